// The plan of one column of tokens at once: as plan_count.wgsl, plan_scan.wgsl and plan_fill.wgsl make it,
// one after the other; see there for the formulas. tokens <= 32; no capacity drops anything, no table scales
// the gates (block_plan_scaled.wgsl).
//   assigned [experts] words of the bit set
//   source [tokens, experts] f32: logits (rule 1) or scores (rules 2, 3)
//   offsets [range_count] u32, of which those that decrease or exceed the tokens are counted
//   active [1] bit set, where has_active: shared experts take these tokens alone
//   experts_per_token [tokens] u32, of which those above most_experts are counted; 0: there are none
//   gates [tokens, experts] f32, written at assigned pairs alone
//   plan u32, written whole; stats [8 + experts] u32, written whole, or added to where add_stats
// Grid: one group; LANES lanes a token.
// Pieces: common/grid, common/keys, common/exp, plan/column, plan/count, plan/prefix_sums, plan/scan,
//   plan/fill, plan/whole.

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> assigned: array<u32>;
@group(0) @binding(2) var<storage, read> source: array<u32>;
@group(0) @binding(3) var<storage, read> offsets: array<u32>;
@group(0) @binding(4) var<storage, read> active_bits: array<u32>;
@group(0) @binding(5) var<storage, read> experts_per_token: array<u32>;
@group(0) @binding(6) var<storage, read_write> gates: array<f32>;
@group(0) @binding(7) var<storage, read_write> plan: array<u32>;
@group(0) @binding(8) var<storage, read_write> stats: array<u32>;

fn active_bits_of(w: u32) -> u32 {
  return active_bits[w];
}

fn number_of(t: u32) -> u32 {
  return experts_per_token[t];
}

fn count_scale(count: u32) -> f32 {
  return 1.0;
}

fn expert_scale(e: u32) -> f32 {
  return 1.0;
}

@compute @workgroup_size(WG)
fn block_plan(
  lane: Lane,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  if flat(group, groups) == 0u {
    plan_block(lane);
  }
}
