// For the slots s that the plan holds, from dA = dz[s, ..F], a = act(z[s, f]) and h = a * z[s, F + f]:
//   hg[s, f] = gate_of[s] * h                     dgate[s] = sum over f of dA[f] * h
//   dz[s, f] = gate_of[s] * dA[f] * z[s, F + f] * act'(z[s, f])
//   dz[s, F + f] = gate_of[s] * dA[f] * a
//   z        [slots, 2 F] f32: the gate's values of a slot, then those of up
//   plan     u32: gate_of and its number of slots are read
//   dz       [slots, 2 F] f32: dA in the first F columns, replaced
//   hg       [slots, F] f32, dgate [slots] f32, written in the rows of those slots
// Grid: a team of LANES lanes a slot, ROWS teams a group.
// Pieces: common/grid, gradient/slope_silu | gradient/slope_gelu,
//   common/reduce_serial | common/reduce_workgroup | common/reduce_subgroup.
struct Params {
  intermediate: u32, // F
  slots_at: u32,     // word of the plan that holds the number of slots
  gate_of: u32,      // plan section: gate of each slot
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> z: array<f32>;
@group(0) @binding(2) var<storage, read> plan: array<u32>;
@group(0) @binding(3) var<storage, read_write> dz: array<f32>;
@group(0) @binding(4) var<storage, read_write> hg: array<f32>;
@group(0) @binding(5) var<storage, read_write> dgate: array<f32>;

@compute @workgroup_size(WG)
fn activation_gradient(
  lane: Lane,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let slot = flat(group, groups) * ROWS + lane.index / LANES;
  let there = slot < plan[params.slots_at];
  let width = params.intermediate;
  var sum = 0.0;
  if there {
    let gate = bitcast<f32>(plan[params.gate_of + slot]);
    let at = 2u * slot * width;
    for (var f = lane.index % LANES; f < width; f += LANES) {
      let act = value_and_slope(z[at + f]);
      let up = z[at + width + f];
      let da = dz[at + f];
      let h = act.x * up;
      sum += da * h;
      hg[slot * width + f] = gate * h;
      dz[at + f] = gate * da * up * act.y;
      dz[at + width + f] = gate * da * act.x;
    }
  }
  let all = team_sum(lane, sum);
  if there && lane.index % LANES == 0u { dgate[slot] = all; }
}
