// Eight neighbouring values.
struct Eight { lo: vec4<f32>, hi: vec4<f32> }

fn kept(v: Eight, keep: bool) -> Eight {
  return Eight(select(vec4(0.0), v.lo, keep), select(vec4(0.0), v.hi, keep));
}
