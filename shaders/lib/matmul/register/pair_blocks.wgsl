// Runs of 32 values of two neighbouring columns, opened eight at a time. Needs run_blocks.wgsl, and
// run_four.wgsl behind it. Twin of pair_f32.wgsl, pair_halves.wgsl and pair_rows.wgsl.
struct Loaded { a: Run, b: Run, a_scale: vec4<f32>, b_scale: vec4<f32> }

fn load_word(up: bool, c: Columns, word: u32) -> Words {
  return load_words(up, c.a + word * PANEL, c.b + word * PANEL);
}

fn load_pair(up: bool, c: Columns, run: u32) -> Loaded {
  let block = run / 8u * BLOCK_WORDS;
  let place = run % 8u;
  let scales = load_word(up, c, block);
  let codes = load_word(up, c, block + code_word(place, 0u));
  var more_scales: Words;
  var more_codes: Words;
  if SCALE_WORDS > 1u { more_scales = load_word(up, c, block + 1u); }
  if CODE_WORDS > 1u { more_codes = load_word(up, c, block + code_word(place, 1u)); }
  let a = Run(scales.a, more_scales.a, codes.a, more_codes.a, place);
  let b = Run(scales.b, more_scales.b, codes.b, more_codes.b, place);
  return Loaded(a, b, scale_of(a), scale_of(b));
}

fn open(l: Loaded, step: u32) -> Pair {
  return Pair(
    Eight(run_four(l.a, l.a_scale, 2u * step), run_four(l.a, l.a_scale, 2u * step + 1u)),
    Eight(run_four(l.b, l.b_scale, 2u * step), run_four(l.b, l.b_scale, 2u * step + 1u)));
}
