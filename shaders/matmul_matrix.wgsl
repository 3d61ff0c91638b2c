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
//   matmul/run_blocks | nothing, matmul/load_blocks | nothing, matmul/matrix/carry_words |
//   matmul/matrix/carry_blocks, matmul/matrix/exponent, matmul/matrix/put, matmul/matrix/square,
//   matmul/matrix/again,
//   matmul/activate_none | matmul/activate_silu | matmul/activate_gelu, matmul/layout, matmul/weights,
//   matmul/out_vec4 | matmul/out_scalar.
//
// On matrix units: squares of SIDE, inputs of type Input (f16; f32 where the device has it), f32 sums. One
// workgroup takes TILE_ROWS slots of one expert and COLUMNS columns of weights; DOWN x ACROSS of its
// subgroups multiply, each 2 x SQUARES_ACROSS squares. More subgroups than those, where they are smaller than
// WG was made for, only bring.
//
// f16 holds 11 bits and 40 powers of two. So a row of x is scaled by a power of two and cut into X_PARTS (1
// or 2) numbers, a column of weights into W_PARTS: x = (high + low) 2^e. Products of parts are exact in f32;
// low times low, 2^-22 of the product at most, is left out. The scale of a row goes by its values in one
// step; where a later one does not fit under it, the tile is made again with the scale of the row's largest.
// Rows and columns with infinities or NaN, or of a range that f16 has no place for, are made again without
// matrices.

const STEP_DEPTH: u32 = 16u;
const K_SQUARES: u32 = STEP_DEPTH / SIDE;
const TILE_ROWS: u32 = DOWN * 2u * SIDE;
const MATRICES: u32 = select(1u, 2u, GATED);
const COLUMNS: u32 = ACROSS * SQUARES_ACROSS * SIDE;
const OUT_COLUMNS: u32 = COLUMNS / MATRICES;
const OUT_SQUARES: u32 = SQUARES_ACROSS / MATRICES;    // of a subgroup, across one matrix

// A row of a square, in fours, and a gap that spreads the rows of one load over the banks.
const ROW_FOURS: u32 = SIDE / 4u;
const STRIDE_FOURS: u32 = ROW_FOURS + select(0u, 2u, SIDE > 8u);
const STRIDE: u32 = 4u * STRIDE_FOURS;

// Vectors of x that a lane brings to a step, and rows that one of them a lane covers.
const X_ROWS: u32 = WG / (STEP_DEPTH / 4u);
const X_LOADS: u32 = max(TILE_ROWS / X_ROWS, 1u);
// Fours of a column that a lane brings.
const COLUMN_LANES: u32 = min(WG / OUT_COLUMNS, 4u);
const LANE_FOURS: u32 = STEP_DEPTH / 4u / COLUMN_LANES;

alias Four = array<Input, 4>;
alias Square = array<array<Four, STRIDE_FOURS>, SIDE>;

// [part][rows / SIDE][k / SIDE][row][k / 4][k % 4], and the same with columns in place of rows. Dimensions of
// their own: an index that is constant once inlined needs no bounds check.
var<workgroup> x_tile: array<array<array<Square, K_SQUARES>, TILE_ROWS / SIDE>, X_PARTS>;
var<workgroup> w_tile: array<array<array<Square, K_SQUARES>, COLUMNS / SIDE>, W_PARTS>;
// Sums on their way out, SLOTS squares at a time.
var<workgroup> sums: array<array<array<array<f32, 4>, ROW_FOURS>, SIDE>, SLOTS>;
// The largest magnitude seen of each row and each column, as bits; and the exponent that scales it.
var<workgroup> row_largest: array<atomic<u32>, TILE_ROWS>;
var<workgroup> column_largest: array<atomic<u32>, COLUMNS>;
var<workgroup> row_exponent: array<u32, TILE_ROWS>;
var<workgroup> column_exponent: array<u32, COLUMNS>;
var<workgroup> misfits: atomic<u32>;
var<workgroup> verdict: u32;

// What a lane brings to the next step.
struct Ahead {
  x0: vec4<f32>,
  x1: vec4<f32>,
  x2: vec4<f32>,
  x3: vec4<f32>,
  left: Carried,
  right: Carried,    // GATED
}

// Of a lane's rows of x, and of its column in either matrix.
struct Lane {
  x: vec4<f32>,
  left: f32,
  right: f32,
}

