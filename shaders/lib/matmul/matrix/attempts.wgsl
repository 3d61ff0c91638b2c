// What one workgroup of a kernel on matrix units does: a tile of sums, made under scales that are tried, and
// stored. Needs of the kernel: Bases (where a lane's loads begin), Ahead (what it brings to a step), Lane
// (its scales, or the largest it has seen), the functions on them that are called here, and LOOKS_AGAIN
// (whether scales go by the first step too: K is of any length).
//
// f16 holds 11 bits and 40 powers of two. So a row is scaled by a power of two and cut into X_PARTS (1 or 2)
// numbers, a column into W_PARTS: x = (high + low) 2^e. Products of parts are exact in f32; low times low,
// 2^-22 of the product at most, is left out. The scale of a row goes by its values in one step; where a later
// one does not fit under it, the tile is made again with the scale of the row's largest. Rows and columns
// with infinities or NaN, or of a range that f16 has no place for, are made again without matrices.

// Whether rows or columns of a four of the output are not finite.
fn is_bad(row: u32, column: u32) -> bool {
  var worst = row_exponent[row];
  for (var i = 0u; i < 4u; i++) {
    worst = max(worst, column_exponent[column + i]);
    if MATRICES > 1u { worst = max(worst, column_exponent[OUT_COLUMNS + column + i]); }
  }
  return worst == NOT_FINITE;
}

// Four neighbours of a row of sums; `column` is that of the first matrix or of the second.
fn four_sums(slot: u32, row: u32, four: u32, tile_row: u32, column: u32) -> vec4<f32> {
  let v = vec4<f32>(
    sums[slot][row][four][0], sums[slot][row][four][1], sums[slot][row][four][2], sums[slot][row][four][3]);
  let columns = vec4<u32>(
    column_exponent[column], column_exponent[column + 1u], column_exponent[column + 2u],
    column_exponent[column + 3u]);
  return unscaled(v, row_exponent[tile_row], columns);
}

// The squares that `sums` holds, of subgroups from `first` on: square `down`, `across` of each.
fn store_sums(at: Bases, rows: u32, lane: u32, first: u32, rows_each: u32, down: u32, across: u32) {
  const FOURS = SIDE * ROW_FOURS;
  for (var i = lane; i < SLOTS / MATRICES * FOURS; i += WG) {
    let subgroup = first + i / FOURS;
    let slot = i / FOURS * MATRICES;
    let row = i % FOURS / ROW_FOURS;
    let four = i % ROW_FOURS;
    let tile_row = (subgroup / ACROSS * rows_each + down) * SIDE + row;
    let column = (subgroup % ACROSS * OUT_SQUARES + across) * SIDE + 4u * four;
    if tile_row < rows && !is_bad(tile_row, column) {
      let left = four_sums(slot, row, four, tile_row, column);
      var right: vec4<f32>;
      if MATRICES > 1u {
        right = four_sums(slot + MATRICES - 1u, row, four, tile_row, OUT_COLUMNS + column);
      }
      finish(at, tile_row, column, left, right);
    }
  }
}

// The fours that store_sums left out.
fn store_bad(at: Bases, rows: u32, lane: u32) {
  const FOURS = OUT_COLUMNS / 4u;
  for (var i = lane; i < rows * FOURS; i += WG) {
    let row = i / FOURS;
    let column = i % FOURS * 4u;
    if is_bad(row, column) {
      store_plain(at, row, column);
    }
  }
}

// Squares of a subgroup: the first of its rows, and of the left and the right half of its columns.
struct Share {
  row: u32,
  left: u32,
  right: u32,
  multiplies: bool,
  has_second: bool,    // rows of a second square
}

// Rows that fill half a tile or less are shared out one square each.
fn share_of(rows: u32, rows_each: u32, subgroup: u32) -> Share {
  let row = subgroup / ACROSS * rows_each;
  let left = subgroup % ACROSS * OUT_SQUARES;
  let right = left + select(SQUARES_ACROSS / 2u, OUT_COLUMNS / SIDE, MATRICES > 1u);
  let multiplies = subgroup < DOWN * ACROSS && row * SIDE < rows;
  return Share(row, left, right, multiplies, rows_each > 1u && (row + 1u) * SIDE < rows);
}

