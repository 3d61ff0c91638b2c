// Stores of eight columns by one 64-bit vector. Needs wide_floats.wgsl; columns and the starts of rows are
// multiples of 8. Twin of store_ones.wgsl and store_fours.wgsl.
alias Out = vec4<u64>;

// Eight columns of the row that starts at `at`.
fn store_eight(at: u32, column: u32, v: Eight) {
  if column < params.columns {
    let i = (at + column) / 8u;
    var sum = v;
    if params.add == 1u {
      let before = values_of(out[i]);
      sum = Eight(v.lo + before.lo, v.hi + before.hi);
    }
    out[i] = vec4(wide_of(sum.lo), wide_of(sum.hi));
  }
}
