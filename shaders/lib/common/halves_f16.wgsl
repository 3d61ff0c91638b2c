// f16, two in a word, the lower half first. No SHADER_F16 needed. Twin of halves_bf16.wgsl.
fn widen_two(w: u32) -> vec2<f32> {
  return unpack2x16float(w);
}

// To nearest, ties to even; NaN stays one. By integers: WGSL leaves open how `pack2x16float` rounds.
fn half_of_f32(v: f32) -> u32 {
  let bits = bitcast<u32>(v);
  let magnitude = bits & 0x7fffffffu;
  let normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13u) & 1u)) >> 13u;
  // Below 2^-14 in units of 2^-24.
  let shift = clamp(126u - (magnitude >> 23u), 1u, 25u);
  let mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  let odd = (mantissa >> shift) & 1u;
  let subnormal = (mantissa + (1u << (shift - 1u)) - 1u + odd) >> shift;
  var half = select(normal, subnormal, magnitude < 0x38800000u);
  half = select(half, 0x7c00u, magnitude >= 0x477ff000u);   // 65,520: halfway past the largest
  half = select(half, 0x7e00u, magnitude > 0x7f800000u);
  return half | ((bits >> 16u) & 0x8000u);
}

fn narrow_two(v: vec2<f32>) -> u32 {
  return half_of_f32(v.x) | (half_of_f32(v.y) << 16u);
}
