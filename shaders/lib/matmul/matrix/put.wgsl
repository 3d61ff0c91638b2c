// Where the kernels on matrix units put what their lanes bring: cut into parts.
// The first of the parts that a value is cut into: 11 bits of it, rounded. By its bits, because compilers may
// take the way to f16 and back for nothing (Mesa does), and then the rest is 0.
fn first_part(v: vec4<f32>, parts: u32) -> vec4<f32> {
  if parts > 1u {
    return bitcast<vec4<f32>>((bitcast<vec4<u32>>(v) + vec4<u32>(0x1000u)) & vec4<u32>(0xffffe000u));
  }
  return v;
}

// The first `count` of four values that follow one another along K: four `k4` of the step, from its value `k`
// on. `count` is a constant, 1, 2 or 4, that divides `k`.
fn put_x_part(part: u32, row: u32, k4: u32, k: u32, v: vec4<Input>, count: u32) {
  let square = row / SIDE;
  if count == 1u {
    x_tile[part][square][k4 / ROW_FOURS][row % SIDE][k4 % ROW_FOURS][k / 2u][k % 2u] = v.x;
  } else {
    let pair = select(k / 2u, 0u, count == 4u);
    x_tile[part][square][k4 / ROW_FOURS][row % SIDE][k4 % ROW_FOURS][pair][0] = v.x;
    x_tile[part][square][k4 / ROW_FOURS][row % SIDE][k4 % ROW_FOURS][pair][1] = v.y;
  }
  if count == 4u {
    x_tile[part][square][k4 / ROW_FOURS][row % SIDE][k4 % ROW_FOURS][1][0] = v.z;
    x_tile[part][square][k4 / ROW_FOURS][row % SIDE][k4 % ROW_FOURS][1][1] = v.w;
  }
}

fn put_x(row: u32, k4: u32, k: u32, v: vec4<f32>, count: u32) {
  let first = first_part(v, X_PARTS);
  put_x_part(0u, row, k4, k, vec4<Input>(first), count);
  if X_PARTS > 1u { put_x_part(X_PARTS - 1u, row, k4, k, vec4<Input>(v - first), count); }
}

// The same of a column.
fn put_w_part(part: u32, column: u32, k4: u32, k: u32, v: vec4<Input>, count: u32) {
  let square = column / SIDE;
  if count == 1u {
    w_tile[part][square][k4 / ROW_FOURS][column % SIDE][k4 % ROW_FOURS][k / 2u][k % 2u] = v.x;
  } else {
    let pair = select(k / 2u, 0u, count == 4u);
    w_tile[part][square][k4 / ROW_FOURS][column % SIDE][k4 % ROW_FOURS][pair][0] = v.x;
    w_tile[part][square][k4 / ROW_FOURS][column % SIDE][k4 % ROW_FOURS][pair][1] = v.y;
  }
  if count == 4u {
    w_tile[part][square][k4 / ROW_FOURS][column % SIDE][k4 % ROW_FOURS][1][0] = v.z;
    w_tile[part][square][k4 / ROW_FOURS][column % SIDE][k4 % ROW_FOURS][1][1] = v.w;
  }
}

fn put_w(column: u32, k4: u32, k: u32, v: vec4<f32>, count: u32) {
  let first = first_part(v, W_PARTS);
  put_w_part(0u, column, k4, k, vec4<Input>(first), count);
  if W_PARTS > 1u { put_w_part(W_PARTS - 1u, column, k4, k, vec4<Input>(v - first), count); }
}

fn largest_of(v: vec4<f32>) -> f32 {
  let m = max(abs(v.xy), abs(v.zw));
  return max(m.x, m.y);
}
