// Stores of eight columns by two 64-bit vectors. Needs wide_floats.wgsl; columns and the starts of rows are
// multiples of 4. Twin of store_ones.wgsl and store_eights.wgsl.
alias Out = vec2<u64>;

fn store_four(at: u32, column: u32, v: vec4<f32>) {
  if column < params.columns {
    let i = (at + column) / 4u;
    var sum = v;
    if params.add == 1u { sum += four_of(out[i]); }
    out[i] = wide_of(sum);
  }
}

// Eight columns of the row that starts at `at`.
fn store_eight(at: u32, column: u32, v: Eight) {
  store_four(at, column, v.lo);
  store_four(at, column + 4u, v.hi);
}
