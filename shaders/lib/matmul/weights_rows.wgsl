// f32 weights in place, rows of any length: a load a value, 0 past the end of a row. Needs layout_rows.wgsl.
// Twin of weights.wgsl.
@group(0) @binding(3) var<storage, read> weights: array<u32>;
@group(0) @binding(4) var<storage, read> weights_up: array<u32>;

fn load_weights(up: bool, base: u32, chunk: u32) -> vec4<u32> {
  let k = vec4(4u * chunk) + vec4(0u, 1u, 2u, 3u);
  let last = vec4(params.depth - 1u);
  let at = vec4(base) + min(k, last);
  var values: vec4<u32>;
  if up {
    values = vec4(weights_up[at.x], weights_up[at.y], weights_up[at.z], weights_up[at.w]);
  } else {
    values = vec4(weights[at.x], weights[at.y], weights[at.z], weights[at.w]);
  }
  return select(vec4(0u), values, k <= last);
}
