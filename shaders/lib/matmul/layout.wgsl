// Where weights lie: a matrix is cut into panels of PANEL columns, the last one padded; 16-byte word c *
// PANEL + n of a panel holds the c-th WEIGHT_LANES values of its column n. PANEL 1 is row-major [N, K] in
// place.
// Twin of layout_rows.wgsl.
fn weight_chunks() -> u32 {
  return (params.depth + WEIGHT_LANES - 1u) / WEIGHT_LANES;
}

// First word of a column of an expert's matrix.
fn weight_base(expert: u32, column: u32) -> u32 {
  let padded = (params.columns + PANEL - 1u) / PANEL * PANEL;
  return (expert * padded + column / PANEL * PANEL) * weight_chunks() + column % PANEL;
}
