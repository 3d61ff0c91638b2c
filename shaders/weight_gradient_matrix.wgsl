// out[e][n, k] = sum over the slots s of expert e of a[a_row(s), a_first + n] * b[b_row(s), k]
//   a        [rows, ..] f32; a_row(s) = token_of[s] (GATHER_A) or s
//   b        [rows, K] f32; b_row(s) = token_of[s] (GATHER_B) or s
//   plan     u32: expert_offsets, token_of
//   out      [experts, N, K] f32 of the experts of a page, written, or added to
// Grid: ceil(N / TILE_ROWS) * ceil(K / COLUMNS) * experts groups, columns fastest, experts slowest.
// Pieces: common/grid, gradient/outer_sizes, gradient/fours_vec4 | gradient/fours_scalar,
//   matmul/matrix/memory, matmul/matrix/exponent, matmul/matrix/put, matmul/matrix/square,
//   matmul/matrix/attempts, matmul/matrix/across, matmul/matrix/rows_across.
//
// matmul_matrix with slots in the place of K: one workgroup makes TILE_ROWS rows x COLUMNS columns. Rows and
// columns are scaled each by a power of two of their own, as there.

// Lanes below one another, and slots that each of them brings, of four rows and of four columns.
const A_UNITS: u32 = TILE_ROWS / 4u;
const A_LANES: u32 = min(WG / A_UNITS, STEP_DEPTH);
const A_LOADS: u32 = STEP_DEPTH / A_LANES;
const B_UNITS: u32 = COLUMNS / 4u;
const B_LANES: u32 = min(WG / B_UNITS, STEP_DEPTH);
const B_LOADS: u32 = STEP_DEPTH / B_LANES;

const LOOKS_AGAIN: bool = true;

// What a lane brings to the next step.
struct Ahead {
  a: Fours,
  b: Fours,
}

// Of a lane's rows, and of its columns.
struct Lane {
  a: vec4<f32>,
  b: vec4<f32>,
}

struct Bases {
  expert: u32,
  slots: Slots,
  n: u32,          // the first row of the tile, and its first column
  k: u32,
  a_spot: Spot,    // where what a lane brings goes
  b_spot: Spot,
}

// The first of a lane's rows, of its columns, and of its slots in a step.
fn row_brought(lane: u32) -> u32 { return lane / A_LANES % A_UNITS * 4u; }
fn column_brought(lane: u32) -> u32 { return lane / B_LANES % B_UNITS * 4u; }
fn a_brought(lane: u32) -> u32 { return lane % A_LANES * A_LOADS; }
fn b_brought(lane: u32) -> u32 { return lane % B_LANES * B_LOADS; }

fn bring_a(slot: u32, n: u32) -> Fours {
  var next: Fours;
  next.v0 = load_a(a_row(slot), n);
  if A_LOADS > 1u { next.v1 = load_a(a_row(slot + 1u), n); }
  if A_LOADS > 2u { next.v2 = load_a(a_row(slot + 2u), n); next.v3 = load_a(a_row(slot + 3u), n); }
  return next;
}

fn bring_b(slot: u32, k: u32) -> Fours {
  var next: Fours;
  next.v0 = load_b(b_row(slot), k);
  if B_LOADS > 1u { next.v1 = load_b(b_row(slot + 1u), k); }
  if B_LOADS > 2u { next.v2 = load_b(b_row(slot + 2u), k); next.v3 = load_b(b_row(slot + 3u), k); }
  return next;
}

// One pass: `up` is false.
fn bring(up: bool, at: Bases, lane: u32, step: u32) -> Ahead {
  let slot = at.slots.first + step * STEP_DEPTH;
  return Ahead(
    bring_a(slot + a_brought(lane), at.n + row_brought(lane)),
    bring_b(slot + b_brought(lane), at.k + column_brought(lane)));
}

