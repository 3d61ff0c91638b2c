// out[s, k] = sum over n of x[row(s), n] * W[expert of s][n, k]                                  (plain)
// out[s, k] = the same sum over x[s, ..N] and Wgate, plus that over x[s, N..] and Wup            (GATED)
//   x        [rows, N] f32 (GATED [rows, 2 N]); row(s) = token_of[s] (GATHER) or s
//   plan     u32: token_of, items and their offsets (lib/matmul/transposed/items_planned.wgsl); none in the
//            dense variant
//   places   u32: which expert of the weights holds each of the plan's, where placed
//   weights, weights_up  [N, K] of each expert of the page, in the layout of lib/matmul/layout.wgsl
//   out      [slots, K] f32, row-major; where a page has some of the rows n, the sums of those before are
//            added
// Grid: ceil(K / (SPAN * TILE_COLUMNS)) * ceil(items / ITEMS) groups, columns slowest.
// Pieces: common/grid, matmul/transposed/sizes,
//   matmul/transposed/items_planned | matmul/transposed/items_dense, common/eight_values,
//   common/wide_floats | nothing, matmul/register/eight,
//   matmul/register/eight_scalar | matmul/register/eight_vec4 | matmul/register/eight_wide,
//   matmul/register/share_none | matmul/register/share_shuffle,
//   matmul/format/f32 | matmul/format/f16 | matmul/format/bf16 | matmul/format/q8_0 |
//   matmul/format/q4_0 | matmul/format/q4_k | matmul/format/q6_k | matmul/format/mxfp4 | matmul/format/fp8,
//   matmul/run_blocks | nothing, matmul/transposed/part | nothing,
//   matmul/transposed/words_at | matmul/transposed/values_at,
//   matmul/weights | matmul/register/words_wide | nothing, matmul/register/words_plain | nothing,
//   matmul/transposed/rows_f32 | matmul/transposed/rows_halves | matmul/transposed/rows_blocks |
//   matmul/transposed/rows_any, common/store_ones | common/store_fours, matmul/transposed/lane.
//
// matmul_register by the rows of the weights instead of their columns: a lane has all rows of an item and
// eight columns that are neighbours, as words hold them, so that no weight is transposed. Loads and
// multiply-adds are as many.

@compute @workgroup_size(WG)
fn transposed_register(
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
  @builtin(local_invocation_index) lane: u32,
) {
  let id = flat(group, groups);
  let first_column = id / params.item_groups * SPAN * TILE_COLUMNS;
  let items = id % params.item_groups * params.item_step % params.item_groups * ITEMS;
  for (var i = 0u; i < ITEMS; i++) {
    let tile = tile_at(items + i);
    if tile.expert == NO_MORE { break; }
    if tile.rows == 0u { continue; }
    let x0 = rows_at(tile, 0u, lane);
    let x1 = rows_at(tile, 8u, lane);
    for (var j = 0u; j < SPAN; j++) {
      let first = first_column + j * TILE_COLUMNS;
      if first < params.columns { stretch(tile, first + 8u * lane, x0, x1); }
    }
  }
}

fn stretch(tile: Tile, column: u32, x0: RowBases, x1: RowBases) {
  let c = columns_at(tile.expert, column);
  var s0 = Octet();
  var s1 = Octet();
  sweep(false, tile, c, x0, x1, &s0, &s1);
  if GATED {
    // Rows of x hold the gate's values and then those of up.
    let half = x_base(1u) / 2u;
    sweep(true, tile, c, moved(x0, half), moved(x1, half), &s0, &s1);
  }
  store_octet(tile, 0u, column, s0);
  if TILE_ROWS > 8u { store_octet(tile, 8u, column, s1); }
}

// The rows of one matrix. Tests stand at the loops' ends: llvmpipe runs the body of a `for` once more with
// all lanes off.
fn sweep(
  up: bool, tile: Tile, c: Columns, x0: RowBases, x1: RowBases,
  s0: ptr<function, Octet>, s1: ptr<function, Octet>,
) {
  let steps = steps_of(tile);
  let first = params.first_row / 8u;
  var k = 0u;
  if TILE_ROWS > 8u {
    loop {
      let w = load_pairs(up, c, k);
      let a = load_rows(x0, first + k);
      let b = load_rows(x1, first + k);
      add_octet(s0, w, a);
      add_octet(s1, w, b);
      continuing { k += 1u; break if k >= steps; }
    }
  } else if tile.rows <= 2u {
    loop {
      let w = load_pairs(up, c, k);
      let x = load_rows(x0, first + k);
      (*s0).r0 = add((*s0).r0, w, row_of(x, 0u));
      (*s0).r1 = add((*s0).r1, w, row_of(x, 1u));
      continuing { k += 1u; break if k >= steps; }
    }
  } else {
    loop {
      add_octet(s0, load_pairs(up, c, k), load_rows(x0, first + k));
      continuing { k += 1u; break if k >= steps; }
    }
  }
}
