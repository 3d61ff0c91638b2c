// Eight values of a row that are neighbours.
struct Eight { lo: vec4<f32>, hi: vec4<f32> }

fn kept(v: Eight, keep: bool) -> Eight {
  return Eight(select(vec4(0.0), v.lo, keep), select(vec4(0.0), v.hi, keep));
}
