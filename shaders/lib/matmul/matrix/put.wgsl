// Where the kernels on matrix units put what their lanes bring: cut into parts.
// The first of the parts that a value is cut into: 11 bits of it, rounded. By its bits, because compilers may
// take the way to f16 and back for nothing (Mesa does), and then the rest is 0.
fn first_part(v: vec4<f32>, parts: u32) -> vec4<f32> {
  if parts > 1u {
    return bitcast<vec4<f32>>((bitcast<vec4<u32>>(v) + vec4<u32>(0x1000u)) & vec4<u32>(0xffffe000u));
  }
  return v;
}

// A place in x_tile or w_tile: a row (or column) of a square, and along K a four of the step and a value of
// it. Lanes find theirs before the loop: Mesa's compilers leave in a loop what is written there. Lines are
// masked in a form in which the bounds check folds away.
struct Spot {
  square: u32,
  line: u32,
  k4: u32,
  k: u32,
}

// The first `count` of four values that follow one another along K, `next` lines on in the square.
// `count` is a constant, 1, 2 or 4, that divides `k`.
fn put_x_part(part: u32, at: Spot, next: u32, v: vec4<Input>, count: u32) {
  let line = at.line + next;
  if count == 1u {
    x_tile[part][at.square][at.k4 / ROW_FOURS][line][at.k4 % ROW_FOURS][at.k / 2u][at.k % 2u] = v.x;
  } else {
    let pair = select(at.k / 2u, 0u, count == 4u);
    x_tile[part][at.square][at.k4 / ROW_FOURS][line][at.k4 % ROW_FOURS][pair][0] = v.x;
    x_tile[part][at.square][at.k4 / ROW_FOURS][line][at.k4 % ROW_FOURS][pair][1] = v.y;
  }
  if count == 4u {
    x_tile[part][at.square][at.k4 / ROW_FOURS][line][at.k4 % ROW_FOURS][1][0] = v.z;
    x_tile[part][at.square][at.k4 / ROW_FOURS][line][at.k4 % ROW_FOURS][1][1] = v.w;
  }
}

fn put_x(at: Spot, next: u32, v: vec4<f32>, count: u32) {
  let first = first_part(v, X_PARTS);
  put_x_part(0u, at, next, vec4<Input>(first), count);
  if X_PARTS > 1u { put_x_part(X_PARTS - 1u, at, next, vec4<Input>(v - first), count); }
}

fn put_w_part(part: u32, at: Spot, next: u32, v: vec4<Input>, count: u32) {
  let line = at.line + next;
  if count == 1u {
    w_tile[part][at.square][at.k4 / ROW_FOURS][line][at.k4 % ROW_FOURS][at.k / 2u][at.k % 2u] = v.x;
  } else {
    let pair = select(at.k / 2u, 0u, count == 4u);
    w_tile[part][at.square][at.k4 / ROW_FOURS][line][at.k4 % ROW_FOURS][pair][0] = v.x;
    w_tile[part][at.square][at.k4 / ROW_FOURS][line][at.k4 % ROW_FOURS][pair][1] = v.y;
  }
  if count == 4u {
    w_tile[part][at.square][at.k4 / ROW_FOURS][line][at.k4 % ROW_FOURS][1][0] = v.z;
    w_tile[part][at.square][at.k4 / ROW_FOURS][line][at.k4 % ROW_FOURS][1][1] = v.w;
  }
}

fn put_w(at: Spot, next: u32, v: vec4<f32>, count: u32) {
  let first = first_part(v, W_PARTS);
  put_w_part(0u, at, next, vec4<Input>(first), count);
  if W_PARTS > 1u { put_w_part(W_PARTS - 1u, at, next, vec4<Input>(v - first), count); }
}

// Of any line, from a four of the step on; and of so many lines from one on, from a value of the step on.
fn spot(line: u32, k4: u32) -> Spot {
  return Spot(line / SIDE, line % SIDE, k4, 0u);
}
fn spot_of_lines(line: u32, lines: u32, k: u32) -> Spot {
  return Spot(line / SIDE, line & (SIDE - lines), k / 4u, k % 4u);
}

fn largest_of(v: vec4<f32>) -> f32 {
  let m = max(abs(v.xy), abs(v.zw));
  return max(m.x, m.y);
}
