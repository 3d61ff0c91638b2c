// Four neighbouring columns of out, any strides. Twin of out_fours.wgsl.
@group(0) @binding(6) var<storage, read_write> out: array<f32>;
fn store_one(at: u32, column: u32, value: f32) {
  if column < params.columns {
    var sum = value;
    if params.add == 1u { sum += out[at + column]; }
    out[at + column] = sum;
  }
}
fn store_out(slot: u32, column: u32, v: vec4<f32>) {
  let at = slot * params.out_stride;
  store_one(at, column, v.x); store_one(at, column + 1u, v.y);
  store_one(at, column + 2u, v.z); store_one(at, column + 3u, v.w);
}
