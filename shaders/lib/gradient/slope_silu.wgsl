// silu and its slope at a value. The exponent is kept from overflowing. Twin of slope_gelu.wgsl.
fn value_and_slope(v: f32) -> vec2<f32> {
  let share = 1.0 / (1.0 + exp(min(-v, 80.0)));
  return vec2(v * share, share * (1.0 + v * (1.0 - share)));
}
