// The scores of two neighbouring experts by one 64-bit load. Needs SHADER_INT64 and an even number of
// experts. llvmpipe pays for a load by its components, not by its bytes. Twin of pairs.wgsl.
@group(0) @binding(1) var<storage, read> values: array<u64>;

fn scores_of(t: u32, e: u32) -> vec2<u32> {
  let v = values[(t * params.experts + e) / 2u];
  return vec2(u32(v), u32(v >> 32u));
}

// Any part of what lies there.
fn one_of(t: u32, e: u32) -> u32 {
  return u32(values[(t * params.experts + e) / 2u]);
}
