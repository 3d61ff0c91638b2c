// Which rows of a tile a lane has: four of the upper half, four of the lower. A subgroup that has none of the
// lower ones does half of the work. For subgroups of 64 lanes, which have 32 neighbouring rows otherwise: the
// second condition costs more than it saves where they have 32 (NAK copies every sum). Needs outer.wgsl. Twin
// of near_rows.wgsl.
fn row_of(lane: u32) -> u32 { return lane / LANES_X * 4u; }

fn row_below(lane: u32) -> u32 { return row_of(lane) + TILE_ROWS / 2u; }

fn add_upper(block: Block, lane: u32, k4: u32, j: u32) -> Block {
  let left = w_four(k4, j, lane % LANES_X);
  let right = w_four(k4, j, lane % LANES_X + LANES_X);
  let top = x_four(k4, j, lane / LANES_X);
  var next = block;
  next.top_left = add_outer(block.top_left, top, left);
  next.top_right = add_outer(block.top_right, top, right);
  return next;
}

fn add_both(block: Block, lane: u32, k4: u32, j: u32) -> Block {
  let left = w_four(k4, j, lane % LANES_X);
  let right = w_four(k4, j, lane % LANES_X + LANES_X);
  let top = x_four(k4, j, lane / LANES_X);
  let bottom = x_four(k4, j, lane / LANES_X + TILE_ROWS / 8u);
  var next = block;
  next.top_left = add_outer(block.top_left, top, left);
  next.top_right = add_outer(block.top_right, top, right);
  next.bottom_left = add_outer(block.bottom_left, bottom, left);
  next.bottom_right = add_outer(block.bottom_right, bottom, right);
  return next;
}

fn add_upper_four(start: Block, lane: u32, k4: u32) -> Block {
  var block = add_upper(start, lane, k4, 0u);
  block = add_upper(block, lane, k4, 1u);
  block = add_upper(block, lane, k4, 2u);
  return add_upper(block, lane, k4, 3u);
}

fn add_both_fours(start: Block, lane: u32, k4: u32) -> Block {
  var block = add_both(start, lane, k4, 0u);
  block = add_both(block, lane, k4, 1u);
  block = add_both(block, lane, k4, 2u);
  return add_both(block, lane, k4, 3u);
}

fn add_rows(lane: u32, start: Block, rows: u32) -> Block {
  var block = start;
  if row_below(lane) < rows {
    block = add_both_fours(block, lane, 0u);
    block = add_both_fours(block, lane, 1u);
    if TILE_DEPTH > 8u {
      block = add_both_fours(block, lane, 2u);
      block = add_both_fours(block, lane, 3u);
    }
  } else if row_of(lane) < rows {
    block = add_upper_four(block, lane, 0u);
    block = add_upper_four(block, lane, 1u);
    if TILE_DEPTH > 8u {
      block = add_upper_four(block, lane, 2u);
      block = add_upper_four(block, lane, 3u);
    }
  }
  return block;
}
