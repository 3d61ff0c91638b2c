// What tables multiply gates by.
// Contract: the kernel has scale_by_count and scale_by_expert, and params that say which of them are given
// and how many experts there are.

fn count_scale(count: u32) -> f32 {
  if params.has_scale_by_count == 1u {
    return scale_by_count[min(count, params.experts)];
  }
  return 1.0;
}

fn expert_scale(e: u32) -> f32 {
  if params.has_scale_by_expert == 1u {
    return scale_by_expert[e];
  }
  return 1.0;
}
