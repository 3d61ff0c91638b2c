// Stores of eight columns, of any number, value by value. Needs eight_values.wgsl. Twin of store_fours.wgsl
// and store_eights.wgsl.
alias Out = f32;

fn store_one(at: u32, column: u32, value: f32) {
  if column < params.columns {
    var sum = value;
    if params.add == 1u { sum += out[at + column]; }
    out[at + column] = sum;
  }
}

// Eight columns of the row that starts at `at`.
fn store_eight(at: u32, column: u32, v: Eight) {
  store_one(at, column, v.lo.x); store_one(at, column + 1u, v.lo.y);
  store_one(at, column + 2u, v.lo.z); store_one(at, column + 3u, v.lo.w);
  store_one(at, column + 4u, v.hi.x); store_one(at, column + 5u, v.hi.y);
  store_one(at, column + 6u, v.hi.z); store_one(at, column + 7u, v.hi.w);
}
