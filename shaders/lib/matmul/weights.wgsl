// 16-byte words of weights. Needs layout.wgsl. Twin of weights_rows.wgsl.
@group(0) @binding(3) var<storage, read> weights: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> weights_up: array<vec4<u32>>;

// Word `chunk` of the column at `base`; of the second matrix (GATED) where `up`, a constant wherever this is
// called.
fn load_weights(up: bool, base: u32, chunk: u32) -> vec4<u32> {
  if up {
    return weights_up[base + chunk * PANEL];
  }
  return weights[base + chunk * PANEL];
}

// Four bytes of one.
fn load_part_of(up: bool, base: u32, chunk: u32, part: u32) -> u32 {
  if up {
    return weights_up[base + chunk * PANEL][part];
  }
  return weights[base + chunk * PANEL][part];
}
