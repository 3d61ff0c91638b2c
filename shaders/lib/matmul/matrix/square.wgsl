// What a subgroup of a kernel on matrix units multiplies.
// What one square of K adds to the sums of a subgroup: two squares of rows (0 and 1), and the left (0, 1) and
// the right half (2, 3) of its columns (GATED: gate and up). Where it has one square across a half, the
// second of each is not used. Named, no array: nothing that a compiler would have to unroll to keep it in
// registers; no struct, in which lavapipe 26.2 does not bear squares of 16.
fn add_square(
  k: u32, rows: u32, left_columns: u32, right_columns: u32,
  s00: ptr<function, Sum>, s01: ptr<function, Sum>, s02: ptr<function, Sum>, s03: ptr<function, Sum>,
  s10: ptr<function, Sum>, s11: ptr<function, Sum>, s12: ptr<function, Sum>, s13: ptr<function, Sum>,
) {
  let x0 = coopLoadT<InputA>(&x_tile[0][rows][k][0][0][0][0], STRIDE);
  let x0_low = coopLoadT<InputA>(&x_tile[X_PARTS - 1u][rows][k][0][0][0][0], STRIDE);
  let x1 = coopLoadT<InputA>(&x_tile[0][rows + 1u][k][0][0][0][0], STRIDE);
  let x1_low = coopLoadT<InputA>(&x_tile[X_PARTS - 1u][rows + 1u][k][0][0][0][0], STRIDE);
  let left = coopLoad<InputB>(&w_tile[0][left_columns][k][0][0][0][0], STRIDE);
  *s00 = coopMultiplyAdd(x0, left, *s00);
  *s10 = coopMultiplyAdd(x1, left, *s10);
  if X_PARTS > 1u {
    *s00 = coopMultiplyAdd(x0_low, left, *s00);
    *s10 = coopMultiplyAdd(x1_low, left, *s10);
  }
  if W_PARTS > 1u {
    let low = coopLoad<InputB>(&w_tile[W_PARTS - 1u][left_columns][k][0][0][0][0], STRIDE);
    *s00 = coopMultiplyAdd(x0, low, *s00);
    *s10 = coopMultiplyAdd(x1, low, *s10);
  }
  if SQUARES_ACROSS > 2u {
    let next_left = coopLoad<InputB>(&w_tile[0][left_columns + 1u][k][0][0][0][0], STRIDE);
    *s01 = coopMultiplyAdd(x0, next_left, *s01);
    *s11 = coopMultiplyAdd(x1, next_left, *s11);
    if X_PARTS > 1u {
      *s01 = coopMultiplyAdd(x0_low, next_left, *s01);
      *s11 = coopMultiplyAdd(x1_low, next_left, *s11);
    }
    if W_PARTS > 1u {
      let low = coopLoad<InputB>(&w_tile[W_PARTS - 1u][left_columns + 1u][k][0][0][0][0], STRIDE);
      *s01 = coopMultiplyAdd(x0, low, *s01);
      *s11 = coopMultiplyAdd(x1, low, *s11);
    }
  }
  let right = coopLoad<InputB>(&w_tile[0][right_columns][k][0][0][0][0], STRIDE);
  *s02 = coopMultiplyAdd(x0, right, *s02);
  *s12 = coopMultiplyAdd(x1, right, *s12);
  if X_PARTS > 1u {
    *s02 = coopMultiplyAdd(x0_low, right, *s02);
    *s12 = coopMultiplyAdd(x1_low, right, *s12);
  }
  if W_PARTS > 1u {
    let low = coopLoad<InputB>(&w_tile[W_PARTS - 1u][right_columns][k][0][0][0][0], STRIDE);
    *s02 = coopMultiplyAdd(x0, low, *s02);
    *s12 = coopMultiplyAdd(x1, low, *s12);
  }
  if SQUARES_ACROSS > 2u {
    let next_right = coopLoad<InputB>(&w_tile[0][right_columns + 1u][k][0][0][0][0], STRIDE);
    *s03 = coopMultiplyAdd(x0, next_right, *s03);
    *s13 = coopMultiplyAdd(x1, next_right, *s13);
    if X_PARTS > 1u {
      *s03 = coopMultiplyAdd(x0_low, next_right, *s03);
      *s13 = coopMultiplyAdd(x1_low, next_right, *s13);
    }
    if W_PARTS > 1u {
      let low = coopLoad<InputB>(&w_tile[W_PARTS - 1u][right_columns + 1u][k][0][0][0][0], STRIDE);
      *s03 = coopMultiplyAdd(x0, low, *s03);
      *s13 = coopMultiplyAdd(x1, low, *s13);
    }
  }
}

// The same with one square of rows.
fn add_row(
  k: u32, rows: u32, left_columns: u32, right_columns: u32,
  s00: ptr<function, Sum>, s01: ptr<function, Sum>, s02: ptr<function, Sum>, s03: ptr<function, Sum>,
) {
  let x = coopLoadT<InputA>(&x_tile[0][rows][k][0][0][0][0], STRIDE);
  let x_low = coopLoadT<InputA>(&x_tile[X_PARTS - 1u][rows][k][0][0][0][0], STRIDE);
  let left = coopLoad<InputB>(&w_tile[0][left_columns][k][0][0][0][0], STRIDE);
  *s00 = coopMultiplyAdd(x, left, *s00);
  if X_PARTS > 1u {
    *s00 = coopMultiplyAdd(x_low, left, *s00);
  }
  if W_PARTS > 1u {
    let low = coopLoad<InputB>(&w_tile[W_PARTS - 1u][left_columns][k][0][0][0][0], STRIDE);
    *s00 = coopMultiplyAdd(x, low, *s00);
  }
  if SQUARES_ACROSS > 2u {
    let next_left = coopLoad<InputB>(&w_tile[0][left_columns + 1u][k][0][0][0][0], STRIDE);
    *s01 = coopMultiplyAdd(x, next_left, *s01);
    if X_PARTS > 1u {
      *s01 = coopMultiplyAdd(x_low, next_left, *s01);
    }
    if W_PARTS > 1u {
      let low = coopLoad<InputB>(&w_tile[W_PARTS - 1u][left_columns + 1u][k][0][0][0][0], STRIDE);
      *s01 = coopMultiplyAdd(x, low, *s01);
    }
  }
  let right = coopLoad<InputB>(&w_tile[0][right_columns][k][0][0][0][0], STRIDE);
  *s02 = coopMultiplyAdd(x, right, *s02);
  if X_PARTS > 1u {
    *s02 = coopMultiplyAdd(x_low, right, *s02);
  }
  if W_PARTS > 1u {
    let low = coopLoad<InputB>(&w_tile[W_PARTS - 1u][right_columns][k][0][0][0][0], STRIDE);
    *s02 = coopMultiplyAdd(x, low, *s02);
  }
  if SQUARES_ACROSS > 2u {
    let next_right = coopLoad<InputB>(&w_tile[0][right_columns + 1u][k][0][0][0][0], STRIDE);
    *s03 = coopMultiplyAdd(x, next_right, *s03);
    if X_PARTS > 1u {
      *s03 = coopMultiplyAdd(x_low, next_right, *s03);
    }
    if W_PARTS > 1u {
      let low = coopLoad<InputB>(&w_tile[W_PARTS - 1u][right_columns + 1u][k][0][0][0][0], STRIDE);
      *s03 = coopMultiplyAdd(x, low, *s03);
    }
  }
}
