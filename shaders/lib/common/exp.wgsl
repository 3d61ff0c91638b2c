// exp(x) for x <= 0 within 2 ulp on every device (WGSL's own may be off by 3 + 2|x| ulp); below -87 it is 0.
// x + n ln 2 is taken in fixed point: compilers may merge the two steps that floats need for it into one that
// rounds (Mesa does), which costs 70 ulp.
fn exp_negative(x: f32) -> f32 {
  let y = min(-x, 88.0);
  let n = u32(y * 1.44269504 + 0.5);
  // In units of 2^-25, ln 2 being 23258159 + 61348 / 65536 of them. Below 2^24, so exact as a float.
  let units = i32(n * 23258159u + ((n * 61348u) >> 16u) - u32(round(y * 33554432.0)));
  let r = f32(units) * (1.0 / 33554432.0);
  var p = 1.0 / 5040.0;
  p = fma(p, r, 1.0 / 720.0);
  p = fma(p, r, 1.0 / 120.0);
  p = fma(p, r, 1.0 / 24.0);
  p = fma(p, r, 1.0 / 6.0);
  p = fma(p, r, 0.5);
  p = fma(p, r, 1.0);
  p = fma(p, r, 1.0);
  return select(p * bitcast<f32>((127u - n) << 23u), 0.0, x < -87.0);
}

// exp(g - highest) of a logit given as bits, `highest` being the highest of its row: 0 for NaN and -inf; a
// +inf counts 1 and leaves nothing to finite ones.
fn softmax_term(g: u32, highest: f32, infinite: bool) -> f32 {
  if infinite {
    return select(0.0, 1.0, g == 0x7f800000u);
  }
  if !is_finite(g) {
    return 0.0;
  }
  return exp_negative(bitcast<f32>(g) - highest);
}
