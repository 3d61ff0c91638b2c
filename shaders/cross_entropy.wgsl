// Cross entropy of rows of logits with one class each, weighted; p: softmax of a row.
//   terms[t] = weights[t] (log of the sum of exponentials of row t - logits[t, targets[t]])
//   dlogits[t, v] = weights[t] (p[t, v] - (v == targets[t]))
//   logits, dlogits [tokens, classes] f32; targets [tokens] u32; weights, terms [tokens] f32
//   Rows of weight 0, or whose target is no class, have terms and gradients of 0, whatever their logits.
// Grid: ceil(tokens / ROWS) groups, ROWS rows of LANES lanes each; LANES is WG (ROWS 1) or 1.
// Pieces: common/grid, common/keys, common/exp,
//   common/reduce_serial | common/reduce_workgroup | common/reduce_subgroup.

struct Params {
  tokens: u32,
  classes: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> logits: array<u32>;
@group(0) @binding(2) var<storage, read> targets: array<u32>;
@group(0) @binding(3) var<storage, read> weights: array<f32>;
@group(0) @binding(4) var<storage, read_write> dlogits: array<f32>;
@group(0) @binding(5) var<storage, read_write> terms: array<f32>;

@compute @workgroup_size(WG)
fn cross_entropy(
  lane: Lane,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let row = flat(group, groups) * ROWS + lane.index / LANES;
  let first = lane.index % LANES;
  let t = min(row, params.tokens - 1u);
  let base = t * params.classes;
  // Rows past the end have no classes: barriers want every lane.
  let end = select(0u, params.classes, row < params.tokens);

  var highest = 0u;
  for (var v = first; v < end; v += LANES) {
    highest = max(highest, key(logits[base + v]));
  }
  highest = team_max(lane, highest);
  let infinite = highest == 0xff800000u;
  let top = bitcast<f32>(bits_of_key(highest));
  var sum = 0.0;
  for (var v = first; v < end; v += LANES) {
    sum += softmax_term(logits[base + v], top, infinite);
  }
  sum = team_sum(lane, sum);
  let target_class = targets[t];
  let weight = weights[t];
  let counts = target_class < params.classes && weight != 0.0;
  for (var v = first; v < end; v += LANES) {
    var d = 0.0;
    if counts {
      let p = softmax_term(logits[base + v], top, infinite) / (sum + 1e-20);
      d = weight * (p - select(0.0, 1.0, v == target_class));
    }
    dlogits[base + v] = d;
  }
  if first == 0u && end > 0u {
    var loss = 0.0;
    if counts {
      loss = weight * (top + log(sum) - bitcast<f32>(logits[base + target_class]));
    }
    terms[t] = loss;
  }
}
