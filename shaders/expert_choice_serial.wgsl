// What expert_choice.wgsl computes, for software drivers: one lane takes two neighbouring experts (x and y of every vector
// here), without barriers or atomics in its loops. Same bindings, same result.
// Grid: ceil(experts / 16) * sequences groups.
//
// Each expert narrows a bracket [lo, hi] of keys that holds the key of its last token: a pass counts how many keys reach
// each of eight pivots. The first pivots are guessed from a sample, so that one pass is mostly enough for the bracket to hold
// no more than CANDIDATES tokens. The last pass sets the bits above the bracket and collects the tokens inside, among
// which the rest is found in workgroup memory. Wrong guesses cost passes: at most 12, as each one divides the
// bracket by up to 9.

struct Params {
    tokens: u32,
    experts: u32,
    sequences: u32,
    has_lengths: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> offsets: array<u32>;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read> capacity: array<u32>;
@group(0) @binding(5) var<storage, read_write> assigned: array<atomic<u32>>;
@group(0) @binding(6) var<storage, read_write> dropped: array<u32>;

const CANDIDATES: u32 = 96u;

// By candidate, expert and lane.
var<workgroup> candidate_keys: array<u32, CANDIDATES * 2u * WG>;
var<workgroup> candidate_tokens: array<u32, CANDIDATES * 2u * WG>;

// How many keys reach lo, and how many lie above hi: over.x < want <= reach.
struct Bracket {
    lo: vec2<u32>,
    hi: vec2<u32>,
    reach: vec2<u32>,
    over: vec2<u32>,
}

// Eight values for each of two experts.
struct Eights {
    x0: vec4<u32>,
    x1: vec4<u32>,
    y0: vec4<u32>,
    y1: vec4<u32>,
}

// Pivots between lo and hi, in equal steps; those beyond hi of a bracket of fewer keys are hi.
fn pivots_of(lo: vec2<u32>, hi: vec2<u32>) -> Eights {
    let most = hi - lo;
    let step = most / 9u + 1u;
    let a = vec4(1u, 2u, 3u, 4u);
    let b = vec4(5u, 6u, 7u, 8u);
    return Eights(
        lo.x + min(a * step.x, vec4(most.x)),
        lo.x + min(b * step.x, vec4(most.x)),
        lo.y + min(a * step.y, vec4(most.y)),
        lo.y + min(b * step.y, vec4(most.y)),
    );
}

fn count(c: Eights, p: Eights, k: vec2<u32>) -> Eights {
    return Eights(
        c.x0 + vec4<u32>(vec4(k.x) >= p.x0),
        c.x1 + vec4<u32>(vec4(k.x) >= p.x1),
        c.y0 + vec4<u32>(vec4(k.y) >= p.y0),
        c.y1 + vec4<u32>(vec4(k.y) >= p.y1),
    );
}

// The part of a bracket that holds rank `want`: (lo, hi, reach, over) after the counts c of the pivots p.
fn part(b: vec4<u32>, want: u32, p0: vec4<u32>, p1: vec4<u32>, c0: vec4<u32>, c1: vec4<u32>) -> vec4<u32> {
    var n = pivot(b, want, p0.x, c0.x);
    n = pivot(n, want, p0.y, c0.y);
    n = pivot(n, want, p0.z, c0.z);
    n = pivot(n, want, p0.w, c0.w);
    n = pivot(n, want, p1.x, c1.x);
    n = pivot(n, want, p1.y, c1.y);
    n = pivot(n, want, p1.z, c1.z);
    return pivot(n, want, p1.w, c1.w);
}

fn pivot(b: vec4<u32>, want: u32, p: u32, c: u32) -> vec4<u32> {
    if p > b.x && p <= b.y {
        return select(vec4(b.x, p - 1u, b.z, c), vec4(p, b.y, c, b.w), c >= want);
    }
    return b;
}

fn narrowed(b: Bracket, want: vec2<u32>, p: Eights, c: Eights) -> Bracket {
    let x = part(vec4(b.lo.x, b.hi.x, b.reach.x, b.over.x), want.x, p.x0, p.x1, c.x0, c.x1);
    let y = part(vec4(b.lo.y, b.hi.y, b.reach.y, b.over.y), want.y, p.y0, p.y1, c.y0, c.y1);
    return Bracket(vec2(x.x, y.x), vec2(x.y, y.y), vec2(x.z, y.z), vec2(x.w, y.w));
}

// Whether the bracket says who is taken: all inside, or the first ones among equals.
fn is_settled(b: Bracket, want: vec2<u32>) -> vec2<bool> {
    return (b.reach == want) | (b.lo == b.hi);
}

// Narrows a bracket among the n tokens in workgroup memory, until at most `most` are inside or it is settled.
fn narrow_candidates(given: Bracket, want: vec2<u32>, n: vec2<u32>, most: u32, lane: u32) -> Bracket {
    var b = given;
    loop {
        let open = (b.reach - b.over > vec2(most)) & !is_settled(b, want);
        if !any(open) {
            break;
        }
        let p = pivots_of(b.lo, b.hi);
        var c = Eights();
        for (var i = 0u; i < max(n.x, n.y); i++) {
            let at = i * 2u * WG + lane;
            let k = vec2(candidate_keys[at], candidate_keys[at + WG]);
            c = count(c, p, select(vec2(0u), k, vec2(i) < n));
        }
        b = narrowed(b, want, p, c);
    }
    return b;
}

// The keys of a token, 0 where bit 0 of live is not set.
fn keys_of(t: u32, e: u32, live: vec2<u32>) -> vec2<u32> {
    let v = scores_of(t, e);
    return vec2(key(v.x), key(v.y)) * (live & vec2(1u));
}

fn count8(given: Eights, p: Eights, t: u32, e: u32, live: vec2<u32>) -> Eights {
    var c = count(given, p, keys_of(t, e, live));
    c = count(c, p, keys_of(t + 1u, e, live >> vec2(1u)));
    c = count(c, p, keys_of(t + 2u, e, live >> vec2(2u)));
    c = count(c, p, keys_of(t + 3u, e, live >> vec2(3u)));
    c = count(c, p, keys_of(t + 4u, e, live >> vec2(4u)));
    c = count(c, p, keys_of(t + 5u, e, live >> vec2(5u)));
    c = count(c, p, keys_of(t + 6u, e, live >> vec2(6u)));
    return count(c, p, keys_of(t + 7u, e, live >> vec2(7u)));
}

// Bits of tokens above a bracket and inside it.
struct Marks {
    above: vec2<u32>,
    inside: vec2<u32>,
}

fn mark(m: Marks, b: Bracket, k: vec2<u32>, bit: u32) -> Marks {
    let above = k > b.hi;
    return Marks(
        m.above | select(vec2(0u), vec2(bit), above),
        m.inside | select(vec2(0u), vec2(bit), (k >= b.lo) & !above),
    );
}

fn mark8(given: Marks, b: Bracket, t: u32, e: u32, live: vec2<u32>, bit: u32) -> Marks {
    var m = mark(given, b, keys_of(t, e, live), bit);
    m = mark(m, b, keys_of(t + 1u, e, live >> vec2(1u)), bit << 1u);
    m = mark(m, b, keys_of(t + 2u, e, live >> vec2(2u)), bit << 2u);
    m = mark(m, b, keys_of(t + 3u, e, live >> vec2(3u)), bit << 3u);
    m = mark(m, b, keys_of(t + 4u, e, live >> vec2(4u)), bit << 4u);
    m = mark(m, b, keys_of(t + 5u, e, live >> vec2(5u)), bit << 5u);
    m = mark(m, b, keys_of(t + 6u, e, live >> vec2(6u)), bit << 6u);
    return mark(m, b, keys_of(t + 7u, e, live >> vec2(7u)), bit << 7u);
}

// Bits low..high, each at most 32.
fn bits_between(low: u32, high: u32) -> u32 {
    return select((0xffffffffu >> (32u - (high - low))) << low, 0u, low >= high);
}

// Eligible tokens of word w.
fn live_word(start: u32, end: u32, w: u32, e: vec2<u32>, columns: u32) -> vec2<u32> {
    let low = max(start, w * 32u);
    let own = bits_between(low - w * 32u, max(low, min(end, w * 32u + 32u)) - w * 32u);
    if MASKED {
        let x = atomicLoad(&assigned[e.x * columns + w]);
        return vec2(own) & vec2(x, atomicLoad(&assigned[e.y * columns + w]));
    }
    return vec2(own);
}

// The lowest n bits that are set.
fn lowest(bits: u32, n: u32) -> u32 {
    if n >= countOneBits(bits) {
        return bits;
    }
    var rest = bits;
    for (var i = 0u; i < n; i++) {
        rest &= rest - 1u;
    }
    return bits ^ rest;
}

// Appends the tokens of a word to the candidates of expert `which` of the lane.
fn collect(bits: u32, w: u32, e: u32, which: u32, n: u32, lane: u32) -> u32 {
    var rest = bits;
    var i = n;
    while rest != 0u {
        let t = w * 32u + countTrailingZeros(rest);
        let v = scores_of(t, e);
        let at = (i * 2u + which) * WG + lane;
        candidate_keys[at] = key(select(v.x, v.y, which == 1u));
        candidate_tokens[at] = t;
        i += 1u;
        rest &= rest - 1u;
    }
    return i;
}

fn put(e: u32, columns: u32, w: u32, own: u32, take: u32) {
    if own == 0xffffffffu {
        atomicStore(&assigned[e * columns + w], take);
    } else {
        // Other sequences hold the rest of the word.
        atomicAnd(&assigned[e * columns + w], take | ~own);
        atomicOr(&assigned[e * columns + w], take);
    }
}

@compute @workgroup_size(WG)
fn expert_choice_serial(
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
) {
    let tiles = (params.experts + 2u * WG - 1u) / (2u * WG);
    let id = flat(group, groups);
    let s = id / tiles;
    if s >= params.sequences {
        return;
    }
    let range = token_range(lane, s, params.tokens);
    let e = ((id % tiles) * WG + lane) * 2u;
    if e >= params.experts {
        return;
    }
    let pair = vec2(e, min(e + 1u, params.experts - 1u));
    let columns = (params.tokens + 31u) / 32u;
    let start = range.x;
    var end = range.y;
    if params.has_lengths == 1u {
        end = min(end, start + min(lengths[s], params.tokens));
    }
    let words = vec2(start / 32u, select((end + 31u) / 32u, 0u, start >= end));

    var eligible = vec2(end - start);
    var want = vec2(capacity[s]);
    if MASKED {
        eligible = vec2(0u);
        for (var w = words.x; w < words.y; w++) {
            eligible += countOneBits(live_word(start, end, w, pair, columns));
        }
        want = min(want, eligible);
        dropped[pair.x] = eligible.x - want.x;
        if pair.y != pair.x {
            dropped[pair.y] = eligible.y - want.y;
        }
    } else {
        want = clamp(want, min(vec2(1u), eligible), eligible);
    }

    var b = Bracket(vec2(1u), vec2(0xffffffffu), eligible, vec2(0u));
    // None are wanted: a bracket that no key reaches.
    b.lo = select(b.lo, b.hi, want == vec2(0u));
    b.reach = select(b.reach, vec2(0u), want == vec2(0u));

    // The guess: where the rank lies in a sample, and as much on both sides.
    var guess = b;
    if end - start > CANDIDATES {
        let size = select(32u, CANDIDATES, end - start >= 2048u);
        for (var i = 0u; i < size; i++) {
            let t = start + i * ((end - start) / size);
            let k = keys_of(t, e, vec2(1u));
            candidate_keys[i * 2u * WG + lane] = k.x;
            candidate_keys[i * 2u * WG + WG + lane] = k.y;
        }
        let share = vec2<f32>(want) / vec2<f32>(max(eligible, vec2(1u)));
        let rank = clamp(vec2<u32>(share * f32(size) + 0.5), vec2(1u), vec2(size));
        guess = Bracket(vec2(1u), vec2(0xffffffffu), vec2(size), vec2(0u));
        guess = narrow_candidates(guess, rank, vec2(size), 8u, lane);
        let margin = (guess.hi - guess.lo) / 2u + 1u;
        guess.lo -= min(guess.lo - 1u, margin);
        guess.hi += min(0xffffffffu - guess.hi, margin);
    }
    loop {
        let open = (b.reach - b.over > vec2(CANDIDATES)) & !is_settled(b, want);
        if !any(open) {
            break;
        }
        let p = pivots_of(max(guess.lo, b.lo), min(guess.hi, b.hi));
        var c = Eights();
        for (var w = words.x; w < words.y; w++) {
            let live = live_word(start, end, w, pair, columns);
            let t = w * 32u;
            c = count8(c, p, t, e, live);
            c = count8(c, p, t + 8u, e, live >> vec2(8u));
            c = count8(c, p, t + 16u, e, live >> vec2(16u));
            c = count8(c, p, t + 24u, e, live >> vec2(24u));
        }
        b = narrowed(b, want, p, c);
        guess = b;
    }

    // Whole words; the first and the last sequence also clear what lies before and behind all of them, and each its own
    // padding. An empty sequence has no words: where it lies inside one, that word belongs to others.
    let begin = select(start, 0u, s == 0u);
    let to = select(range.y, columns * 32u, s + 1u == params.sequences);
    let last = select((to + 31u) / 32u, 0u, begin >= to);
    let settled = is_settled(b, want);
    var room = want - b.over;
    var n = vec2(0u);
    for (var w = begin / 32u; w < last; w++) {
        let live = live_word(start, end, w, pair, columns);
        let t = w * 32u;
        var m = mark8(Marks(), b, t, e, live, 1u);
        m = mark8(m, b, t + 8u, e, live >> vec2(8u), 1u << 8u);
        m = mark8(m, b, t + 16u, e, live >> vec2(16u), 1u << 16u);
        m = mark8(m, b, t + 24u, e, live >> vec2(24u), 1u << 24u);
        var take = m.above;
        if settled.x {
            let ties = lowest(m.inside.x, room.x);
            room.x -= countOneBits(ties);
            take.x |= ties;
            m.inside.x = 0u;
        }
        if settled.y {
            let ties = lowest(m.inside.y, room.y);
            room.y -= countOneBits(ties);
            take.y |= ties;
            m.inside.y = 0u;
        }
        n.x = collect(m.inside.x, w, e, 0u, n.x, lane);
        n.y = collect(m.inside.y, w, e, 1u, n.y, lane);
        let low = max(begin, t);
        let own = bits_between(low - t, min(to, t + 32u) - t);
        put(pair.x, columns, w, own, take.x);
        if pair.y != pair.x {
            put(pair.y, columns, w, own, take.y);
        }
    }

    // The candidates, in token order. Behind the last expert there is none.
    n.y = select(n.y, 0u, pair.y == pair.x);
    let over = b.over;
    b.reach -= over;
    b.over = vec2(0u);
    b = narrow_candidates(Bracket(b.lo, b.hi, select(b.reach, vec2(0u), n == vec2(0u)), b.over), want - over, n, 0u, lane);
    room = want - over - b.over;
    for (var i = 0u; i < max(n.x, n.y); i++) {
        for (var which = 0u; which < 2u; which++) {
            if i < n[which] {
                let at = (i * 2u + which) * WG + lane;
                let k = candidate_keys[at];
                let tie = k >= b.lo[which] && k <= b.hi[which] && room[which] > 0u;
                if k > b.hi[which] || tie {
                    room[which] -= u32(tie);
                    let t = candidate_tokens[at];
                    atomicOr(&assigned[pair[which] * columns + t / 32u], 1u << (t % 32u));
                }
            }
        }
    }
}
