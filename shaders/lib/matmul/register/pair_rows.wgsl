// f32 rows of any length in place. Needs weights_rows.wgsl. Twin of pair_f32.wgsl, pair_halves.wgsl
// and pair_blocks.wgsl.
fn load_column(up: bool, base: u32, step: u32) -> Eight {
  return eight_of(load_weights(up, base, 2u * step), load_weights(up, base, 2u * step + 1u));
}

fn load_pair(up: bool, c: Columns, step: u32) -> Pair {
  return Pair(load_column(up, c.a, step), load_column(up, c.b, step));
}