// Adds the steps of one pass to the sums; what is the largest so far. `first` is the last step's.
fn add_pass(
  up: bool, first: Ahead, at: Bases, by: Lane, before: Lane, lane: u32, steps: u32, share: Share,
  s00: ptr<function, Sum>, s01: ptr<function, Sum>, s02: ptr<function, Sum>, s03: ptr<function, Sum>,
  s10: ptr<function, Sum>, s11: ptr<function, Sum>, s12: ptr<function, Sum>, s13: ptr<function, Sum>,
) -> Lane {
  var next = first;
  var seen = before;
  for (var i = 0u; i <= steps; i++) {
    workgroupBarrier();
    seen = put(at, lane, next, by, seen);
    workgroupBarrier();
    // Once more than there are: without an `if`, so that no compiler waits for the loads at once.
    next = bring(up, at, lane, select(i, 0u, i == steps));
    if share.has_second {
      add_square(0u, share.row, share.left, share.right, s00, s01, s02, s03, s10, s11, s12, s13);
      if K_SQUARES > 1u {
        add_square(
          K_SQUARES - 1u, share.row, share.left, share.right, s00, s01, s02, s03, s10, s11, s12, s13);
      }
    } else if share.multiplies {
      add_row(0u, share.row, share.left, share.right, s00, s01, s02, s03);
      if K_SQUARES > 1u {
        add_row(K_SQUARES - 1u, share.row, share.left, share.right, s00, s01, s02, s03);
      }
    }
  }
  return seen;
}

// A tile of `rows` rows; `steps` is one less than the steps of a pass.
fn make_tile(at: Bases, rows: u32, steps: u32, lane: u32, subgroup: u32, subgroups: u32) {
  let rows_each = select(1u, 2u, rows > TILE_ROWS / 2u);
  let share = share_of(rows, rows_each, subgroup);
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

  for (var attempt = 0u; attempt < 2u; attempt++) {
    // The last step goes first: only its loads need guards.
    let first = bring_tail(false, at, lane, steps);
    if attempt == 0u {
      note_largest(lane, largest_brought(at, first));
      if PASSES > 1u { note_largest(lane, largest_brought(at, bring_tail(true, at, lane, steps))); }
      // A last step of few values says little of the others.
      if LOOKS_AGAIN && steps > 0u {
        note_largest(lane, largest_brought(at, bring(false, at, lane, 0u)));
      }
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
    let by = scales_of(lane);

    var s00 = Sum();
    var s01 = Sum();
    var s02 = Sum();
    var s03 = Sum();
    var s10 = Sum();
    var s11 = Sum();
    var s12 = Sum();
    var s13 = Sum();
    var seen = add_pass(
      false, first, at, by, Lane(), lane, steps, share, &s00, &s01, &s02, &s03, &s10, &s11, &s12, &s13);
    if PASSES > 1u {
      let second = bring_tail(true, at, lane, steps);
      seen = add_pass(
        true, second, at, by, seen, lane, steps, share, &s00, &s01, &s02, &s03, &s10, &s11, &s12, &s13);
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
      // A square of some subgroups at a time, or its pair of both matrices.
      const ROUND = SLOTS / MATRICES;
      for (var begin = 0u; begin < DOWN * ACROSS; begin += ROUND) {
        let stores = subgroup >= begin && subgroup < begin + ROUND;
        let slot = (subgroup - begin) % ROUND * MATRICES;
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
            if MATRICES > 1u {
              switch down * 2u + name {
                case 0u: { coopStoreT(s02, &sums[slot + MATRICES - 1u][0][0][0], SIDE); }
                case 1u: { coopStoreT(s03, &sums[slot + MATRICES - 1u][0][0][0], SIDE); }
                case 2u: { coopStoreT(s12, &sums[slot + MATRICES - 1u][0][0][0], SIDE); }
                default: { coopStoreT(s13, &sums[slot + MATRICES - 1u][0][0][0], SIDE); }
              }
            }
          }
          workgroupBarrier();
          store_sums(at, rows, lane, begin, rows_each, down, square % OUT_SQUARES);
        }
      }
      store_bad(at, rows, lane);
      break;
    }
  }
}
