// f32 weights row by row in place, rows of any length: a load a value, 0 past the end of a row. Twin of weights.wgsl with
// layout.wgsl.
@group(0) @binding(3) var<storage, read> weights: array<u32>;
@group(0) @binding(4) var<storage, read> weights_up: array<u32>;

fn weight_chunks() -> u32 {
    return (params.depth + WEIGHT_LANES - 1u) / WEIGHT_LANES;
}

fn weight_base(expert: u32, column: u32) -> u32 {
    return (expert * params.columns + column) * params.depth;
}

fn weight(up: bool, base: u32, k: u32) -> u32 {
    if k >= params.depth {
        return 0u;
    }
    if up {
        return weights_up[base + k];
    }
    return weights[base + k];
}

fn load_weights(up: bool, base: u32, chunk: u32) -> vec4<u32> {
    let k = 4u * chunk;
    return vec4(weight(up, base, k), weight(up, base, k + 1u), weight(up, base, k + 2u), weight(up, base, k + 3u));
}
