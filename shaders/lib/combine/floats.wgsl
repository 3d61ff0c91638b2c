// out in f32: as it is. Twin of floats_wide.wgsl, halves_two.wgsl and halves_four.wgsl.
fn widen(v: Stored) -> Vector {
  return v;
}

fn narrow(v: Vector) -> Stored {
  return v;
}
