// out[s, n] = sum over k of x[row(s), k] * W[expert of s][n, k]                                  (plain)
// out[s, n] = activate(sum over k of x[row(s), k] * Wgate[e][n, k], the same sum with Wup)       (GATED)
//   x        [rows, K] f32, f16 or bf16; row(s) = token_of[s] (GATHER, where token_of is given) or s
//   plan     u32: token_of, items and their offsets (lib/matmul/tile_plan.wgsl); none in the dense variant
//   places   u32: which expert of the weights holds each of the plan's, where placed
//   weights, weights_up  [N, K] of each expert of the page, in the layout of lib/matmul/layout.wgsl
//   out      [slots, N] f32, row-major
// Grid: ceil(N / OUT_COLUMNS) * items groups, items slowest; OUT_COLUMNS = 2 * COLUMNS, GATED COLUMNS.
// Pieces: common/grid, matmul/params, matmul/tile_plan | matmul/tile_dense,
//   common/halves_f16 | common/halves_bf16 | nothing, matmul/x_vec4 | matmul/x_scalar | matmul/x_halves |
//   matmul/x_half_pairs,
//   matmul/format/f32 | matmul/format/f16 | matmul/format/bf16 | matmul/format/q8_0 |
//   matmul/format/q4_0 | matmul/format/q4_k | matmul/format/q6_k | matmul/format/mxfp4 | matmul/format/fp8,
//   matmul/run_words | matmul/run_blocks, matmul/load_blocks | nothing,
//   matmul/activate_none | matmul/activate_silu | matmul/activate_gelu, matmul/layout | matmul/layout_rows,
//   matmul/weights | matmul/weights_rows.
//
// For 1 to TILE_ROWS (8 or 4) slots of one expert: weights are read once, 16 bytes a load, and are what it
// costs. A lane owns two columns of weights (gate and up of one column, or n and n + COLUMNS) and one of
// SPLIT parts of K.

const WG: u32 = COLUMNS * SPLIT;
const MATRICES: u32 = select(1u, 2u, GATED);
const OUT_COLUMNS: u32 = COLUMNS * 2u / MATRICES;
const STEP_DEPTH: u32 = SPLIT * RUN_DEPTH;             // a run of each part
// Rows that the workgroup brings with one load a lane: TILE_ROWS or more (then copies of the last). No branch
// around the load of x: with one, the weights waited behind it.
const X_ROWS: u32 = WG * 4u / STEP_DEPTH;
const_assert X_ROWS >= TILE_ROWS;                       // so 4 COLUMNS >= TILE_ROWS * RUN_DEPTH
const RUN_FOURS: u32 = RUN_DEPTH / 4u;                  // fours of k in a run

@group(0) @binding(6) var<storage, read_write> out: array<f32>;

// Two tiles of x in turn (one barrier a step), [tile][part][k / 4][k % 4][row / 4][row % 4]. Dimensions of
// their own, because an index that is constant once inlined needs no bounds check and folds into the load's
// offset: with one flat array wgpu's and browsers' checks took half of the instructions. Not array<vec4>: to
// WGSL, lanes that store different components of one vector race.
var<workgroup> x_tile: array<array<array<array<array<array<f32, 4>, X_ROWS / 4u>, 4>, RUN_FOURS>, SPLIT>, 2>;
// Sums that half of the parts hand to the other half: two vectors a lane.
var<workgroup> handed: array<array<vec4<f32>, 2>, WG / 2u>;

// Sums of a lane: rows 0 to 3 (top) and 4 to 7 of its first (left) and second column (GATED: left gate, right
// up).
struct Sums {
  top_left: vec4<f32>,
  top_right: vec4<f32>,
  bottom_left: vec4<f32>,
  bottom_right: vec4<f32>,
}

fn put_x(tile: u32, four: u32, row: u32, v: vec4<f32>) {
  let part = four / RUN_FOURS;
  let k4 = four % RUN_FOURS;
  x_tile[tile][part][k4][0][row / 4u][row % 4u] = v.x;
  x_tile[tile][part][k4][1][row / 4u][row % 4u] = v.y;
  x_tile[tile][part][k4][2][row / 4u][row % 4u] = v.z;
  x_tile[tile][part][k4][3][row / 4u][row % 4u] = v.w;
}

// Rows 0 to 3 (half 0) or 4 to 7 at one k; compilers make one 16-byte read of them.
fn x_four(tile: u32, part: u32, k4: u32, j: u32, half: u32) -> vec4<f32> {
  return vec4<f32>(
    x_tile[tile][part][k4][j][half][0], x_tile[tile][part][k4][j][half][1],
    x_tile[tile][part][k4][j][half][2], x_tile[tile][part][k4][j][half][3],
  );
}

fn add_one(sums: Sums, tile: u32, part: u32, k4: u32, j: u32, left: f32, right: f32) -> Sums {
  let top = x_four(tile, part, k4, j, 0u);
  var next = sums;
  next.top_left = fma(top, vec4<f32>(left), sums.top_left);
  next.top_right = fma(top, vec4<f32>(right), sums.top_right);
  if TILE_ROWS > 4u {
    let bottom = x_four(tile, part, k4, j, 1u);
    next.bottom_left = fma(bottom, vec4<f32>(left), sums.bottom_left);
    next.bottom_right = fma(bottom, vec4<f32>(right), sums.bottom_right);
  }
  return next;
}

