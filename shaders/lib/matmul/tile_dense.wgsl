// One dense expert: item i holds rows i * TILE_ROWS and up. The plan buffer is bound, not read.
fn tile_at(index: u32) -> Tile {
  return clip(0u, index * TILE_ROWS, (index + 1u) * TILE_ROWS);
}
