// out in halves, a word a lane. Needs common/halves_*. Twin of floats.wgsl, floats_wide.wgsl and
// halves_four.wgsl.
fn widen(w: Stored) -> Vector {
  return widen_two(w);
}

fn narrow(v: Vector) -> Stored {
  return narrow_two(v);
}
