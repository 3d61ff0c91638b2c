// Where weights lie: f32, row-major [N, K] in place, rows of any length; a base counts values. Twin of
// layout.wgsl.
fn weight_chunks() -> u32 {
  return (params.depth + BLOCK_DEPTH - 1u) / BLOCK_DEPTH;
}

fn weight_base(expert: u32, column: u32) -> u32 {
  return (expert * params.columns + column) * params.depth;
}
