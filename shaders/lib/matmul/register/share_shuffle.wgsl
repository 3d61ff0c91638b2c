// Rows of x, loaded once a lane and handed round by shuffles (0.3 ns for 8 lanes on llvmpipe, where a load
// costs 30).
// Needs a workgroup of one subgroup of at least 8 lanes in order of their index, which the host knows of the
// device.
alias RowBases = u32;
alias RowValues = Eight;

// Lane i has row first + i; rows past the item repeat its last one.
fn rows_at(tile: Tile, first: u32, lane: u32) -> RowBases {
  return x_base(x_row_of(tile.first + min(first + lane % 8u, tile.rows - 1u)));
}

// The same rows, from a later value on.
fn moved(bases: RowBases, by: u32) -> RowBases { return bases + by; }

fn load_rows(bases: RowBases, step: u32) -> RowValues { return load_x(bases, step); }

fn row_of(v: RowValues, row: u32) -> Eight {
  return Eight(subgroupShuffle(v.lo, row), subgroupShuffle(v.hi, row));
}
