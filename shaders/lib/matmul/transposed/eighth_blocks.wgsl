// Eight columns of a row of blocks, as loaded: a run, of which they are a quarter. Needs words_at.wgsl and
// part.wgsl. Twin of eighth_halves.wgsl.
alias Eighth = Run;

fn eighth_base(expert: u32, column: u32) -> u32 {
  return expert_at(expert) + min(column, params.columns - 1u) / 256u * (BLOCK_WORDS * PANEL);
}

fn load_eighth(up: bool, at: u32, column: u32) -> Eighth {
  var run: Run;
  run.place = column / 32u % 8u;
  run.scales = load_weights(up, at, 0u);
  if SCALE_WORDS > 1u { run.more_scales = load_weights(up, at, 1u); }
  run.codes = load_weights(up, at, code_word(run.place, 0u));
  if CODE_WORDS > 1u { run.more_codes = load_weights(up, at, code_word(run.place, 1u)); }
  return run;
}

fn low_of(run: Eighth, column: u32) -> vec4<f32> {
  let j = column / 8u % 4u;
  return run_four(part_of(run, j), part_scale(run, j), 0u);
}
fn high_of(run: Eighth, column: u32) -> vec4<f32> {
  let j = column / 8u % 4u;
  return run_four(part_of(run, j), part_scale(run, j), 1u);
}
