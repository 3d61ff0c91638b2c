// capacity_of[b] = clamp(floor(N[b] * k_of[b] / experts), 1, N[b]), and 0 for an empty sequence; N[b] is the
// number of its tokens that take part
//   offsets [sequences + 1] u32; lengths [sequences] u32 where has_lengths: the rest of a sequence is padding
//   rows [ceil(tokens / 32)] bit set, where has_rows: the others take no part
//   mask [sequences], by `source`:
//     FROM_RATIOS   mask ratios f32, any value
//     FROM_COUNTS   masked tokens u32, of which at most N[b] count
//     FROM_K        k_of itself, u32
//   steps [steps, 2] u32: (key of a mask ratio, k from there on), by ascending key, the first key 0; unused
//     with FROM_K
//   capacity_of, k_of [sequences] u32, written whole
// Grid: one group a sequence; its lanes clean the offsets together, and one does the rest.
// Pieces: common/grid, common/offsets, common/bits.
// Integers alone: comparisons of floats with NaN, and quotients of floats, are not the same on every device.

struct Params {
  tokens: u32,
  experts: u32,
  sequences: u32,
  has_lengths: u32,
  source: u32,
  steps: u32,
  has_rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> mask: array<u32>;
@group(0) @binding(2) var<storage, read> offsets: array<u32>;
@group(0) @binding(3) var<storage, read> lengths: array<u32>;
@group(0) @binding(4) var<storage, read> steps: array<u32>;
@group(0) @binding(5) var<storage, read> rows: array<u32>;
@group(0) @binding(6) var<storage, read_write> capacity_of: array<u32>;
@group(0) @binding(7) var<storage, read_write> k_of: array<u32>;

// Sources of k.
const FROM_COUNTS: u32 = 1u;
const FROM_K: u32 = 2u;

const ONE: u32 = 0x3f800000u;

var<workgroup> totals: array<u32, WG>;

// The key of a ratio given as bits: NaN = 0, else 1 + the bits of its value clamped to 0..=1, which are in
// its order.
fn ratio_key(bits: u32) -> u32 {
  if (bits & 0x7fffffffu) > 0x7f800000u {
    return 0u;
  }
  return 1u + select(min(bits, ONE), 0u, (bits >> 31u) == 1u);
}

// The key of masked / length, as the nearest f32, ties to even.
fn quotient_key(masked: u32, length: u32) -> u32 {
  if length == 0u {
    return 0u;
  }
  if masked == 0u || masked >= length {
    return 1u + select(ONE, 0u, masked == 0u);
  }
  // Long division: the first bit that is 1 gives the exponent, it and the next 23 are the significand.
  var rest = masked;
  var significand = 0u;
  var exponent = 127u;
  while (significand >> 23u) == 0u {
    // rest < length, so that twice the rest is less than twice the length, with or without the carry.
    let carry = rest >> 31u;
    rest <<= 1u;
    significand <<= 1u;
    if carry == 1u || rest >= length {
      rest -= length;
      significand |= 1u;
    }
    exponent -= u32(significand == 0u);
  }
  // What is left against one half.
  let lower = length - rest;
  if rest > lower || (rest == lower && (significand & 1u) == 1u) {
    significand += 1u;
  }
  // The leading 1 of the significand adds 1 to the exponent, as a carry out of it adds one more.
  return 1u + ((exponent - 2u) << 23u) + significand;
}

// k of the last step whose key is at most `key`.
fn k_at(key: u32) -> u32 {
  var low = 0u;
  var high = params.steps;
  while high - low > 1u {
    let middle = (low + high) / 2u;
    if steps[2u * middle] <= key {
      low = middle;
    } else {
      high = middle;
    }
  }
  return steps[2u * low + 1u];
}

@compute @workgroup_size(WG)
fn capacity(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let b = flat(group, groups);
  if b >= params.sequences {
    return;
  }
  let range = token_range(index, b, params.tokens);
  var length = range.y - range.x;
  if params.has_lengths == 1u {
    length = min(length, lengths[b]);
  }
  if params.has_rows == 1u {
    let end = range.x + length;
    var n = 0u;
    for (var w = range.x / 32u + index; w * 32u < end; w += WG) {
      let low = max(range.x, w * 32u) - w * 32u;
      n += countOneBits(rows[w] & bits_between_or_none(low, min(end, w * 32u + 32u) - w * 32u));
    }
    totals[index] = n;
    workgroupBarrier();
    length = 0u;
    for (var l = 0u; l < WG; l++) {
      length += totals[l];
    }
  }
  if index != 0u {
    return;
  }
  var each = mask[b];
  if params.source == FROM_COUNTS {
    each = k_at(quotient_key(each, length));
  } else if params.source != FROM_K {
    each = k_at(ratio_key(each));
  }
  k_of[b] = each;

  // floor(length * each / experts) without a product of 64 bits. Where each < experts, both terms are at most
  // `length`.
  var share = length;
  if each < params.experts {
    let whole = length / params.experts;
    let part = length % params.experts;
    share = whole * each + part * each / params.experts;
  }
  capacity_of[b] = min(max(share, 1u), length);
}
