// out[s, n] = sum over k of x[row(s), k] * W[expert of s][n, k]                                  (plain)
// out[s, n] = activate(sum over k of x[row(s), k] * Wgate[e][n, k], the same sum with Wup)       (GATED)
//   x        [rows, K] f32, f16 or bf16; row(s) = token_of[s] (GATHER, where token_of is given) or s
//   plan     u32: token_of, items and their offsets (lib/matmul/tile_plan.wgsl); none in the dense variant
//   places   u32: which expert of the weights holds each of the plan's, where placed
//   weights, weights_up  [N, K] of each expert of the page, in the layout of lib/matmul/layout.wgsl
//   out      [slots, N] f32, row-major
// Grid: ceil(N / OUT_COLUMNS) * items groups, items slowest; OUT_COLUMNS = 2 * COLUMNS, GATED COLUMNS.
// Pieces: common/grid, matmul/params, matmul/tile_plan | matmul/tile_rest | matmul/tile_dense,
//   common/halves_f16 | common/halves_bf16 | nothing, matmul/x_vec4 | matmul/x_scalar | matmul/x_halves |
//   matmul/x_half_pairs,
//   matmul/format/f32 | matmul/format/f16 | matmul/format/bf16 | matmul/format/q8_0 |
//   matmul/format/q4_0 | matmul/format/q4_k | matmul/format/q6_k | matmul/format/mxfp4 | matmul/format/fp8,
//   matmul/run_words | matmul/run_blocks, matmul/load_blocks | nothing,
//   matmul/activate_none | matmul/activate_silu | matmul/activate_gelu, matmul/layout | matmul/layout_rows,
//   matmul/weights | matmul/weights_rows, matmul/skinny/eight_rows | matmul/skinny/sixteen_rows,
//   matmul/skinny/one_loop | matmul/skinny/loops_of_eight | matmul/skinny/loops_of_sixteen.
//
// For 1 to TILE_ROWS (8 or 16) slots of one expert: weights are read once, 16 bytes a load, and go from
// memory to registers. A lane owns two columns of weights (gate and up of one column, or n and n + COLUMNS)
// and one of SPLIT parts of K. With loops by rows, those that are not there cost nothing but the rest of a
// four (of a two after eight). A row's sums hang on neither the loops nor TILE_ROWS.

const WG: u32 = COLUMNS * SPLIT;
const MATRICES: u32 = select(1u, 2u, GATED);
const OUT_COLUMNS: u32 = COLUMNS * 2u / MATRICES;
const STEP_DEPTH: u32 = SPLIT * RUN_DEPTH;             // a run of each part
// A step brings x in PIECES, so that it fits workgroup memory: of each run PIECE_DEPTH values at a time.
const PIECE_DEPTH: u32 = min(RUN_DEPTH, COLUMNS * 4u / TILE_ROWS);
const PIECES: u32 = RUN_DEPTH / PIECE_DEPTH;           // 1 or 2
const PIECE_FOURS: u32 = PIECE_DEPTH / 4u;             // fours of k in a piece: 8 or 4
// Rows that the workgroup brings with one load a lane: TILE_ROWS or more (then copies of the last). No branch
// around the load of x: with one, the weights waited behind it.
const X_ROWS: u32 = WG * 4u / (SPLIT * PIECE_DEPTH);
const_assert X_ROWS >= TILE_ROWS && PIECES <= 2u;

@group(0) @binding(6) var<storage, read_write> out: array<f32>;

// Two tiles of x in turn (one barrier a piece), [tile][part][k / 4][k % 4][row / 4][row % 4]. Dimensions of
// their own, because an index that is constant once inlined needs no bounds check and folds into the load's
// offset: with one flat array wgpu's and browsers' checks took half of the instructions. Not array<vec4>: to
// WGSL, lanes that store different components of one vector race.
alias Rows = array<array<f32, 4>, X_ROWS / 4u>;
var<workgroup> x_tile: array<array<array<array<Rows, 4>, PIECE_FOURS>, SPLIT>, 2>;
// Sums that half of the parts hand to the other half: two vectors a lane.
var<workgroup> handed: array<array<vec4<f32>, 2>, WG / 2u>;

// Sums of four rows: of a lane's first (left) and second column (GATED: left gate, right up).
struct Four {
  left: vec4<f32>,
  right: vec4<f32>,
}

// Where a lane reads x: the tile, its part, a four of k.
struct At { tile: u32, part: u32, k4: u32 }

fn put_x(tile: u32, four: u32, row: u32, v: vec4<f32>) {
  let part = four / PIECE_FOURS;
  let k4 = four % PIECE_FOURS;
  x_tile[tile][part][k4][0][row / 4u][row % 4u] = v.x;
  x_tile[tile][part][k4][1][row / 4u][row % 4u] = v.y;
  x_tile[tile][part][k4][2][row / 4u][row % 4u] = v.z;
  x_tile[tile][part][k4][3][row / 4u][row % 4u] = v.w;
}

// Four rows at one k; compilers make one 16-byte read of them.
fn x_four(at: At, j: u32, four: u32) -> vec4<f32> {
  return vec4<f32>(
    x_tile[at.tile][at.part][at.k4][j][four][0], x_tile[at.tile][at.part][at.k4][j][four][1],
    x_tile[at.tile][at.part][at.k4][j][four][2], x_tile[at.tile][at.part][at.k4][j][four][3],
  );
}

