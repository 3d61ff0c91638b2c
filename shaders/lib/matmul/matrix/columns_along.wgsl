// Columns of weights on their way to matmul_matrix's units, values along K: one of either matrix a lane. Needs
// carry_words.wgsl or carry_blocks.wgsl.
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

// A lane's fours of a column; the largest of them.
fn put_carried(column: u32, part: u32, words: Carried, by: f32) -> f32 {
  let scale = carried_scale(words);
  let k4 = part * LANE_FOURS;
  let v = carried_four(words, scale, 0u);
  var m = largest_of(v);
  put_w(column, k4, 0u, v * by, 4u);
  if LANE_FOURS > 1u {
    let next = carried_four(words, scale, 1u);
    m = max(m, largest_of(next));
    put_w(column, k4 + 1u, 0u, next * by, 4u);
  }
  if LANE_FOURS > 2u {
    let third = carried_four(words, scale, 2u);
    m = max(m, largest_of(third));
    put_w(column, k4 + 2u, 0u, third * by, 4u);
    let last = carried_four(words, scale, 3u);
    m = max(m, largest_of(last));
    put_w(column, k4 + 3u, 0u, last * by, 4u);
  }
  return m;
}
