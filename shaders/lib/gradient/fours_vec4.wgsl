// Four values of a row of a and of b by one load, and stores of four: rows, columns, strides and a_first are
// multiples of 4. Past the matrix, its last values, which are not stored. Twin of fours_scalar.wgsl.
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> b: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>;

fn load_a(row: u32, n: u32) -> vec4<f32> {
  return a[(row * params.a_stride + params.a_first + min(n, params.rows - 4u)) / 4u];
}

fn load_b(row: u32, k: u32) -> vec4<f32> {
  return b[(row * params.b_stride + min(k, params.columns - 4u)) / 4u];
}

fn store_out(at: u32, column: u32, v: vec4<f32>) {
  if column < params.columns {
    let i = (at + column) / 4u;
    var sum = v;
    if params.add == 1u { sum += out[i]; }
    out[i] = sum;
  }
}
