// Reductions over a workgroup, workgroup memory only: runs on every WebGPU device.
// Twin of reduce_subgroup.wgsl and reduce_serial.wgsl: same names, same contract.
// Contract: all WG lanes call, in uniform control flow; all get the result.
struct Lane {
  @builtin(local_invocation_index) index: u32,
}

var<workgroup> reduce_f32: array<f32, WG>;
var<workgroup> reduce_u32: array<u32, WG>;

fn team_sum(lane: Lane, value: f32) -> f32 {
  reduce_f32[lane.index] = value;
  for (var half = WG / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if lane.index < half {
      reduce_f32[lane.index] += reduce_f32[lane.index + half];
    }
  }
  return workgroupUniformLoad(&reduce_f32[0]);
}

fn team_max(lane: Lane, value: u32) -> u32 {
  reduce_u32[lane.index] = value;
  for (var half = WG / 2u; half > 0u; half /= 2u) {
    workgroupBarrier();
    if lane.index < half {
      reduce_u32[lane.index] = max(reduce_u32[lane.index], reduce_u32[lane.index + half]);
    }
  }
  return workgroupUniformLoad(&reduce_u32[0]);
}