// Where a lane's rows and columns begin.
struct Bases {
  x: vec4<u32>,
  left: u32,
  right: u32,
  part: u32,
}

fn bring(at: Bases, lane: u32, step: u32) -> Ahead {
  let k = step * STEP_DEPTH + lane % (STEP_DEPTH / 4u) * 4u;
  var next: Ahead;
  next.x0 = load_x(at.x[0], k);
  if X_LOADS > 1u { next.x1 = load_x(at.x[1], k); }
  if X_LOADS > 2u {
    next.x2 = load_x(at.x[2], k);
    next.x3 = load_x(at.x[3], k);
  }
  next.left = carry(false, at.left, at.part, step);
  if GATED { next.right = carry(true, at.right, at.part, step); }
  return next;
}

// The same with zeros past the end.
fn bring_tail(at: Bases, lane: u32, step: u32) -> Ahead {
  let k = step * STEP_DEPTH + lane % (STEP_DEPTH / 4u) * 4u;
  var next: Ahead;
  next.x0 = load_x_tail(at.x[0], k);
  if X_LOADS > 1u { next.x1 = load_x_tail(at.x[1], k); }
  if X_LOADS > 2u {
    next.x2 = load_x_tail(at.x[2], k);
    next.x3 = load_x_tail(at.x[3], k);
  }
  next.left = carry_tail(false, at.left, at.part, step);
  if GATED { next.right = carry_tail(true, at.right, at.part, step); }
  return next;
}

fn largest_of(v: vec4<f32>) -> f32 {
  let m = max(abs(v.xy), abs(v.zw));
  return max(m.x, m.y);
}

fn largest_carried(words: Carried) -> f32 {
  let scale = carried_scale(words);
  var m = largest_of(carried_four(words, scale, 0u));
  if LANE_FOURS > 1u { m = max(m, largest_of(carried_four(words, scale, 1u))); }
  if LANE_FOURS > 2u {
    m = max(m, largest_of(carried_four(words, scale, 2u)));
    m = max(m, largest_of(carried_four(words, scale, 3u)));
  }
  return m;
}

// What rows and columns have seen of a lane.
fn note_largest(lane: u32, seen: Lane) {
  let row = lane / (STEP_DEPTH / 4u);
  if X_ROWS <= TILE_ROWS || row < TILE_ROWS {
    atomicMax(&row_largest[row], bitcast<u32>(seen.x[0]));
  }
  if X_LOADS > 1u { atomicMax(&row_largest[row + X_ROWS], bitcast<u32>(seen.x[1])); }
  if X_LOADS > 2u {
    atomicMax(&row_largest[row + 2u * X_ROWS], bitcast<u32>(seen.x[2]));
    atomicMax(&row_largest[row + 3u * X_ROWS], bitcast<u32>(seen.x[3]));
  }
  if lane < OUT_COLUMNS * COLUMN_LANES {
    atomicMax(&column_largest[lane % OUT_COLUMNS], bitcast<u32>(seen.left));
    if GATED { atomicMax(&column_largest[lane % OUT_COLUMNS + OUT_COLUMNS], bitcast<u32>(seen.right)); }
  }
}

// Whether rows or columns of a four of the output are not finite.
fn is_bad(row: u32, column: u32) -> bool {
  var worst = row_exponent[row];
  for (var i = 0u; i < 4u; i++) {
    worst = max(worst, column_exponent[column + i]);
    if GATED { worst = max(worst, column_exponent[OUT_COLUMNS + column + i]); }
  }
  return worst == NOT_FINITE;
}

// Four neighbours of a row of sums; `column` is that of the gate (or of the only matrix) or of up's.
fn four_sums(slot: u32, row: u32, four: u32, tile_row: u32, column: u32) -> vec4<f32> {
  let v = vec4<f32>(
    sums[slot][row][four][0], sums[slot][row][four][1], sums[slot][row][four][2], sums[slot][row][four][3]);
  let columns = vec4<u32>(
    column_exponent[column], column_exponent[column + 1u], column_exponent[column + 2u],
    column_exponent[column + 3u]);
  return unscaled(v, row_exponent[tile_row], columns);
}

