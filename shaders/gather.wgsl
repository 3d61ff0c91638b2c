// out[s, h] = x[token_of[s], h]; 0 where token_of[s] >= tokens
//   x [tokens, hidden] f32; token_of [slots] u32; out [slots, hidden] f32
// Grid: ceil(slots * ceil(hidden / VECTOR) / (WG * ITEMS)) groups; one lane ITEMS vectors of VECTOR elements.

struct Params {
    tokens: u32,
    slots: u32,
    vectors: u32, // of a row
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<Vector>;
@group(0) @binding(2) var<storage, read> token_of: array<u32>;
@group(0) @binding(3) var<storage, read_write> out: array<Vector>;

@compute @workgroup_size(WG)
fn gather(
    @builtin(local_invocation_index) index: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let first = flat(group, groups) * WG * ITEMS + index;
    for (var i = 0u; i < ITEMS; i++) {
        let at = first + i * WG;
        let s = at / params.vectors;
        if s >= params.slots {
            return;
        }
        let t = token_of[s];
        var value = Vector();
        if t < params.tokens {
            value = x[t * params.vectors + at % params.vectors];
        }
        out[at] = value;
    }
}
