// Four values of a row of x, two in a word: x_stride and depth are even. Needs common/halves_*.
@group(0) @binding(1) var<storage, read> x: array<u32>;
fn x_base(row: u32) -> u32 {
  return row * (params.x_stride / 2u);
}
fn load_x(base: u32, k: u32) -> vec4<f32> {
  let i = base + k / 2u;
  return vec4<f32>(widen_two(x[i]), widen_two(x[i + 1u]));
}
// The same with zeros from `depth` on.
fn load_x_tail(base: u32, k: u32) -> vec4<f32> {
  var low = vec2<f32>();
  var high = vec2<f32>();
  if k < params.depth { low = widen_two(x[base + k / 2u]); }
  if k + 2u < params.depth { high = widen_two(x[base + k / 2u + 1u]); }
  return vec4<f32>(low, high);
}
