// One dense expert: item i holds rows i * item_rows and up. The plan buffer is bound, not read. Twin of
// items_planned.wgsl.
fn tile_at(index: u32) -> Tile {
  let first = index * params.item_rows;
  return Tile(0u, first, min(params.slots - min(first, params.slots), params.item_rows));
}

fn x_row_of(slot: u32) -> u32 { return slot; }
