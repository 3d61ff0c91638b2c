// Rows of x on their way to matrix units: what a lane brings of them to a step, four values along K of each
// of up to four rows. Needs a piece that loads x, and one that says which row is a slot's.
// Rows that one load of all lanes covers, and loads of a lane.
const X_ROWS: u32 = WG / (STEP_DEPTH / 4u);
const X_LOADS: u32 = max(TILE_ROWS / X_ROWS, 1u);

struct Rows {
  v0: vec4<f32>,
  v1: vec4<f32>,
  v2: vec4<f32>,
  v3: vec4<f32>,
}

// Where a lane's rows begin. Rows past the end are clamped to the last one, and not stored.
fn rows_at(tile: Tile, lane: u32) -> vec4<u32> {
  let last_row = tile.rows - 1u;
  let row = lane / (STEP_DEPTH / 4u);
  var at: vec4<u32>;
  at[0] = x_base(x_row_of(tile.first + min(row, last_row)));
  if X_LOADS > 1u { at[1] = x_base(x_row_of(tile.first + min(row + X_ROWS, last_row))); }
  if X_LOADS > 2u {
    at[2] = x_base(x_row_of(tile.first + min(row + 2u * X_ROWS, last_row)));
    at[3] = x_base(x_row_of(tile.first + min(row + 3u * X_ROWS, last_row)));
  }
  return at;
}

// The value of a step's that a lane's begin with.
fn first_of_rows(lane: u32, step: u32) -> u32 {
  return step * STEP_DEPTH + lane % (STEP_DEPTH / 4u) * 4u;
}

fn bring_rows(at: vec4<u32>, k: u32) -> Rows {
  var next: Rows;
  next.v0 = load_x(at[0], k);
  if X_LOADS > 1u { next.v1 = load_x(at[1], k); }
  if X_LOADS > 2u {
    next.v2 = load_x(at[2], k);
    next.v3 = load_x(at[3], k);
  }
  return next;
}

// The same with zeros past the end.
fn bring_rows_tail(at: vec4<u32>, k: u32) -> Rows {
  var next: Rows;
  next.v0 = load_x_tail(at[0], k);
  if X_LOADS > 1u { next.v1 = load_x_tail(at[1], k); }
  if X_LOADS > 2u {
    next.v2 = load_x_tail(at[2], k);
    next.v3 = load_x_tail(at[3], k);
  }
  return next;
}

fn largest_of_rows(next: Rows) -> vec4<f32> {
  return vec4<f32>(largest_of(next.v0), largest_of(next.v1), largest_of(next.v2), largest_of(next.v3));
}

fn note_rows(lane: u32, seen: vec4<f32>) {
  let row = lane / (STEP_DEPTH / 4u);
  if X_ROWS <= TILE_ROWS || row < TILE_ROWS {
    atomicMax(&row_largest[row], bitcast<u32>(seen[0]));
  }
  if X_LOADS > 1u { atomicMax(&row_largest[row + X_ROWS], bitcast<u32>(seen[1])); }
  if X_LOADS > 2u {
    atomicMax(&row_largest[row + 2u * X_ROWS], bitcast<u32>(seen[2]));
    atomicMax(&row_largest[row + 3u * X_ROWS], bitcast<u32>(seen[3]));
  }
}

fn scales_of_rows(lane: u32) -> vec4<f32> {
  let row = lane / (STEP_DEPTH / 4u);
  var by: vec4<f32>;
  by[0] = scale_down(row_exponent[min(row, TILE_ROWS - 1u)]);
  if X_LOADS > 1u { by[1] = scale_down(row_exponent[row + X_ROWS]); }
  if X_LOADS > 2u {
    by[2] = scale_down(row_exponent[row + 2u * X_ROWS]);
    by[3] = scale_down(row_exponent[row + 3u * X_ROWS]);
  }
  return by;
}

// Where a lane puts the first of its rows.
fn spot_of_rows(lane: u32) -> Spot {
  return spot(lane / (STEP_DEPTH / 4u) % TILE_ROWS, lane % (STEP_DEPTH / 4u));
}

fn rows_on(at: Spot, rows: u32) -> Spot {
  return Spot(at.square + rows / SIDE, at.line, at.k4, at.k);
}

// Puts a lane's rows in their place, scaled; what is the largest so far.
fn put_rows(lane: u32, at: Spot, next: Rows, by: vec4<f32>, seen: vec4<f32>) -> vec4<f32> {
  var most = seen;
  if X_ROWS <= TILE_ROWS || lane / (STEP_DEPTH / 4u) < TILE_ROWS {
    most[0] = max(most[0], largest_of(next.v0));
    put_x(at, 0u, next.v0 * by[0], 4u);
  }
  if X_LOADS > 1u {
    most[1] = max(most[1], largest_of(next.v1));
    put_x(rows_on(at, X_ROWS), 0u, next.v1 * by[1], 4u);
  }
  if X_LOADS > 2u {
    most[2] = max(most[2], largest_of(next.v2));
    put_x(rows_on(at, 2u * X_ROWS), 0u, next.v2 * by[2], 4u);
    most[3] = max(most[3], largest_of(next.v3));
    put_x(rows_on(at, 3u * X_ROWS), 0u, next.v3 * by[3], 4u);
  }
  return most;
}
