// Where matmul_matrix puts what its lanes bring: scaled, and cut into parts.
// The first of the parts that a value is cut into: 11 bits of it, rounded. By its bits, because compilers may
// take the way to f16 and back for nothing (Mesa does), and then the rest is 0.
fn first_part(v: vec4<f32>, parts: u32) -> vec4<f32> {
  if parts > 1u {
    return bitcast<vec4<f32>>((bitcast<vec4<u32>>(v) + vec4<u32>(0x1000u)) & vec4<u32>(0xffffe000u));
  }
  return v;
}

fn put_x(row: u32, k4: u32, v: vec4<f32>) {
  let first = first_part(v, X_PARTS);
  let high = vec4<Input>(first);
  let square = row / SIDE;
  let k = k4 / ROW_FOURS;
  x_tile[0][square][k][row % SIDE][k4 % ROW_FOURS][0] = high.x;
  x_tile[0][square][k][row % SIDE][k4 % ROW_FOURS][1] = high.y;
  x_tile[0][square][k][row % SIDE][k4 % ROW_FOURS][2] = high.z;
  x_tile[0][square][k][row % SIDE][k4 % ROW_FOURS][3] = high.w;
  if X_PARTS > 1u {
    let low = vec4<Input>(v - first);
    x_tile[X_PARTS - 1u][square][k][row % SIDE][k4 % ROW_FOURS][0] = low.x;
    x_tile[X_PARTS - 1u][square][k][row % SIDE][k4 % ROW_FOURS][1] = low.y;
    x_tile[X_PARTS - 1u][square][k][row % SIDE][k4 % ROW_FOURS][2] = low.z;
    x_tile[X_PARTS - 1u][square][k][row % SIDE][k4 % ROW_FOURS][3] = low.w;
  }
}

fn put_w(column: u32, k4: u32, v: vec4<f32>) {
  let first = first_part(v, W_PARTS);
  let high = vec4<Input>(first);
  let square = column / SIDE;
  let k = k4 / ROW_FOURS;
  w_tile[0][square][k][column % SIDE][k4 % ROW_FOURS][0] = high.x;
  w_tile[0][square][k][column % SIDE][k4 % ROW_FOURS][1] = high.y;
  w_tile[0][square][k][column % SIDE][k4 % ROW_FOURS][2] = high.z;
  w_tile[0][square][k][column % SIDE][k4 % ROW_FOURS][3] = high.w;
  if W_PARTS > 1u {
    let low = vec4<Input>(v - first);
    w_tile[W_PARTS - 1u][square][k][column % SIDE][k4 % ROW_FOURS][0] = low.x;
    w_tile[W_PARTS - 1u][square][k][column % SIDE][k4 % ROW_FOURS][1] = low.y;
    w_tile[W_PARTS - 1u][square][k][column % SIDE][k4 % ROW_FOURS][2] = low.z;
    w_tile[W_PARTS - 1u][square][k][column % SIDE][k4 % ROW_FOURS][3] = low.w;
  }
}

// A lane's fours of a column; the largest of them.
fn put_carried(column: u32, part: u32, words: Carried, by: f32) -> f32 {
  let scale = carried_scale(words);
  let k4 = part * LANE_FOURS;
  let v = carried_four(words, scale, 0u);
  var m = largest_of(v);
  put_w(column, k4, v * by);
  if LANE_FOURS > 1u {
    let next = carried_four(words, scale, 1u);
    m = max(m, largest_of(next));
    put_w(column, k4 + 1u, next * by);
  }
  if LANE_FOURS > 2u {
    let third = carried_four(words, scale, 2u);
    m = max(m, largest_of(third));
    put_w(column, k4 + 2u, third * by);
    let last = carried_four(words, scale, 3u);
    m = max(m, largest_of(last));
    put_w(column, k4 + 3u, last * by);
  }
  return m;
}

// Puts what a lane has brought in its place, scaled; what is the largest so far.
fn put(lane: u32, part: u32, next: Ahead, by: Lane, seen: Lane) -> Lane {
  var most = seen;
  let row = lane / (STEP_DEPTH / 4u);
  let k4 = lane % (STEP_DEPTH / 4u);
  if X_ROWS <= TILE_ROWS || row < TILE_ROWS {
    most.x[0] = max(most.x[0], largest_of(next.x0));
    put_x(row, k4, next.x0 * by.x[0]);
  }
  if X_LOADS > 1u {
    most.x[1] = max(most.x[1], largest_of(next.x1));
    put_x(row + X_ROWS, k4, next.x1 * by.x[1]);
  }
  if X_LOADS > 2u {
    most.x[2] = max(most.x[2], largest_of(next.x2));
    put_x(row + 2u * X_ROWS, k4, next.x2 * by.x[2]);
    most.x[3] = max(most.x[3], largest_of(next.x3));
    put_x(row + 3u * X_ROWS, k4, next.x3 * by.x[3]);
  }
  if WG <= OUT_COLUMNS * COLUMN_LANES || lane < OUT_COLUMNS * COLUMN_LANES {
    let column = lane % OUT_COLUMNS;
    most.left = max(most.left, put_carried(column, part, next.left, by.left));
    if GATED {
      most.right = max(most.right, put_carried(column + OUT_COLUMNS, part, next.right, by.right));
    }
  }
  return most;
}