// The squares that `sums` holds, of subgroups from `first` on: square `down`, `across` of each.
fn store_sums(tile: Tile, lane: u32, first_column: u32, first: u32, rows_each: u32, down: u32, across: u32) {
  const FOURS = SIDE * ROW_FOURS;
  for (var i = lane; i < SLOTS / MATRICES * FOURS; i += WG) {
    let subgroup = first + i / FOURS;
    let slot = i / FOURS * MATRICES;
    let row = i % FOURS / ROW_FOURS;
    let four = i % ROW_FOURS;
    let tile_row = (subgroup / ACROSS * rows_each + down) * SIDE + row;
    let column = (subgroup % ACROSS * OUT_SQUARES + across) * SIDE + 4u * four;
    if tile_row < tile.rows && !is_bad(tile_row, column) {
      var v = four_sums(slot, row, four, tile_row, column);
      if GATED {
        v = activate(v, four_sums(slot + MATRICES - 1u, row, four, tile_row, OUT_COLUMNS + column));
      }
      store_out(tile.first + tile_row, first_column + column, v);
    }
  }
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
  let first_column = params.column_begin + id % across * OUT_COLUMNS;

  // What this lane brings. Rows and columns past the end are clamped to the last one, and not stored.
  var at: Bases;
  let last_row = tile.rows - 1u;
  let row = lane / (STEP_DEPTH / 4u);
  at.x[0] = x_base(x_row_of(tile.first + min(row, last_row)));
  if X_LOADS > 1u { at.x[1] = x_base(x_row_of(tile.first + min(row + X_ROWS, last_row))); }
  if X_LOADS > 2u {
    at.x[2] = x_base(x_row_of(tile.first + min(row + 2u * X_ROWS, last_row)));
    at.x[3] = x_base(x_row_of(tile.first + min(row + 3u * X_ROWS, last_row)));
  }
  at.left = weight_base(tile.expert, min(first_column + lane % OUT_COLUMNS, params.columns - 1u));
  at.right = at.left;
  at.part = lane / OUT_COLUMNS % COLUMN_LANES;

  // Squares of this subgroup: the first of its rows, and of the left and the right half of its columns
  // (GATED: gate and up). Rows that fill half a tile or less are shared out one square each.
  let rows_each = select(1u, 2u, tile.rows > TILE_ROWS / 2u);
  let row_square = subgroup / ACROSS * rows_each;
  let left_square = subgroup % ACROSS * OUT_SQUARES;
  let right_square = left_square + select(SQUARES_ACROSS / 2u, OUT_COLUMNS / SIDE, GATED);
  let multiplies = subgroup < DOWN * ACROSS && row_square * SIDE < tile.rows;
  let has_second = rows_each > 1u && (row_square + 1u) * SIDE < tile.rows;

  for (var i = lane; i < TILE_ROWS; i += WG) {
    atomicStore(&row_largest[i], 0u);
    row_exponent[i] = 0u;
  }
  for (var i = lane; i < COLUMNS; i += WG) {
    atomicStore(&column_largest[i], 0u);
    column_exponent[i] = 0u;
  }
  if lane == 0u {
    atomicStore(&misfits, 0u);
  }
  workgroupBarrier();

  let steps = (params.depth - 1u) / STEP_DEPTH;
  for (var attempt = 0u; attempt < 2u; attempt++) {
    // The last step goes first: only its loads need guards.
    var next = bring_tail(at, lane, steps);
    if attempt == 0u {
      var brought = Lane(
        vec4<f32>(largest_of(next.x0), largest_of(next.x1), largest_of(next.x2), largest_of(next.x3)),
        largest_carried(next.left), 0.0);
      if GATED { brought.right = largest_carried(next.right); }
      note_largest(lane, brought);
    }
    workgroupBarrier();
    for (var i = lane; i < TILE_ROWS; i += WG) {
      // With larger subgroups than WG was made for some squares would be missing: all is then made again.
      let exponent = exponent_for(attempt, atomicLoad(&row_largest[i]), row_exponent[i]);
      row_exponent[i] = select(exponent, NOT_FINITE, subgroups < DOWN * ACROSS);
    }
    for (var i = lane; i < COLUMNS; i += WG) {
      column_exponent[i] = exponent_for(attempt, atomicLoad(&column_largest[i]), column_exponent[i]);
    }
    workgroupBarrier();
    var by: Lane;
    by.x[0] = scale_down(row_exponent[min(row, TILE_ROWS - 1u)]);
    if X_LOADS > 1u { by.x[1] = scale_down(row_exponent[row + X_ROWS]); }
    if X_LOADS > 2u {
      by.x[2] = scale_down(row_exponent[row + 2u * X_ROWS]);
      by.x[3] = scale_down(row_exponent[row + 3u * X_ROWS]);
    }
    by.left = scale_down(column_exponent[lane % OUT_COLUMNS]);
    by.right = scale_down(column_exponent[lane % OUT_COLUMNS + COLUMNS - OUT_COLUMNS]);

    var seen: Lane;
    var s00 = Sum();
    var s01 = Sum();
    var s02 = Sum();
    var s03 = Sum();
    var s10 = Sum();
    var s11 = Sum();
    var s12 = Sum();
    var s13 = Sum();
    for (var i = 0u; i <= steps; i++) {
      workgroupBarrier();
      seen = put(lane, at.part, next, by, seen);
      workgroupBarrier();
      // Once more than there are: without an `if`, so that no compiler waits for the loads at once.
      next = bring(at, lane, select(i, 0u, i == steps));
      if has_second {
        add_square(
          0u, row_square, left_square, right_square,
          &s00, &s01, &s02, &s03, &s10, &s11, &s12, &s13);
        if K_SQUARES > 1u {
          add_square(
            K_SQUARES - 1u, row_square, left_square, right_square,
            &s00, &s01, &s02, &s03, &s10, &s11, &s12, &s13);
        }
      } else if multiplies {
        add_row(0u, row_square, left_square, right_square, &s00, &s01, &s02, &s03);
        if K_SQUARES > 1u {
          add_row(K_SQUARES - 1u, row_square, left_square, right_square, &s00, &s01, &s02, &s03);
        }
      }
    }

    // A value that did not fit under its scale: once more.
    note_largest(lane, seen);
    workgroupBarrier();
    var misfit = false;
    for (var i = lane; i < TILE_ROWS; i += WG) {
      misfit |= !fits(atomicLoad(&row_largest[i]), row_exponent[i]) && subgroups >= DOWN * ACROSS;
    }
    for (var i = lane; i < COLUMNS; i += WG) {
      misfit |= !fits(atomicLoad(&column_largest[i]), column_exponent[i]);
    }
    if misfit {
      atomicOr(&misfits, 1u);
    }
    workgroupBarrier();
    if lane == 0u {
      verdict = atomicExchange(&misfits, 0u);
    }
    // In here, so that the sums do not outlive the loop over attempts: Mesa's compiler for NVIDIA copied all
    // of them at each step.
    if workgroupUniformLoad(&verdict) == 0u || attempt == 1u {
      // A square of some subgroups at a time, or its pair of gate and up.
      const ROUND = SLOTS / MATRICES;
      for (var first = 0u; first < DOWN * ACROSS; first += ROUND) {
        let stores = subgroup >= first && subgroup < first + ROUND;
        let slot = (subgroup - first) % ROUND * MATRICES;
        for (var square = 0u; square < rows_each * OUT_SQUARES; square++) {
          let down = square / OUT_SQUARES;
          let name = square % OUT_SQUARES * (4u / SQUARES_ACROSS);
          workgroupBarrier();
          if stores {
            switch down * 4u + name {
              case 0u: { coopStoreT(s00, &sums[slot][0][0][0], SIDE); }
              case 1u: { coopStoreT(s01, &sums[slot][0][0][0], SIDE); }
              case 2u: { coopStoreT(s02, &sums[slot][0][0][0], SIDE); }
              case 3u: { coopStoreT(s03, &sums[slot][0][0][0], SIDE); }
              case 4u: { coopStoreT(s10, &sums[slot][0][0][0], SIDE); }
              case 5u: { coopStoreT(s11, &sums[slot][0][0][0], SIDE); }
              case 6u: { coopStoreT(s12, &sums[slot][0][0][0], SIDE); }
              default: { coopStoreT(s13, &sums[slot][0][0][0], SIDE); }
            }
            if GATED {
              switch down * 2u + name {
                case 0u: { coopStoreT(s02, &sums[slot + MATRICES - 1u][0][0][0], SIDE); }
                case 1u: { coopStoreT(s03, &sums[slot + MATRICES - 1u][0][0][0], SIDE); }
                case 2u: { coopStoreT(s12, &sums[slot + MATRICES - 1u][0][0][0], SIDE); }
                default: { coopStoreT(s13, &sums[slot + MATRICES - 1u][0][0][0], SIDE); }
              }
            }
          }
          workgroupBarrier();
          store_sums(tile, lane, first_column, first, rows_each, down, square % OUT_SQUARES);
        }
      }
      store_bad(tile, lane, first_column);
      break;
    }
  }
}
