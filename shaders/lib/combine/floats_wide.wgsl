// out in f32, eight values in a 64-bit vector. Needs rows_wide.wgsl and common/wide_floats.wgsl. Twin of
// floats.wgsl, halves_two.wgsl and halves_four.wgsl.
fn widen(v: Stored) -> Vector {
  return opened(v);
}

fn narrow(v: Vector) -> Stored {
  return vec4(wide_of(v[0]), wide_of(v[1]));
}
