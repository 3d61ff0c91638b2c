// Where weights lie: a matrix is cut into panels of PANEL columns, the last one padded; 16-byte word c *
// PANEL + n of a panel is word c of its column n: blocks of BLOCK_WORDS words, BLOCK_DEPTH values of K each,
// the last one padded. PANEL 1 is row-major [N, K] in place.
// Twin of layout_rows.wgsl.
fn weight_chunks() -> u32 {
  return (params.depth + BLOCK_DEPTH - 1u) / BLOCK_DEPTH * BLOCK_WORDS;
}

// First word of a column of an expert's matrix.
fn weight_base(expert: u32, column: u32) -> u32 {
  let padded = (params.columns + PANEL - 1u) / PANEL * PANEL;
  return (expert * padded + column / PANEL * PANEL) * weight_chunks() + column % PANEL;
}
