// out[s, n] = sum over k of x[row(s), k] * W[expert of s][n, k]                                  (plain)
// out[s, n] = activate(sum over k of x[row(s), k] * Wgate[e][n, k], the same sum with Wup)       (GATED)
//   x        [rows, K] f32, f16 or bf16; row(s) = token_of[s] (GATHER, where token_of is given) or s
//   plan     u32: token_of, items and their offsets (lib/matmul/tile_plan.wgsl); none in the dense variant
//   places   u32: which expert of the weights holds each of the plan's, where placed
//   weights, weights_up  [N, K] of each expert of the page, in the layout of lib/matmul/layout.wgsl
//   out      [slots, N] f32, row-major
// Grid: ceil(N / OUT_COLUMNS) * items groups, items slowest; OUT_COLUMNS = 128, GATED 64.
// Pieces: common/grid, matmul/params, matmul/tile_plan | matmul/tile_dense,
//   common/halves_f16 | common/halves_bf16 | nothing, matmul/x_vec4 | matmul/x_scalar | matmul/x_halves |
//   matmul/x_half_pairs,
//   matmul/format/f32 | matmul/format/f16 | matmul/format/bf16 | matmul/format/q8_0 |
//   matmul/format/q4_0 | matmul/format/q4_k | matmul/format/q6_k | matmul/format/mxfp4 | matmul/format/fp8,
//   matmul/run_blocks | nothing, matmul/load_blocks | nothing, matmul/tile/bring_words |
//   matmul/tile/bring_blocks, matmul/tile/outer, matmul/tile/near_rows | matmul/tile/split_rows,
//   matmul/activate_none | matmul/activate_silu | matmul/activate_gelu, matmul/layout | matmul/layout_rows,
//   matmul/weights | matmul/weights_rows, matmul/out_vec4 | matmul/out_scalar.
//
// One workgroup takes TILE_ROWS (64 or 32) slots of one expert and 128 columns of weights; a lane 8 (or 4)
// rows x 8 columns: neighbours, or four of either half of the tile.

const WG: u32 = 128u;
const LANES_X: u32 = 16u;                   // lanes along columns; each has four at c and four at c + 64
const LANE_ROWS: u32 = TILE_ROWS / 8u;      // 8 or 4
const OUT_COLUMNS: u32 = select(WG, WG / 2u, GATED);
const X_PER_ROW: u32 = TILE_DEPTH / 4u;     // vectors of x in a row of a step
const X_ROWS: u32 = WG / X_PER_ROW;         // rows that one load a lane covers
// One more than needed: stores of lanes along K spread over the banks.
const X_FOURS: u32 = TILE_ROWS / 4u + 1u;
const W_FOURS: u32 = WG / 4u;

// Both transposed and weights widened, [k / 4][k % 4][row / 4][row % 4] and the same with columns: a lane
// reads four rows or columns as 16 bytes. Dimensions of their own, because an index that is constant once
// inlined needs no bounds check and folds into the load's offset: with flat arrays wgpu's and browsers'
// checks took half of the instructions. Not array<vec4>: to WGSL, lanes that store different components of
// one vector race (seen on Metal and D3D).
var<workgroup> x_tile: array<array<array<array<f32, 4>, X_FOURS>, 4>, TILE_DEPTH / 4u>;
var<workgroup> w_tile: array<array<array<array<f32, 4>, W_FOURS>, 4>, TILE_DEPTH / 4u>;

// What a lane brings to the next step: one or two vectors of x, and weights.
struct Ahead {
  x0: vec4<f32>,
  x1: vec4<f32>,
  w: Brought,
}

// `further` fours of rows, or of columns, are a constant wherever these are called: no address of their own.
fn put_x(k4: u32, row: u32, further: u32, v: vec4<f32>) {
  let four = row / 4u + further;
  x_tile[k4][0][four][row % 4u] = v.x;
  x_tile[k4][1][four][row % 4u] = v.y;
  x_tile[k4][2][four][row % 4u] = v.z;
  x_tile[k4][3][four][row % 4u] = v.w;
}

