// The scores of two neighbouring experts; behind the last one any value. Twin of pairs_wide.wgsl.
@group(0) @binding(1) var<storage, read> values: array<u32>;

fn scores_of(t: u32, e: u32) -> vec2<u32> {
  let at = t * params.experts + e;
  return vec2(values[at], values[at + u32(e + 1u < params.experts)]);
}

// Any part of what lies there.
fn one_of(t: u32, e: u32) -> u32 {
  return values[t * params.experts + e];
}