// The same with zeros past the last slot.
fn bring_tail(up: bool, at: Bases, lane: u32, step: u32) -> Ahead {
  let first = at.slots.first + step * STEP_DEPTH;
  let end = at.slots.end;
  let n = at.n + row_brought(lane);
  let k = at.k + column_brought(lane);
  var next: Ahead;
  var slot = first + a_brought(lane);
  if slot < end { next.a.v0 = load_a(a_row(slot), n); }
  if A_LOADS > 1u && slot + 1u < end { next.a.v1 = load_a(a_row(slot + 1u), n); }
  if A_LOADS > 2u && slot + 2u < end { next.a.v2 = load_a(a_row(slot + 2u), n); }
  if A_LOADS > 2u && slot + 3u < end { next.a.v3 = load_a(a_row(slot + 3u), n); }
  slot = first + b_brought(lane);
  if slot < end { next.b.v0 = load_b(b_row(slot), k); }
  if B_LOADS > 1u && slot + 1u < end { next.b.v1 = load_b(b_row(slot + 1u), k); }
  if B_LOADS > 2u && slot + 2u < end { next.b.v2 = load_b(b_row(slot + 2u), k); }
  if B_LOADS > 2u && slot + 3u < end { next.b.v3 = load_b(b_row(slot + 3u), k); }
  return next;
}

fn largest_brought(at: Bases, next: Ahead) -> Lane {
  return Lane(largest_of_fours(next.a, A_LOADS), largest_of_fours(next.b, B_LOADS));
}

// What rows and columns have seen of a lane.
fn note_largest(lane: u32, seen: Lane) {
  note_four_rows(row_brought(lane), seen.a);
  note_four_columns(column_brought(lane), seen.b);
}

fn scales_of(lane: u32) -> Lane {
  return Lane(scales_of_four_rows(row_brought(lane)), scales_of_four_columns(column_brought(lane)));
}

// Puts what a lane has brought in its place, scaled; what is the largest so far.
fn put(at: Bases, lane: u32, next: Ahead, by: Lane, seen: Lane) -> Lane {
  var most = seen;
  if WG <= A_UNITS * A_LANES || lane < A_UNITS * A_LANES {
    most.a = max(most.a, largest_of_fours(next.a, A_LOADS));
    put_fours_x(at.a_spot, 0u, next.a, by.a, A_LOADS);
  }
  if WG <= B_UNITS * B_LANES || lane < B_UNITS * B_LANES {
    most.b = max(most.b, largest_of_fours(next.b, B_LOADS));
    put_fours_w(at.b_spot, 0u, next.b, by.b, B_LOADS);
  }
  return most;
}

// One matrix: `right` is not used.
fn finish(at: Bases, row: u32, column: u32, left: vec4<f32>, right: vec4<f32>) {
  store_out((at.expert * params.rows + at.n + row) * params.columns, at.k + column, left);
}

fn plain_slot(sum: vec4<f32>, at: Bases, slot: u32, n: u32, k: u32) -> vec4<f32> {
  if slot >= at.slots.end { return sum; }
  return fma(vec4<f32>(load_a(a_row(slot), n / 4u * 4u)[n % 4u]), load_b(b_row(slot), k), sum);
}

// Four of the output that store_sums left out: made without matrices, as other kernels make them.
fn store_plain(at: Bases, row: u32, column: u32) {
  if at.k + column >= params.columns { return; }
  var sum: vec4<f32>;
  for (var slot = at.slots.first; slot < at.slots.end; slot += 4u) {
    sum = plain_slot(sum, at, slot, at.n + row, at.k + column);
    sum = plain_slot(sum, at, slot + 1u, at.n + row, at.k + column);
    sum = plain_slot(sum, at, slot + 2u, at.n + row, at.k + column);
    sum = plain_slot(sum, at, slot + 3u, at.n + row, at.k + column);
  }
  finish(at, row, column, sum, vec4<f32>());
}

@compute @workgroup_size(WG)
fn weight_gradient_matrix(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(subgroup_id) subgroup: u32,
  @builtin(num_subgroups) subgroups: u32,
) {
  let id = flat(group, groups);
  let expert = id / (params.across * params.down);
  if expert >= params.experts { return; }
  let n = id / params.across % params.down * TILE_ROWS;
  let at = Bases(
    expert, slots_of(expert), n, id % params.across * COLUMNS,
    spot_of_lines(row_brought(lane), 4u, a_brought(lane)),
    spot_of_lines(column_brought(lane), 4u, b_brought(lane)));
  let rows = min(TILE_ROWS, params.rows - n);
  if at.slots.first < at.slots.end {
    make_tile(at, rows, (at.slots.end - at.slots.first - 1u) / STEP_DEPTH, lane, subgroup, subgroups);
  } else if params.add == 0u {
    for (var i = lane; i < rows * (COLUMNS / 4u); i += WG) {
      finish(at, i / (COLUMNS / 4u), i % (COLUMNS / 4u) * 4u, vec4<f32>(), vec4<f32>());
    }
  }
}
