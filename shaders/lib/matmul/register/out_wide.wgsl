// Four neighbouring columns of out by one 64-bit vector store. Needs common/wide_floats.wgsl; columns, the
// ends of their window, column_base and out_stride are multiples of 4. Twin of ../out_scalar.wgsl.
@group(0) @binding(6) var<storage, read_write> out: array<vec2<u64>>;

fn store_out(slot: u32, column: u32, v: vec4<f32>) {
  if column < params.column_end {
    let at = (slot - params.out_slot) * params.out_stride + params.column_base + column;
    out[at / 4u] = wide_of(v);
  }
}
