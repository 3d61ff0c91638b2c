// Last part of a plan: token_of[s] and gate_of[s] of each slot s, slot_of[token_offsets[t] + i] of each token
// t, i over its experts, then over shared experts; both in order, from offsets and ranks.
//   assigned [experts, columns] bit set; gates [tokens, experts] f32
//   active [columns] bit set, where has_active: shared experts take these tokens alone
//   plan: in: offsets, ranks; out: these lists, and token_offsets where slots are cut: those are in no list
// Grid: ceil(tokens / 32) groups, LANES lanes a token.
// Pieces: common/grid, plan/column, plan/fill.

struct Params {
  tokens: u32,
  experts: u32,
  shared_experts: u32,
  slots: u32,        // bound, shared experts' included
  routed_slots: u32, // bound
  expert_offsets: u32, // sections of the plan
  token_offsets: u32,
  ranks: u32,
  token_of: u32,
  gate_of: u32,
  slot_of: u32,
  has_active: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> assigned: array<u32>;
@group(0) @binding(2) var<storage, read> gates: array<f32>;
@group(0) @binding(3) var<storage, read> active_bits: array<u32>;
@group(0) @binding(4) var<storage, read_write> plan: array<u32>;

fn active_bits_of(w: u32) -> u32 {
  return active_bits[w];
}

@compute @workgroup_size(WG)
fn plan_fill(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let column = flat(group, groups);
  let columns = (params.tokens + 31u) / 32u;
  if column >= columns {
    return;
  }
  load_column(index, column, columns, params.experts, params.tokens);
  fill_column(index, column, columns);
}
