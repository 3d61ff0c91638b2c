// dlogits[t, e]: the gradient of the router's logits, from that of the gates. S: the experts of t that the
// gates were made over, n of them; u[e] = scale * scale_by_count[n] * scale_by_expert[e] * dgates[slot] where
// t has a slot of e, else 0; s: the source.
//   softmax over S (1):  p (u - sum of p u),          p = softmax of the logits s over S
//   normalised (2):      d / Z (u - sum of s u / Z),  Z = sum of s over S + 1e-20
//   as they are (3):     d (u - sum of s u) for ALL experts with softmax scores, d u with sigmoid scores
//     where d = s with softmax scores and s (1 - s) with sigmoid scores
//   dgates [slots] f32: of slots that t does not have, shared experts' among them, nothing is read
//   plan: expert_offsets, token_offsets, slot_of; chosen [experts, ceil(tokens / 32)] bit set: S of each
//     token
//   source [tokens, experts] f32: logits (1) or scores
//   dlogits [tokens, experts] f32, written whole: 0 where nothing above says otherwise
// Grid: ceil(tokens / ROWS) groups, ROWS rows of LANES lanes each; LANES is WG (ROWS 1) or 1.
// Pieces: common/grid, common/keys, common/exp,
//   common/reduce_serial | common/reduce_workgroup | common/reduce_subgroup.

struct Params {
  tokens: u32,
  experts: u32,
  rule: u32,
  softmax: u32,      // 1: scores are a softmax, 0: sigmoids
  has_scale_by_count: u32,
  has_scale_by_expert: u32,
  scale: f32,
  slots: u32,
  expert_offsets: u32, // sections of the plan
  token_offsets: u32,
  slot_of: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> dgates: array<f32>;
@group(0) @binding(2) var<storage, read> plan: array<u32>;
@group(0) @binding(3) var<storage, read> chosen: array<u32>;
@group(0) @binding(4) var<storage, read> source: array<u32>;
@group(0) @binding(5) var<storage, read> scale_by_count: array<f32>;
@group(0) @binding(6) var<storage, read> scale_by_expert: array<f32>;
@group(0) @binding(7) var<storage, read_write> dlogits: array<f32>;

// The routed expert of a slot: the last one that starts at or before it.
fn expert_of(slot: u32) -> u32 {
  var low = 0u;
  var high = params.experts;
  while high - low > 1u {
    let middle = (low + high) / 2u;
    if plan[params.expert_offsets + middle] <= slot {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

fn is_chosen(t: u32, e: u32) -> bool {
  return ((chosen[e * ((params.tokens + 31u) / 32u) + t / 32u] >> (t % 32u)) & 1u) == 1u;
}

fn factor_of(e: u32) -> f32 {
  if params.has_scale_by_expert == 1u {
    return scale_by_expert[e];
  }
  return 1.0;
}

@compute @workgroup_size(WG)
fn gates_backward(
  lane: Lane,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let row = flat(group, groups) * ROWS + lane.index / LANES;
  let first = lane.index % LANES;
  let t = min(row, params.tokens - 1u);
  let base = t * params.experts;
  // Rows past the end have no experts: barriers want every lane.
  let end = select(0u, params.experts, row < params.tokens);

  // The gradient of each gate, at its place in the row.
  for (var e = first; e < end; e += LANES) {
    dlogits[base + e] = 0.0;
  }
  if LANES > 1u {
    storageBarrier();
  }
  if end > 0u {
    let routed = min(plan[params.expert_offsets + params.experts], params.slots);
    let stop = min(plan[params.token_offsets + t + 1u], params.slots);
    for (var i = plan[params.token_offsets + t] + first; i < stop; i += LANES) {
      let slot = plan[params.slot_of + i];
      if slot < routed {
        dlogits[base + expert_of(slot)] = dgates[slot];
      }
    }
  }
  if LANES > 1u {
    storageBarrier();
  }

  var highest = 0u;
  var count = 0.0;
  for (var e = first; e < end; e += LANES) {
    if is_chosen(t, e) {
      highest = max(highest, key(source[base + e]));
      count += 1.0;
    }
  }
  highest = team_max(lane, highest);
  count = team_sum(lane, count);
  let infinite = highest == 0xff800000u;
  let top = bitcast<f32>(bits_of_key(highest));
  var scale = params.scale;
  if params.has_scale_by_count == 1u {
    scale *= scale_by_count[min(u32(count), params.experts)];
  }

  let dense = params.rule == 3u && params.softmax == 1u;
  var sum = 0.0;
  var dot = 0.0;
  for (var e = first; e < end; e += LANES) {
    if dense || is_chosen(t, e) {
      var s = bitcast<f32>(source[base + e]);
      if params.rule == 1u {
        s = softmax_term(source[base + e], top, infinite);
      }
      sum += s;
      dot += s * (scale * factor_of(e) * dlogits[base + e]);
    }
  }
  sum = team_sum(lane, sum);
  dot = team_sum(lane, dot);
  var z = sum + 1e-20;
  if params.rule == 3u {
    z = 1.0;
    if !dense {
      dot = 0.0;
    }
  }

  for (var e = first; e < end; e += LANES) {
    var d = 0.0;
    if dense || is_chosen(t, e) {
      let u = scale * factor_of(e) * dlogits[base + e];
      d = bitcast<f32>(source[base + e]);
      if params.rule == 1u {
        d = softmax_term(source[base + e], top, infinite);
      } else if params.softmax == 0u {
        d *= 1.0 - d;
      }
      d = d / z * (u - dot / z);
    }
    dlogits[base + e] = d;
  }
}
