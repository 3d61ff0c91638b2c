// 16 bytes of f32 weights: four values.
const WEIGHT_LANES: u32 = 4u;
const BLOCK_DEPTH: u32 = WEIGHT_LANES;
const BLOCK_WORDS: u32 = 1u;
fn unpack_low(w: vec4<u32>) -> vec4<f32> {
  return bitcast<vec4<f32>>(w);
}
// For the kernels' text only: never reached, WEIGHT_LANES is 4.
fn unpack_high(w: vec4<u32>) -> vec4<f32> {
  return vec4<f32>();
}
