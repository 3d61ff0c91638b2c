// gelu(gate) * up, tanh form: 0.5 g (1 + tanh z) = g / (1 + exp(-2 z)). The exponent is kept from
// overflowing.
fn activate(gate: vec4<f32>, up: vec4<f32>) -> vec4<f32> {
  let z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate);
  return gate / (1.0 + exp(min(-2.0 * z, vec4(80.0)))) * up;
}
