// The parts of plan_count.wgsl: what a column's tokens and a stretch of experts count. LANES lanes a token,
// EXPERT_LANES an expert.
// Contract: all WG lanes call, in uniform control flow; the kernel has its params and bindings, and
// count_scale(count) and expert_scale(expert), what gates are multiplied by.
var<workgroup> partial_sums: array<f32, WG>;
var<workgroup> partial_keys: array<u32, WG>;
var<workgroup> partial_counts: array<u32, WG>;

// Needs the column loaded.
fn count_column(index: u32, column: u32) {
  let slot = index / LANES;
  let first = index % LANES;
  let t = column * 32u + slot;
  let chunks = (params.experts + 31u) / 32u;

  var count = 0u;
  var highest = 0u;
  for (var c = first; c < chunks; c += LANES) {
    var word = row_words[slot * chunks + c];
    count += countOneBits(word);
    while params.rule == 1u && word != 0u {
      highest = max(highest, key(source[t * params.experts + c * 32u + firstTrailingBit(word)]));
      word &= word - 1u;
    }
  }
  if LANES > 1u {
    partial_counts[index] = count;
    partial_keys[index] = highest;
    workgroupBarrier();
    count = 0u;
    for (var l = 0u; l < LANES; l++) {
      count += partial_counts[slot * LANES + l];
      highest = max(highest, partial_keys[slot * LANES + l]);
    }
  }
  if first == 0u && t < params.tokens {
    plan[params.token_offsets + t] = count;
  }
  if params.rule == 0u {
    return;
  }

  let infinite = highest == 0xff800000u;
  let top = bitcast<f32>(bits_of_key(highest));
  var sum = 0.0;
  for (var c = first; c < chunks; c += LANES) {
    var word = row_words[slot * chunks + c];
    while word != 0u {
      let s = source[t * params.experts + c * 32u + firstTrailingBit(word)];
      word &= word - 1u;
      if params.rule == 1u {
        sum += softmax_term(s, top, infinite);
      } else {
        sum += bitcast<f32>(s);
      }
    }
  }
  if LANES > 1u {
    partial_sums[index] = sum;
    workgroupBarrier();
    sum = 0.0;
    for (var l = 0u; l < LANES; l++) {
      sum += partial_sums[slot * LANES + l];
    }
  }
  var scale = params.scale;
  scale *= count_scale(count);
  for (var c = first; c < chunks; c += LANES) {
    var word = row_words[slot * chunks + c];
    while word != 0u {
      let e = c * 32u + firstTrailingBit(word);
      let s = source[t * params.experts + e];
      word &= word - 1u;
      var gate = 0.0;
      if params.rule == 1u {
        gate = softmax_term(s, top, infinite) / (sum + 1e-20);
      } else if params.rule == 2u {
        gate = bitcast<f32>(s) / (sum + 1e-20);
      } else {
        gate = bitcast<f32>(s);
      }
      gate *= expert_scale(e);
      gates[t * params.experts + e] = gate * scale;
    }
  }
}

fn count_experts(index: u32, group: u32, columns: u32) {
  let slot = index / EXPERT_LANES;
  let first = index % EXPERT_LANES;
  let e = group * (WG / EXPERT_LANES) + slot;
  let live = e < params.experts;
  let stretch = (columns + EXPERT_LANES - 1u) / EXPERT_LANES;
  let low = min(first * stretch, columns);
  let high = min(low + stretch, columns);
  var count = 0u;
  for (var w = low; live && w < high; w++) {
    count += countOneBits(assigned[e * columns + w] & token_bits(w, params.tokens));
  }
  partial_counts[index] = count;
  workgroupBarrier();
  var rank = 0u;
  for (var l = 0u; l < first; l++) {
    rank += partial_counts[slot * EXPERT_LANES + l];
  }
  if live && first + 1u == EXPERT_LANES {
    plan[params.expert_offsets + e] = rank + count;
  }
  for (var w = low; live && w < high; w++) {
    plan[params.ranks + e * columns + w] = rank;
    rank += countOneBits(assigned[e * columns + w]);
  }
}
