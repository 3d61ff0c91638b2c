// As block_plan.wgsl, for gates that tables scale: a kernel has no room for the bindings of both, so here
// every token is active and takes as many experts as its rule says.
//   assigned [experts] words of the bit set
//   source [tokens, experts] f32: logits (rule 1) or scores (rules 2, 3)
//   scale_by_count [experts + 1] f32, where has_scale_by_count; scale_by_expert [experts] f32, where
//     has_scale_by_expert
//   offsets [range_count] u32, of which those that decrease or exceed the tokens are counted
//   gates [tokens, experts] f32, written at assigned pairs alone
//   plan u32, written whole; stats [8 + experts] u32, written whole, or added to where add_stats
// Grid: one group; LANES lanes a token.
// Pieces: common/grid, common/keys, common/exp, plan/column, plan/count, plan/prefix_sums, plan/scan,
//   plan/fill, plan/whole, plan/scales.

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> assigned: array<u32>;
@group(0) @binding(2) var<storage, read> source: array<u32>;
@group(0) @binding(3) var<storage, read> scale_by_count: array<f32>;
@group(0) @binding(4) var<storage, read> scale_by_expert: array<f32>;
@group(0) @binding(5) var<storage, read> offsets: array<u32>;
@group(0) @binding(6) var<storage, read_write> gates: array<f32>;
@group(0) @binding(7) var<storage, read_write> plan: array<u32>;
@group(0) @binding(8) var<storage, read_write> stats: array<u32>;

fn active_bits_of(w: u32) -> u32 {
  return 0xffffffffu;
}

fn number_of(t: u32) -> u32 {
  return 0u;
}

@compute @workgroup_size(WG)
fn block_plan_scaled(
  lane: Lane,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  if flat(group, groups) == 0u {
    plan_block(lane);
  }
}
