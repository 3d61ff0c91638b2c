// Four neighbouring columns of out, any strides.
@group(0) @binding(6) var<storage, read_write> out: array<f32>;
fn store_out(slot: u32, column: u32, v: vec4<f32>) {
  let i = (slot - params.out_slot) * params.out_stride + params.column_base + column;
  if column < params.column_end { out[i] = v.x; }
  if column + 1u < params.column_end { out[i + 1u] = v.y; }
  if column + 2u < params.column_end { out[i + 2u] = v.z; }
  if column + 3u < params.column_end { out[i + 3u] = v.w; }
}
