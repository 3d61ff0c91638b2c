// out[s, n] = sum over k of x[row(s), k] * W[expert of s][n, k]                                  (plain)
// out[s, n] = activate(sum over k of x[row(s), k] * Wgate[e][n, k], the same sum with Wup)       (GATED)
//   x        [rows, K] f32, f16 or bf16; row(s) = token_of[s] (GATHER, where token_of is given) or s
//   plan     u32: token_of, items and their offsets (lib/matmul/tile_plan.wgsl); none in the dense variant
//   places   u32: which expert of the weights holds each of the plan's, where placed
//   weights, weights_up  [N, K] of each expert of the page, in the layout of lib/matmul/layout.wgsl
//   out      [slots, N] f32, row-major
// Grid: ceil(N / (SPAN * TILE_COLUMNS)) * ceil(items / ITEMS) groups, columns slowest.
// Pieces: common/grid, matmul/params, matmul/tile_plan | matmul/tile_dense,
//   common/eight_values, common/wide_floats | nothing, matmul/register/eight,
//   common/halves_f16 | common/halves_bf16 | nothing, matmul/register/eight_scalar |
//   matmul/register/eight_vec4 | matmul/register/eight_wide | matmul/register/eight_halves |
//   matmul/register/eight_half_pairs,
//   matmul/register/share_none | matmul/register/share_shuffle,
//   matmul/format/f32 | matmul/format/f16 | matmul/format/bf16 | matmul/format/q8_0 |
//   matmul/format/q4_0 | matmul/format/q4_k | matmul/format/q6_k | matmul/format/mxfp4 | matmul/format/fp8,
//   matmul/run_blocks | nothing, matmul/layout | matmul/layout_rows,
//   matmul/weights | matmul/weights_rows | matmul/register/words_wide, matmul/register/words_plain | nothing,
//   matmul/register/pair_f32 | matmul/register/pair_halves | matmul/register/pair_rows |
//   matmul/register/pair_blocks,
//   matmul/activate_none | matmul/activate_silu | matmul/activate_gelu,
//   matmul/out_scalar | matmul/register/out_wide, matmul/register/block,
//   matmul/register/run_one | matmul/register/run_four.
//
// For devices where a load costs many multiply-adds and workgroup memory does not pay: everything stays in
// registers. A lane has all rows of an item, up to TILE_ROWS, and 8 columns (GATED: 4 of each matrix). A
// workgroup of WG lanes takes SPAN stretches of TILE_COLUMNS columns of ITEMS items, one after the other,
// since a group that finds nothing to do costs 0.6 us. Items of one expert are neighbours, and read the same
// weights while a cache still holds them. Groups of items are taken in steps, so that those that exist are
// spread over the grid. Loops over items and stretches with their tests at the end were 5 % slower.

@compute @workgroup_size(WG)
fn matmul_register(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = flat(group, groups);
  let first_column = params.column_begin + id / params.item_groups * SPAN * TILE_COLUMNS;
  let items = id % params.item_groups * params.item_step % params.item_groups * ITEMS;
  for (var i = 0u; i < ITEMS; i++) {
    let tile = tile_at(items + i);
    if tile.expert == NO_MORE { break; }
    if tile.rows == 0u { continue; }
    let x0 = rows_at(tile, 0u, lane);
    let x1 = rows_at(tile, 8u, lane);
    for (var j = 0u; j < SPAN; j++) {
      let first = first_column + j * TILE_COLUMNS;
      if first < params.column_end { stretch(tile, first + 4u * lane, x0, x1); }
    }
  }
}

// The columns of one stretch. Tests stand at the loops' ends: llvmpipe runs the body of a `for` once more
// with all lanes off.
fn stretch(tile: Tile, column: u32, x0: RowBases, x1: RowBases) {
  let block = block_at(tile.expert, column);
  let runs = runs_of(tile);
  var s0 = Octet();
  var s1 = Octet();
  var k = 0u;
  if TILE_ROWS > 8u {
    loop {
      add_run(16u, &s0, &s1, block, k, x0, x1);
      continuing { k += 1u; break if k >= runs; }
    }
  } else if tile.rows <= 2u {
    loop {
      add_run(2u, &s0, &s1, block, k, x0, x1);
      continuing { k += 1u; break if k >= runs; }
    }
  } else if tile.rows <= 4u {
    loop {
      add_run(4u, &s0, &s1, block, k, x0, x1);
      continuing { k += 1u; break if k >= runs; }
    }
  } else {
    loop {
      add_run(8u, &s0, &s1, block, k, x0, x1);
      continuing { k += 1u; break if k >= runs; }
    }
  }
  store_octet(tile, 0u, column, s0);
  if TILE_ROWS > 8u { store_octet(tile, 8u, column, s1); }
}
