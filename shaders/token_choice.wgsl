// assigned[e, t] = 1 for the `top` eligible experts of token t with the highest r; ties go to the lower expert
//   r [tokens, experts] f32, any value; NaN ranks below -inf
//   coreset [blocks, ceil(experts / 32)] bit set, block_of [tokens] (blocks or more: none, no expert), where blocks > 0
//   assigned [experts, ceil(tokens / 32)] bit set, written whole
// Groups (group_count > 1): a group's value is the sum of its two highest eligible r; its experts stay eligible if it is
// among the group_top best; fewer than two eligible experts: never.
// Grid: ceil(tokens / 32) groups; a group owns a column of words, LANES lanes work on a token.

struct Params {
    tokens: u32,
    experts: u32,
    top: u32,
    group_count: u32,
    group_top: u32,
    blocks: u32, // of the coresets; 0: none, all experts are eligible
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> r: array<u32>;
@group(0) @binding(2) var<storage, read> coreset: array<u32>;
@group(0) @binding(3) var<storage, read> block_of: array<u32>;
@group(0) @binding(4) var<storage, read_write> assigned: array<u32>;

const WG: u32 = 32u * LANES;

var<workgroup> words: array<atomic<u32>, 1024>;
var<workgroup> group_keys: array<u32, 32u * GROUPS>;
var<workgroup> group_masks: array<atomic<u32>, 32>;
var<workgroup> heads: array<vec2<u32>, WG>;

struct Row {
    base: u32,       // of r
    coreset: u32,    // first word of the block's coreset
    groups: u32,     // bit set of groups that stay
    group_size: u32,
    live: bool,
}

// The key of an expert, 0 where it is not eligible.
fn expert_key(row: Row, e: u32) -> u32 {
    if !row.live || ((row.groups >> (e / row.group_size)) & 1u) == 0u {
        return 0u;
    }
    if params.blocks > 0u && ((coreset[row.coreset + e / 32u] >> (e % 32u)) & 1u) == 0u {
        return 0u;
    }
    return key(r[row.base + e]);
}

@compute @workgroup_size(WG)
fn token_choice(
    @builtin(local_invocation_index) index: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let column = flat(group, groups);
    let columns = (params.tokens + 31u) / 32u;
    if column >= columns {
        return;
    }
    let slot = index / LANES;
    let first = index % LANES;
    let t = column * 32u + slot;

    for (var e = index; e < params.experts; e += WG) {
        atomicStore(&words[e], 0u);
    }

    var row = Row(t * params.experts, 0u, 0xffffffffu, params.experts, t < params.tokens);
    if row.live && params.blocks > 0u {
        let block = block_of[t];
        row.live = block < params.blocks;
        row.coreset = select(0u, block, row.live) * ((params.experts + 31u) / 32u);
    }
    if GROUPS > 1u {
        // The highest two of a group.
        row.group_size = params.experts / params.group_count;
        for (var g = first; g < params.group_count; g += LANES) {
            var best = vec2<u32>(0u, 0u);
            var bits = vec2<u32>(0u, 0u);
            for (var i = 0u; i < row.group_size; i++) {
                let e = g * row.group_size + i;
                let k = expert_key(row, e);
                if k > best.x {
                    bits = vec2(r[row.base + e], bits.x);
                    best = vec2(k, best.x);
                } else if k > best.y {
                    bits.y = r[row.base + e];
                    best.y = k;
                }
            }
            group_keys[slot * GROUPS + g] = select(0u, key(add_bits(bits.x, bits.y)), best.y != 0u);
        }
        if index < 32u {
            atomicStore(&group_masks[index], 0u);
        }
        workgroupBarrier();
        for (var g = first; g < params.group_count; g += LANES) {
            let mine = group_keys[slot * GROUPS + g];
            var rank = 0u;
            for (var o = 0u; o < params.group_count; o++) {
                let other = group_keys[slot * GROUPS + o];
                rank += u32(other > mine || (other == mine && o < g));
            }
            if mine != 0u && rank < params.group_top {
                atomicOr(&group_masks[slot], 1u << g);
            }
        }
        workgroupBarrier();
        row.groups = atomicLoad(&group_masks[slot]);
    }
    workgroupBarrier();

    // LIST experts at a time, in the order (key, lower index), each pass after the last expert of the one before.
    var last = vec2<u32>(0xffffffffu, 0u);
    for (var taken = 0u; taken < params.top; taken += LIST) {
        // Every lane keeps the best LIST of its experts, best first.
        var keys: array<u32, LIST>;
        var indices: array<u32, LIST>;
        for (var i = 0u; i < LIST; i++) {
            keys[i] = 0u;
            indices[i] = 0u;
        }
        for (var e = first; e < params.experts; e += LANES) {
            var k = expert_key(row, e);
            k = select(0u, k, k < last.x || (k == last.x && e > last.y));
            var at = e;
            for (var i = 0u; i < LIST; i++) {
                // What an earlier place gave up may tie with what follows it, and is the lower expert then.
                let better = k > keys[i] || (k == keys[i] && at < indices[i]);
                let lower = vec2(select(k, keys[i], better), select(at, indices[i], better));
                keys[i] = select(keys[i], k, better);
                indices[i] = select(indices[i], at, better);
                k = lower.x;
                at = lower.y;
            }
        }
        let rounds = min(LIST, params.top - taken);
        if LANES == 1u {
            for (var i = 0u; i < LIST; i++) {
                if i < rounds && keys[i] != 0u {
                    atomicOr(&words[indices[i]], 1u << slot);
                }
            }
            last = vec2(keys[LIST - 1u], indices[LIST - 1u]);
        } else {
            // The lanes of a token show their best; the winner sets its bit and moves on.
            for (var i = 0u; i < rounds; i++) {
                heads[index] = vec2(keys[0], indices[0]);
                workgroupBarrier();
                var best = vec2<u32>(0u, 0u);
                for (var l = 0u; l < LANES; l++) {
                    let head = heads[slot * LANES + l];
                    if head.x > best.x || (head.x == best.x && head.y < best.y) {
                        best = head;
                    }
                }
                workgroupBarrier();
                if best.x != 0u && best.y == indices[0] && best.x == keys[0] {
                    atomicOr(&words[best.y], 1u << slot);
                    for (var j = 0u; j + 1u < LIST; j++) {
                        keys[j] = keys[j + 1u];
                        indices[j] = indices[j + 1u];
                    }
                    keys[LIST - 1u] = 0u;
                }
                last = best;
            }
        }
    }
    workgroupBarrier();
    for (var e = index; e < params.experts; e += WG) {
        assigned[e * columns + column] = atomicLoad(&words[e]);
    }
}
