// Four values of a row of x, two in a word: x_stride and depth are multiples of 4. Needs common/halves_*.
@group(0) @binding(1) var<storage, read> x: array<vec2<u32>>;
fn x_base(row: u32) -> u32 {
  return row * (params.x_stride / 4u);
}
fn load_x(base: u32, k: u32) -> vec4<f32> {
  let words = x[base + k / 4u];
  return vec4<f32>(widen_two(words.x), widen_two(words.y));
}
// The same with zeros from `depth` on.
fn load_x_tail(base: u32, k: u32) -> vec4<f32> {
  if k < params.depth {
    return load_x(base, k);
  }
  return vec4<f32>();
}
