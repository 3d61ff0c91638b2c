// What lanes bring of neighbouring rows or columns of a tile, at places that follow one another along K; put
// across, since squares lie along K, as units load them.
// Four neighbours at each of up to four places: `count` of them, a constant, 1, 2 or 4.
struct Fours {
  v0: vec4<f32>,
  v1: vec4<f32>,
  v2: vec4<f32>,
  v3: vec4<f32>,
}

// The largest of each neighbour.
fn largest_of_fours(v: Fours, count: u32) -> vec4<f32> {
  var most = abs(v.v0);
  if count > 1u { most = max(most, abs(v.v1)); }
  if count > 2u { most = max(most, max(abs(v.v2), abs(v.v3))); }
  return most;
}

fn scales_of_four_columns(column: u32) -> vec4<f32> {
  return vec4<f32>(
    scale_down(column_exponent[column]), scale_down(column_exponent[column + 1u]),
    scale_down(column_exponent[column + 2u]), scale_down(column_exponent[column + 3u]));
}

// What four columns have seen.
fn note_four_columns(column: u32, seen: vec4<f32>) {
  atomicMax(&column_largest[column], bitcast<u32>(seen.x));
  atomicMax(&column_largest[column + 1u], bitcast<u32>(seen.y));
  atomicMax(&column_largest[column + 2u], bitcast<u32>(seen.z));
  atomicMax(&column_largest[column + 3u], bitcast<u32>(seen.w));
}

// Fours of columns, scaled, `next` columns on from a place.
fn put_fours_w(at: Spot, next: u32, v: Fours, by: vec4<f32>, count: u32) {
  let v0 = v.v0 * by;
  let v1 = v.v1 * by;
  let v2 = v.v2 * by;
  let v3 = v.v3 * by;
  put_w(at, next, vec4<f32>(v0.x, v1.x, v2.x, v3.x), count);
  put_w(at, next + 1u, vec4<f32>(v0.y, v1.y, v2.y, v3.y), count);
  put_w(at, next + 2u, vec4<f32>(v0.z, v1.z, v2.z, v3.z), count);
  put_w(at, next + 3u, vec4<f32>(v0.w, v1.w, v2.w, v3.w), count);
}
