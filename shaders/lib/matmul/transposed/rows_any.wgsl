// Eight columns of two neighbouring rows of f32, rows of any length in place. Needs values_at.wgsl. Twin of
// rows_f32.wgsl, rows_halves.wgsl and rows_blocks.wgsl.
fn columns_at(expert: u32, column: u32) -> Columns {
  return Columns(expert_at(expert), column);
}

fn load_one(up: bool, c: Columns, n: u32) -> Eight {
  let last = params.rows - 1u;
  let base = c.a + row_at(min(n, last));
  return kept(Eight(four_at(up, base, c.b), four_at(up, base, c.b + 4u)), n <= last);
}

fn load_two(up: bool, c: Columns, n: u32) -> Pair {
  return Pair(load_one(up, c, n), load_one(up, c, n + 1u));
}
