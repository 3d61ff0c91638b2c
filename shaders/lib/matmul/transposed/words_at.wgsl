// Where weights lie, seen by rows: word `c` of row `n` of an expert's matrix [N, K] is that of
// lib/matmul/layout.wgsl, at expert_at + row_at(n) + c * PANEL. Twin of values_at.wgsl.
fn row_words() -> u32 {
  return (params.columns + BLOCK_DEPTH - 1u) / BLOCK_DEPTH * BLOCK_WORDS;
}

fn expert_at(expert: u32) -> u32 {
  return expert * ((params.rows + PANEL - 1u) / PANEL * PANEL) * row_words();
}

fn row_at(n: u32) -> u32 {
  return n / PANEL * PANEL * row_words() + n % PANEL;
}
