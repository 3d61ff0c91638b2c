// A block's tokens elect experts by RULE (see coreset.wgsl): the result is the bit set `elected`.
// Contract: all WG lanes call, in uniform control flow, with equal arguments; the kernel has values, voters,
// own_word(e, w), word w of the bits of tokens that vote for e, and row_word(w), that of the tokens that take
// part. Experts <= MOST. The rules' names (MASS, ...) and RULE are constants of the prelude.
const MAX_BLOCK: u32 = 1024u;
const VOTES: bool = RULE == MASS || RULE == VOTE;
const SEARCHES: bool = VOTES || RULE == CAPACITY; // for the last key that is elected; other keys are 0 or 1

struct Election {
  experts: u32,
  count: u32,     // 1..=experts
  mass: u32,      // of 2^24
  has_voters: u32,
}

var<workgroup> elected: array<u32, MOST / 32u>;
var<workgroup> electors: array<u32, 33>; // tokens that have a say, as words of a column
var<workgroup> low_keys: array<u32, MOST>;
var<workgroup> high_keys: array<u32, select(1u, MOST, VOTES)>;
var<workgroup> partials: array<vec4<u32>, WG>;
var<workgroup> probe: vec3<u32>;
var<workgroup> lowest: atomic<u32>;
var<workgroup> highest: atomic<u32>;
var<workgroup> equals: array<u32, MOST / 32u>;

// What an expert is ranked by, as 64 bits.
fn rank_key(e: u32) -> vec2<u32> {
  if VOTES {
    return vec2(low_keys[e], high_keys[e]);
  }
  return vec2(low_keys[e], 0u);
}

// Sum over lanes of a count and of a 64-bit number: (count, number) in the first lane, anything in others.
struct Total {
  count: u32,
  sum: vec2<u32>,
}

fn election_total(index: u32, count: u32, sum: vec2<u32>) -> Total {
  const SPAN: u32 = min(WG, 16u);
  // The sum in parts that have room for carries.
  partials[index] = vec4(count, sum.x & 0xffffu, sum.x >> 16u, sum.y);
  workgroupBarrier();
  var all = vec4<u32>();
  if index < WG / SPAN {
    for (var i = 0u; i < SPAN; i++) {
      all += partials[i * (WG / SPAN) + index];
    }
  }
  if WG > SPAN {
    if index < WG / SPAN {
      partials[index] = all; // of its own entries
    }
    workgroupBarrier();
    if index == 0u {
      for (var i = 1u; i < WG / SPAN; i++) {
        all += partials[i];
      }
    }
  }
  return Total(all.x, wide_add(wide_add(vec2(all.y, 0u), vec2(all.z << 16u, all.z >> 16u)), vec2(0u, all.w)));
}

// Word i of the tokens start..end that are not padding; end lies past the word's first token.
fn there_word(start: u32, end: u32, i: u32) -> u32 {
  let w = start / 32u + i;
  return bits_between(max(start, w * 32u) - w * 32u, min(end, w * 32u + 32u) - w * 32u) & row_word(w);
}

// Tokens start..end that have a say, of the first MAX_BLOCK; returns the number of words.
fn load_electors(index: u32, start: u32, end: u32, has_voters: u32) -> u32 {
  let to = min(end, start + MAX_BLOCK);
  var words = 0u;
  if to > start {
    words = (to - 1u) / 32u - start / 32u + 1u;
  }
  for (var i = index; i < words; i += WG) {
    var word = there_word(start, to, i);
    if has_voters == 1u {
      let base = (start / 32u + i) * 32u;
      let low = max(start, base) - base;
      let high = min(to, base + 32u) - base;
      var marked = 0u;
      for (var bit = low; bit < high; bit++) {
        marked |= u32(voters[base + bit] != 0u) << bit;
      }
      word &= marked;
    }
    electors[i] = word;
  }
  workgroupBarrier();
  return words;
}

