// Four neighbouring columns of out: columns and out_stride are multiples of 4. Twin of out_ones.wgsl.
@group(0) @binding(6) var<storage, read_write> out: array<vec4<f32>>;
fn store_out(slot: u32, column: u32, v: vec4<f32>) {
  if column < params.columns {
    let i = (slot * params.out_stride + column) / 4u;
    var sum = v;
    if params.add == 1u { sum += out[i]; }
    out[i] = sum;
  }
}
