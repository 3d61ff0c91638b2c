// out[s, k] = sum over n of x[row(s), n] * W[expert of s][n, k]                                  (plain)
// out[s, k] = the same sum over x[s, ..N] and Wgate, plus that over x[s, N..] and Wup            (GATED)
//   x        [rows, N] f32 (GATED [rows, 2 N]); row(s) = token_of[s] (GATHER) or s
//   plan     u32: token_of, items and their offsets (lib/matmul/transposed/items_planned.wgsl); none in the
//            dense variant
//   places   u32: which expert of the weights holds each of the plan's, where placed
//   weights, weights_up  [N, K] of each expert of the page, in the layout of lib/matmul/layout.wgsl
//   out      [slots, K] f32, row-major; where a page has some of the rows n, the sums of those before are
//            added
// Grid: ceil(K / 128) * items groups, items slowest.
// Pieces: common/grid, matmul/transposed/sizes,
//   matmul/transposed/items_planned | matmul/transposed/items_dense,
//   matmul/x_vec4 | matmul/x_scalar,
//   matmul/format/f32 | matmul/format/f16 | matmul/format/bf16 | matmul/format/q8_0 |
//   matmul/format/q4_0 | matmul/format/q4_k | matmul/format/q6_k | matmul/format/mxfp4 | matmul/format/fp8,
//   matmul/run_blocks | nothing, matmul/transposed/part | nothing,
//   matmul/transposed/words_at | matmul/transposed/values_at, matmul/weights | nothing,
//   matmul/transposed/eighth_halves | matmul/transposed/eighth_blocks | nothing,
//   matmul/transposed/bring_fours | matmul/transposed/bring_eights | matmul/transposed/bring_any,
//   matmul/tile/outer, matmul/transposed/out_fours | matmul/transposed/out_ones.
//
// matmul_tile by the rows of the weights: one workgroup takes TILE_ROWS (64 or 32) slots of one expert and
// 128 columns; a lane 8 (or 4) rows x 8 columns. Words of weights hold neighbouring columns of one row, as
// w_tile has them, so that none is transposed. GATED: half of a step's depth is of either matrix.

const WG: u32 = 128u;
const LANES_X: u32 = 16u;                   // lanes along columns; each has four at c and four at c + 64
const LANE_ROWS: u32 = TILE_ROWS / 8u;      // 8 or 4
const OUT_COLUMNS: u32 = 128u;
const MATRIX_DEPTH: u32 = select(TILE_DEPTH, TILE_DEPTH / 2u, GATED);   // of a step, of one matrix
const X_PER_ROW: u32 = TILE_DEPTH / 4u;     // vectors of x in a row of a step
const X_ROWS: u32 = WG / X_PER_ROW;         // rows that one load a lane covers
// One more than needed: stores of lanes spread over the banks.
const X_FOURS: u32 = TILE_ROWS / 4u + 1u;
const W_FOURS: u32 = OUT_COLUMNS / 4u + 1u;

// As in matmul_tile; w_tile holds vectors, which one lane stores whole.
var<workgroup> x_tile: array<array<array<array<f32, 4>, X_FOURS>, 4>, TILE_DEPTH / 4u>;
var<workgroup> w_tile: array<array<array<vec4<f32>, W_FOURS>, 4>, TILE_DEPTH / 4u>;

// What a lane brings to the next step: one or two vectors of x, and weights.
struct Ahead {
  x0: vec4<f32>,
  x1: vec4<f32>,
  w: Brought,
}

fn put_x(k4: u32, row: u32, v: vec4<f32>) {
  x_tile[k4][0][row / 4u][row % 4u] = v.x;
  x_tile[k4][1][row / 4u][row % 4u] = v.y;
  x_tile[k4][2][row / 4u][row % 4u] = v.z;
  x_tile[k4][3][row / 4u][row % 4u] = v.w;
}

fn put_four(n: u32, four: u32, v: vec4<f32>) {
  w_tile[n / 4u][n % 4u][four] = v;
}

