// Rows and columns that are not finite, for matmul_matrix: made without matrices, as other kernels make them.
fn plain_four(sum: f32, words: Carried, scale: vec4<f32>, i: u32, x: u32, k: u32) -> f32 {
  let w = carried_four(words, scale, i);
  let v = load_x_tail(x, k + 4u * i);
  return fma(v.w, w.w, fma(v.z, w.z, fma(v.y, w.y, fma(v.x, w.x, sum))));
}

// What one lane brings of a column, times a row.
fn plain_part(sum: f32, x: u32, up: bool, base: u32, part: u32, step: u32) -> f32 {
  let words = carry_tail(up, base, part, step);
  let scale = carried_scale(words);
  let k = step * STEP_DEPTH + part * LANE_FOURS * 4u;
  var next = plain_four(sum, words, scale, 0u, x, k);
  if LANE_FOURS > 1u { next = plain_four(next, words, scale, 1u, x, k); }
  if LANE_FOURS > 2u {
    next = plain_four(next, words, scale, 2u, x, k);
    next = plain_four(next, words, scale, 3u, x, k);
  }
  return next;
}

// The product of a row and a column, one value at a time.
fn plain_product(x: u32, up: bool, base: u32) -> f32 {
  var sum = 0.0;
  let steps = (params.depth + STEP_DEPTH - 1u) / STEP_DEPTH;
  for (var step = 0u; step < steps; step++) {
    sum = plain_part(sum, x, up, base, 0u, step);
    if COLUMN_LANES > 1u { sum = plain_part(sum, x, up, base, 1u, step); }
    if COLUMN_LANES > 2u {
      sum = plain_part(sum, x, up, base, 2u, step);
      sum = plain_part(sum, x, up, base, 3u, step);
    }
  }
  return sum;
}

// Four of the output that store_sums left out.
fn store_plain(at: Bases, row: u32, column: u32) {
  let x = x_base(x_row_of(at.tile.first + row));
  var left: vec4<f32>;
  var right: vec4<f32>;
  for (var c = 0u; c < 4u; c++) {
    let base = weight_base(at.tile.expert, min(at.first_column + column + c, params.columns - 1u));
    for (var matrix = 0u; matrix < MATRICES; matrix++) {
      let product = plain_product(x, matrix == 1u, base);
      if matrix == 0u { left[c] = product; } else { right[c] = product; }
    }
  }
  finish(at, row, column, left, right);
}
