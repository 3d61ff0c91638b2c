// Rows of any length in place, see ../weights_rows.wgsl. Twin of weights_f32.wgsl.
fn load_column(up: bool, base: u32, step: u32) -> Eight {
  return Eight(bitcast<vec4<f32>>(load_weights(up, base, 2u * step)), bitcast<vec4<f32>>(load_weights(up, base, 2u * step + 1u)));
}

fn load_pair(up: bool, c: Columns, step: u32) -> Pair {
  return Pair(load_column(up, c.a, step), load_column(up, c.b, step));
}
