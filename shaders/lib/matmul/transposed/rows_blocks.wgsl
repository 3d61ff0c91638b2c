// Eight columns of two neighbouring rows of blocks: a quarter of a run of each. Needs words_at.wgsl and
// part.wgsl. Twin of rows_f32.wgsl, rows_halves.wgsl and rows_any.wgsl.
// The block, and the place of the eight columns among all.
fn columns_at(expert: u32, column: u32) -> Columns {
  let eight = min(column, params.columns - 1u) / 8u;
  return Columns(expert_at(expert) + eight / 32u * (BLOCK_WORDS * PANEL), eight);
}

fn open_run(run: Run, j: u32) -> Eight {
  let part = part_of(run, j);
  let scale = part_scale(run, j);
  return Eight(run_four(part, scale, 0u), run_four(part, scale, 1u));
}

fn load_word(up: bool, at: u32, word: u32) -> Words {
  return load_words(up, at + word * PANEL, at + word * PANEL + 1u);
}

fn load_two(up: bool, c: Columns, n: u32) -> Pair {
  let at = c.a + row_at(n);
  let place = c.b / 4u % 8u;
  let scales = load_word(up, at, 0u);
  let codes = load_word(up, at, code_word(place, 0u));
  var more_scales: Words;
  var more_codes: Words;
  if SCALE_WORDS > 1u { more_scales = load_word(up, at, 1u); }
  if CODE_WORDS > 1u { more_codes = load_word(up, at, code_word(place, 1u)); }
  return Pair(
    open_run(Run(scales.a, more_scales.a, codes.a, more_codes.a, place), c.b % 4u),
    open_run(Run(scales.b, more_scales.b, codes.b, more_codes.b, place), c.b % 4u));
}
