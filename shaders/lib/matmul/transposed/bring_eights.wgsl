// What a lane brings of weights to a step of transposed_tile: eight columns of two rows, or of two places of
// a row; GATED: of one row of each matrix. Needs eighth_halves.wgsl or eighth_blocks.wgsl. Twin of
// bring_fours.wgsl and bring_any.wgsl.
const TILE_DEPTH: u32 = 16u;
const EIGHTS: u32 = OUT_COLUMNS / 8u;

struct Brought { w0: Eighth, w1: Eighth }

// Lanes that are neighbours load neighbours: rows of a panel, words of a row.
fn row_brought(lane: u32) -> u32 {
  return select(lane % MATRIX_DEPTH, lane / EIGHTS, PANEL == 1u);
}
fn eight_brought(lane: u32) -> u32 {
  return select(lane / MATRIX_DEPTH, lane % EIGHTS, PANEL == 1u);
}

const ROWS_ON: u32 = select(0u, WG / EIGHTS, PANEL == 1u && !GATED);
const EIGHTS_ON: u32 = select(0u, WG / MATRIX_DEPTH, PANEL != 1u && !GATED);

// Words of the two, and the column of the first.
struct Bases { w0: u32, w1: u32, column: u32 }

fn bases_of(expert: u32, first_column: u32, lane: u32) -> Bases {
  let column = first_column + 8u * eight_brought(lane);
  return Bases(eighth_base(expert, column), eighth_base(expert, column + 8u * EIGHTS_ON), column);
}

fn bring(b: Bases, lane: u32, step: u32) -> Brought {
  let n = step * MATRIX_DEPTH + row_brought(lane);
  return Brought(
    load_eighth(false, b.w0 + row_at(n), b.column),
    load_eighth(GATED, b.w1 + row_at(n + ROWS_ON), b.column + 8u * EIGHTS_ON));
}

// The same with zeros from the last row on: words of zeros are such.
fn bring_tail(b: Bases, lane: u32, step: u32) -> Brought {
  let n = step * MATRIX_DEPTH + row_brought(lane);
  var next: Brought;
  if n < params.rows { next.w0 = load_eighth(false, b.w0 + row_at(n), b.column); }
  if n + ROWS_ON < params.rows {
    next.w1 = load_eighth(GATED, b.w1 + row_at(n + ROWS_ON), b.column + 8u * EIGHTS_ON);
  }
  return next;
}

fn put_eighth(n: u32, eight: u32, w: Eighth) {
  let column = 8u * eight;
  put_four(n, 2u * eight, low_of(w, column));
  put_four(n, 2u * eight + 1u, high_of(w, column));
}

fn put_brought(lane: u32, next: Brought) {
  let n = row_brought(lane);
  let eight = eight_brought(lane);
  put_eighth(n, eight, next.w0);
  put_eighth(n + select(ROWS_ON, MATRIX_DEPTH, GATED), eight + EIGHTS_ON, next.w1);
}
