// 16 bytes of bf16 weights: eight values, the lower half of each word first; widened exactly by a shift.
fn unpack_low(w: vec4<u32>) -> vec4<f32> {
  return bitcast<vec4<f32>>(vec4<u32>(w.x << 16u, w.x & 0xffff0000u, w.y << 16u, w.y & 0xffff0000u));
}
fn unpack_high(w: vec4<u32>) -> vec4<f32> {
  return bitcast<vec4<f32>>(vec4<u32>(w.z << 16u, w.z & 0xffff0000u, w.w << 16u, w.w & 0xffff0000u));
}