fn elect(index: u32, start: u32, end: u32, election: Election) {
  let experts = election.experts;
  let words = load_electors(index, start, end, election.has_voters);
  var anybody = 0u;
  for (var i = 0u; i < words; i++) {
    anybody |= electors[i];
  }
  if index == 0u {
    atomicStore(&lowest, 0xffffffffu);
    atomicStore(&highest, 0u);
  }
  if RULE == CAPACITY {
    workgroupBarrier();
  }

  // What every expert got.
  let every_vote = RULE == MASS && election.mass >= (1u << 24u);
  var voted = 0u;
  var gains = vec2<u32>();
  var debts = vec2<u32>();
  for (var e = index; e < experts; e += WG) {
    var got = 0u; // the highest key, or the tokens
    var votes = vec2<i32>();
    for (var i = 0u; i < words; i++) {
      var bits = electors[i];
      if RULE != CAPACITY {
        bits &= own_word(e, start / 32u + i);
      }
      if RULE == UNION {
        got |= bits;
        continue;
      }
      while bits != 0u {
        let t = (start / 32u + i) * 32u + firstTrailingBit(bits);
        bits &= bits - 1u;
        let value = values[t * experts + e];
        if RULE == CAPACITY {
          got = max(got, key(value));
        } else {
          votes += vote_of(value);
          got = 1u;
        }
      }
    }
    var rank = vec2(got, 0u);
    if RULE == CAPACITY {
      atomicMin(&lowest, got);
      atomicMax(&highest, got);
    } else if RULE == UNION {
      rank.x = u32(got != 0u);
    } else {
      voted += got;
      rank.x = got + 1u;
      if !every_vote {
        rank = vote_key(votes);
        if wide_less(NO_VOTE, rank) {
          gains = wide_add(gains, wide_sub(rank, NO_VOTE));
        } else {
          debts = wide_add(debts, wide_sub(NO_VOTE, rank));
        }
      }
    }
    low_keys[e] = rank.x;
    if VOTES {
      high_keys[e] = rank.y;
    }
  }

  // The last key that is elected, and how many of the experts that have it. Only the first lane knows these.
  var room = 0u;
  var low = vec2<u32>();
  if SEARCHES {
    var count = election.count;
    var bounded = false; // by the mass
    var bound = vec2<u32>();
    var high = vec2<u32>();
    if VOTES {
      let gained = election_total(index, voted, gains);
      workgroupBarrier();
      let owed = election_total(index, 0u, debts);
      if every_vote {
        count = max(count, gained.count);
        low = vec2(1u, 0u);
        high = vec2(2u, 0u);
      } else {
        // No key is 0.
        low = select(vec2(1u, 0u), wide_sub(NO_VOTE, owed.sum), wide_less(owed.sum, NO_VOTE));
        high = wide_add(NO_VOTE, gained.sum);
        if RULE == MASS {
          bounded = wide_less(owed.sum, gained.sum);
          bound = wide_part(wide_sub(gained.sum, owed.sum), election.mass);
        }
      }
    } else {
      workgroupBarrier();
      low.x = atomicLoad(&lowest);
      high.x = atomicLoad(&highest);
    }
    // Bisection: the key lies in low..=high, `reach` experts have low or more, `above` more than high, with
    // `mass` in sum.
    var reach = experts;
    var above = 0u;
    var mass = vec2<u32>();
    loop {
      if index == 0u {
        let done = all(low == high) || reach - above <= 1u || (!bounded && reach == count);
        probe = vec3(wide_add(low, wide_half(wide_sub(high, low))), u32(done));
      }
      let at = workgroupUniformLoad(&probe);
      if at.z == 1u {
        break;
      }
      var over = 0u;
      var sum = vec2<u32>();
      for (var e = index; e < experts; e += WG) {
        let rank = rank_key(e);
        if wide_less(at.xy, rank) {
          over += 1u;
          if RULE == MASS && wide_less(NO_VOTE, rank) {
            sum = wide_add(sum, wide_sub(rank, NO_VOTE));
          }
        }
      }
      let total = election_total(index, over, sum);
      if total.count < count || (bounded && !wide_less(bound, total.sum)) {
        high = at.xy;
        above = total.count;
        mass = total.sum;
      } else {
        low = wide_add(at.xy, vec2(1u, 0u));
        reach = total.count;
      }
    }
    // A key that some may share.
    room = reach - above;
    if index == 0u && room > 1u && (bounded || reach != count) {
      var taken = 0u;
      while bounded && taken < room && !wide_less(bound, mass) {
        mass = wide_add(mass, wide_sub(low, NO_VOTE));
        taken++;
      }
      room = max(taken, count - min(count, above));
    }
    if index == 0u {
      // Where the search ended early, all from low on are elected.
      if !all(low == high) {
        low = wide_sub(low, vec2(1u, 0u));
        room = 0u;
      }
      probe = vec3(low, room);
    }
  }
  var last = vec3<u32>();
  if SEARCHES {
    last = workgroupUniformLoad(&probe);
  } else {
    workgroupBarrier();
  }

  var somebody = anybody;
  if anybody == 0u {
    for (var i = 0u; i < words; i++) {
      somebody |= there_word(start, min(end, start + MAX_BLOCK), i);
    }
  }
  let chunks = (experts + 31u) / 32u;
  for (var c = index; c < chunks; c += WG) {
    var higher = 0u;
    var equal = 0u;
    // 32 in any case: with an end of its own, the loop is unrolled into as many branches.
    for (var i = 0u; i < 32u; i++) {
      let rank = rank_key(min(c * 32u + i, experts - 1u));
      higher |= u32(wide_less(last.xy, rank)) << i;
      equal |= u32(all(rank == last.xy)) << i;
    }
    let there = 0xffffffffu >> (32u - min(32u, experts - c * 32u));
    elected[c] = higher & there;
    equals[c] = equal & there;
  }
  workgroupBarrier();
  for (var c = index; c < chunks; c += WG) {
    // The lowest of the experts that share the last key.
    var before = 0u;
    for (var d = 0u; d < MOST / 32u; d++) {
      before += select(0u, countOneBits(equals[min(d, c)]), d < c);
    }
    var places = last.z - min(last.z, before);
    var equal = equals[c];
    var word = elected[c];
    while equal != 0u && places > 0u {
      word |= equal & (~equal + 1u);
      equal &= equal - 1u;
      places--;
    }
    if anybody == 0u {
      // Nobody has a say: every expert; nobody is there: none.
      let everyone = 0xffffffffu >> (32u - min(32u, experts - c * 32u));
      word = select(0u, everyone, somebody != 0u);
    }
    elected[c] = word;
  }
  workgroupBarrier();
}
