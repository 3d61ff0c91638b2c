// Small items: of the tiles' list the last item of each expert, where it has no more than small_rows rows, in
// parts of TILE_ROWS. Neighbours, so that the weights of one still lie in a cache for the next. Twin of
// tile_plan.wgsl.
fn tile_at(index: u32) -> Tile {
  let nothing = Tile(0u, 0u, 0u);
  let at = params.items_begin + index / params.item_rows;
  if at >= params.items_end { return nothing; }
  let past = plan[at + 1u];
  if past == plan[at] { return nothing; }
  let expert = plan[params.items + 2u * past - 2u];
  let first = plan[params.items + 2u * past - 1u];
  let end = plan[params.expert_offsets + expert + 1u];
  let part = first + index % params.item_rows * TILE_ROWS;
  if end - first > params.small_rows || part >= end { return nothing; }
  let place = place_of(expert);
  if place >= params.experts { return nothing; }
  return clip(place, part, min(part + TILE_ROWS, end));
}
