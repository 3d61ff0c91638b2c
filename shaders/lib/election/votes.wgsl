// A vote as an integer, so that a sum of votes is exact and knows no order: units of 2^-24, half to even,
// clamped to +-2047; NaN counts 0. As (whole units of 2^-8, the rest in units of 2^-24), of one sign: neither
// part of the sum of 1,024 votes leaves 30 bits.
fn vote_of(bits: u32) -> vec2<i32> {
  if is_nan(bits) {
    return vec2<i32>();
  }
  const HIGHEST: u32 = 0x44ffe000u; // 2047
  let magnitude = min(bits & 0x7fffffffu, HIGHEST);
  let units = bitcast<f32>((bits & 0x80000000u) | magnitude) * 256.0;
  let whole = trunc(units);
  return vec2(i32(whole), i32(round((units - whole) * 65536.0)));
}

// The key of a sum of votes, order-preserving: the sum in units of 2^-24, plus NO_VOTE.
fn vote_key(sum: vec2<i32>) -> vec2<u32> {
  let high = u32(sum.x + (1 << 30u));
  let low = u32(sum.y + (1 << 27u));
  return wide_add(vec2(high << 16u, high >> 16u), vec2(low, 0u));
}

const NO_VOTE: vec2<u32> = vec2<u32>(1u << 27u, 1u << 14u);
