// Four neighbouring columns of out: columns, column_base and out_stride are multiples of 4.
@group(0) @binding(6) var<storage, read_write> out: array<vec4<f32>>;
fn store_out(slot: u32, column: u32, v: vec4<f32>) {
  if column < params.column_end {
    out[((slot - params.out_slot) * params.out_stride + params.column_base + column) / 4u] = v;
  }
}
