// The body of block_plan.wgsl and block_plan_scaled.wgsl: the plan of one column of tokens.
// Contract: all WG lanes call, in uniform control flow; the kernel has what plan/count, plan/scan and
// plan/fill ask for, but for what stands here.

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
