// SwiGLU: silu(gate) * up. The exponent is kept from overflowing.
fn activate(gate: vec4<f32>, up: vec4<f32>) -> vec4<f32> {
  return gate / (1.0 + exp(min(-gate, vec4(80.0)))) * up;
}
