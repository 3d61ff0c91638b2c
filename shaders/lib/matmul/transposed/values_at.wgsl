// Where weights lie, seen by rows: f32, row-major [N, K] in place, rows of any length; all counts values.
// Twin of words_at.wgsl.
@group(0) @binding(3) var<storage, read> weights: array<u32>;
@group(0) @binding(4) var<storage, read> weights_up: array<u32>;

fn expert_at(expert: u32) -> u32 {
  return expert * params.rows * params.columns;
}

fn row_at(n: u32) -> u32 {
  return n * params.columns;
}

// Four values of the row that starts at `base`; past its end, others that are not stored.
fn four_at(up: bool, base: u32, column: u32) -> vec4<f32> {
  let at = vec4(base) + min(vec4(column) + vec4(0u, 1u, 2u, 3u), vec4(params.columns - 1u));
  if up {
    return bitcast<vec4<f32>>(
      vec4(weights_up[at.x], weights_up[at.y], weights_up[at.z], weights_up[at.w]));
  }
  return bitcast<vec4<f32>>(vec4(weights[at.x], weights[at.y], weights[at.z], weights[at.w]));
}
