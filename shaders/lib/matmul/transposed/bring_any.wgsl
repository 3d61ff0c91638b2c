// What a lane brings of weights to a step of transposed_tile: f32 rows of any length in place. Needs
// values_at.wgsl. Twin of bring_fours.wgsl and bring_eights.wgsl.
const TILE_DEPTH: u32 = 8u;
const FOURS: u32 = OUT_COLUMNS / 4u;

struct Brought { w0: vec4<f32>, w1: vec4<f32> }

// The expert's first value, and the lane's first column.
struct Bases { first: u32, column: u32 }

const ROWS_ON: u32 = select(WG / FOURS, 0u, GATED);

fn bases_of(expert: u32, first_column: u32, lane: u32) -> Bases {
  return Bases(expert_at(expert), first_column + lane % FOURS * 4u);
}

fn bring(b: Bases, lane: u32, step: u32) -> Brought {
  let n = step * MATRIX_DEPTH + lane / FOURS;
  return Brought(
    four_at(false, b.first + row_at(n), b.column),
    four_at(GATED, b.first + row_at(n + ROWS_ON), b.column));
}

fn bring_tail(b: Bases, lane: u32, step: u32) -> Brought {
  let n = step * MATRIX_DEPTH + lane / FOURS;
  var next: Brought;
  if n < params.rows { next.w0 = four_at(false, b.first + row_at(n), b.column); }
  if n + ROWS_ON < params.rows { next.w1 = four_at(GATED, b.first + row_at(n + ROWS_ON), b.column); }
  return next;
}

fn put_brought(lane: u32, next: Brought) {
  let n = lane / FOURS;
  put_four(n, lane % FOURS, next.w0);
  put_four(n + select(ROWS_ON, MATRIX_DEPTH, GATED), lane % FOURS, next.w1);
}
