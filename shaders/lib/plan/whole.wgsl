// The body of block_plan.wgsl and block_plan_scaled.wgsl: the plan of one column of tokens.
// Contract: all WG lanes call, in uniform control flow; the kernel has what plan/count, plan/scan and
// plan/fill ask for, but for what stands here.

struct Params {
  tokens: u32,
  experts: u32,
  shared_experts: u32,
  slots: u32,        // bound, shared experts' included
  routed_slots: u32, // bound
  add_stats: u32,    // 1: to what stats holds
  rule: u32,
  scale: f32,
  drop_count: u32,   // 0
  ignore_count: u32, // 0
  range_count: u32,
  tile_rows: u32,
  skinny_rows: u32,
  expert_offsets: u32, // sections of the plan
  token_offsets: u32,
  active_experts: u32,
  skinny_offsets: u32,
  skinny_items: u32,
  tile_offsets: u32,
  tile_items: u32,
  ranks: u32,
  token_of: u32,
  gate_of: u32,
  slot_of: u32,
  has_active: u32,
  most_experts: u32, // 0: no experts_per_token
  has_scale_by_count: u32,
  has_scale_by_expert: u32,
}

fn loss(i: u32) -> u32 {
  return 0u;
}

fn range_end(i: u32) -> u32 {
  return offsets[i];
}

fn plan_block(lane: Lane) {
  load_column(lane.index, 0u, 1u, params.experts, params.tokens);
  count_column(lane.index, 0u);
  for (var e = 0u; e < params.experts; e += WG / EXPERT_LANES) {
    workgroupBarrier();
    count_experts(lane.index, e / (WG / EXPERT_LANES), 1u);
  }
  storageBarrier();
  scan_counts(lane);
  storageBarrier();
  fill_column(lane.index, 0u, 1u);
}
