// Eight values of a row of a and of b by two loads each: rows, columns, strides and a_first are multiples of
// 4. Past the matrix, its last values, which are not stored. Twin of sides_wide.wgsl and sides_scalar.wgsl.
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> b: array<vec4<f32>>;

fn load_a(row: u32, n: u32) -> Eight {
  let base = (row * params.a_stride + params.a_first) / 4u;
  let last = params.rows / 4u - 1u;
  return Eight(a[base + min(n / 4u, last)], a[base + min(n / 4u + 1u, last)]);
}

fn load_b(row: u32, k: u32) -> Eight {
  let base = row * (params.b_stride / 4u);
  let last = params.columns / 4u - 1u;
  return Eight(b[base + min(k / 4u, last)], b[base + min(k / 4u + 1u, last)]);
}
