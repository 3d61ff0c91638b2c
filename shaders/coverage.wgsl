// coverage[b] = (how many pairs the tokens of block b would take of all experts, how many of these lie in the
// block's coreset)
//   own_choice [experts, ceil(tokens / 32)] bit set: those pairs
//   members [blocks, ceil(experts / 32)] bit set: the coresets
//   offsets [blocks + 1] u32, clamped
//   coverage [blocks, 2] u32, written whole
// Grid: blocks groups; a lane owns experts index, index + WG, ...
// Pieces: common/grid, common/offsets, common/bits.

struct Params {
  tokens: u32,
  experts: u32,
  blocks: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> own_choice: array<u32>;
@group(0) @binding(2) var<storage, read> members: array<u32>;
@group(0) @binding(3) var<storage, read> offsets: array<u32>;
@group(0) @binding(4) var<storage, read_write> coverage_of: array<u32>;

var<workgroup> pairs: atomic<u32>;
var<workgroup> covered: atomic<u32>;

@compute @workgroup_size(WG)
fn coverage(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let block = flat(group, groups);
  if block >= params.blocks {
    return;
  }
  if index == 0u {
    atomicStore(&pairs, 0u);
    atomicStore(&covered, 0u);
  }
  let range = token_range(index, block, params.tokens); // passes a barrier
  let columns = (params.tokens + 31u) / 32u;
  let chunks = (params.experts + 31u) / 32u;
  var mine = vec2<u32>();
  for (var e = index; e < params.experts; e += WG) {
    var n = 0u;
    for (var w = range.x / 32u; w * 32u < range.y; w++) {
      let low = max(range.x, w * 32u) - w * 32u;
      let block_bits = bits_between_or_none(low, min(range.y, w * 32u + 32u) - w * 32u);
      n += countOneBits(own_choice[e * columns + w] & block_bits);
    }
    let inside = (members[block * chunks + e / 32u] >> (e % 32u)) & 1u;
    mine += vec2(n, n * inside);
  }
  atomicAdd(&pairs, mine.x);
  atomicAdd(&covered, mine.y);
  workgroupBarrier();
  if index == 0u {
    coverage_of[2u * block] = atomicLoad(&pairs);
    coverage_of[2u * block + 1u] = atomicLoad(&covered);
  }
}
