// 16 bytes of f32 weights: four values.
fn unpack_low(w: vec4<u32>) -> vec4<f32> {
  return bitcast<vec4<f32>>(w);
}
// For the kernels' text only: never reached, BLOCK_DEPTH is 4.
fn unpack_high(w: vec4<u32>) -> vec4<f32> {
  return vec4<f32>();
}
