// What a lane brings of weights to a step of transposed_tile: f32, two words of four columns, of two rows or
// of two places of a row; GATED: one of each matrix. Needs words_at.wgsl. Twin of bring_eights.wgsl and
// bring_any.wgsl.
const TILE_DEPTH: u32 = 8u;
const FOURS: u32 = OUT_COLUMNS / 4u;

struct Brought { w0: vec4<f32>, w1: vec4<f32> }

// Lanes that are neighbours load neighbours: rows of a panel, words of a row.
fn row_brought(lane: u32) -> u32 {
  return select(lane % MATRIX_DEPTH, lane / FOURS, PANEL == 1u);
}
fn four_brought(lane: u32) -> u32 {
  return select(lane / MATRIX_DEPTH, lane % FOURS, PANEL == 1u);
}

// The row and the four of the second word.
const ROWS_ON: u32 = select(0u, WG / FOURS, PANEL == 1u && !GATED);
const FOURS_ON: u32 = select(0u, WG / MATRIX_DEPTH, PANEL != 1u && !GATED);

struct Bases { w0: u32, w1: u32 }

fn bases_of(expert: u32, first_column: u32, lane: u32) -> Bases {
  let first = expert_at(expert);
  let last = row_words() - 1u;
  let word = first_column / 4u + four_brought(lane);
  return Bases(first + min(word, last) * PANEL, first + min(word + FOURS_ON, last) * PANEL);
}

fn bring(b: Bases, lane: u32, step: u32) -> Brought {
  let n = step * MATRIX_DEPTH + row_brought(lane);
  return Brought(
    unpack_low(load_weights(false, b.w0 + row_at(n), 0u)),
    unpack_low(load_weights(GATED, b.w1 + row_at(n + ROWS_ON), 0u)));
}

// The same with zeros from the last row on.
fn bring_tail(b: Bases, lane: u32, step: u32) -> Brought {
  let n = step * MATRIX_DEPTH + row_brought(lane);
  var next: Brought;
  if n < params.rows { next.w0 = unpack_low(load_weights(false, b.w0 + row_at(n), 0u)); }
  if n + ROWS_ON < params.rows {
    next.w1 = unpack_low(load_weights(GATED, b.w1 + row_at(n + ROWS_ON), 0u));
  }
  return next;
}

fn put_brought(lane: u32, next: Brought) {
  let n = row_brought(lane);
  let four = four_brought(lane);
  put_four(n, four, next.w0);
  put_four(n + select(ROWS_ON, MATRIX_DEPTH, GATED), four + FOURS_ON, next.w1);
}
