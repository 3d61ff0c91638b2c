// A token chooses experts: sets their bits in `words`, those of a column's 32 tokens for each expert (see
// token_choice.wgsl).
// Contract: all WG lanes call, in uniform control flow, with equal choices; experts <= MOST. LANES lanes,
// neighbours, work on a token, TEAMS tokens at a time; the kernel has values, and coreset_word(at), a word
// of the bit sets of coresets.
const TEAMS: u32 = WG / LANES;
const STRIPES: u32 = 0xffffffffu / ((1u << LANES) - 1u); // bits of a word that one lane of a team looks at

struct Choice {
  experts: u32,
  top: u32,
  group_count: u32,
  group_top: u32,
}

struct Row {
  base: u32,       // of values
  coreset: u32,    // first word of the coreset
  limited: bool,   // to a coreset
  live: bool,
  top: u32,        // experts it takes, of those of the choice
  groups: u32,     // bit set of groups that stay
}

var<workgroup> words: array<atomic<u32>, MOST>;
var<workgroup> group_keys: array<u32, TEAMS * GROUPS>;
var<workgroup> group_masks: array<atomic<u32>, TEAMS>;
var<workgroup> heads: array<vec2<u32>, select(1u, WG, LANES > 1u)>;

// Bits of word c that stand for low..high, which reaches into the word.
fn range_bits(c: u32, low: u32, high: u32) -> u32 {
  let begin = max(low, c * 32u) - c * 32u;
  let end = min(high, c * 32u + 32u) - c * 32u;
  return bits_between(begin, end);
}

// Word c of the experts that a row may choose, groups apart.
fn eligible_word(row: Row, c: u32, experts: u32) -> u32 {
  if !row.live {
    return 0u;
  }
  var word = range_bits(c, c * 32u, min(c * 32u + 32u, experts));
  if row.limited {
    word &= coreset_word(row.coreset + c);
  }
  return word;
}

// The groups that stay for a row: the group_top best by the sum of their two highest, groups of one by
// their one.
fn choose_groups(index: u32, row: Row, choice: Choice) -> u32 {
  let team = index / LANES;
  let first = index % LANES;
  let size = choice.experts / choice.group_count;
  for (var g = first; g < choice.group_count; g += LANES) {
    let low = g * size;
    let high = low + size;
    var best = 0u;
    var second = 0u;
    for (var c = low / 32u; c * 32u < high; c++) {
      var word = eligible_word(row, c, choice.experts) & range_bits(c, low, high);
      while word != 0u {
        let k = key(values[row.base + c * 32u + firstTrailingBit(word)]);
        word &= word - 1u;
        second = max(second, min(best, k));
        best = max(best, k);
      }
    }
    let sum = key(add_bits(bits_of_key(best), bits_of_key(second)));
    group_keys[team * GROUPS + g] = select(select(0u, sum, second != 0u), best, size == 1u);
  }
  if first == 0u {
    atomicStore(&group_masks[team], 0u);
  }
  workgroupBarrier();
  for (var g = first; g < choice.group_count; g += LANES) {
    let mine = group_keys[team * GROUPS + g];
    var rank = 0u;
    for (var o = 0u; o < choice.group_count; o++) {
      let other = group_keys[team * GROUPS + o];
      rank += u32(other > mine || (other == mine && o < g));
    }
    if mine != 0u && rank < choice.group_top {
      atomicOr(&group_masks[team], 1u << g);
    }
  }
  workgroupBarrier();
  return atomicLoad(&group_masks[team]);
}

// Sets bit `bit` of the best experts of a row, as many as the row takes of the choice's `top`.
fn choose(index: u32, bit: u32, row: Row, choice: Choice) {
  let team = index / LANES;
  let chunks = (choice.experts + 31u) / 32u;
  let size = choice.experts / choice.group_count;
  // LIST experts at a time, in the order (key, lower index), each pass after the last expert of the one
  // before.
  var last = vec2<u32>(0xffffffffu, 0u);
  for (var taken = 0u; taken < choice.top; taken += LIST) {
    // Every lane keeps the best LIST of its experts, best first. It meets them in their order, so that of
    // equal ones the first stays ahead.
    var keys: array<u32, LIST>;
    var indices: array<u32, LIST>;
    for (var i = 0u; i < LIST; i++) {
      keys[i] = 0u;
      indices[i] = 0u;
    }
    for (var c = 0u; c < chunks; c++) {
      var word = eligible_word(row, c, choice.experts) & (STRIPES << (index % LANES));
      if GROUPS > 1u {
        var stay = 0u;
        for (var g = c * 32u / size; g < min((c * 32u + 31u) / size + 1u, choice.group_count); g++) {
          if ((row.groups >> g) & 1u) == 1u {
            stay |= range_bits(c, g * size, g * size + size);
          }
        }
        word &= stay;
      }
      while word != 0u {
        let e = c * 32u + firstTrailingBit(word);
        word &= word - 1u;
        var k = key(values[row.base + e]);
        k = select(0u, k, k < last.x || (k == last.x && e > last.y));
        // Each place keeps its own, or takes the new one, or the one above. Drivers unroll a loop over all of
        // an array, which must be: rounds are limited (Mesa 22.3), and registers have no index.
        var above = vec2<u32>(0xffffffffu, 0u);
        for (var i = 0u; i < LIST; i++) {
          let here = vec2(keys[i], indices[i]);
          keys[i] = max(here.x, min(above.x, k));
          indices[i] = select(here.y, select(e, above.y, k > above.x), k > here.x);
          above = here;
        }
      }
    }
    let rounds = min(LIST, choice.top - taken);
    if LANES == 1u {
      for (var i = 0u; i < LIST; i++) {
        if i < rounds && taken + i < row.top && keys[i] != 0u {
          atomicOr(&words[indices[i]], 1u << bit);
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
          let head = heads[team * LANES + l];
          if head.x > best.x || (head.x == best.x && head.y < best.y) {
            best = head;
          }
        }
        workgroupBarrier();
        if best.x != 0u && best.y == indices[0] && best.x == keys[0] {
          if taken + i < row.top {
            atomicOr(&words[best.y], 1u << bit);
          }
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
}
