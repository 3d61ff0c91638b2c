// bf16, two in a word, the lower half first. Twin of halves_f16.wgsl.
fn widen_two(w: u32) -> vec2<f32> {
  return bitcast<vec2<f32>>(vec2<u32>(w << 16u, w & 0xffff0000u));
}

// To nearest, ties to even; NaN stays one.
fn half_of_f32(v: f32) -> u32 {
  let bits = bitcast<u32>(v);
  let rounded = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
  return select(rounded, (bits >> 16u) | 0x40u, (bits & 0x7fffffffu) > 0x7f800000u);
}

fn narrow_two(v: vec2<f32>) -> u32 {
  return half_of_f32(v.x) | (half_of_f32(v.y) << 16u);
}
