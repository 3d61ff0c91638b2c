// What one step adds to the sums of a lane: outer products of columns of x_tile and of w_tile. Both lie by
// the step's depth, [k / 4][k % 4][four], so that a lane reads four values as 16 bytes. Needs x_four, w_four.
// Sums of a lane: rows 0 to 3 (top) and 4 to 7, columns c.. (left) and c + 64.. (right; of two
// matrices: left gate, right up). Named matrices, no arrays: nothing that a compiler would have to unroll to
// keep it in registers.
struct Block {
  top_left: mat4x4<f32>,
  top_right: mat4x4<f32>,
  bottom_left: mat4x4<f32>,
  bottom_right: mat4x4<f32>,
}

fn add_outer(m: mat4x4<f32>, rows: vec4<f32>, columns: vec4<f32>) -> mat4x4<f32> {
  return mat4x4<f32>(
    fma(vec4<f32>(rows.x), columns, m[0]),
    fma(vec4<f32>(rows.y), columns, m[1]),
    fma(vec4<f32>(rows.z), columns, m[2]),
    fma(vec4<f32>(rows.w), columns, m[3]),
  );
}

fn add_one(block: Block, lane: u32, k4: u32, j: u32) -> Block {
  let left = w_four(k4, j, lane % LANES_X);
  let right = w_four(k4, j, lane % LANES_X + LANES_X);
  let x = lane / LANES_X * (LANE_ROWS / 4u);
  let top = x_four(k4, j, x);
  var next = block;
  next.top_left = add_outer(block.top_left, top, left);
  next.top_right = add_outer(block.top_right, top, right);
  if LANE_ROWS > 4u {
    let bottom = x_four(k4, j, x + 1u);
    next.bottom_left = add_outer(block.bottom_left, bottom, left);
    next.bottom_right = add_outer(block.bottom_right, bottom, right);
  }
  return next;
}

fn add_four(start: Block, lane: u32, k4: u32) -> Block {
  var block = add_one(start, lane, k4, 0u);
  block = add_one(block, lane, k4, 1u);
  block = add_one(block, lane, k4, 2u);
  return add_one(block, lane, k4, 3u);
}

// Written out: as a loop over k4 every read computed its address, 77 % multiply-adds instead of 85 %.
fn add_step(lane: u32, start: Block) -> Block {
  var block = add_four(start, lane, 0u);
  block = add_four(block, lane, 1u);
  if TILE_DEPTH > 8u {
    block = add_four(block, lane, 2u);
    block = add_four(block, lane, 3u);
  }
  return block;
}
