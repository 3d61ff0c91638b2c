// Which rows of a tile a lane has: LANE_ROWS neighbours. Needs outer.wgsl. Twin of split_rows.wgsl.
fn row_of(lane: u32) -> u32 { return lane / LANES_X * LANE_ROWS; }

// The first of its second four.
fn row_below(lane: u32) -> u32 { return row_of(lane) + 4u; }

// What a step adds to the sums of the rows that there are.
fn add_rows(lane: u32, block: Block, rows: u32) -> Block {
  var next = block;
  if row_of(lane) < rows { next = add_step(lane, block); }
  return next;
}
