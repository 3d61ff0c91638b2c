// Four values of a row of x of any length.
@group(0) @binding(1) var<storage, read> x: array<f32>;
fn x_base(row: u32) -> u32 {
  return row * params.x_stride;
}
fn load_x(base: u32, k: u32) -> vec4<f32> {
  let i = base + k;
  return vec4<f32>(x[i], x[i + 1u], x[i + 2u], x[i + 3u]);
}
// The same with zeros from `depth` on.
fn load_x_tail(base: u32, k: u32) -> vec4<f32> {
  var v = vec4<f32>();
  if k < params.depth { v.x = x[base + k]; }
  if k + 1u < params.depth { v.y = x[base + k + 1u]; }
  if k + 2u < params.depth { v.z = x[base + k + 2u]; }
  if k + 3u < params.depth { v.w = x[base + k + 3u]; }
  return v;
}
