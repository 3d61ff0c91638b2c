// 16 bytes of f16 weights: eight values, the lower half of each word first; no SHADER_F16 needed.
fn unpack_low(w: vec4<u32>) -> vec4<f32> {
  return vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y));
}
fn unpack_high(w: vec4<u32>) -> vec4<f32> {
  return vec4<f32>(unpack2x16float(w.z), unpack2x16float(w.w));
}
