// Eight values of a row of a and of b by one 64-bit vector load, and of out by one store: llvmpipe pays for
// both by their components. Needs SHADER_INT64; rows, columns, strides and a_first are multiples of 8. Past
// the matrix, its last values, which are not stored. Twin of sides_vec4.wgsl and sides_scalar.wgsl.
@group(0) @binding(1) var<storage, read> a: array<vec4<u64>>;
@group(0) @binding(2) var<storage, read> b: array<vec4<u64>>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<u64>>;

fn halves(v: u64) -> vec2<f32> { return vec2(bitcast<f32>(u32(v)), bitcast<f32>(u32(v >> 32u))); }

fn values_of(v: vec4<u64>) -> Eight {
  return Eight(vec4(halves(v.x), halves(v.y)), vec4(halves(v.z), halves(v.w)));
}

fn load_a(row: u32, n: u32) -> Eight {
  return values_of(a[(row * params.a_stride + params.a_first + min(n, params.rows - 8u)) / 8u]);
}

fn load_b(row: u32, k: u32) -> Eight {
  return values_of(b[(row * params.b_stride + min(k, params.columns - 8u)) / 8u]);
}

fn joined(v: vec2<f32>) -> u64 {
  return u64(bitcast<u32>(v.x)) | (u64(bitcast<u32>(v.y)) << 32u);
}

// Columns k to k + 7 of the row that starts at `at`.
fn store_eight(at: u32, k: u32, v: Eight) {
  if k < params.columns {
    let i = (at + k) / 8u;
    var sum = v;
    if params.add == 1u {
      let before = values_of(out[i]);
      sum = Eight(v.lo + before.lo, v.hi + before.hi);
    }
    out[i] = vec4<u64>(joined(sum.lo.xy), joined(sum.lo.zw), joined(sum.hi.xy), joined(sum.hi.zw));
  }
}
