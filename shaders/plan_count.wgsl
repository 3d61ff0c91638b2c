// First part of a plan. For each token t: how many experts it has, and gates[t, e] of each expert e it has,
// by `rule`:
//   0: not written
//   1: softmax of the token's logits over its experts
//   2: s / (sum over its experts + 1e-20)
//   3: s
// times scale, scale_by_count[number of experts] and scale_by_expert[e]. For each expert: how many tokens it
// has, and ranks.
//   assigned [experts, columns] bit set, columns = ceil(tokens / 32); bits past the last token count for
//     nothing
//   source [tokens, experts] f32: logits (rule 1) or scores (rules 2, 3)
//   scale_by_count [experts + 1] f32 where has_scale_by_count; scale_by_expert [experts] f32 where
//     has_scale_by_expert
//   gates [tokens, experts] f32, written at assigned pairs alone
//   plan: counts of experts and of tokens where the offsets will stand, ranks[e, column] = bits of e in lower
//     columns
// Grid: columns + ceil(experts / (WG / EXPERT_LANES)) groups; LANES lanes a token, EXPERT_LANES an expert.
// Pieces: common/grid, common/keys, common/exp, plan/column, plan/count, plan/scales.

struct Params {
  tokens: u32,
  experts: u32,
  rule: u32,
  has_scale_by_count: u32,
  has_scale_by_expert: u32,
  scale: f32,
  expert_offsets: u32, // sections of the plan
  token_offsets: u32,
  ranks: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> assigned: array<u32>;
@group(0) @binding(2) var<storage, read> source: array<u32>;
@group(0) @binding(3) var<storage, read> scale_by_count: array<f32>;
@group(0) @binding(4) var<storage, read> scale_by_expert: array<f32>;
@group(0) @binding(5) var<storage, read_write> gates: array<f32>;
@group(0) @binding(6) var<storage, read_write> plan: array<u32>;

@compute @workgroup_size(WG)
fn plan_count(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let id = flat(group, groups);
  let columns = (params.tokens + 31u) / 32u;
  if id < columns {
    load_column(index, id, columns, params.experts, params.tokens);
    count_column(index, id);
  } else {
    count_experts(index, id - columns, columns);
  }
}
