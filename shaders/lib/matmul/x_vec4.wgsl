// Four values of a row of x: x_stride and depth are multiples of 4.
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
fn x_base(row: u32) -> u32 {
  return row * (params.x_stride / 4u);
}
fn load_x(base: u32, k: u32) -> vec4<f32> {
  return x[base + k / 4u];
}
// The same with zeros from `depth` on.
fn load_x_tail(base: u32, k: u32) -> vec4<f32> {
  if k < params.depth {
    return x[base + k / 4u];
  }
  return vec4<f32>();
}
