// Two neighbouring 16-byte words of weights by one 64-bit vector load. Needs SHADER_INT64 and an even index:
// even columns of packed weights, or an even number of words a row. Twin of words_plain.wgsl with
// weights.wgsl.
@group(0) @binding(3) var<storage, read> weights: array<vec4<u64>>;
@group(0) @binding(4) var<storage, read> weights_up: array<vec4<u64>>;

fn split(v: u64) -> vec2<u32> { return vec2(u32(v), u32(v >> 32u)); }

fn words_of(v: vec4<u64>) -> Words {
  return Words(vec4(split(v.x), split(v.y)), vec4(split(v.z), split(v.w)));
}

// Of the second matrix (GATED) where `up`, a constant wherever it is called.
fn load_words(up: bool, a: u32, b: u32) -> Words {
  if up { return words_of(weights_up[a / 2u]); }
  return words_of(weights[a / 2u]);
}
