// Loads of runs of blocks, a column at a time. Needs run_blocks.wgsl and weights.wgsl.
fn load_run(up: bool, base: u32, run: u32) -> Run {
  let block = base + run / 8u * (BLOCK_WORDS * PANEL);
  var words: Run;
  words.place = run % 8u;
  words.scales = load_weights(up, block, 0u);
  if SCALE_WORDS > 1u { words.more_scales = load_weights(up, block, 1u); }
  words.codes = load_weights(up, block, code_word(words.place, 0u));
  if CODE_WORDS > 1u { words.more_codes = load_weights(up, block, code_word(words.place, 1u)); }
  return words;
}

// The same with zeros past the last block of the column.
fn load_run_tail(up: bool, base: u32, run: u32) -> Run {
  var words: Run;
  if run * RUN_DEPTH < params.depth { words = load_run(up, base, run); }
  return words;
}
