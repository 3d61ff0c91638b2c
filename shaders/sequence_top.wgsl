// assigned[e, t] = 1 for the length * top pairs of each sequence with the highest values[t, e]; ties go to
// the lower t * experts + e; the length is of the tokens that take part
//   values [tokens, experts] f32, any value; NaN ranks below -inf
//   offsets [sequences + 1] u32, clamped
//   lengths [sequences] u32 where has_lengths: the rest of a sequence is padding, never chosen
//   rows [ceil(tokens / 32)] bit set, where has_rows: the others take no part
//   counts [4 rounds, tiles + sequences, 256] u32: keys of a piece by 8 bits, among those that agree with the
//     bits found before
//   assigned [experts, ceil(tokens / 32)] bit set, written whole
// Grid: tiles + sequences groups.
// Pieces: common/grid, common/keys, common/offsets, common/bits, choice/words.
//
// A radix select over many workgroups. The tokens are cut at multiples of `tile` (itself one of 32) and where
// sequences begin. The piece at a tile's first token has the tile's number; that at a sequence's first token,
// inside a tile, has tiles + sequence. Rounds 0 to 3 count; round 4 finds the last key and writes the bits.

struct Params {
  tokens: u32,
  experts: u32,
  sequences: u32,
  top: u32, // 1..=experts
  tile: u32,
  tiles: u32,
  round: u32,
  has_lengths: u32,
  has_rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> values: array<u32>;
@group(0) @binding(2) var<storage, read> offsets: array<u32>;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read> rows: array<u32>;
@group(0) @binding(5) var<storage, read_write> counts: array<u32>;
@group(0) @binding(6) var<storage, read_write> assigned: array<atomic<u32>>;

const BINS: u32 = 256u;

var<workgroup> after: atomic<u32>;
var<workgroup> sequence_of: u32;
var<workgroup> totals: array<u32, WG>;
var<workgroup> found: vec3<u32>;
var<workgroup> bins: array<atomic<u32>, BINS>;
var<workgroup> higher_words: array<u32, 1024>;
var<workgroup> equal_words: array<u32, 1024>;
var<workgroup> ties_of: array<atomic<u32>, 32>;
var<workgroup> tied: array<atomic<u32>, 32>;

fn count_at(round: u32, piece: u32, bin: u32) -> u32 {
  return (round * (params.tiles + params.sequences) + piece) * BINS + bin;
}

// The tokens of word w that take part, as far as `rows` says.
fn row_word(w: u32) -> u32 {
  if params.has_rows == 1u {
    return rows[w];
  }
  return 0xffffffffu;
}

// The sequence that holds token t, as its number plus 1; 0: t lies before all, sequences + 1: behind all.
fn find_sequence(index: u32, t: u32) -> u32 {
  if index == 0u {
    atomicStore(&after, params.sequences + 1u);
  }
  workgroupBarrier();
  for (var i = index; i <= params.sequences; i += WG) {
    if offsets[i] > t {
      atomicMin(&after, i);
      break;
    }
  }
  workgroupBarrier();
  if index == 0u {
    sequence_of = atomicLoad(&after);
  }
  return workgroupUniformLoad(&sequence_of);
}

@compute @workgroup_size(WG)
fn sequence_top(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let piece = flat(group, groups);
  if piece >= params.tiles + params.sequences {
    return;
  }
  let columns = (params.tokens + 31u) / 32u;

  // Sequence and tokens of the piece: it chooses among start..end and writes the bits of start..to.
  let end_of_all = token_range(index, params.sequences - 1u, params.tokens).y;
  var start = 0u;
  var end = 0u;
  var sequence = vec2<u32>();
  var b = 0u;
  if piece < params.tiles {
    start = piece * params.tile;
    let number = find_sequence(index, start);
    b = clamp(number, 1u, params.sequences) - 1u;
    sequence = token_range(index, b, params.tokens);
    if number == 0u {
      // Before all: nothing to choose.
      end = select(sequence.x, 0xffffffffu, sequence.x >= end_of_all);
      sequence = vec2<u32>();
    } else if number > params.sequences {
      end = 0xffffffffu;
      sequence = vec2<u32>();
    } else {
      end = sequence.y;
    }
  } else {
    b = piece - params.tiles;
    sequence = token_range(index, b, params.tokens);
    start = sequence.x;
    end = sequence.y;
    if start == end || start % params.tile == 0u {
      return;
    }
  }
  let border = min((start / params.tile + 1u) * params.tile, columns * 32u);
  let to = select(min(end, border), border, end >= end_of_all);
  if params.has_lengths == 1u {
    sequence.y = sequence.x + min(sequence.y - sequence.x, lengths[b]);
  }
  end = min(min(end, border), max(sequence.y, start));

  // The digits of the last key that is taken, as far as they were counted.
  let first = select(sequence.x / params.tile, params.tiles + b, sequence.x % params.tile != 0u);
  let last = select(0u, (max(sequence.y, 1u) - 1u) / params.tile, sequence.y > sequence.x);
  var prefix = 0u;
  var need = (sequence.y - sequence.x) * params.top;
  var before = 0u; // keys of earlier pieces that equal the last key, at the end
  for (var round = 0u; round < params.round; round++) {
    let shift = 24u - 8u * round;
    const STRETCH = BINS / WG;
    var mine = array<u32, STRETCH>();
    var earlier = array<u32, STRETCH>();
    var sum = 0u;
    if sequence.y > sequence.x {
      for (var j = 0u; j < STRETCH; j++) {
        let bin = index * STRETCH + j;
        mine[j] = counts[count_at(round, first, bin)];
        earlier[j] = select(mine[j], 0u, piece == first);
        for (var i = sequence.x / params.tile + 1u; i <= last; i++) {
          let n = counts[count_at(round, i, bin)];
          mine[j] += n;
          earlier[j] += select(0u, n, piece != first && i < piece);
        }
        sum += mine[j];
      }
    }
    totals[index] = sum;
    if index == 0u {
      found = vec3(prefix, 0u, 0u);
    }
    workgroupBarrier();
    var over = 0u;
    for (var l = index + 1u; l < WG; l++) {
      over += totals[l];
    }
    if params.has_rows == 1u && round == 0u {
      // Every pair of the tokens that take part was counted: how many those are.
      var all = over;
      for (var l = 0u; l <= index; l++) {
        all += totals[l];
      }
      need = all / params.experts * params.top;
    }
    if over < need && over + sum >= need {
      for (var j = STRETCH; j > 0u;) {
        j--;
        if over + mine[j] >= need {
          found = vec3(prefix | ((index * STRETCH + j) << shift), need - over, earlier[j]);
          break;
        }
        over += mine[j];
      }
    }
    let at = workgroupUniformLoad(&found);
    prefix = at.x;
    need = at.y;
    before = at.z;
  }

  if params.round < 4u {
    for (var i = index; i < BINS; i += WG) {
      atomicStore(&bins[i], 0u);
    }
    workgroupBarrier();
    let shift = 24u - 8u * params.round;
    for (var i = start * params.experts + index; i < end * params.experts; i += WG) {
      let k = key(values[i]);
      if params.has_rows == 1u {
        let t = i / params.experts;
        if ((rows[t / 32u] >> (t % 32u)) & 1u) == 0u {
          continue;
        }
      }
      // Two shifts: one of 32 is undefined.
      if ((k >> shift) >> 8u) == ((prefix >> shift) >> 8u) {
        atomicAdd(&bins[(k >> shift) & 255u], 1u);
      }
    }
    workgroupBarrier();
    for (var i = index; i < BINS; i += WG) {
      counts[count_at(params.round, piece, i)] = atomicLoad(&bins[i]);
    }
    return;
  }

  var room = need - min(need, before);
  let tail = (to + 31u) / 32u;
  for (var w = start / 32u; w < tail; w++) {
    if index < 32u {
      atomicStore(&ties_of[index], 0u);
      atomicStore(&tied[index], 0u);
    }
    workgroupBarrier();
    for (var e = index; e < params.experts; e += WG) {
      var higher = 0u;
      var equal = 0u;
      for (var t = max(start, w * 32u); t < min(end, w * 32u + 32u); t++) {
        let k = key(values[t * params.experts + e]);
        higher |= u32(k > prefix) << (t % 32u);
        equal |= u32(k == prefix) << (t % 32u);
      }
      higher &= row_word(w);
      equal &= row_word(w);
      higher_words[e] = higher;
      equal_words[e] = equal;
      while equal != 0u {
        atomicAdd(&ties_of[firstTrailingBit(equal)], 1u);
        equal &= equal - 1u;
      }
    }
    workgroupBarrier();
    // Tokens whose ties are all taken, and the one of which some are.
    var whole = 0u;
    var part = 32u;
    for (var i = 0u; i < 32u && part == 32u; i++) {
      let n = atomicLoad(&ties_of[i]);
      if n <= room {
        room -= n;
        whole |= 1u << i;
      } else {
        part = i;
      }
    }
    if part < 32u {
      for (var e = index; e < params.experts; e += WG) {
        if ((equal_words[e] >> part) & 1u) == 1u {
          atomicOr(&tied[e / 32u], 1u << (e % 32u));
        }
      }
    }
    workgroupBarrier();
    let low = max(start, w * 32u) - w * 32u;
    let own = bits_between(low, min(to, w * 32u + 32u) - w * 32u);
    for (var e = index; e < params.experts; e += WG) {
      let equal = equal_words[e];
      var take = higher_words[e] | (equal & whole);
      if part < 32u && ((equal >> part) & 1u) == 1u {
        var rank = countOneBits(atomicLoad(&tied[e / 32u]) & ((1u << (e % 32u)) - 1u));
        for (var c = 0u; c < e / 32u; c++) {
          rank += countOneBits(atomicLoad(&tied[c]));
        }
        take |= u32(rank < room) << part;
      }
      put_word(e * columns + w, own, take);
    }
    room = select(room, 0u, part < 32u);
    workgroupBarrier(); // `tied` is cleared next
  }
}
