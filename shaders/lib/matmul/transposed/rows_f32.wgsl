// Eight columns of two neighbouring rows of f32. Needs words_at.wgsl. Twin of rows_halves.wgsl,
// rows_blocks.wgsl and rows_any.wgsl.
// The words of the first and of the last four columns; past the matrix, its last ones.
fn columns_at(expert: u32, column: u32) -> Columns {
  let last = row_words() - 1u;
  let word = min(column / 4u, last / 2u * 2u);
  return Columns(expert_at(expert) + word * PANEL, expert_at(expert) + min(word + 1u, last) * PANEL);
}

fn load_two(up: bool, c: Columns, n: u32) -> Pair {
  if PANEL == 1u {
    // Rows end where those of the next expert begin.
    let last = params.rows - 1u;
    let one = row_at(min(n, last));
    let two = row_at(min(n + 1u, last));
    let p = load_words(up, c.a + one, c.b + one);
    let q = load_words(up, c.a + two, c.b + two);
    return Pair(kept(eight_of(p.a, p.b), n <= last), kept(eight_of(q.a, q.b), n < last));
  }
  let at = row_at(n);
  let p = load_words(up, c.a + at, c.a + at + 1u);
  let q = load_words(up, c.b + at, c.b + at + 1u);
  return Pair(eight_of(p.a, q.a), eight_of(p.b, q.b));
}
