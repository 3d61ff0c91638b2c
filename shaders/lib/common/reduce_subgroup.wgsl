// Reductions over a workgroup by subgroups of any size. Needs Features::SUBGROUP.
// Twin of reduce_workgroup.wgsl and reduce_serial.wgsl: same names, same contract.
// Nothing is assumed of how lanes map to subgroups; their size divides WG.
struct Lane {
  @builtin(local_invocation_index) index: u32,
  @builtin(subgroup_invocation_id) in_subgroup: u32,
  @builtin(subgroup_size) subgroup_size: u32,
}

var<workgroup> reduce_f32: array<f32, WG>;
var<workgroup> reduce_u32: array<u32, WG>;

fn team_sum(lane: Lane, value: f32) -> f32 {
  let sum = subgroupAdd(value);
  reduce_f32[lane.index] = select(0.0, sum, lane.in_subgroup == 0u);
  workgroupBarrier();
  var part = 0.0;
  for (var i = lane.in_subgroup; i < WG; i += lane.subgroup_size) {
    part += reduce_f32[i];
  }
  workgroupBarrier(); // the array may be used again
  return subgroupAdd(part);
}

fn team_max(lane: Lane, value: u32) -> u32 {
  let highest = subgroupMax(value);
  reduce_u32[lane.index] = highest;
  workgroupBarrier();
  var part = 0u;
  for (var i = lane.in_subgroup; i < WG; i += lane.subgroup_size) {
    part = max(part, reduce_u32[i]);
  }
  workgroupBarrier();
  return subgroupMax(part);
}
