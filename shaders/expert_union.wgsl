// members[b, e] = 1 where a token of block b has expert e; counts[b] = how many experts that are; bytes[b] =
// what their weights take
//   assigned [experts, ceil(tokens / 32)] bit set; offsets [blocks + 1] u32
//   members [blocks, ceil(experts / 32)] bit set; counts [blocks] u32; bytes [blocks, 2] u32 (low, high word)
//   totals [4] u32 where has_totals: the counts of blocks with tokens, and the number of those blocks, are
//     added (low, high word each)
// Grid: blocks groups; a lane owns experts index, index + WG, ...
// Pieces: common/grid, common/offsets, common/bits.

struct Params {
  tokens: u32,
  experts: u32,
  blocks: u32,
  expert_bytes_low: u32,
  expert_bytes_high: u32,
  has_totals: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> assigned: array<u32>;
@group(0) @binding(2) var<storage, read> offsets: array<u32>;
@group(0) @binding(3) var<storage, read_write> members: array<u32>;
@group(0) @binding(4) var<storage, read_write> counts: array<u32>;
@group(0) @binding(5) var<storage, read_write> bytes: array<u32>;
@group(0) @binding(6) var<storage, read_write> totals: array<atomic<u32>>;

var<workgroup> total: atomic<u32>;
var<workgroup> chunk_words: array<atomic<u32>, 32>;

// totals[2 i] as 64 bits += n
fn add_total(i: u32, n: u32) {
  if atomicAdd(&totals[2u * i], n) > 0xffffffffu - n {
    atomicAdd(&totals[2u * i + 1u], 1u);
  }
}

@compute @workgroup_size(WG)
fn expert_union(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let block = flat(group, groups);
  if block >= params.blocks {
    return;
  }
  let chunks = (params.experts + 31u) / 32u;
  if index == 0u {
    atomicStore(&total, 0u);
  }
  for (var c = index; c < chunks; c += WG) {
    atomicStore(&chunk_words[c], 0u);
  }
  let range = token_range(index, block, params.tokens);
  let columns = (params.tokens + 31u) / 32u;
  for (var e = index; range.y > range.x && e < params.experts; e += WG) {
    var any = 0u;
    for (var w = range.x / 32u; w <= (range.y - 1u) / 32u; w++) {
      let low = max(range.x, w * 32u) - w * 32u;
      any |= assigned[e * columns + w] & bits_between(low, min(range.y, w * 32u + 32u) - w * 32u);
    }
    if any != 0u {
      atomicOr(&chunk_words[e / 32u], 1u << (e % 32u));
      atomicAdd(&total, 1u);
    }
  }
  workgroupBarrier();
  for (var c = index; c < chunks; c += WG) {
    members[block * chunks + c] = atomicLoad(&chunk_words[c]);
  }
  if index == 0u {
    let n = atomicLoad(&total);
    counts[block] = n;
    if params.has_totals == 1u && range.y > range.x {
      add_total(0u, n);
      add_total(1u, 1u);
    }
    // n * bytes in 64 bits, n <= 1024: the low word in two halves.
    let low = (params.expert_bytes_low & 0xffffu) * n;
    let middle = (params.expert_bytes_low >> 16u) * n + (low >> 16u);
    bytes[2u * block] = (low & 0xffffu) | (middle << 16u);
    bytes[2u * block + 1u] = params.expert_bytes_high * n + (middle >> 16u);
  }
}
