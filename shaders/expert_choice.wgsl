// assigned[e, t] = 1 for the capacity[b] tokens t of sequence b with the highest r[t, e]; ties go to the lower token
//   r [tokens, experts] f32, any value; NaN ranks below -inf
//   offsets [sequences + 1] u32; lengths [sequences] u32 where has_lengths: the rest of a sequence is padding, never chosen
//   capacity [sequences] u32, clamped to 1..=length
//   assigned [experts, ceil(tokens / 32)] bit set, written whole
// MASKED (capacity factor of token choice): chooses among the bits already set, at most capacity[b], 0 included;
//   dropped[e] = how many lost their bit (one sequence).
// Grid: ceil(experts / EXPERTS) * sequences groups; EXPERTS neighbouring experts, LANES lanes each.
// A radix select: four passes of 8 bits find the key of the last token that is taken, and one sets the bits.

struct Params {
    tokens: u32,
    experts: u32,
    sequences: u32,
    has_lengths: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> r: array<u32>;
@group(0) @binding(2) var<storage, read> offsets: array<u32>;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read> capacity: array<u32>;
@group(0) @binding(5) var<storage, read_write> assigned: array<atomic<u32>>;
@group(0) @binding(6) var<storage, read_write> dropped: array<u32>;

const BINS: u32 = 256u;

var<workgroup> bins: array<atomic<u32>, BINS * EXPERTS>;
var<workgroup> totals: array<u32, WG>;
var<workgroup> prefixes: array<u32, EXPERTS>;
var<workgroup> needs: array<u32, EXPERTS>;

// The key of a token for an expert, 0 where it is not eligible.
fn token_key(e: u32, t: u32) -> u32 {
    if MASKED {
        let columns = (params.tokens + 31u) / 32u;
        if ((atomicLoad(&assigned[e * columns + t / 32u]) >> (t % 32u)) & 1u) == 0u {
            return 0u;
        }
    }
    return key(r[t * params.experts + e]);
}

// Where a pass of the select is.
struct At { e: u32, slot: u32, end: u32, shift: u32, prefix: u32 }

// Counts a token whose key begins with the prefix.
fn count(at: At, t: u32) {
    var k = 0u;
    if t < at.end {
        k = token_key(at.e, t);
    }
    // Two shifts: one of 32 is undefined.
    if k != 0u && ((k >> at.shift) >> 8u) == ((at.prefix >> at.shift) >> 8u) {
        atomicAdd(&bins[((k >> at.shift) & 255u) * EXPERTS + at.slot], 1u);
    }
}

// Adds the bits of a token that is above the threshold, or equal to it: x and y.
fn compare(bits: vec2<u32>, e: u32, t: u32, end: u32, threshold: u32) -> vec2<u32> {
    var k = 0u;
    if t < end {
        k = token_key(e, t);
    }
    return bits | (vec2(u32(k > threshold), u32(k == threshold && k != 0u)) << vec2(t % 32u));
}

@compute @workgroup_size(WG)
fn expert_choice(
    @builtin(local_invocation_index) index: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let tiles = (params.experts + EXPERTS - 1u) / EXPERTS;
    let id = flat(group, groups);
    let b = id / tiles;
    if b >= params.sequences {
        return;
    }
    let slot = index % EXPERTS;
    let first = index / EXPERTS;
    let live = (id % tiles) * EXPERTS + slot < params.experts;
    let e = min((id % tiles) * EXPERTS + slot, params.experts - 1u);
    let columns = (params.tokens + 31u) / 32u;

    let range = token_range(index, b, params.tokens);
    let start = range.x;
    var end = range.y;
    if params.has_lengths == 1u {
        end = min(end, start + min(lengths[b], params.tokens));
    }
    var want = capacity[b];
    if !MASKED {
        want = clamp(want, min(1u, end - start), end - start);
    }

    if first == 0u {
        prefixes[slot] = 0u;
        needs[slot] = want;
    }
    var eligible = 0u;
    for (var shift = 32u; shift > 0u;) {
        shift -= 8u;
        for (var i = index; i < EXPERTS * BINS; i += WG) {
            atomicStore(&bins[i], 0u);
        }
        workgroupBarrier();
        let prefix = prefixes[slot];
        let need = needs[slot];
        let at = At(e, slot, end, shift, prefix);
        for (var t = start + first; t < end; t += 8u * LANES) {
            count(at, t);
            count(at, t + LANES);
            count(at, t + 2u * LANES);
            count(at, t + 3u * LANES);
            count(at, t + 4u * LANES);
            count(at, t + 5u * LANES);
            count(at, t + 6u * LANES);
            count(at, t + 7u * LANES);
        }
        workgroupBarrier();
        // Each lane sums a stretch of bins; the one in whose stretch the need is met from above finds the bin.
        const STRETCH = BINS / LANES;
        var mine = 0u;
        for (var i = 0u; i < STRETCH; i++) {
            mine += atomicLoad(&bins[(first * STRETCH + i) * EXPERTS + slot]);
        }
        totals[index] = mine;
        workgroupBarrier();
        var over = 0u;
        for (var l = first + 1u; l < LANES; l++) {
            over += totals[l * EXPERTS + slot];
        }
        if shift == 24u && first == 0u {
            eligible = over + mine;
            if eligible < need {
                // Fewer than the capacity (MASKED only): a need of none above key 0 takes all.
                needs[slot] = 0u;
            }
        }
        if over < need && over + mine >= need {
            var i = STRETCH;
            var count = 0u;
            loop {
                i -= 1u;
                count = atomicLoad(&bins[(first * STRETCH + i) * EXPERTS + slot]);
                if over + count >= need || i == 0u {
                    break;
                }
                over += count;
            }
            prefixes[slot] = prefix | ((first * STRETCH + i) << shift);
            needs[slot] = need - over;
        }
        workgroupBarrier();
    }
    let threshold = select(prefixes[slot], 0xffffffffu, want == 0u);
    let need = needs[slot];
    if MASKED && live && first == 0u {
        dropped[e] = eligible - min(eligible, want);
    }

    // Whole words, in token order; a word that two sequences share is changed at this sequence's bits alone. The first
    // and the last sequence also clear what lies before and behind all of them, and each its own padding.
    let begin = select(start, 0u, b == 0u);
    var to = range.y;
    if b + 1u == params.sequences {
        to = columns * 32u;
    }
    var ties = 0u;
    // An empty sequence has no words: where it lies inside one, that word belongs to others.
    let last = select((to + 31u) / 32u, 0u, begin >= to);
    for (var w0 = begin / 32u; w0 < last; w0 += LANES) {
        let w = w0 + first;
        var bits = vec2(0u);
        if w < last {
            let high = min(end, w * 32u + 32u);
            for (var t = max(start, w * 32u); t < high; t += 8u) {
                bits = compare(bits, e, t, high, threshold);
                bits = compare(bits, e, t + 1u, high, threshold);
                bits = compare(bits, e, t + 2u, high, threshold);
                bits = compare(bits, e, t + 3u, high, threshold);
                bits = compare(bits, e, t + 4u, high, threshold);
                bits = compare(bits, e, t + 5u, high, threshold);
                bits = compare(bits, e, t + 6u, high, threshold);
                bits = compare(bits, e, t + 7u, high, threshold);
            }
        }
        let higher = bits.x;
        var equal = bits.y;
        totals[index] = countOneBits(equal);
        workgroupBarrier();
        var before = ties;
        for (var l = 0u; l < LANES; l++) {
            let n = totals[l * EXPERTS + slot];
            before += select(0u, n, l < first);
            ties += n;
        }
        workgroupBarrier();
        // The lowest `room` ties of the word.
        var room = need - min(need, before);
        var take = higher;
        if room >= countOneBits(equal) {
            take |= equal;
            equal = 0u;
        }
        while equal != 0u && room > 0u {
            take |= equal & (~equal + 1u);
            equal &= equal - 1u;
            room -= 1u;
        }
        if w < last && live {
            let low = max(begin, w * 32u) - w * 32u;
            let length = min(to, w * 32u + 32u) - w * 32u - low;
            let own = (0xffffffffu >> (32u - length)) << low;
            if own == 0xffffffffu {
                atomicStore(&assigned[e * columns + w], take);
            } else {
                atomicAnd(&assigned[e * columns + w], take | ~own);
                atomicOr(&assigned[e * columns + w], take);
            }
        }
    }
}
