// Eight values of a row of a and of b by one 64-bit vector load. Needs common/wide_floats.wgsl; rows,
// columns, strides and a_first are multiples of 8. Past the matrix, its last values, which are not stored.
// Twin of sides_vec4.wgsl and sides_scalar.wgsl.
@group(0) @binding(1) var<storage, read> a: array<vec4<u64>>;
@group(0) @binding(2) var<storage, read> b: array<vec4<u64>>;

fn load_a(row: u32, n: u32) -> Eight {
  return values_of(a[(row * params.a_stride + params.a_first + min(n, params.rows - 8u)) / 8u]);
}

fn load_b(row: u32, k: u32) -> Eight {
  return values_of(b[(row * params.b_stride + min(k, params.columns - 8u)) / 8u]);
}
