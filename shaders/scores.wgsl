// scores[t, e] = softmax over e (g[t, :]) or sigmoid(g[t, e]);  values[t, e] = (g or s)[t, e] + bias[e]
//   logits [tokens, experts] f32, any value; bias [experts] f32
//   scores [tokens, experts] f32: NaN logits give 0; in a softmax, logits of +inf share 1 equally and the
//   others get 0, and a row of only -inf and NaN gives 0 throughout
//   values [tokens, experts] f32: NaN where the logit is NaN
// Grid: ceil(tokens / ROWS) groups, ROWS rows of LANES lanes each; LANES is WG (ROWS 1) or 1.
// Pieces: common/grid, common/keys, common/exp,
//   common/reduce_serial | common/reduce_workgroup | common/reduce_subgroup.

struct Params {
  tokens: u32,
  experts: u32,
  softmax: u32,      // 1: softmax, 0: sigmoid
  from_logits: u32,  // 1: values = g + bias, 0: values = scores + bias
  has_bias: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> logits: array<u32>;
@group(0) @binding(2) var<storage, read> bias: array<u32>;
@group(0) @binding(3) var<storage, read_write> scores: array<f32>;
@group(0) @binding(4) var<storage, read_write> values: array<u32>;

fn sigmoid(g: u32) -> f32 {
  if is_nan(g) {
    return 0.0;
  }
  if !is_finite(g) {
    return select(0.0, 1.0, g == 0x7f800000u);
  }
  let x = bitcast<f32>(g);
  let z = exp_negative(-abs(x));
  return select(z, 1.0, x >= 0.0) / (1.0 + z);
}

@compute @workgroup_size(WG)
fn scores(
  lane: Lane,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let row = flat(group, groups) * ROWS + lane.index / LANES;
  let first = lane.index % LANES;
  // Rows past the end work on the last one and write nothing: barriers want every lane.
  let live = row < params.tokens;
  let base = min(row, params.tokens - 1u) * params.experts;

  var highest = 0u;
  for (var e = first; e < params.experts; e += LANES) {
    highest = max(highest, key(logits[base + e]));
  }
  highest = team_max(lane, highest);

  let infinite = highest == 0xff800000u;
  let top = bitcast<f32>(bits_of_key(highest));
  var sum = 0.0;
  if params.softmax == 1u {
    for (var e = first; e < params.experts; e += LANES) {
      sum += softmax_term(logits[base + e], top, infinite);
    }
  }
  sum = team_sum(lane, sum);

  for (var e = first; e < params.experts; e += LANES) {
    let g = logits[base + e];
    var score = 0.0;
    if params.softmax == 1u {
      score = softmax_term(g, top, infinite) / (sum + 1e-20);
    } else {
      score = sigmoid(g);
    }
    let value = select(bitcast<u32>(score), g, params.from_logits == 1u || is_nan(g));
    var selection = value;
    if params.has_bias == 1u {
      selection = add_bits(value, bias[e]);
    }
    if live {
      scores[base + e] = score;
      values[base + e] = selection;
    }
  }
}
