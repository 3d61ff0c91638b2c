// Sums of a lane of matmul_skinny for TILE_ROWS = 8: rows 0 to 3, and 4 to 7. Members, not an array: nothing
// that a compiler would have to unroll to keep it in registers. Needs Four, add_rows, finish. Twin of
// sixteen_rows.wgsl.
struct Sums { a: Four, b: Four }

// `rows`, a constant wherever this is called, are 4 or 8.
fn add_four(sums: Sums, rows: u32, at: At, left: vec4<f32>, right: vec4<f32>) -> Sums {
  var next = sums;
  next.a = add_rows(sums.a, at, 0u, left, right);
  if rows > 4u { next.b = add_rows(sums.b, at, 1u, left, right); }
  return next;
}

fn finish_all(tile: Tile, column: u32, lane: u32, sums: Sums) {
  finish(tile, 0u, column, lane, sums.a);
  if tile.rows > 4u { finish(tile, 4u, column, lane, sums.b); }
}
