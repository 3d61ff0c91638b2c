// rows[t] = 1 where a sequence b holds token t and t - (start of b) < lengths[b], so that it is not padding,
// and active[t] = 1 where has_active: the tokens that take part
//   offsets [sequences + 1] u32, clamped; lengths [sequences] u32
//   active [ceil(tokens / 32)] bit set, where has_active
//   rows [ceil(tokens / 32)] bit set, written whole
//   capacity [1] u32 = capacity_of[how many those tokens are], where has_capacity; capacity_of [tokens + 1]
//     u32
// Grid: ceil((ceil(tokens / 32) + 1) / WG) groups; one lane a word of 32 tokens, and a last one that counts
// by the lengths. Where has_active and has_capacity, a second dispatch of one group, `counts` 1, counts the
// bits of rows.
// Pieces: common/grid.

struct Params {
  tokens: u32,
  sequences: u32,
  has_capacity: u32,
  has_active: u32,
  counts: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> offsets: array<u32>;
@group(0) @binding(2) var<storage, read> lengths: array<u32>;
@group(0) @binding(3) var<storage, read> capacity_of: array<u32>;
@group(0) @binding(4) var<storage, read> active_bits: array<u32>;
@group(0) @binding(5) var<storage, read_write> rows: array<u32>;
@group(0) @binding(6) var<storage, read_write> capacity: array<u32>;

const WG: u32 = 32u;

var<workgroup> totals: array<u32, WG>;

// The bits of the 32 tokens from `first` on. A token's sequence ends at the first offset above it, and begins
// at the highest before that one.
fn word_from(first: u32) -> u32 {
  var word = 0u;
  var next = 0u; // the first offset above the token
  var start = 0u;
  for (var bit = 0u; bit < min(32u, params.tokens - first); bit++) {
    let t = first + bit;
    while next <= params.sequences && offsets[next] <= t {
      start = max(start, offsets[next]);
      next++;
    }
    if next > 0u && next <= params.sequences {
      word |= u32(t - start < lengths[next - 1u]) << bit;
    }
  }
  if params.has_active == 1u {
    word &= active_bits[first / 32u];
  }
  return word;
}

// How many tokens are not padding, by the lengths.
fn count_rows() -> u32 {
  var sum = 0u;
  var start = min(offsets[0], params.tokens);
  for (var b = 0u; b < params.sequences; b++) {
    let end = max(start, min(offsets[b + 1u], params.tokens));
    sum += min(end - start, lengths[b]);
    start = end;
  }
  return sum;
}

@compute @workgroup_size(WG)
fn active_rows(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let columns = (params.tokens + 31u) / 32u;
  if params.counts == 1u {
    var n = 0u;
    for (var i = index; i < columns; i += WG) {
      n += countOneBits(rows[i]);
    }
    totals[index] = n;
    workgroupBarrier();
    if index == 0u {
      for (var l = 1u; l < WG; l++) {
        n += totals[l];
      }
      capacity[0] = capacity_of[n];
    }
    return;
  }
  let w = flat(group, groups) * WG + index;
  if w < columns {
    rows[w] = word_from(w * 32u);
  } else if w == columns && params.has_capacity == 1u && params.has_active == 0u {
    capacity[0] = capacity_of[count_rows()];
  }
}
