// Eight columns of two neighbouring rows of f16 or bf16: a word of each. Needs words_at.wgsl. Twin of
// rows_f32.wgsl, rows_blocks.wgsl and rows_any.wgsl.
fn columns_at(expert: u32, column: u32) -> Columns {
  let at = expert_at(expert) + min(column / 8u, row_words() - 1u) * PANEL;
  return Columns(at, at);
}

fn open_word(w: vec4<u32>) -> Eight {
  return Eight(unpack_low(w), unpack_high(w));
}

fn load_two(up: bool, c: Columns, n: u32) -> Pair {
  if PANEL == 1u {
    let last = params.rows - 1u;
    let p = load_words(up, c.a + row_at(min(n, last)), c.a + row_at(min(n + 1u, last)));
    return Pair(kept(open_word(p.a), n <= last), kept(open_word(p.b), n < last));
  }
  let at = c.a + row_at(n);
  let p = load_words(up, at, at + 1u);
  return Pair(open_word(p.a), open_word(p.b));
}
