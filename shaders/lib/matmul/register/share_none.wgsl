// Rows of x, loaded by every lane: no feature, no assumption. Workgroup memory with barriers would cost as
// many loads.
struct RowBases { lo: vec4<u32>, hi: vec4<u32> }
struct RowValues { r0: Eight, r1: Eight, r2: Eight, r3: Eight, r4: Eight, r5: Eight, r6: Eight, r7: Eight }

fn base_of(tile: Tile, row: u32) -> u32 { return x_base(x_row_of(tile.first + min(row, tile.rows - 1u))); }

fn rows_at(tile: Tile, first: u32, lane: u32) -> RowBases {
  return RowBases(
    vec4(
      base_of(tile, first), base_of(tile, first + 1u),
      base_of(tile, first + 2u), base_of(tile, first + 3u)),
    vec4(
      base_of(tile, first + 4u), base_of(tile, first + 5u),
      base_of(tile, first + 6u), base_of(tile, first + 7u)));
}

// The same rows, from a later value on.
fn moved(b: RowBases, by: u32) -> RowBases { return RowBases(b.lo + vec4(by), b.hi + vec4(by)); }

fn load_rows(b: RowBases, step: u32) -> RowValues {
  return RowValues(
    load_x(b.lo.x, step), load_x(b.lo.y, step), load_x(b.lo.z, step), load_x(b.lo.w, step),
    load_x(b.hi.x, step), load_x(b.hi.y, step), load_x(b.hi.z, step), load_x(b.hi.w, step));
}

fn row_of(v: RowValues, row: u32) -> Eight {
  switch row {
    case 0u: { return v.r0; }
    case 1u: { return v.r1; }
    case 2u: { return v.r2; }
    case 3u: { return v.r3; }
    case 4u: { return v.r4; }
    case 5u: { return v.r5; }
    case 6u: { return v.r6; }
    default: { return v.r7; }
  }
}
