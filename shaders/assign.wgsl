// Another router's choice, token by token: assigned[e, t] = 1 and gates[t, e] = weights[t, i] where ids[t, i]
// = e
//   ids [tokens, top] u32: experts; those out of range, and repeated ones of a token, are ignored: the first
//     one counts. 0xffffffff is an empty place, and not counted as ignored
//   weights [tokens, top] f32
//   rows [ceil(tokens / 32)] bit set, where has_rows: places of the other tokens are as if they were empty
//   assigned [experts, ceil(tokens / 32)] bit set, written whole
//   gates [tokens, experts] f32, written at assigned pairs alone
//   ignored [ceil(tokens / 32)] u32, written whole: how many ids were ignored
// Grid: ceil(tokens / 32) groups of 32 lanes, one lane a token.
// Pieces: common/grid.

struct Params {
  tokens: u32,
  experts: u32,
  top: u32,
  has_rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read> weights: array<f32>;
@group(0) @binding(3) var<storage, read> rows: array<u32>;
@group(0) @binding(4) var<storage, read_write> assigned: array<u32>;
@group(0) @binding(5) var<storage, read_write> gates: array<f32>;
@group(0) @binding(6) var<storage, read_write> ignored: array<u32>;

const WG: u32 = 32u;

var<workgroup> words: array<atomic<u32>, 1024>;
var<workgroup> lost: atomic<u32>;

@compute @workgroup_size(WG)
fn assign(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let column = flat(group, groups);
  let columns = (params.tokens + 31u) / 32u;
  if column >= columns {
    return;
  }
  for (var e = index; e < params.experts; e += WG) {
    atomicStore(&words[e], 0u);
  }
  if index == 0u {
    atomicStore(&lost, 0u);
  }
  workgroupBarrier();
  let t = column * 32u + index;
  var live = t < params.tokens;
  if params.has_rows == 1u {
    live = live && ((rows[column] >> index) & 1u) == 1u;
  }
  if live {
    for (var i = 0u; i < params.top; i++) {
      let e = ids[t * params.top + i];
      if e >= params.experts {
        if e != 0xffffffffu {
          atomicAdd(&lost, 1u);
        }
        continue;
      }
      let before = atomicOr(&words[e], 1u << index);
      if ((before >> index) & 1u) == 1u {
        atomicAdd(&lost, 1u);
        continue;
      }
      gates[t * params.experts + e] = weights[t * params.top + i];
    }
  }
  workgroupBarrier();
  for (var e = index; e < params.experts; e += WG) {
    assigned[e * columns + column] = atomicLoad(&words[e]);
  }
  if index == 0u {
    ignored[column] = atomicLoad(&lost);
  }
}