fn put(lane: u32, next: Ahead) {
  let row = lane / X_PER_ROW;
  if X_ROWS <= TILE_ROWS || row < TILE_ROWS {
    put_x(lane % X_PER_ROW, row, next.x0);
  }
  if X_ROWS < TILE_ROWS {
    put_x(lane % X_PER_ROW, row + X_ROWS, next.x1);
  }
  put_brought(lane, next.w);
}

// Four neighbours; compilers make one 16-byte read of them.
fn x_four(k4: u32, j: u32, four: u32) -> vec4<f32> {
  return vec4<f32>(
    x_tile[k4][j][four][0],
    x_tile[k4][j][four][1],
    x_tile[k4][j][four][2],
    x_tile[k4][j][four][3],
  );
}

fn w_four(k4: u32, j: u32, four: u32) -> vec4<f32> {
  return w_tile[k4][j][four];
}

fn finish(tile: Tile, row: u32, column: u32, left: vec4<f32>, right: vec4<f32>) {
  if row < tile.rows {
    store_out(tile.first + row, column, left);
    store_out(tile.first + row, column + 64u, right);
  }
}

@compute @workgroup_size(WG)
fn transposed_tile(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let across = (params.columns + OUT_COLUMNS - 1u) / OUT_COLUMNS;
  let id = flat(group, groups);
  let tile = tile_at(id / across);
  if tile.rows == 0u {
    return;
  }
  let first_column = id % across * OUT_COLUMNS;

  // What this lane brings: x at k of one or two rows, of either half of a row (GATED), and weights. Rows past
  // the end are clamped to the last one, columns too, and not stored.
  let part = lane % X_PER_ROW * 4u;
  let k = params.first_row + part % MATRIX_DEPTH;
  let half = part / MATRIX_DEPTH * (x_base(1u) / 2u);
  let row = lane / X_PER_ROW;
  let x0 = x_base(x_row_of(tile.first + min(row, tile.rows - 1u))) + half;
  let x1 = x_base(x_row_of(tile.first + min(row + X_ROWS, tile.rows - 1u))) + half;
  let w = bases_of(tile.expert, first_column, lane);

  // The last step goes first: only its loads need guards, and the loop has none.
  let steps = (params.rows - 1u) / MATRIX_DEPTH;
  var next: Ahead;
  next.x0 = load_x_tail(x0, steps * MATRIX_DEPTH + k);
  if X_ROWS < TILE_ROWS {
    next.x1 = load_x_tail(x1, steps * MATRIX_DEPTH + k);
  }
  next.w = bring_tail(w, lane, steps);

  // Lanes without a row leave the multiply-adds out: a tile with few rows costs whole waves less.
  let r = lane / LANES_X * LANE_ROWS;
  var block: Block;
  for (var i = 0u; i < steps; i++) {
    workgroupBarrier();
    put(lane, next);
    workgroupBarrier();
    next.x0 = load_x(x0, i * MATRIX_DEPTH + k);
    if X_ROWS < TILE_ROWS {
      next.x1 = load_x(x1, i * MATRIX_DEPTH + k);
    }
    next.w = bring(w, lane, i);
    if r < tile.rows {
      block = add_step(lane, block);
    }
  }
  // Written out again, as in matmul_tile.
  workgroupBarrier();
  put(lane, next);
  workgroupBarrier();
  if r < tile.rows {
    block = add_step(lane, block);
  }

  let c = first_column + lane % LANES_X * 4u;
  finish(tile, r, c, block.top_left[0], block.top_right[0]);
  finish(tile, r + 1u, c, block.top_left[1], block.top_right[1]);
  finish(tile, r + 2u, c, block.top_left[2], block.top_right[2]);
  finish(tile, r + 3u, c, block.top_left[3], block.top_right[3]);
  if LANE_ROWS > 4u {
    finish(tile, r + 4u, c, block.bottom_left[0], block.bottom_right[0]);
    finish(tile, r + 5u, c, block.bottom_left[1], block.bottom_right[1]);
    finish(tile, r + 6u, c, block.bottom_left[2], block.bottom_right[2]);
    finish(tile, r + 7u, c, block.bottom_left[3], block.bottom_right[3]);
  }
}
