// out[e][n, k] = sum over the slots s of expert e of a[a_row(s), a_first + n] * b[b_row(s), k]
//   a        [rows, ..] f32; a_row(s) = token_of[s] (GATHER_A) or s
//   b        [rows, K] f32; b_row(s) = token_of[s] (GATHER_B) or s
//   plan     u32: expert_offsets, token_of; not read (DENSE: one expert, all rows)
//   out      [experts, N, K] f32 of the experts of a page, written, or added to
// Grid: ceil(N / 64) * ceil(K / 128) * experts groups, columns fastest, experts slowest.
// Pieces: common/grid, gradient/outer_sizes, gradient/fours_vec4 | gradient/fours_scalar, matmul/tile/outer.
//
// matmul_tile with slots in the place of K: one workgroup makes 64 rows x 128 columns, a lane 8 x 8. Rows of
// a and b are loaded as the tiles hold them. The last eight slots, of which some may not be there, come
// first; the others follow in order.

const WG: u32 = 128u;
const LANES_X: u32 = 16u;                   // lanes along columns; each has four at c and four at c + 64
const LANE_ROWS: u32 = 8u;
const TILE_ROWS: u32 = 64u;
const TILE_COLUMNS: u32 = 128u;
const TILE_DEPTH: u32 = 8u;                 // slots a step
// One more than needed: stores of lanes spread over the banks.
const A_FOURS: u32 = TILE_ROWS / 4u + 1u;
const B_FOURS: u32 = TILE_COLUMNS / 4u + 1u;

// Dimensions of their own, as in matmul_tile; a vector is stored whole by one lane.
var<workgroup> a_tile: array<array<array<vec4<f32>, A_FOURS>, 4>, TILE_DEPTH / 4u>;
var<workgroup> b_tile: array<array<array<vec4<f32>, B_FOURS>, 4>, TILE_DEPTH / 4u>;

// What a lane brings to the next step: four rows of one slot, four columns of two.
struct Ahead { a: vec4<f32>, b0: vec4<f32>, b1: vec4<f32> }

fn put(lane: u32, next: Ahead) {
  a_tile[lane / 64u][lane / 16u % 4u][lane % 16u] = next.a;
  b_tile[0][lane / 32u][lane % 32u] = next.b0;
  b_tile[1][lane / 32u][lane % 32u] = next.b1;
}

fn x_four(k4: u32, j: u32, four: u32) -> vec4<f32> { return a_tile[k4][j][four]; }
fn w_four(k4: u32, j: u32, four: u32) -> vec4<f32> { return b_tile[k4][j][four]; }

// What a lane brings for eight slots from `slot` on: all of them are there.
fn bring(slot: u32, n: u32, k: u32, lane: u32) -> Ahead {
  return Ahead(
    load_a(a_row(slot + lane / 16u), n + lane % 16u * 4u),
    load_b(b_row(slot + lane / 32u), k + lane % 32u * 4u),
    load_b(b_row(slot + lane / 32u + 4u), k + lane % 32u * 4u));
}

// The same with zeros from `end` on.
fn bring_tail(slot: u32, end: u32, n: u32, k: u32, lane: u32) -> Ahead {
  var next: Ahead;
  if slot + lane / 16u < end { next.a = load_a(a_row(slot + lane / 16u), n + lane % 16u * 4u); }
  if slot + lane / 32u < end { next.b0 = load_b(b_row(slot + lane / 32u), k + lane % 32u * 4u); }
  if slot + lane / 32u + 4u < end {
    next.b1 = load_b(b_row(slot + lane / 32u + 4u), k + lane % 32u * 4u);
  }
  return next;
}

fn finish(expert: u32, row: u32, column: u32, left: vec4<f32>, right: vec4<f32>) {
  if row < params.rows {
    let at = (expert * params.rows + row) * params.columns;
    store_out(at, column, left);
    store_out(at, column + 64u, right);
  }
}

@compute @workgroup_size(WG)
fn weight_gradient_tile(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let id = flat(group, groups);
  let expert = id / (params.across * params.down);
  if expert >= params.experts { return; }
  let slots = slots_of(expert);
  let n = id / params.across % params.down * TILE_ROWS;
  let k = id % params.across * TILE_COLUMNS;
  var block: Block;
  if slots.first < slots.end {
    let steps = (slots.end - slots.first - 1u) / TILE_DEPTH;
    // The last step goes first: only its loads need guards, and the loop has none.
    var next = bring_tail(slots.first + steps * TILE_DEPTH, slots.end, n, k, lane);
    for (var i = 0u; i < steps; i++) {
      workgroupBarrier();
      put(lane, next);
      workgroupBarrier();
      next = bring(slots.first + i * TILE_DEPTH, n, k, lane);
      block = add_step(lane, block);
    }
    workgroupBarrier();
    put(lane, next);
    workgroupBarrier();
    block = add_step(lane, block);
  } else if params.add == 1u {
    return;
  }
  let r = n + lane / LANES_X * LANE_ROWS;
  let c = k + lane % LANES_X * 4u;
  finish(expert, r, c, block.top_left[0], block.top_right[0]);
  finish(expert, r + 1u, c, block.top_left[1], block.top_right[1]);
  finish(expert, r + 2u, c, block.top_left[2], block.top_right[2]);
  finish(expert, r + 3u, c, block.top_left[3], block.top_right[3]);
  finish(expert, r + 4u, c, block.bottom_left[0], block.bottom_right[0]);
  finish(expert, r + 5u, c, block.bottom_left[1], block.bottom_right[1]);
  finish(expert, r + 6u, c, block.bottom_left[2], block.bottom_right[2]);
  finish(expert, r + 7u, c, block.bottom_left[3], block.bottom_right[3]);
}
