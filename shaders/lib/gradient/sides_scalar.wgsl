// Eight values of a row of a and of b of any length, a load a value. Past the matrix, its last value, which
// is not stored. Twin of sides_wide.wgsl and sides_vec4.wgsl.
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;

fn a_four(base: u32, n: u32) -> vec4<f32> {
  let at = vec4(base) + min(vec4(n) + vec4(0u, 1u, 2u, 3u), vec4(params.rows - 1u));
  return vec4(a[at.x], a[at.y], a[at.z], a[at.w]);
}

fn b_four(base: u32, k: u32) -> vec4<f32> {
  let at = vec4(base) + min(vec4(k) + vec4(0u, 1u, 2u, 3u), vec4(params.columns - 1u));
  return vec4(b[at.x], b[at.y], b[at.z], b[at.w]);
}

fn load_a(row: u32, n: u32) -> Eight {
  let base = row * params.a_stride + params.a_first;
  return Eight(a_four(base, n), a_four(base, n + 4u));
}

fn load_b(row: u32, k: u32) -> Eight {
  let base = row * params.b_stride;
  return Eight(b_four(base, k), b_four(base, k + 4u));
}
