// Weights on their way to matrix units by words of neighbouring columns: a lane brings such a unit of W_LOADS
// rows that follow one another. Needs across.wgsl, and unit_eights.wgsl, unit_fours.wgsl
// or unit_any.wgsl.
const UNITS: u32 = COLUMNS / (4u * UNIT_FOURS);
// Lanes below one another, and rows that each of them brings.
const W_LANES: u32 = min(WG / UNITS, STEP_DEPTH);
const W_LOADS: u32 = STEP_DEPTH / W_LANES;

struct Units {
  u0: Unit,
  u1: Unit,
  u2: Unit,
  u3: Unit,
}

// Values of a unit's columns, one each.
struct Across {
  low: vec4<f32>,
  high: vec4<f32>,
}

// The first of a lane's columns, and of its rows. Lanes that are neighbours load neighbours: rows of a panel,
// words of a row.
fn column_brought(lane: u32) -> u32 {
  return 4u * UNIT_FOURS * (select(lane / W_LANES, lane, PANEL == 1u) % UNITS);
}
fn row_brought(lane: u32) -> u32 {
  return W_LOADS * (select(lane, lane / UNITS, PANEL == 1u) % W_LANES);
}

// Where a lane's units lie. Steps begin within a panel, and none reaches past one: places of rows add up.
fn units_at(expert: u32, column: u32, lane: u32) -> u32 {
  return unit_base(expert, column) + row_at(row_brought(lane));
}

fn bring_units(up: bool, base: u32, step: u32, column: u32) -> Units {
  let at = base + row_at(step * STEP_DEPTH);
  var next: Units;
  next.u0 = load_unit(up, at, column);
  if W_LOADS > 1u { next.u1 = load_unit(up, at + row_at(1u), column); }
  if W_LOADS > 2u {
    next.u2 = load_unit(up, at + row_at(2u), column);
    next.u3 = load_unit(up, at + row_at(3u), column);
  }
  return next;
}

// The same with zeros from the last row on: units of zeros are such.
fn bring_units_tail(up: bool, base: u32, step: u32, column: u32, lane: u32) -> Units {
  let at = base + row_at(step * STEP_DEPTH);
  let n = step * STEP_DEPTH + row_brought(lane);
  var next: Units;
  if n < params.rows { next.u0 = load_unit(up, at, column); }
  if W_LOADS > 1u && n + 1u < params.rows { next.u1 = load_unit(up, at + row_at(1u), column); }
  if W_LOADS > 2u && n + 2u < params.rows { next.u2 = load_unit(up, at + row_at(2u), column); }
  if W_LOADS > 2u && n + 3u < params.rows { next.u3 = load_unit(up, at + row_at(3u), column); }
  return next;
}

fn fours_of(next: Units, column: u32, high: bool) -> Fours {
  var v: Fours;
  if high {
    v.v0 = unit_high(next.u0, column);
    if W_LOADS > 1u { v.v1 = unit_high(next.u1, column); }
    if W_LOADS > 2u { v.v2 = unit_high(next.u2, column); v.v3 = unit_high(next.u3, column); }
  } else {
    v.v0 = unit_low(next.u0, column);
    if W_LOADS > 1u { v.v1 = unit_low(next.u1, column); }
    if W_LOADS > 2u { v.v2 = unit_low(next.u2, column); v.v3 = unit_low(next.u3, column); }
  }
  return v;
}

fn largest_of_units(next: Units, column: u32) -> Across {
  var most: Across;
  most.low = largest_of_fours(fours_of(next, column, false), W_LOADS);
  if UNIT_FOURS > 1u { most.high = largest_of_fours(fours_of(next, column, true), W_LOADS); }
  return most;
}

fn note_units(lane: u32, seen: Across) {
  note_four_columns(column_brought(lane), seen.low);
  if UNIT_FOURS > 1u { note_four_columns(column_brought(lane) + 4u, seen.high); }
}

fn scales_of_units(lane: u32) -> Across {
  var by: Across;
  by.low = scales_of_four_columns(column_brought(lane));
  if UNIT_FOURS > 1u { by.high = scales_of_four_columns(column_brought(lane) + 4u); }
  return by;
}

// Where a lane puts its units.
fn spot_of_units(lane: u32) -> Spot {
  return spot_of_lines(column_brought(lane), 4u * UNIT_FOURS, row_brought(lane));
}

// Puts a lane's units in their place, scaled; what is the largest so far. `column` is that of the matrix.
fn put_units(lane: u32, at: Spot, column: u32, next: Units, by: Across, seen: Across) -> Across {
  var most = seen;
  if WG <= UNITS * W_LANES || lane < UNITS * W_LANES {
    let low = fours_of(next, column, false);
    most.low = max(most.low, largest_of_fours(low, W_LOADS));
    put_fours_w(at, 0u, low, by.low, W_LOADS);
    if UNIT_FOURS > 1u {
      let high = fours_of(next, column, true);
      most.high = max(most.high, largest_of_fours(high, W_LOADS));
      put_fours_w(at, 4u, high, by.high, W_LOADS);
    }
  }
  return most;
}
