// One lane works on a row alone: nothing to reduce.
// Twin of reduce_workgroup.wgsl and reduce_subgroup.wgsl: same names, same contract.
struct Lane {
  @builtin(local_invocation_index) index: u32,
}

fn team_sum(lane: Lane, value: f32) -> f32 {
  return value;
}

fn team_max(lane: Lane, value: u32) -> u32 {
  return value;
}
