// values[at] = (values[at] +) scale * sum over i < count of terms[first + i]
//   terms f32; values f32, the others are left alone
// Grid: one group.
// Pieces: common/grid, common/reduce_workgroup.

struct Params {
  first: u32,
  count: u32,
  at: u32,
  add: u32,
  scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> terms: array<f32>;
@group(0) @binding(2) var<storage, read_write> values: array<f32>;

@compute @workgroup_size(WG)
fn loss_sum(
  lane: Lane,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  if flat(group, groups) != 0u {
    return;
  }
  var sum = 0.0;
  for (var i = lane.index; i < params.count; i += WG) {
    sum += terms[params.first + i];
  }
  sum = team_sum(lane, sum);
  if lane.index == 0u {
    var value = params.scale * sum;
    if params.add == 1u {
      value += values[params.at];
    }
    values[params.at] = value;
  }
}
