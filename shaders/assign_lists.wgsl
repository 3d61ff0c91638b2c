// Another router's choice, expert by expert: assigned[e, t] = 1 and gates[t, e] = weights[i] for each entry i
// of the list of expert e, t = list[i]
//   offsets [experts + 1] u32: entries of each expert; those that decrease or exceed `entries` are clamped
//   list [entries] u32: tokens; those out of range, and repeated ones of an expert, are ignored: the first
//     one counts. 0xffffffff is an empty place, and not counted as ignored
//   weights [entries] f32, as bits
//   rows [ceil(tokens / 32)] bit set, where has_rows: entries of the other tokens are as if they were empty
//   assigned [experts, ceil(tokens / 32)] bit set, written whole
//   gates [tokens, experts] f32 as bits, written at assigned pairs alone
//   ignored [experts] u32, written whole: how many entries were ignored
// Grid: experts groups, WG entries at a time. A group is alone with its row of the bit set and its column of
// gates.
// Pieces: common/grid, common/offsets.

struct Params {
  tokens: u32,
  experts: u32,
  entries: u32,
  has_rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> offsets: array<u32>;
@group(0) @binding(2) var<storage, read> list: array<u32>;
@group(0) @binding(3) var<storage, read> weights: array<u32>;
@group(0) @binding(4) var<storage, read> rows: array<u32>;
@group(0) @binding(5) var<storage, read_write> assigned: array<atomic<u32>>;
@group(0) @binding(6) var<storage, read_write> gates: array<atomic<u32>>;
@group(0) @binding(7) var<storage, read_write> ignored: array<u32>;

const EMPTY = 0xffffffffu;

var<workgroup> lost: atomic<u32>;

@compute @workgroup_size(WG)
fn assign_lists(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let e = flat(group, groups);
  if e >= params.experts {
    return;
  }
  let columns = (params.tokens + 31u) / 32u;
  for (var c = index; c < columns; c += WG) {
    atomicStore(&assigned[e * columns + c], 0u);
  }
  if index == 0u {
    atomicStore(&lost, 0u);
  }
  let range = token_range(index, e, params.entries);
  for (var first = range.x; first < range.y; first += WG) {
    storageBarrier(); // the bits of the entries before
    let i = first + index;
    var t = EMPTY;
    if i < range.y {
      t = list[i];
    }
    if params.has_rows == 1u && t < params.tokens {
      t = select(EMPTY, t, ((rows[t / 32u] >> (t % 32u)) & 1u) == 1u);
    }
    let word = e * columns + t / 32u;
    let bit = 1u << (t % 32u);
    let gate = t * params.experts + e;
    var fresh = false;
    if t < params.tokens {
      fresh = (atomicLoad(&assigned[word]) & bit) == 0u;
    }
    // Of the lanes with one token the lowest counts: they settle it where its gate will stand.
    if fresh {
      atomicStore(&gates[gate], EMPTY);
    }
    storageBarrier();
    if fresh {
      atomicMin(&gates[gate], index);
    }
    storageBarrier();
    if fresh {
      fresh = atomicLoad(&gates[gate]) == index;
    }
    storageBarrier();
    if fresh {
      atomicOr(&assigned[word], bit);
      atomicStore(&gates[gate], weights[i]);
    } else if t != EMPTY {
      atomicAdd(&lost, 1u);
    }
  }
  workgroupBarrier();
  if index == 0u {
    ignored[e] = atomicLoad(&lost);
  }
}
