// What expert_choice.wgsl computes, with the same bindings, for software drivers: one lane takes two
// neighbouring experts (x and y of every vector here), without barriers or atomics in its loops.
// Grid: ceil(experts / (2 * WG)) * sequences groups.
// Pieces: common/grid, common/keys, common/offsets, common/bits, choice/words,
//   choice/pairs | choice/pairs_wide, choice/pivots_few | choice/pivots_many.
//
// Each expert narrows a bracket [lo, hi] of keys that holds the key of its last token: a pass counts how many
// keys reach each of 8 or 16 pivots. From 64 tokens on the first are guessed from a sample, so that one
// pass is mostly enough for the bracket to hold few tokens. The last pass sets the bits above the bracket and
// collects the tokens inside, among which the rest is found in workgroup memory. Wrong guesses cost passes:
// at most 14, as from the fourth on each divides the bracket by 9 or more.

struct Params {
  tokens: u32,
  experts: u32,
  sequences: u32,
  has_lengths: u32,
  has_rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(2) var<storage, read> offsets: array<u32>;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read> capacity: array<u32>;
@group(0) @binding(5) var<storage, read> rows: array<u32>;
@group(0) @binding(6) var<storage, read_write> assigned: array<atomic<u32>>;
@group(0) @binding(7) var<storage, read_write> dropped: array<u32>;

const CANDIDATES: u32 = 120u;
// So many scores lie in no cache.
const FAR: u32 = 1u << 20u;

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

// The pivots from number `first` on of those that cut lo..=hi into equal parts; those beyond hi of a bracket
// of fewer keys are hi.
fn pivots_of(lo: vec2<u32>, hi: vec2<u32>, parts: u32, first: u32) -> Eights {
  let most = hi - lo;
  let step = most / parts + 1u;
  let a = vec4(first) + vec4(0u, 1u, 2u, 3u);
  let b = vec4(first) + vec4(4u, 5u, 6u, 7u);
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

// Ranks that a bracket is to hold: low.x is the last one from above, high.x the first. Exact where they are
// equal.
struct Ranks {
  low: vec2<u32>,
  high: vec2<u32>,
}

// A bracket (lo, hi, reach, over) narrowed by a pivot that `c` keys reach.
fn by_pivot(b: vec4<u32>, low: u32, high: u32, p: u32, c: u32) -> vec4<u32> {
  let inside = p > b.x && p <= b.y && (c >= low || c < high);
  let half = select(vec4(b.x, p - 1u, b.z, c), vec4(p, b.y, c, b.w), c >= low);
  return select(b, half, inside);
}

fn by_pivots(
  b: vec4<u32>,
  low: u32,
  high: u32,
  p0: vec4<u32>,
  p1: vec4<u32>,
  c0: vec4<u32>,
  c1: vec4<u32>,
) -> vec4<u32> {
  var n = by_pivot(b, low, high, p0.x, c0.x);
  n = by_pivot(n, low, high, p0.y, c0.y);
  n = by_pivot(n, low, high, p0.z, c0.z);
  n = by_pivot(n, low, high, p0.w, c0.w);
  n = by_pivot(n, low, high, p1.x, c1.x);
  n = by_pivot(n, low, high, p1.y, c1.y);
  n = by_pivot(n, low, high, p1.z, c1.z);
  return by_pivot(n, low, high, p1.w, c1.w);
}

fn narrowed(b: Bracket, ranks: Ranks, p: Eights, c: Eights) -> Bracket {
  let x_before = vec4(b.lo.x, b.hi.x, b.reach.x, b.over.x);
  let x = by_pivots(x_before, ranks.low.x, ranks.high.x, p.x0, p.x1, c.x0, c.x1);
  let y_before = vec4(b.lo.y, b.hi.y, b.reach.y, b.over.y);
  let y = by_pivots(y_before, ranks.low.y, ranks.high.y, p.y0, p.y1, c.y0, c.y1);
  return Bracket(vec2(x.x, y.x), vec2(x.y, y.y), vec2(x.z, y.z), vec2(x.w, y.w));
}

// Whether the bracket says who is taken: all inside, or the first ones among equals.
fn is_settled(b: Bracket, want: vec2<u32>) -> vec2<bool> {
  return (b.reach == want) | (b.lo == b.hi);
}

// Ranks on both sides of that of the last token taken, in a sample of n tokens: 2.25 standard deviations
// away.
fn sample_ranks(share: vec2<f32>, n: u32) -> Ranks {
  let rank = share * f32(n);
  let margin = 2.25 * sqrt(rank * (1.0 - share) + 0.25);
  return Ranks(
    min(vec2<u32>(rank + margin) + 1u, vec2(n)),
    max(vec2<u32>(max(rank - margin, vec2(0.0))), vec2(1u)),
  );
}

// Whether a bracket in a sample can become much narrower.
fn is_wide(b: Bracket, ranks: Ranks) -> vec2<bool> {
  return (b.reach - b.over > (ranks.low - ranks.high) * 5u / 4u + 2u) & (b.lo != b.hi);
}

// A bracket and a part of its width on both sides.
fn widened(b: Bracket, part: u32) -> Bracket {
  let margin = (b.hi - b.lo) / part + 1u;
  return Bracket(b.lo - min(b.lo - 1u, margin), b.hi + min(0xffffffffu - b.hi, margin), b.reach, b.over);
}

// Where to look next in bracket b, after the guess: where that was wrong, beside it and four times as wide.
fn next_guess(b: Bracket, guess: Bracket) -> Bracket {
  let width = min(guess.hi - guess.lo, vec2(0x3fffffffu)) * 4u;
  let lo = select(b.lo, b.hi - min(width, b.hi - b.lo), b.lo < guess.lo);
  let hi = select(b.hi, b.lo + min(width, b.hi - b.lo), b.hi > guess.hi);
  return Bracket(lo, hi, b.reach, b.over);
}

// How many of the n keys in workgroup memory reach each pivot.
fn count_candidates(p: Eights, n: vec2<u32>, lane: u32) -> Eights {
  var c = Eights();
  for (var i = 0u; i < max(n.x, n.y); i++) {
    let at = i * 2u * WG + lane;
    let k = vec2(candidate_keys[at], candidate_keys[at + WG]);
    c = count(c, p, select(vec2(0u), k, vec2(i) < n));
  }
  return c;
}

// Keys of eight tokens for both experts, 0 where a bit of live is not set. All are loaded before any is used,
// so that the rows, which lie far apart, come at the same time.
fn keys_of(t: u32, e: u32, live: vec2<u32>) -> Eights {
  let a = scores_of(t, e);
  let b = scores_of(t + 1u, e);
  let c = scores_of(t + 2u, e);
  let d = scores_of(t + 3u, e);
  let f = scores_of(t + 4u, e);
  let g = scores_of(t + 5u, e);
  let h = scores_of(t + 6u, e);
  let i = scores_of(t + 7u, e);
  return Eights(
    keys4(a.x, b.x, c.x, d.x, live.x),
    keys4(f.x, g.x, h.x, i.x, live.x >> 4u),
    keys4(a.y, b.y, c.y, d.y, live.y),
    keys4(f.y, g.y, h.y, i.y, live.y >> 4u),
  );
}

fn keys4(a: u32, b: u32, c: u32, d: u32, live: u32) -> vec4<u32> {
  let bits = (vec4(live) >> vec4(0u, 1u, 2u, 3u)) & vec4(1u);
  return vec4(key(a), key(b), key(c), key(d)) * bits;
}

fn count_keys(given: Eights, p: Eights, k: Eights) -> Eights {
  var c = count(given, p, vec2(k.x0.x, k.y0.x));
  c = count(c, p, vec2(k.x0.y, k.y0.y));
  c = count(c, p, vec2(k.x0.z, k.y0.z));
  c = count(c, p, vec2(k.x0.w, k.y0.w));
  c = count(c, p, vec2(k.x1.x, k.y1.x));
  c = count(c, p, vec2(k.x1.y, k.y1.y));
  c = count(c, p, vec2(k.x1.z, k.y1.z));
  return count(c, p, vec2(k.x1.w, k.y1.w));
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
  let k = keys_of(t, e, live);
  var m = mark(given, b, vec2(k.x0.x, k.y0.x), bit);
  m = mark(m, b, vec2(k.x0.y, k.y0.y), bit << 1u);
  m = mark(m, b, vec2(k.x0.z, k.y0.z), bit << 2u);
  m = mark(m, b, vec2(k.x0.w, k.y0.w), bit << 3u);
  m = mark(m, b, vec2(k.x1.x, k.y1.x), bit << 4u);
  m = mark(m, b, vec2(k.x1.y, k.y1.y), bit << 5u);
  m = mark(m, b, vec2(k.x1.z, k.y1.z), bit << 6u);
  return mark(m, b, vec2(k.x1.w, k.y1.w), bit << 7u);
}

// Eligible tokens of word w.
fn live_word(start: u32, end: u32, w: u32, e: vec2<u32>, columns: u32) -> vec2<u32> {
  let low = max(start, w * 32u);
  let own = bits_between_or_none(low - w * 32u, max(low, min(end, w * 32u + 32u)) - w * 32u);
  if MASKED {
    let x = atomicLoad(&assigned[e.x * columns + w]);
    return vec2(own) & vec2(x, atomicLoad(&assigned[e.y * columns + w]));
  }
  if params.has_rows == 1u && own != 0u {
    return vec2(own & rows[w]);
  }
  return vec2(own);
}

// Reads one value of each of the 32 rows from token t on, the next word's: they lie far apart, and in no
// cache where there are many. So memory fetches them side by side, before they are wanted eight at a time.
// Nothing is made of the values.
var<private> asked: u32;

fn ask(t: u32, lane: u32, first: u32) {
  let last = params.tokens - 1u;
  asked |= one_of(min(t + lane, last), first) | one_of(min(t + lane + WG, last), first) |
    one_of(min(t + lane + 2u * WG, last), first) | one_of(min(t + lane + 3u * WG, last), first);
}

// Every `step`th word of the tokens start..end.
struct Words { start: u32, end: u32, first: u32, last: u32, step: u32 }

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
  // Longer ones are left to expert_choice.wgsl.
  if range.y - range.x > SHORT {
    return;
  }
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
  if MASKED || params.has_rows == 1u {
    eligible = vec2(0u);
    for (var w = words.x; w < words.y; w++) {
      eligible += countOneBits(live_word(start, end, w, pair, columns));
    }
  }
  if MASKED {
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

  // A guess from a sample, which of a longer sequence every eighth word sharpens.
  let length = end - start;
  let share = vec2<f32>(want) / vec2<f32>(max(eligible, vec2(1u)));
  var guess = b;
  if length >= 64u {
    // Strips of eight tokens.
    let apart = length / 8u;
    let all = vec2(0xffu);
    let k0 = keys_of(start, e, all);
    let k1 = keys_of(start + apart, e, all);
    let k2 = keys_of(start + 2u * apart, e, all);
    let k3 = keys_of(start + 3u * apart, e, all);
    let k4 = keys_of(start + 4u * apart, e, all);
    let k5 = keys_of(start + 5u * apart, e, all);
    let k6 = keys_of(start + 6u * apart, e, all);
    let k7 = keys_of(start + 7u * apart, e, all);
    let ranks = sample_ranks(share, 64u);
    guess = Bracket(vec2(1u), vec2(0xffffffffu), vec2(64u), vec2(0u));
    for (var i = 0u; i < 11u && any(is_wide(guess, ranks)); i++) {
      let p = pivots_of(guess.lo, guess.hi, 9u, 1u);
      var c = count_keys(Eights(), p, k0);
      c = count_keys(c, p, k1);
      c = count_keys(c, p, k2);
      c = count_keys(c, p, k3);
      c = count_keys(c, p, k4);
      c = count_keys(c, p, k5);
      c = count_keys(c, p, k6);
      c = count_keys(c, p, k7);
      guess = narrowed(guess, ranks, p, c);
    }
    guess = widened(guess, 4u);
  }

  // Of a long sequence every eighth word first, thrice at most. One call of `counted` for both, as compilers
  // inline each.
  let ranks = sample_ranks(share, length / 8u);
  var inner = Bracket(vec2(1u), vec2(0xffffffffu), vec2(length / 8u), vec2(0u));
  // Many candidates of a short sequence cost more than a pass, given a guess.
  let few = vec2(select(clamp(length / 8u, 40u, CANDIDATES), CANDIDATES, length < 64u));
  for (var i = select(3u, 0u, length >= 2048u); ; i++) {
    let samples = i < 3u;
    if i == 3u && length >= 2048u {
      // A larger sample says more, and what it leaves must not be more than fits.
      guess = widened(guess, select(4u, 8u, length >= 32768u));
    }
    let busy = select(
      any((b.reach - b.over > few) & !is_settled(b, want)),
      any(is_wide(inner, ranks)),
      samples,
    );
    if !busy && !samples {
      break;
    }
    if busy {
      var outer = b;
      var wanted = Ranks(want, want);
      var words_of = Words(start, end, words.x, words.y, 1u);
      if samples {
        outer = inner;
        wanted = ranks;
        words_of.step = 8u;
      }
      guess.lo = max(guess.lo, outer.lo);
      guess.hi = min(guess.hi, outer.hi);
      let got = counted(outer, wanted, guess.lo, guess.hi, words_of, e, pair, columns, lane);
      if samples {
        inner = got;
        guess = got;
      } else {
        b = got;
        guess = next_guess(got, guess);
        if i >= 5u {
          guess = got;
        }
      }
    }
  }

  // Whole words; the first and the last sequence also clear what lies before and behind all of them, and each
  // its own padding. An empty sequence has no words: where it lies inside one, that word belongs to others.
  let begin = select(start, 0u, s == 0u);
  let to = select(range.y, columns * 32u, s + 1u == params.sequences);
  let last = select((to + 31u) / 32u, 0u, begin >= to);
  let settled = is_settled(b, want);
  var room = want - b.over;
  var n = vec2(0u);
  for (var w = begin / 32u; w < last; w++) {
    let live = live_word(start, end, w, pair, columns);
    let t = w * 32u;
    if params.tokens * params.experts >= FAR {
      ask(t + 32u, lane, e - 2u * lane);
    }
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
    let own = bits_between_or_none(low - t, min(to, t + 32u) - t);
    put_word(pair.x * columns + w, own, take.x);
    if pair.y != pair.x {
      put_word(pair.y * columns + w, own, take.y);
    }
  }

  // The candidates, in token order. Behind the last expert there is none.
  n.y = select(n.y, 0u, pair.y == pair.x);
  let rest = want - b.over;
  b.reach = select(b.reach - b.over, vec2(0u), n == vec2(0u));
  b.over = vec2(0u);
  while any((b.reach != b.over) & !is_settled(b, rest)) {
    let p = pivots_of(b.lo, b.hi, 9u, 1u);
    b = narrowed(b, Ranks(rest, rest), p, count_candidates(p, n, lane));
  }
  room = rest - b.over;
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
  // Never: but the compiler must not know.
  if params.experts == 0u {
    atomicOr(&assigned[0], asked);
  }
}
