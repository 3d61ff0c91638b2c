// h[s, f] = act(z[s, f]) * z[s, F + f] for the slots s that the plan holds
//   z        [slots, 2 F] f32: the gate's values of a slot, then those of up
//   plan     u32: its number of slots is read
//   h        [slots, F] f32, written in the rows of those slots
// Grid: a group a slot.
// Pieces: common/grid, matmul/activate_silu | matmul/activate_gelu.
struct Params {
  intermediate: u32, // F
  slots_at: u32,     // word of the plan that holds the number of slots
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> z: array<f32>;
@group(0) @binding(2) var<storage, read> plan: array<u32>;
@group(0) @binding(3) var<storage, read_write> h: array<f32>;

@compute @workgroup_size(WG)
fn activation(
  @builtin(local_invocation_index) lane: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let slot = flat(group, groups);
  if slot >= plan[params.slots_at] { return; }
  let width = params.intermediate;
  let at = 2u * slot * width;
  for (var f = lane; f < width; f += WG) {
    h[slot * width + f] = activate(vec4(z[at + f]), vec4(z[at + width + f])).x;
  }
}
