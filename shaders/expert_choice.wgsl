// assigned[e, t] = 1 for the capacity[b] tokens t of sequence b with the highest values[t, e]; ties go to the
// lower token
//   values [tokens, experts] f32, any value; NaN ranks below -inf
//   offsets [sequences + 1] u32
//   lengths [sequences] u32 where has_lengths: the rest of a sequence is padding, never chosen
//   rows [ceil(tokens / 32)] bit set, where has_rows: the others are never chosen, and do not count
//   capacity [sequences] u32, clamped to 1..=the tokens there are to choose from
//   assigned [experts, ceil(tokens / 32)] bit set, written whole
// MASKED (the capacity factor of token choice): chooses among the bits already set, at most capacity[b], 0
// included, of one sequence
//   dropped [experts] u32, written whole: how many bits the expert lost
// Grid: ceil(experts / EXPERTS) * sequences groups; EXPERTS neighbouring experts, LANES lanes each.
// Pieces: common/grid, common/keys, common/offsets, common/bits, choice/words.
//
// Each expert narrows a bracket [lo, hi] of keys that holds the key of its last token: a pass counts the keys
// of 254 equal parts of the bracket. The tokens of up to LANES words of 32 stay in registers: their scores
// are read once. Of more, each lane first takes one word as a sample, which mostly says enough for one pass
// over all tokens to leave few of them. A second one sets the bits above the bracket and lists the tokens
// inside, which are ranked in workgroup memory. Wrong guesses cost passes.

