// out in halves, two words a lane. Needs common/halves_*. Twin of floats.wgsl, floats_wide.wgsl and
// halves_two.wgsl.
fn widen(w: Stored) -> Vector {
  return vec4<f32>(widen_two(w.x), widen_two(w.y));
}

fn narrow(v: Vector) -> Stored {
  return vec2<u32>(narrow_two(v.xy), narrow_two(v.zw));
}
