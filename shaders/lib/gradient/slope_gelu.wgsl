// gelu (tanh form) and its slope at a value: (1 + tanh z) / 2 = 1 / (1 + exp(-2 z)). The exponent is kept
// from overflowing. Twin of slope_silu.wgsl.
fn value_and_slope(v: f32) -> vec2<f32> {
  let z = 0.7978845608028654 * (v + 0.044715 * v * v * v);
  let share = 1.0 / (1.0 + exp(min(-2.0 * z, 80.0)));
  // 1 - tanh^2 = 4 share (1 - share)
  let rise = 2.0 * v * share * (1.0 - share) * 0.7978845608028654 * (1.0 + 0.134145 * v * v);
  return vec2(v * share, share + rise);
}