fn put_four(k4: u32, column: u32, further: u32, v: vec4<f32>) {
  let four = column / 4u + further;
  w_tile[k4][0][four][column % 4u] = v.x;
  w_tile[k4][1][four][column % 4u] = v.y;
  w_tile[k4][2][four][column % 4u] = v.z;
  w_tile[k4][3][four][column % 4u] = v.w;
}

fn put(lane: u32, next: Ahead) {
  let row = lane / X_PER_ROW;
  if X_ROWS <= TILE_ROWS || row < TILE_ROWS {
    put_x(lane % X_PER_ROW, row, 0u, next.x0);
  }
  if X_ROWS < TILE_ROWS {
    put_x(lane % X_PER_ROW, row, X_ROWS / 4u, next.x1);
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
  return vec4<f32>(
    w_tile[k4][j][four][0],
    w_tile[k4][j][four][1],
    w_tile[k4][j][four][2],
    w_tile[k4][j][four][3],
  );
}

fn finish(tile: Tile, row: u32, column: u32, left: vec4<f32>, right: vec4<f32>) {
  if row < tile.rows {
    if GATED {
      store_out(tile.first + row, column, activate(left, right));
    } else {
      store_out(tile.first + row, column, left);
      store_out(tile.first + row, column + 64u, right);
    }
  }
}

@compute @workgroup_size(WG)
fn matmul_tile(
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
  let first_column = params.column_begin + id % across * OUT_COLUMNS;

  // What this lane brings: x at k of one or two rows, weights of one column. Rows and columns past the end
  // are clamped to the last one, and not stored.
  let k = lane % X_PER_ROW * 4u;
  let row = lane / X_PER_ROW;
  let x0 = x_base(x_row_of(tile.first + min(row, tile.rows - 1u)));
  let x1 = x_base(x_row_of(tile.first + min(row + X_ROWS, tile.rows - 1u)));
  let column = min(first_column + lane % OUT_COLUMNS, params.columns - 1u);
  let w = weight_base(tile.expert, column);

  // The last step goes first: only its loads need guards, and the loop has none.
  let steps = (params.depth - 1u) / TILE_DEPTH;
  var next: Ahead;
  next.x0 = load_x_tail(x0, steps * TILE_DEPTH + k);
  if X_ROWS < TILE_ROWS {
    next.x1 = load_x_tail(x1, steps * TILE_DEPTH + k);
  }
  next.w = bring_tail(w, lane, steps);

  // Lanes without a row leave the multiply-adds out: a tile with few rows costs whole subgroups less.
  var block: Block;
  for (var i = 0u; i < steps; i++) {
    workgroupBarrier();
    put(lane, next);
    workgroupBarrier();
    next.x0 = load_x(x0, i * TILE_DEPTH + k);
    if X_ROWS < TILE_ROWS {
      next.x1 = load_x(x1, i * TILE_DEPTH + k);
    }
    next.w = bring(w, lane, i);
    block = add_rows(lane, block, tile.rows);
  }
  // Written out again: loads under a condition in the loop made ACO wait for them at once and swap registers,
  // and a loop of one iteration more, whose last loads are for nothing, cost NAK a copy of every sum.
  workgroupBarrier();
  put(lane, next);
  workgroupBarrier();
  block = add_rows(lane, block, tile.rows);

  let c = first_column + lane % LANES_X * 4u;
  let r = row_of(lane);
  let below = row_below(lane);
  finish(tile, r, c, block.top_left[0], block.top_right[0]);
  finish(tile, r + 1u, c, block.top_left[1], block.top_right[1]);
  finish(tile, r + 2u, c, block.top_left[2], block.top_right[2]);
  finish(tile, r + 3u, c, block.top_left[3], block.top_right[3]);
  if LANE_ROWS > 4u {
    finish(tile, below, c, block.bottom_left[0], block.bottom_right[0]);
    finish(tile, below + 1u, c, block.bottom_left[1], block.bottom_right[1]);
    finish(tile, below + 2u, c, block.bottom_left[2], block.bottom_right[2]);
    finish(tile, below + 3u, c, block.bottom_left[3], block.bottom_right[3]);
  }
}
