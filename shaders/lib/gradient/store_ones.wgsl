// Stores of eight columns, of any number: for sides_vec4.wgsl and sides_scalar.wgsl.
@group(0) @binding(4) var<storage, read_write> out: array<f32>;

fn store_one(at: u32, k: u32, value: f32) {
  if k < params.columns {
    var sum = value;
    if params.add == 1u { sum += out[at + k]; }
    out[at + k] = sum;
  }
}

// Columns k to k + 7 of the row that starts at `at`.
fn store_eight(at: u32, k: u32, v: Eight) {
  store_one(at, k, v.lo.x); store_one(at, k + 1u, v.lo.y);
  store_one(at, k + 2u, v.lo.z); store_one(at, k + 3u, v.lo.w);
  store_one(at, k + 4u, v.hi.x); store_one(at, k + 5u, v.hi.y);
  store_one(at, k + 6u, v.hi.z); store_one(at, k + 7u, v.hi.w);
}
