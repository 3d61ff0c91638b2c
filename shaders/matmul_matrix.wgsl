// out[s, n] = sum over k of x[row(s), k] * W[expert of s][n, k]                                  (plain)
// out[s, n] = activate(sum over k of x[row(s), k] * Wgate[e][n, k], the same sum with Wup)       (GATED)
//   x        [rows, K] f32, f16 or bf16; row(s) = token_of[s] (GATHER, where token_of is given) or s
//   plan     u32: token_of, items and their offsets (lib/matmul/tile_plan.wgsl)
//   places   u32: which expert of the weights holds each of the plan's, where placed
//   weights, weights_up  [N, K] of each expert of the page, in the layout of lib/matmul/layout.wgsl
//   out      [slots, N] f32, row-major
// Grid: ceil(N / OUT_COLUMNS) * items groups, items slowest.
// Pieces: common/grid, matmul/params, matmul/tile_plan, common/halves_f16 | common/halves_bf16 | nothing,
//   matmul/x_vec4 | matmul/x_scalar | matmul/x_halves | matmul/x_half_pairs,
//   matmul/format/f32 | matmul/format/f16 | matmul/format/bf16 | matmul/format/q8_0 |
//   matmul/format/q4_0 | matmul/format/q4_k | matmul/format/q6_k | matmul/format/mxfp4 | matmul/format/fp8,
//   matmul/run_blocks | nothing, matmul/load_blocks | nothing,
//   matmul/matrix/memory, matmul/matrix/exponent, matmul/matrix/put, matmul/matrix/square,
//   matmul/matrix/attempts, matmul/matrix/rows_along,
//   matmul/matrix/carry_words | matmul/matrix/carry_blocks, matmul/matrix/columns_along,
//   matmul/matrix/plain_along,
//   matmul/activate_none | matmul/activate_silu | matmul/activate_gelu, matmul/layout, matmul/weights,
//   matmul/out_vec4 | matmul/out_scalar.
//
// On matrix units: squares of SIDE, inputs of type Input (f16; f32 where the device has it), f32 sums. One
// workgroup takes TILE_ROWS slots of one expert and COLUMNS columns of weights (GATED: half of them of either
// matrix). How sums keep the precision of f32: lib/matmul/matrix/attempts.wgsl.

const LOOKS_AGAIN: bool = false;

// What a lane brings to the next step.
struct Ahead {
  x: Rows,
  left: Carried,
  right: Carried,    // GATED
}

// Of a lane's rows of x, and of its column in either matrix.
struct Lane {
  x: vec4<f32>,
  left: f32,
  right: f32,
}

// Where a lane's rows and columns begin, and its part of a column.
struct Bases {
  tile: Tile,
  first_column: u32,
  x: vec4<u32>,
  left: u32,
  part: u32,
  x_spot: Spot,       // where what is brought goes
  left_spot: Spot,
}

// Both matrices in one pass: `up` is false.
fn bring(up: bool, at: Bases, lane: u32, step: u32) -> Ahead {
  var next: Ahead;
  next.x = bring_rows(at.x, first_of_rows(lane, step));
  next.left = carry(false, at.left, at.part, step);
  if GATED { next.right = carry(true, at.left, at.part, step); }
  return next;
}

// The same with zeros past the end.
fn bring_tail(up: bool, at: Bases, lane: u32, step: u32) -> Ahead {
  var next: Ahead;
  next.x = bring_rows_tail(at.x, first_of_rows(lane, step));
  next.left = carry_tail(false, at.left, at.part, step);
  if GATED { next.right = carry_tail(true, at.left, at.part, step); }
  return next;
}

fn largest_brought(at: Bases, next: Ahead) -> Lane {
  var seen = Lane(largest_of_rows(next.x), largest_carried(next.left), 0.0);
  if GATED { seen.right = largest_carried(next.right); }
  return seen;
}

// What rows and columns have seen of a lane.
fn note_largest(lane: u32, seen: Lane) {
  note_rows(lane, seen.x);
  if lane < OUT_COLUMNS * COLUMN_LANES {
    atomicMax(&column_largest[lane % OUT_COLUMNS], bitcast<u32>(seen.left));
    if GATED { atomicMax(&column_largest[lane % OUT_COLUMNS + OUT_COLUMNS], bitcast<u32>(seen.right)); }
  }
}

fn scales_of(lane: u32) -> Lane {
  return Lane(
    scales_of_rows(lane),
    scale_down(column_exponent[lane % OUT_COLUMNS]),
    scale_down(column_exponent[lane % OUT_COLUMNS + COLUMNS - OUT_COLUMNS]));
}

// Puts what a lane has brought in its place, scaled; what is the largest so far.
fn put(at: Bases, lane: u32, next: Ahead, by: Lane, seen: Lane) -> Lane {
  var most = seen;
  most.x = put_rows(lane, at.x_spot, next.x, by.x, seen.x);
  if WG <= OUT_COLUMNS * COLUMN_LANES || lane < OUT_COLUMNS * COLUMN_LANES {
    most.left = max(most.left, put_carried(at.left_spot, next.left, by.left));
    if GATED {
      let spot = Spot(
        at.left_spot.square + OUT_COLUMNS / SIDE, at.left_spot.line, at.left_spot.k4, at.left_spot.k);
      most.right = max(most.right, put_carried(spot, next.right, by.right));
    }
  }
  return most;
}

fn finish(at: Bases, row: u32, column: u32, left: vec4<f32>, right: vec4<f32>) {
  store_out(at.tile.first + row, at.first_column + column, activate(left, right));
}

@compute @workgroup_size(WG)
fn matmul_matrix(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(num_subgroups) subgroups: u32,
) {
  let across = (params.column_end - params.column_begin + OUT_COLUMNS - 1u) / OUT_COLUMNS;
  let id = flat(group, groups);
  let tile = tile_at(id / across);
  if tile.rows == 0u {
    return;
  }
  // Columns past the end are clamped to the last one, and not stored.
  var at: Bases;
  at.tile = tile;
  at.first_column = params.column_begin + id % across * OUT_COLUMNS;
  at.x = rows_at(tile, lane);
  at.left = weight_base(tile.expert, min(at.first_column + lane % OUT_COLUMNS, params.columns - 1u));
  at.part = lane / OUT_COLUMNS % COLUMN_LANES;
  at.x_spot = spot_of_rows(lane);
  at.left_spot = spot(lane % OUT_COLUMNS, at.part * LANE_FOURS);
  make_tile(at, tile.rows, (params.depth - 1u) / STEP_DEPTH, lane, subgroup, subgroups);
}
