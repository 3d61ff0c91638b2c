// bias[e] += rate * sign(mean of n - n[e]), n[e]: tokens of expert e; sign(0) = 0
//   counts u32: n from word `first` on; bias [experts] f32
// The comparison is of sum of n with experts * n[e], in 64 bits: exact.
// Grid: ceil(experts / WG) groups.
// Pieces: common/grid.

struct Params {
  experts: u32,
  first: u32,
  rate: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> counts: array<u32>;
@group(0) @binding(2) var<storage, read_write> bias: array<f32>;

// (high, low 16 bits) of a sum of halves, each below 2^32.
fn carried(halves: vec2<u32>) -> vec2<u32> {
  return vec2(halves.x + (halves.y >> 16u), halves.y & 0xffffu);
}

@compute @workgroup_size(WG)
fn bias_update(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let e = flat(group, groups) * WG + index;
  if e >= params.experts {
    return;
  }
  // Of at most 1,024 experts: neither half leaves 32 bits.
  var halves = vec2<u32>();
  for (var i = 0u; i < params.experts; i++) {
    let n = counts[params.first + i];
    halves += vec2(n >> 16u, n & 0xffffu);
  }
  let sum = carried(halves);
  let n = counts[params.first + e];
  let own = carried(params.experts * vec2(n >> 16u, n & 0xffffu));
  if sum.x > own.x || (sum.x == own.x && sum.y > own.y) {
    bias[e] += params.rate;
  } else if sum.x != own.x || sum.y != own.y {
    bias[e] -= params.rate;
  }
}
