// Lists: the token and the gate of each slot, and the slots of each token, both in order, from offsets and ranks.
//   assigned [experts, columns] bit set; gates [tokens, experts] f32
//   plan: token_of[slot], gate_of[slot], slot_of[token_offsets[t] + i], i over t's experts, then over shared experts
// Grid: ceil(tokens / 32) groups, LANES lanes a token.

struct Params {
    tokens: u32,
    experts: u32,
    shared_experts: u32,
    slots: u32,
    expert_offsets: u32, // sections of the plan
    token_offsets: u32,
    ranks: u32,
    token_of: u32,
    gate_of: u32,
    slot_of: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> assigned: array<u32>;
@group(0) @binding(2) var<storage, read> gates: array<f32>;
@group(0) @binding(3) var<storage, read_write> plan: array<u32>;

const WG: u32 = 32u * LANES;

fn put(slot: u32, at: u32, t: u32, gate: f32) {
    if slot < params.slots {
        plan[params.token_of + slot] = t;
        plan[params.gate_of + slot] = bitcast<u32>(gate);
    }
    if at < params.slots {
        plan[params.slot_of + at] = select(0xffffffffu, slot, slot < params.slots);
    }
}

@compute @workgroup_size(WG)
fn plan_fill(
    @builtin(local_invocation_index) index: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let column = flat(group, groups);
    let columns = (params.tokens + 31u) / 32u;
    if column >= columns {
        return;
    }
    load_column(index, column, columns, params.experts, params.tokens);
    let bit = index / LANES;
    let t = column * 32u + bit;
    if t >= params.tokens {
        return;
    }
    let chunks = (params.experts + 31u) / 32u;
    let below = (1u << bit) - 1u;
    var at = plan[params.token_offsets + t];
    for (var c = 0u; c < chunks; c++) {
        var word = row_words[bit * chunks + c];
        if c % LANES != index % LANES {
            at += countOneBits(word);
            continue;
        }
        while word != 0u {
            let e = c * 32u + firstTrailingBit(word);
            word &= word - 1u;
            let rank = plan[params.ranks + e * columns + column] + countOneBits(column_words[e] & below);
            put(plan[params.expert_offsets + e] + rank, at, t, gates[t * params.experts + e]);
            at++;
        }
    }
    for (var i = index % LANES; i < params.shared_experts; i += LANES) {
        put(plan[params.expert_offsets + params.experts + i] + t, at + i, t, 1.0);
    }
}
