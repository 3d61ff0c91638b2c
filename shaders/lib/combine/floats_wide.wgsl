// out in f32, as rows_wide.wgsl has y. Twin of floats.wgsl, halves_two.wgsl and halves_four.wgsl.
fn widen(v: Stored) -> Vector {
  return opened(v);
}

fn narrow(v: Vector) -> Stored {
  return vec4(wide_of(v[0]), wide_of(v[1]));
}
