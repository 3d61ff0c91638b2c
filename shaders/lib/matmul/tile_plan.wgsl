// Items and gather read from the plan buffer.
fn tile_at(index: u32) -> Tile {
  let first_item = plan[params.item_offsets + params.first_expert];
  let end = plan[params.item_offsets + params.first_expert + params.experts];
  let item = first_item + index;
  if item >= end { return Tile(0u, 0u, 0u); }
  let expert = plan[params.items + 2u * item];
  let first = plan[params.items + 2u * item + 1u];
  let rows = min(TILE_ROWS, plan[params.expert_offsets + expert + 1u] - first);
  return clip(expert - params.first_expert, first, first + rows);
}

fn x_row_of(slot: u32) -> u32 {
  if GATHER { return plan[params.token_of + slot]; }
  return slot - params.x_slot;
}
