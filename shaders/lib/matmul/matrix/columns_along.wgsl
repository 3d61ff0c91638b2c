// Columns of weights on their way to the units of matmul_matrix, values along K: one of either matrix a lane.
// Needs carry_words.wgsl or carry_blocks.wgsl.
// Lanes that a column of a matrix is shared out to, and fours that each of them brings.
const COLUMN_LANES: u32 = min(WG / OUT_COLUMNS, 4u);
const LANE_FOURS: u32 = STEP_DEPTH / 4u / COLUMN_LANES;

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

// A lane's fours of a column, put from a place on; the largest of them.
fn put_carried(at: Spot, words: Carried, by: f32) -> f32 {
  let scale = carried_scale(words);
  let v = carried_four(words, scale, 0u);
  var m = largest_of(v);
  put_w(at, 0u, v * by, 4u);
  if LANE_FOURS > 1u {
    let next = carried_four(words, scale, 1u);
    m = max(m, largest_of(next));
    put_w(Spot(at.square, at.line, at.k4 + 1u, 0u), 0u, next * by, 4u);
  }
  if LANE_FOURS > 2u {
    let third = carried_four(words, scale, 2u);
    m = max(m, largest_of(third));
    put_w(Spot(at.square, at.line, at.k4 + 2u, 0u), 0u, third * by, 4u);
    let last = carried_four(words, scale, 3u);
    m = max(m, largest_of(last));
    put_w(Spot(at.square, at.line, at.k4 + 3u, 0u), 0u, last * by, 4u);
  }
  return m;
}