struct Params {
  tokens: u32,
  experts: u32,
  sequences: u32,
  has_lengths: u32,
  has_rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> values: array<u32>;
@group(0) @binding(2) var<storage, read> offsets: array<u32>;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read> capacity: array<u32>;
@group(0) @binding(5) var<storage, read> rows: array<u32>;
@group(0) @binding(6) var<storage, read_write> assigned: array<atomic<u32>>;
@group(0) @binding(7) var<storage, read_write> dropped: array<u32>;

const BINS: u32 = 256u;
const CANDIDATES: u32 = 64u;

// Bin 0 holds the keys below a bracket, BINS - 1 those above.
var<workgroup> bins: array<atomic<u32>, BINS * EXPERTS>;
var<workgroup> totals: array<u32, WG>;
var<workgroup> busy: atomic<u32>;
var<workgroup> any_busy: u32;
var<workgroup> range_end: u32;
// Of each expert: what a pass has found, and the tokens that are left to rank.
var<workgroup> found: array<Bracket, EXPERTS>;
var<workgroup> listed: array<atomic<u32>, EXPERTS>;
var<workgroup> candidate_keys: array<u32, CANDIDATES * EXPERTS>;
var<workgroup> candidate_tokens: array<u32, CANDIDATES * EXPERTS>;

// Keys lo..=hi. `reach` keys are at least lo, `over` of them above hi.
struct Bracket { lo: u32, hi: u32, reach: u32, over: u32 }

// Ranks, from above and from 1, whose keys a bracket is to hold: those of high to low.
struct Ranks { high: u32, low: u32 }

// A lane's place: its expert and the expert's place in the workgroup, its place among the expert's lanes.
struct Place { e: u32, slot: u32, first: u32 }

// The keys of a word's 32 tokens, 0 where they are not eligible.
alias Word = array<vec4<u32>, 8>;

// Tokens start..end, in the words first..last.
struct Tokens { start: u32, end: u32, first: u32, last: u32 }

// Bits of the tokens of word w that are within start..end, and set already where that is asked for.
fn eligible_bits(tokens: Tokens, e: u32, w: u32) -> u32 {
  if w >= tokens.last {
    return 0u;
  }
  let low = max(tokens.start, w * 32u);
  let bits = bits_between_or_none(low - w * 32u, max(low, min(tokens.end, w * 32u + 32u)) - w * 32u);
  if MASKED {
    return bits & atomicLoad(&assigned[e * ((params.tokens + 31u) / 32u) + w]);
  }
  if params.has_rows == 1u {
    return bits & rows[w];
  }
  return bits;
}

// The keys of the four tokens of word w from its `4 * i`th on; `bits` says which of the word are eligible. A
// token that is not there stands for the last one, to be masked: a branch would keep loads from being under
// way together.
fn word_four(e: u32, w: u32, i: u32, bits: u32) -> vec4<u32> {
  let t = w * 32u + 4u * i;
  let row = min(vec4(t, t + 1u, t + 2u, t + 3u), vec4(params.tokens - 1u)) * params.experts + e;
  let k = vec4(key(values[row.x]), key(values[row.y]), key(values[row.z]), key(values[row.w]));
  return select(vec4(0u), k, (vec4(bits >> (4u * i)) & vec4(1u, 2u, 4u, 8u)) != vec4(0u));
}

// The least shift that leaves at most BINS - 2 parts of a bracket.
fn shift_of(b: Bracket) -> u32 {
  let width = b.hi - b.lo;
  let bits = 32u - countLeadingZeros(width | 1u);
  let least = max(bits, 8u) - 8u;
  return least + u32((width >> least) >= BINS - 2u);
}

// What keys are counted by: a bracket, the shift of its parts, the expert's place.
struct Scale { b: Bracket, shift: u32, slot: u32 }

fn count_one(s: Scale, k: u32) {
  if k >= s.b.lo && k <= s.b.hi {
    atomicAdd(&bins[(1u + ((k - s.b.lo) >> s.shift)) * EXPERTS + s.slot], 1u);
  }
}

// Counts keys: those inside the bracket in their bins; the result is those below and above.
fn count_four(s: Scale, k: vec4<u32>) -> vec2<u32> {
  count_one(s, k.x);
  count_one(s, k.y);
  count_one(s, k.z);
  count_one(s, k.w);
  let below = vec4<u32>(k < vec4(s.b.lo)) * min(k, vec4(1u));
  let above = vec4<u32>(k > vec4(s.b.hi));
  return vec2(below.x + below.y + below.z + below.w, above.x + above.y + above.z + above.w);
}

// Bits of the keys above a bracket, and of those inside.
fn mark_four(b: Bracket, k: vec4<u32>) -> vec2<u32> {
  let above = select(vec4(0u), vec4(1u, 2u, 4u, 8u), k > vec4(b.hi));
  let inside = select(vec4(0u), vec4(1u, 2u, 4u, 8u), (k >= vec4(b.lo)) & (k <= vec4(b.hi)));
  return vec2(above.x + above.y + above.z + above.w, inside.x + inside.y + inside.z + inside.w);
}

fn clear_bins(index: u32) {
  for (var i = index; i < EXPERTS * BINS; i += WG) {
    atomicStore(&bins[i], 0u);
  }
  workgroupBarrier();
}

// From the bins of `guess` to the part of `outer` that holds the ranks. All lanes call.
fn find(at: Place, guess: Bracket, shift: u32, outer: Bracket, ranks: Ranks, sides: vec2<u32>) -> Bracket {
  atomicAdd(&bins[at.slot], sides.x);
  atomicAdd(&bins[(BINS - 1u) * EXPERTS + at.slot], sides.y);
  if at.first == 0u {
    found[at.slot] = outer;
  }
  workgroupBarrier();
  // Each lane sums a stretch of bins; those in whose stretch a rank lies find its bin.
  const STRETCH = BINS / LANES;
  var mine = 0u;
  for (var i = 0u; i < STRETCH; i++) {
    mine += atomicLoad(&bins[(at.first * STRETCH + i) * EXPERTS + at.slot]);
  }
  totals[at.first * EXPERTS + at.slot] = mine;
  workgroupBarrier();
  var above = 0u;
  for (var l = at.first + 1u; l < LANES; l++) {
    above += totals[l * EXPERTS + at.slot];
  }
  for (var i = STRETCH; i > 0u; i--) {
    let bin = at.first * STRETCH + i - 1u;
    let reach = above + atomicLoad(&bins[bin * EXPERTS + at.slot]);
    // By i, known once the loop is unrolled: conditions of every bin would fill AMD's scalar registers.
    let below = i == 1u && at.first == 0u;
    let beyond = i == STRETCH && at.first == LANES - 1u;
    if above < ranks.high && reach >= ranks.high {
      if below {
        found[at.slot].hi = guess.lo - 1u;
      } else if !beyond {
        found[at.slot].hi = guess.lo + min(guess.hi - guess.lo, (bin << shift) - 1u);
      }
      found[at.slot].over = select(above, outer.over, beyond);
    }
    if above < ranks.low && reach >= ranks.low {
      if beyond {
        found[at.slot].lo = guess.hi + 1u;
      } else if !below {
        found[at.slot].lo = guess.lo + ((bin - 1u) << shift);
      }
      found[at.slot].reach = select(reach, outer.reach, below);
    }
    above = reach;
  }
  workgroupBarrier();
  return found[at.slot];
}

// Whether the bracket says who is taken: all inside, or the first ones among equals.
fn is_settled(b: Bracket, want: u32) -> bool {
  return b.reach == want || b.lo == b.hi;
}

// The sum over an expert's lanes. All lanes call.
fn sum_lanes(at: Place, mine: u32) -> u32 {
  totals[at.first * EXPERTS + at.slot] = mine;
  workgroupBarrier();
  var sum = 0u;
  for (var l = 0u; l < LANES; l++) {
    sum += totals[l * EXPERTS + at.slot];
  }
  workgroupBarrier();
  return sum;
}

// Ranks on both sides of that of the last token taken, in a sample of n tokens: 2.25 standard deviations
// away.
fn sample_ranks(share: f32, n: u32) -> Ranks {
  let rank = share * f32(n);
  let margin = 2.25 * sqrt(rank * (1.0 - share) + 0.25);
  return Ranks(min(max(u32(max(rank - margin, 0.0)), 1u), n), min(u32(rank + margin) + 1u, n));
}

// The bits of word w that are this sequence's tokens and padding, begin..to.
fn own_bits(begin: u32, to: u32, w: u32) -> u32 {
  return bits_between_or_none(max(begin, w * 32u) - w * 32u, min(to, w * 32u + 32u) - w * 32u);
}

// Whether any lane says so. All lanes call.
fn any_lane(index: u32, mine: bool) -> bool {
  if index == 0u {
    atomicStore(&busy, 0u);
  }
  workgroupBarrier();
  if mine {
    atomicOr(&busy, 1u);
  }
  workgroupBarrier();
  if index == 0u {
    any_busy = atomicLoad(&busy);
  }
  return workgroupUniformLoad(&any_busy) != 0u;
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
  let at = Place(e, slot, first);
  let columns = (params.tokens + 31u) / 32u;

  let range = token_range(index, b, params.tokens);
  let start = range.x;
  // With SHORT not 0, expert_choice_serial.wgsl takes the others.
  if SHORT > 0u && range.y - start <= SHORT {
    return;
  }
  if index == 0u {
    range_end = range.y;
    if params.has_lengths == 1u {
      range_end = min(range.y, start + min(lengths[b], params.tokens));
    }
  }
  let end = workgroupUniformLoad(&range_end);
  let tokens = Tokens(start, end, start / 32u, select((end + 31u) / 32u, 0u, start >= end));
  let words = max(tokens.last, tokens.first) - tokens.first;
  let kept = words <= LANES;

  var eligible = end - start;
  if MASKED || params.has_rows == 1u {
    var mine = 0u;
    for (var w = tokens.first + first; w < tokens.last; w += LANES) {
      mine += countOneBits(eligible_bits(tokens, e, w));
    }
    eligible = sum_lanes(at, mine);
  }
  let want = clamp(capacity[b], select(min(1u, eligible), 0u, MASKED), eligible);
  if MASKED && live && first == 0u {
    dropped[e] = eligible - want;
  }
  if first == 0u {
    atomicStore(&listed[slot], 0u);
  }

  // Where none is wanted, a bracket that no key reaches.
  var whole = Bracket(1u, 0xffffffffu, eligible, 0u);
  if want == 0u {
    whole = Bracket(0xffffffffu, 0xffffffffu, 0u, 0u);
  }
  var bracket = whole;
  var guess = whole;

  // All tokens, or a sample: one word a lane, in equal steps.
  let own = tokens.first + select(u32(f32(first) / f32(LANES) * f32(words)), first, kept);
  var keys: Word;
  let sample_bits = eligible_bits(tokens, e, own);
  for (var i = 0u; i < 8u; i++) {
    keys[i] = word_four(e, own, i, sample_bits);
  }
  if !kept {
    let n = sum_lanes(at, countOneBits(sample_bits));
    let ranks = sample_ranks(f32(want) / f32(max(eligible, 1u)), n);
    for (var i = 0u; i < 3u; i++) {
      clear_bins(index);
      let shift = shift_of(guess);
      var sides = vec2(0u);
      for (var j = 0u; j < 8u; j++) {
        sides += count_four(Scale(guess, shift, slot), keys[j]);
      }
      guess = find(at, guess, shift, guess, ranks, sides);
    }
  }
  while any_lane(index, !is_settled(bracket, want) && bracket.reach - bracket.over > CANDIDATES) {
    clear_bins(index);
    let shift = shift_of(guess);
    var sides = vec2(0u);
    // Once where they are kept.
    for (var w = tokens.first + first; w < tokens.last; w += LANES) {
      let bits = eligible_bits(tokens, e, w);
      for (var i = 0u; i < 8u; i++) {
        var k = keys[i];
        if !kept {
          k = word_four(e, w, i, bits);
        }
        sides += count_four(Scale(guess, shift, slot), k);
      }
    }
    bracket = find(at, guess, shift, bracket, Ranks(want, want), sides);
    guess = bracket;
  }

  // In token order. The first and the last sequence also clear what lies before and behind all of them, and
  // each its own padding.
  let begin = select(start, 0u, b == 0u);
  let to = select(range.y, columns * 32u, b + 1u == params.sequences);
  let settled = is_settled(bracket, want);
  let room = want - bracket.over;
  var before = 0u;
  for (var w0 = tokens.first; w0 < tokens.last; w0 += LANES) {
    let w = w0 + first;
    let bits = eligible_bits(tokens, e, w);
    var voters = vec2(0u);
    for (var i = 0u; i < 8u; i++) {
      var k = keys[i];
      if !kept {
        k = word_four(e, w, i, bits);
      }
      voters |= mark_four(bracket, k) << vec2(4u * i);
    }
    var take = voters.x;
    var inside = voters.y;
    // Where the bracket settles it, the lowest tokens inside: among equals those first, or all.
    totals[index] = select(0u, countOneBits(inside), settled);
    workgroupBarrier();
    var here = before;
    for (var l = 0u; l < LANES; l++) {
      let n = totals[l * EXPERTS + slot];
      here += select(0u, n, l < first);
      before += n;
    }
    workgroupBarrier();
    if settled {
      let left = room - min(room, here);
      if left >= countOneBits(inside) {
        take |= inside;
      } else {
        for (var i = 0u; i < left; i++) {
          take |= inside & (~inside + 1u);
          inside &= inside - 1u;
        }
      }
    } else {
      while inside != 0u {
        let t = w * 32u + countTrailingZeros(inside);
        let i = atomicAdd(&listed[slot], 1u) * EXPERTS + slot;
        candidate_keys[i] = key(values[t * params.experts + e]);
        candidate_tokens[i] = t;
        inside &= inside - 1u;
      }
    }
    if w < tokens.last && live {
      put_word(e * columns + w, own_bits(begin, to, w), take);
    }
  }
  // An empty sequence has no words: where it lies inside one, that word belongs to others.
  let last = select((to + 31u) / 32u, 0u, begin >= to);
  for (var w = begin / 32u + first; w < last; w += LANES) {
    if live && (w < tokens.first || w >= tokens.last) {
      put_word(e * columns + w, own_bits(begin, to, w), 0u);
    }
  }

  // The candidates: each is ranked among all of its expert.
  storageBarrier();
  workgroupBarrier();
  let n = atomicLoad(&listed[slot]);
  for (var c = first; c < n; c += LANES) {
    let k = candidate_keys[c * EXPERTS + slot];
    let t = candidate_tokens[c * EXPERTS + slot];
    var rank = 0u;
    for (var i = 0u; i < n; i++) {
      let other = candidate_keys[i * EXPERTS + slot];
      rank += u32(other > k || (other == k && candidate_tokens[i * EXPERTS + slot] < t));
    }
    if rank < room && live {
      atomicOr(&assigned[e * columns + t / 32u], 1u << (t % 32u));
    }
  }
}
