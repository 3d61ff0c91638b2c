// Items read from the plan buffer. Twin of tile_rest.wgsl.
fn tile_at(index: u32) -> Tile {
  let item = max(plan[params.items_begin], params.least_item) + index;
  if item >= plan[params.items_end] { return Tile(NO_MORE, 0u, 0u); }
  let expert = plan[params.items + 2u * item];
  let first = plan[params.items + 2u * item + 1u];
  if first >= params.slot_end { return Tile(NO_MORE, 0u, 0u); }
  let left = plan[params.expert_offsets + expert + 1u] - first;
  if left <= params.small_rows { return Tile(0u, 0u, 0u); }
  let rows = min(params.item_rows, left);
  let place = place_of(expert);
  if place >= params.experts { return Tile(0u, 0u, 0u); }
  return clip(place, first, first + rows);
}
