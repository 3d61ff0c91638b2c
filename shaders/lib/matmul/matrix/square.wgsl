// What a subgroup of matmul_matrix multiplies.
// Sums of a subgroup: two squares of rows, and the left and the right half of its columns (GATED: gate and
// up). Where it has one square across a half, the second of each is not used. Named, no array: nothing that
// a compiler would have to unroll to keep it in registers.
struct Block {
  s00: Sum,
  s01: Sum,
  s02: Sum,
  s03: Sum,
  s10: Sum,
  s11: Sum,
  s12: Sum,
  s13: Sum,
}

// What one square of K adds.
fn add_square(block: Block, k: u32, rows: u32, left_columns: u32, right_columns: u32) -> Block {
  var next = block;
  let x0 = coopLoadT<InputA>(&x_tile[0][rows][k][0][0][0], STRIDE);
  let x0_low = coopLoadT<InputA>(&x_tile[X_PARTS - 1u][rows][k][0][0][0], STRIDE);
  let x1 = coopLoadT<InputA>(&x_tile[0][rows + 1u][k][0][0][0], STRIDE);
  let x1_low = coopLoadT<InputA>(&x_tile[X_PARTS - 1u][rows + 1u][k][0][0][0], STRIDE);
  let left = coopLoad<InputB>(&w_tile[0][left_columns][k][0][0][0], STRIDE);
  next.s00 = coopMultiplyAdd(x0, left, next.s00);
  next.s10 = coopMultiplyAdd(x1, left, next.s10);
  if X_PARTS > 1u {
    next.s00 = coopMultiplyAdd(x0_low, left, next.s00);
    next.s10 = coopMultiplyAdd(x1_low, left, next.s10);
  }
  if W_PARTS > 1u {
    let low = coopLoad<InputB>(&w_tile[W_PARTS - 1u][left_columns][k][0][0][0], STRIDE);
    next.s00 = coopMultiplyAdd(x0, low, next.s00);
    next.s10 = coopMultiplyAdd(x1, low, next.s10);
  }
  if SQUARES_ACROSS > 2u {
    let next_left = coopLoad<InputB>(&w_tile[0][left_columns + 1u][k][0][0][0], STRIDE);
    next.s01 = coopMultiplyAdd(x0, next_left, next.s01);
    next.s11 = coopMultiplyAdd(x1, next_left, next.s11);
    if X_PARTS > 1u {
      next.s01 = coopMultiplyAdd(x0_low, next_left, next.s01);
      next.s11 = coopMultiplyAdd(x1_low, next_left, next.s11);
    }
    if W_PARTS > 1u {
      let low = coopLoad<InputB>(&w_tile[W_PARTS - 1u][left_columns + 1u][k][0][0][0], STRIDE);
      next.s01 = coopMultiplyAdd(x0, low, next.s01);
      next.s11 = coopMultiplyAdd(x1, low, next.s11);
    }
  }
  let right = coopLoad<InputB>(&w_tile[0][right_columns][k][0][0][0], STRIDE);
  next.s02 = coopMultiplyAdd(x0, right, next.s02);
  next.s12 = coopMultiplyAdd(x1, right, next.s12);
  if X_PARTS > 1u {
    next.s02 = coopMultiplyAdd(x0_low, right, next.s02);
    next.s12 = coopMultiplyAdd(x1_low, right, next.s12);
  }
  if W_PARTS > 1u {
    let low = coopLoad<InputB>(&w_tile[W_PARTS - 1u][right_columns][k][0][0][0], STRIDE);
    next.s02 = coopMultiplyAdd(x0, low, next.s02);
    next.s12 = coopMultiplyAdd(x1, low, next.s12);
  }
  if SQUARES_ACROSS > 2u {
    let next_right = coopLoad<InputB>(&w_tile[0][right_columns + 1u][k][0][0][0], STRIDE);
    next.s03 = coopMultiplyAdd(x0, next_right, next.s03);
    next.s13 = coopMultiplyAdd(x1, next_right, next.s13);
    if X_PARTS > 1u {
      next.s03 = coopMultiplyAdd(x0_low, next_right, next.s03);
      next.s13 = coopMultiplyAdd(x1_low, next_right, next.s13);
    }
    if W_PARTS > 1u {
      let low = coopLoad<InputB>(&w_tile[W_PARTS - 1u][right_columns + 1u][k][0][0][0], STRIDE);
      next.s03 = coopMultiplyAdd(x0, low, next.s03);
      next.s13 = coopMultiplyAdd(x1, low, next.s13);
    }
  }
  return next;
}