fn add_four(sums: Sums, tile: u32, part: u32, k4: u32, left: vec4<f32>, right: vec4<f32>) -> Sums {
  var next = add_one(sums, tile, part, k4, 0u, left.x, right.x);
  next = add_one(next, tile, part, k4, 1u, left.y, right.y);
  next = add_one(next, tile, part, k4, 2u, left.z, right.z);
  return add_one(next, tile, part, k4, 3u, left.w, right.w);
}

struct Pair {
  left: Run,
  right: Run,
  left_scale: vec4<f32>,
  right_scale: vec4<f32>,
}

fn add_run_four(sums: Sums, tile: u32, part: u32, i: u32, pair: Pair) -> Sums {
  return add_four(
    sums, tile, part, i,
    run_four(pair.left, pair.left_scale, i), run_four(pair.right, pair.right_scale, i));
}

fn add_run(sums: Sums, tile: u32, part: u32, left: Run, right: Run) -> Sums {
  let pair = Pair(left, right, scale_of(left), scale_of(right));
  var next = add_run_four(sums, tile, part, 0u, pair);
  next = add_run_four(next, tile, part, 1u, pair);
  next = add_run_four(next, tile, part, 2u, pair);
  next = add_run_four(next, tile, part, 3u, pair);
  if RUN_FOURS > 4u {
    next = add_run_four(next, tile, part, 4u, pair);
    next = add_run_four(next, tile, part, 5u, pair);
    next = add_run_four(next, tile, part, 6u, pair);
    next = add_run_four(next, tile, part, 7u, pair);
  }
  return next;
}

// The sum over the parts of two vectors, in pairs, halving, always in this order; right in part 0.
fn sum_parts(lane: u32, mine: array<vec4<f32>, 2>) -> array<vec4<f32>, 2> {
  var sum = mine;
  for (var count = WG / 2u; count >= COLUMNS; count /= 2u) {
    workgroupBarrier();
    if lane >= count && lane < 2u * count {
      handed[lane - count][0] = sum[0];
      handed[lane - count][1] = sum[1];
    }
    workgroupBarrier();
    if lane < count {
      sum[0] += handed[lane][0];
      sum[1] += handed[lane][1];
    }
  }
  return sum;
}

fn store_rows(tile: Tile, row: u32, column: u32, v: vec4<f32>) {
  if column < params.column_end {
    let at = (tile.first + row - params.out_slot) * params.out_stride + params.column_base + column;
    if row < tile.rows { out[at] = v.x; }
    if row + 1u < tile.rows { out[at + params.out_stride] = v.y; }
    if row + 2u < tile.rows { out[at + 2u * params.out_stride] = v.z; }
    if row + 3u < tile.rows { out[at + 3u * params.out_stride] = v.w; }
  }
}

fn finish(tile: Tile, row: u32, column: u32, left: vec4<f32>, right: vec4<f32>) {
  if GATED {
    store_rows(tile, row, column, activate(left, right));
  } else {
    store_rows(tile, row, column, left);
    store_rows(tile, row, column + COLUMNS, right);
  }
}

@compute @workgroup_size(WG)
fn matmul_skinny(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let across = (params.column_end - params.column_begin + OUT_COLUMNS - 1u) / OUT_COLUMNS;
  let id = flat(group, groups);
  let tile = tile_at(id / across);
  if tile.rows == 0u {
    return;
  }
  let part = lane / COLUMNS;
  let column = params.column_begin + id % across * OUT_COLUMNS + lane % COLUMNS;

  // What this lane brings of x: four values of one row. Rows first along lanes: k first put 32 lanes on one
  // bank.
  let row = lane % X_ROWS;
  let four = lane / X_ROWS;
  let k = four * 4u;
  let x_row = x_base(x_row_of(tile.first + min(row, tile.rows - 1u)));

  let last_column = params.columns - 1u;
  let left_at = weight_base(tile.expert, min(column, last_column));
  let right_at = weight_base(tile.expert, min(select(column + COLUMNS, column, GATED), last_column));

  // The last step goes first: only its loads need guards, and the loop has none.
  let steps = (params.depth - 1u) / STEP_DEPTH;
  var sums: Sums;
  {
    let left = load_run_tail(false, left_at, steps * SPLIT + part);
    let right = load_run_tail(GATED, right_at, steps * SPLIT + part);
    put_x(steps % 2u, four, row, load_x_tail(x_row, steps * STEP_DEPTH + k));
    workgroupBarrier();
    sums = add_run(sums, steps % 2u, part, left, right);
  }
  for (var i = steps; i > 0u; i--) {
    let step = i - 1u;
    // x first: loads return in order, and x must be there before the barrier, the weights only after it.
    let brought = load_x(x_row, step * STEP_DEPTH + k);
    let left = load_run(false, left_at, step * SPLIT + part);
    let right = load_run(GATED, right_at, step * SPLIT + part);
    put_x(step % 2u, four, row, brought);
    workgroupBarrier();
    sums = add_run(sums, step % 2u, part, left, right);
  }

  let top = sum_parts(lane, array<vec4<f32>, 2>(sums.top_left, sums.top_right));
  if part == 0u {
    finish(tile, 0u, column, top[0], top[1]);
  }
  if TILE_ROWS > 4u {
    let bottom = sum_parts(lane, array<vec4<f32>, 2>(sums.bottom_left, sums.bottom_right));
    if part == 0u {
      finish(tile, 4u, column, bottom[0], bottom[1]);
    }
  }
}