fn add_one(sums: Four, x: vec4<f32>, left: f32, right: f32) -> Four {
  return Four(fma(x, vec4<f32>(left), sums.left), fma(x, vec4<f32>(right), sums.right));
}

// What four values of k add to the sums of four rows.
fn add_rows(sums: Four, at: At, four: u32, left: vec4<f32>, right: vec4<f32>) -> Four {
  var next = add_one(sums, x_four(at, 0u, four), left.x, right.x);
  next = add_one(next, x_four(at, 1u, four), left.y, right.y);
  next = add_one(next, x_four(at, 2u, four), left.z, right.z);
  return add_one(next, x_four(at, 3u, four), left.w, right.w);
}

// Two columns' runs of weights.
struct Pair {
  left: Run,
  right: Run,
  left_scale: vec4<f32>,
  right_scale: vec4<f32>,
}

fn pair_of(left: Run, right: Run) -> Pair {
  return Pair(left, right, scale_of(left), scale_of(right));
}

fn add_run_four(sums: Sums, rows: u32, tile: u32, part: u32, k4: u32, i: u32, pair: Pair) -> Sums {
  return add_four(
    sums, rows, At(tile, part, k4),
    run_four(pair.left, pair.left_scale, i), run_four(pair.right, pair.right_scale, i));
}

// What piece `piece` of a run adds: a constant wherever this is called.
fn add_piece(sums: Sums, rows: u32, tile: u32, part: u32, piece: u32, pair: Pair) -> Sums {
  let i = piece * PIECE_FOURS;
  var next = add_run_four(sums, rows, tile, part, 0u, i, pair);
  next = add_run_four(next, rows, tile, part, 1u, i + 1u, pair);
  if PIECE_FOURS > 2u {
    next = add_run_four(next, rows, tile, part, 2u, i + 2u, pair);
    next = add_run_four(next, rows, tile, part, 3u, i + 3u, pair);
  }
  if PIECE_FOURS > 4u {
    next = add_run_four(next, rows, tile, part, 4u, i + 4u, pair);
    next = add_run_four(next, rows, tile, part, 5u, i + 5u, pair);
    next = add_run_four(next, rows, tile, part, 6u, i + 6u, pair);
    next = add_run_four(next, rows, tile, part, 7u, i + 7u, pair);
  }
  return next;
}

// What a lane works on.
struct Place { part: u32, four: u32, row: u32, k: u32, x_row: u32, left: u32, right: u32 }

// Steps `steps` - 1 to 0, for `rows` rows: a constant wherever this is called, so that each has a loop of its
// own. A branch in one loop cost NVIDIA's compiler 30 registers.
fn add_steps(start: Sums, rows: u32, steps: u32, at: Place) -> Sums {
  var sums = start;
  for (var i = steps; i > 0u; i--) {
    let step = i - 1u;
    // x first: loads return in order, and x must be there before the barrier, the weights only after it.
    var brought = load_x(at.x_row, step * STEP_DEPTH + at.k);
    let left = load_run(false, at.left, step * SPLIT + at.part);
    let right = load_run(GATED, at.right, step * SPLIT + at.part);
    let tile_of = step * PIECES % 2u;
    put_x(tile_of, at.four, at.row, brought);
    // The other piece's x is on its way while one is added.
    if PIECES > 1u { brought = load_x(at.x_row, step * STEP_DEPTH + at.k + PIECE_DEPTH); }
    workgroupBarrier();
    let pair = pair_of(left, right);
    sums = add_piece(sums, rows, tile_of, at.part, 0u, pair);
    if PIECES > 1u {
      put_x(1u, at.four, at.row, brought);
      workgroupBarrier();
      sums = add_piece(sums, rows, 1u, at.part, 1u, pair);
    }
  }
  return sums;
}

// The sum over the parts of two vectors, in pairs, halving, always in this order; right in part 0.
fn sum_parts(lane: u32, mine: Four) -> Four {
  var sum = mine;
  for (var count = WG / 2u; count >= COLUMNS; count /= 2u) {
    workgroupBarrier();
    if lane >= count && lane < 2u * count {
      handed[lane - count][0] = sum.left;
      handed[lane - count][1] = sum.right;
    }
    workgroupBarrier();
    if lane < count {
      sum.left += handed[lane][0];
      sum.right += handed[lane][1];
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

fn finish(tile: Tile, row: u32, column: u32, lane: u32, sums: Four) {
  let all = sum_parts(lane, sums);
  if lane < COLUMNS {
    if GATED {
      store_rows(tile, row, column, activate(all.left, all.right));
    } else {
      store_rows(tile, row, column, all.left);
      store_rows(tile, row, column + COLUMNS, all.right);
    }
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
  let k = four / PIECE_FOURS * RUN_DEPTH + four % PIECE_FOURS * 4u;
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
    let pair = pair_of(left, right);
    for (var piece = 0u; piece < PIECES; piece++) {
      let tile_of = (steps * PIECES + piece) % 2u;
      put_x(tile_of, four, row, load_x_tail(x_row, steps * STEP_DEPTH + k + piece * PIECE_DEPTH));
      workgroupBarrier();
      sums = add_piece(sums, TILE_ROWS, tile_of, part, piece, pair);
    }
  }
  let at = Place(part, four, row, k, x_row, left_at, right_at);
  sums = add_all(sums, tile.rows, steps, at);
  finish_all(tile, column, lane, sums);
}
