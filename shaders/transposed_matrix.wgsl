// out[s, k] = sum over n of x[row(s), n] * W[expert of s][n, k]                                  (plain)
// out[s, k] = the same sum over x[s, ..N] and Wgate, plus that over x[s, N..] and Wup            (GATED)
//   x        [rows, N] f32 (GATED [rows, 2 N]); row(s) = token_of[s] (GATHER) or s
//   plan     u32: token_of, items and their offsets (lib/matmul/transposed/items_planned.wgsl)
//   places   u32: which expert of the weights holds each of the plan's, where placed
//   weights, weights_up  [N, K] of each expert of the page, in the layout of lib/matmul/layout.wgsl
//   out      [slots, K] f32, row-major; where a page has some of the rows n, the sums of those before are
//            added
// Grid: ceil(K / COLUMNS) * items groups, items slowest.
// Pieces: common/grid, matmul/transposed/sizes, matmul/transposed/items_planned,
//   matmul/x_vec4 | matmul/x_scalar,
//   matmul/format/f32 | matmul/format/f16 | matmul/format/bf16 | matmul/format/q8_0 |
//   matmul/format/q4_0 | matmul/format/q4_k | matmul/format/q6_k | matmul/format/mxfp4 | matmul/format/fp8,
//   matmul/run_blocks | nothing, matmul/transposed/part | nothing,
//   matmul/transposed/words_at | matmul/transposed/values_at, matmul/weights | nothing,
//   matmul/transposed/eighth_halves | matmul/transposed/eighth_blocks | nothing,
//   matmul/matrix/memory, matmul/matrix/exponent, matmul/matrix/put, matmul/matrix/square,
//   matmul/matrix/attempts, matmul/matrix/rows_along, matmul/matrix/across,
//   matmul/matrix/unit_eights | matmul/matrix/unit_fours | matmul/matrix/unit_any,
//   matmul/matrix/columns_across,
//   matmul/transposed/out_fours | matmul/transposed/out_ones.
//
// matmul_matrix by the rows of the weights: one workgroup takes TILE_ROWS slots of one expert and COLUMNS
// columns. GATED: the sums go on from a pass over one matrix to a pass over the other.

const LOOKS_AGAIN: bool = false;

// What a lane brings to the next step.
struct Ahead {
  x: Rows,
  w: Units,
}

// Of a lane's rows of x, and of its columns.
struct Lane {
  x: vec4<f32>,
  w: Across,
}

// Where a lane's rows and columns begin.
struct Bases {
  tile: Tile,
  first_column: u32,
  x: vec4<u32>,
  w: u32,
  column: u32,       // the first of a lane's columns
  x_spot: Spot,      // where what is brought goes
  w_spot: Spot,
}

// Where rows begin: those of x for up lie behind those for the gate.
fn x_at(up: bool, at: Bases) -> vec4<u32> {
  if up { return at.x + vec4<u32>(x_base(1u) / 2u); }
  return at.x;
}

fn bring(up: bool, at: Bases, lane: u32, step: u32) -> Ahead {
  return Ahead(
    bring_rows(x_at(up, at), params.first_row + first_of_rows(lane, step)),
    bring_units(up, at.w, step, at.column));
}

// The same with zeros past the end.
fn bring_tail(up: bool, at: Bases, lane: u32, step: u32) -> Ahead {
  return Ahead(
    bring_rows_tail(x_at(up, at), params.first_row + first_of_rows(lane, step)),
    bring_units_tail(up, at.w, step, at.column, lane));
}

fn largest_brought(at: Bases, next: Ahead) -> Lane {
  return Lane(largest_of_rows(next.x), largest_of_units(next.w, at.column));
}

// What rows and columns have seen of a lane.
fn note_largest(lane: u32, seen: Lane) {
  note_rows(lane, seen.x);
  note_units(lane, seen.w);
}

fn scales_of(lane: u32) -> Lane {
  return Lane(scales_of_rows(lane), scales_of_units(lane));
}

// Puts what a lane has brought in its place, scaled; what is the largest so far.
fn put(at: Bases, lane: u32, next: Ahead, by: Lane, seen: Lane) -> Lane {
  return Lane(
    put_rows(lane, at.x_spot, next.x, by.x, seen.x),
    put_units(lane, at.w_spot, at.column, next.w, by.w, seen.w));
}

// One matrix at a time: `right` is not used.
fn finish(at: Bases, row: u32, column: u32, left: vec4<f32>, right: vec4<f32>) {
  store_out(at.tile.first + row, at.first_column + column, left);
}

// What a row of one matrix adds to four columns.
fn plain_row(sum: vec4<f32>, up: bool, base: u32, n: u32, column: u32, x: f32) -> vec4<f32> {
  if n >= params.rows { return sum; }
  let w = load_unit(up, base + row_at(n), column);
  if UNIT_FOURS > 1u && column % 8u >= 4u { return fma(vec4<f32>(x), unit_high(w, column), sum); }
  return fma(vec4<f32>(x), unit_low(w, column), sum);
}

fn plain_matrix(before: vec4<f32>, up: bool, x: u32, base: u32, column: u32) -> vec4<f32> {
  var sum = before;
  for (var n = 0u; n < params.rows; n += 4u) {
    let v = load_x_tail(x, params.first_row + n);
    sum = plain_row(sum, up, base, n, column, v.x);
    sum = plain_row(sum, up, base, n + 1u, column, v.y);
    sum = plain_row(sum, up, base, n + 2u, column, v.z);
    sum = plain_row(sum, up, base, n + 3u, column, v.w);
  }
  return sum;
}

// Four of the output that store_sums left out: made without matrices, as other kernels make them.
fn store_plain(at: Bases, row: u32, tile_column: u32) {
  let column = at.first_column + tile_column;
  if column >= params.columns { return; }
  let x = x_base(x_row_of(at.tile.first + row));
  let base = unit_base(at.tile.expert, column);
  var sum = plain_matrix(vec4<f32>(), false, x, base, column);
  if GATED { sum = plain_matrix(sum, true, x + x_base(1u) / 2u, base, column); }
  finish(at, row, tile_column, sum, vec4<f32>());
}

@compute @workgroup_size(WG)
fn transposed_matrix(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(num_subgroups) subgroups: u32,
) {
  let across = (params.columns + COLUMNS - 1u) / COLUMNS;
  let id = flat(group, groups);
  let tile = tile_at(id / across);
  if tile.rows == 0u {
    return;
  }
  // Columns past the end are clamped to the last ones, and not stored.
  var at: Bases;
  at.tile = tile;
  at.first_column = id % across * COLUMNS;
  at.x = rows_at(tile, lane);
  at.column = at.first_column + column_brought(lane);
  at.w = units_at(tile.expert, at.column, lane);
  at.x_spot = spot_of_rows(lane);
  at.w_spot = spot_of_units(lane);
  make_tile(at, tile.rows, (params.rows - 1u) / STEP_DEPTH, lane, subgroup, subgroups);
}
