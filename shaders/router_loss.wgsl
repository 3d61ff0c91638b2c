// Losses of the router's logits under token choice, token by token; p: softmax of a token's logits over all
// experts, lse: the logarithm of the sum of their exponentials, n[e]: tokens that chose expert e.
//   terms[0, t] = lse^2                      router z-loss:  z_value times their sum
//   terms[1, t] = sum over e of n[e] p[t, e] Switch's loss:  balance times their sum
//   dlogits[t, e] = (dlogits[t, e] +) p[t, e] (z_slope lse + balance (n[e] - terms[1, t]))
//   logits [tokens, experts] f32: NaN has p = 0, and a row with no finite logit has terms of 0
//   counts: n, or offsets of which n are the differences, from word `first` on; none where has_counts is 0
//   dropped [experts] u32: what is added to n, where has_dropped
//   terms [2, tokens] f32
// Grid: ceil(tokens / ROWS) groups, ROWS rows of LANES lanes each; LANES is WG (ROWS 1) or 1.
// Pieces: common/grid, common/keys, common/exp,
//   common/reduce_serial | common/reduce_workgroup | common/reduce_subgroup.

struct Params {
  tokens: u32,
  experts: u32,
  z_slope: f32,
  balance: f32,
  add: u32,
  has_counts: u32,
  offsets: u32, // 1: counts are offsets
  first: u32,
  has_dropped: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> logits: array<u32>;
@group(0) @binding(2) var<storage, read> counts: array<u32>;
@group(0) @binding(3) var<storage, read> dropped: array<u32>;
@group(0) @binding(4) var<storage, read_write> dlogits: array<f32>;
@group(0) @binding(5) var<storage, read_write> terms: array<f32>;

fn tokens_of(e: u32) -> f32 {
  if params.has_counts == 0u {
    return 0.0;
  }
  var n = counts[params.first + e];
  if params.offsets == 1u {
    n = counts[params.first + e + 1u] - n;
  }
  if params.has_dropped == 1u {
    n += dropped[e];
  }
  return f32(n);
}

@compute @workgroup_size(WG)
fn router_loss(
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

  var highest = 0u;
  for (var e = first; e < end; e += LANES) {
    highest = max(highest, key(logits[base + e]));
  }
  highest = team_max(lane, highest);
  let infinite = highest == 0xff800000u;
  let top = bitcast<f32>(bits_of_key(highest));
  var sum = 0.0;
  var dot = 0.0;
  for (var e = first; e < end; e += LANES) {
    let p = softmax_term(logits[base + e], top, infinite);
    sum += p;
    dot += p * tokens_of(e);
  }
  sum = team_sum(lane, sum);
  dot = team_sum(lane, dot) / (sum + 1e-20);
  var lse = 0.0;
  if highest > 0x7fffffu { // the key of -inf
    lse = top + log(sum);
  }
  for (var e = first; e < end; e += LANES) {
    let p = softmax_term(logits[base + e], top, infinite) / (sum + 1e-20);
    var d = p * (params.z_slope * lse + params.balance * (tokens_of(e) - dot));
    if params.add == 1u {
      d += dlogits[base + e];
    }
    dlogits[base + e] = d;
  }
  if first == 0u && end > 0u {
    terms[t] = lse * lse;
    terms[params.tokens + t] = dot;
  }
}
