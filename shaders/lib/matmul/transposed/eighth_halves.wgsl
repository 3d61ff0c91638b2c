// Eight columns of a row of f16 or bf16, as loaded: a word. Needs words_at.wgsl. Twin of eighth_blocks.wgsl.
alias Eighth = vec4<u32>;

fn eighth_base(expert: u32, column: u32) -> u32 {
  return expert_at(expert) + min(column / 8u, row_words() - 1u) * PANEL;
}

// `column` is not needed: a word has all.
fn load_eighth(up: bool, at: u32, column: u32) -> Eighth {
  return load_weights(up, at, 0u);
}

fn low_of(w: Eighth, column: u32) -> vec4<f32> { return unpack_low(w); }
fn high_of(w: Eighth, column: u32) -> vec4<f32> { return unpack_high(w); }
