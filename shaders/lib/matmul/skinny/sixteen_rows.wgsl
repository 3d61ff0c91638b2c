// Sums of a lane of matmul_skinny for TILE_ROWS = 16: rows 0 to 3, 4 to 7, and so on. Needs Four, add_rows,
// finish. Twin of eight_rows.wgsl.
struct Sums { a: Four, b: Four, c: Four, d: Four }

fn x_two(at: At, j: u32, four: u32) -> vec2<f32> {
  return vec2<f32>(
    x_tile[at.tile][at.part][at.k4][j][four][0], x_tile[at.tile][at.part][at.k4][j][four][1]);
}

fn add_one_two(sums: Four, x: vec2<f32>, left: f32, right: f32) -> Four {
  let l = fma(x, vec2<f32>(left), sums.left.xy);
  let r = fma(x, vec2<f32>(right), sums.right.xy);
  return Four(vec4<f32>(l, sums.left.zw), vec4<f32>(r, sums.right.zw));
}

// The same where the last two of them are not there.
fn add_two_rows(sums: Four, at: At, four: u32, left: vec4<f32>, right: vec4<f32>) -> Four {
  var next = add_one_two(sums, x_two(at, 0u, four), left.x, right.x);
  next = add_one_two(next, x_two(at, 1u, four), left.y, right.y);
  next = add_one_two(next, x_two(at, 2u, four), left.z, right.z);
  return add_one_two(next, x_two(at, 3u, four), left.w, right.w);
}

// `rows`, a constant wherever this is called, are 10, 12 or 16.
fn add_four(sums: Sums, rows: u32, at: At, left: vec4<f32>, right: vec4<f32>) -> Sums {
  var next = sums;
  next.a = add_rows(sums.a, at, 0u, left, right);
  next.b = add_rows(sums.b, at, 1u, left, right);
  if rows == 10u { next.c = add_two_rows(sums.c, at, 2u, left, right); }
  if rows > 10u { next.c = add_rows(sums.c, at, 2u, left, right); }
  if rows > 12u { next.d = add_rows(sums.d, at, 3u, left, right); }
  return next;
}

fn finish_all(tile: Tile, column: u32, lane: u32, sums: Sums) {
  finish(tile, 0u, column, lane, sums.a);
  finish(tile, 4u, column, lane, sums.b);
  if tile.rows > 8u { finish(tile, 8u, column, lane, sums.c); }
  if tile.rows > 12u { finish(tile, 12u, column, lane, sums.d); }
}
