// Four values of a row of a and of b of any length, and stores of four. Past the matrix, its last value,
// which is not stored. Twin of fours_vec4.wgsl.
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;

fn load_a(row: u32, n: u32) -> vec4<f32> {
  let last = vec4(params.rows - 1u);
  let at = vec4(row * params.a_stride + params.a_first) + min(vec4(n) + vec4(0u, 1u, 2u, 3u), last);
  return vec4(a[at.x], a[at.y], a[at.z], a[at.w]);
}

fn load_b(row: u32, k: u32) -> vec4<f32> {
  let last = vec4(params.columns - 1u);
  let at = vec4(row * params.b_stride) + min(vec4(k) + vec4(0u, 1u, 2u, 3u), last);
  return vec4(b[at.x], b[at.y], b[at.z], b[at.w]);
}

fn store_one(at: u32, column: u32, value: f32) {
  if column < params.columns {
    var sum = value;
    if params.add == 1u { sum += out[at + column]; }
    out[at + column] = sum;
  }
}

fn store_out(at: u32, column: u32, v: vec4<f32>) {
  store_one(at, column, v.x); store_one(at, column + 1u, v.y);
  store_one(at, column + 2u, v.z); store_one(at, column + 3u, v.w);
}
