// out[s, n] = sum_k w[e][n, k] * x[row(s), k];  GATED: activate(that, the same sum over a second matrix)
//   x [rows, depth] f32; row(s) = token_of[s] (GATHER) or s; out [slots, columns] f32
//   weights, weights_up [experts, columns, depth] in the layout of lib/matmul/layout.wgsl
//   items of up to TILE_ROWS rows of one expert, from the plan or dense; a lane has all of them and 8 columns (GATED: 4 of
//   each matrix)
// Grid: ceil(columns / TILE_COLUMNS) * items groups, items slowest; a workgroup is WG lanes.
// For devices where a load costs many multiply-adds and workgroup memory does not pay: everything stays in registers.

@compute @workgroup_size(WG)
fn matmul_register(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let across = (params.column_end - params.column_begin + TILE_COLUMNS - 1u) / TILE_COLUMNS;
  let id = flat(group, groups);
  let tile = tile_at(id / across);
  if tile.rows == 0u { return; }
  let column = params.column_begin + id % across * TILE_COLUMNS + 2u * lane;
  let block = block_at(tile.expert, column);
  let steps = steps_of(tile);
  let x0 = rows_at(tile, 0u, lane);
  var s0 = Octet();
  if TILE_ROWS == 8u && tile.rows <= 2u {
    for (var k = 0u; k < steps; k++) {
      let w = load_pairs(block, k);
      let x = load_rows(x0, k);
      s0.r0 = add(s0.r0, w, row_of(x, 0u));
      s0.r1 = add(s0.r1, w, row_of(x, 1u));
    }
    store_octet(tile, 0u, column, s0);
    return;
  }
  if TILE_ROWS == 8u && tile.rows <= 4u {
    for (var k = 0u; k < steps; k++) {
      let w = load_pairs(block, k);
      let x = load_rows(x0, k);
      s0.r0 = add(s0.r0, w, row_of(x, 0u));
      s0.r1 = add(s0.r1, w, row_of(x, 1u));
      s0.r2 = add(s0.r2, w, row_of(x, 2u));
      s0.r3 = add(s0.r3, w, row_of(x, 3u));
    }
    store_octet(tile, 0u, column, s0);
    return;
  }
  let x1 = rows_at(tile, 8u, lane);
  let x2 = rows_at(tile, 16u, lane);
  let x3 = rows_at(tile, 24u, lane);
  var s1 = Octet();
  var s2 = Octet();
  var s3 = Octet();
  for (var k = 0u; k < steps; k++) {
    let w = load_pairs(block, k);
    add_octet(&s0, w, load_rows(x0, k));
    if TILE_ROWS > 8u { add_octet(&s1, w, load_rows(x1, k)); }
    if TILE_ROWS > 16u { add_octet(&s2, w, load_rows(x2, k)); }
    if TILE_ROWS > 24u { add_octet(&s3, w, load_rows(x3, k)); }
  }
  store_octet(tile, 0u, column, s0);
  if TILE_ROWS > 8u { store_octet(tile, 8u, column, s1); }
  if TILE_ROWS > 16u { store_octet(tile, 16u, column, s2); }
  if TILE_ROWS > 24u { store_octet(tile, 24u, column, s3); }
}
