// The same as across.wgsl does of columns, of rows: for the kernel whose rows lie across.
fn scales_of_four_rows(row: u32) -> vec4<f32> {
  return vec4<f32>(
    scale_down(row_exponent[row]), scale_down(row_exponent[row + 1u]), scale_down(row_exponent[row + 2u]),
    scale_down(row_exponent[row + 3u]));
}

fn note_four_rows(row: u32, seen: vec4<f32>) {
  atomicMax(&row_largest[row], bitcast<u32>(seen.x));
  atomicMax(&row_largest[row + 1u], bitcast<u32>(seen.y));
  atomicMax(&row_largest[row + 2u], bitcast<u32>(seen.z));
  atomicMax(&row_largest[row + 3u], bitcast<u32>(seen.w));
}

fn put_fours_x(at: Spot, next: u32, v: Fours, by: vec4<f32>, count: u32) {
  let v0 = v.v0 * by;
  let v1 = v.v1 * by;
  let v2 = v.v2 * by;
  let v3 = v.v3 * by;
  put_x(at, next, vec4<f32>(v0.x, v1.x, v2.x, v3.x), count);
  put_x(at, next + 1u, vec4<f32>(v0.y, v1.y, v2.y, v3.y), count);
  put_x(at, next + 2u, vec4<f32>(v0.z, v1.z, v2.z, v3.z), count);
  put_x(at, next + 3u, vec4<f32>(v0.w, v1.w, v2.w, v3.w), count);
}
