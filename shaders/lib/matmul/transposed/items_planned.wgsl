// Items and gather read from the plan buffer. Twin of items_dense.wgsl.
fn tile_at(index: u32) -> Tile {
  let item = plan[params.items_begin] + index;
  if item >= plan[params.items_end] { return Tile(NO_MORE, 0u, 0u); }
  let expert = plan[params.items + 2u * item];
  let first = plan[params.items + 2u * item + 1u];
  let rows = min(params.item_rows, plan[params.expert_offsets + expert + 1u] - first);
  var place = expert;
  if params.placed == 1u { place = places[expert]; }
  place -= params.first_expert;
  if place >= params.experts { return Tile(0u, 0u, 0u); }
  return Tile(place, first, rows);
}

fn x_row_of(slot: u32) -> u32 {
  if GATHER { return plan[params.token_of + slot]; }
  return slot;
}
