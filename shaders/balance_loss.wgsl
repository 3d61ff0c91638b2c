// EC-DLM's balance loss of expert choice, expert by expert; q: softmax of an expert's logits over ALL tokens,
// m[t]: experts that took token t.
//   terms[e] = sum over t of m[t] q[t, e];   the loss is `balance` times their sum
//   dlogits[t, e] = (dlogits[t, e] +) balance q[t, e] (m[t] - terms[e])
//   logits [tokens, experts] f32: NaN has q = 0
//   taken: m, or offsets of which m + less are the differences, from word `first` on
//   terms [experts] f32
// Grid: ceil(experts / COLUMNS) groups; COLUMNS experts of LANES lanes each, neighbours along experts.
// Pieces: common/grid, common/keys, common/exp.

struct Params {
  tokens: u32,
  experts: u32,
  balance: f32,
  add: u32,
  offsets: u32, // 1: taken are offsets
  first: u32,
  less: u32, // shared experts, which are in the differences of a plan
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> logits: array<u32>;
@group(0) @binding(2) var<storage, read> taken: array<u32>;
@group(0) @binding(3) var<storage, read_write> dlogits: array<f32>;
@group(0) @binding(4) var<storage, read_write> terms: array<f32>;

var<workgroup> maxima: array<u32, WG>;
var<workgroup> sums: array<vec2<f32>, WG>;

fn experts_of(t: u32) -> f32 {
  var m = taken[params.first + t];
  if params.offsets == 1u {
    m = taken[params.first + t + 1u] - m - params.less;
  }
  return f32(m);
}

@compute @workgroup_size(WG)
fn balance_loss(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let column = index % COLUMNS;
  let first = index / COLUMNS;
  let e = flat(group, groups) * COLUMNS + column;
  // Experts past the end have no tokens: barriers want every lane.
  let end = select(0u, params.tokens, e < params.experts);

  var highest = 0u;
  for (var t = first; t < end; t += LANES) {
    highest = max(highest, key(logits[t * params.experts + e]));
  }
  if LANES > 1u {
    maxima[index] = highest;
    workgroupBarrier();
    for (var l = 0u; l < LANES; l++) {
      highest = max(highest, maxima[l * COLUMNS + column]);
    }
  }
  let infinite = highest == 0xff800000u;
  let top = bitcast<f32>(bits_of_key(highest));
  var sum = vec2<f32>(); // of exponentials, of these times m
  for (var t = first; t < end; t += LANES) {
    let q = softmax_term(logits[t * params.experts + e], top, infinite);
    sum += vec2(q, q * experts_of(t));
  }
  if LANES > 1u {
    sums[index] = sum;
    workgroupBarrier();
    sum = vec2<f32>();
    for (var l = 0u; l < LANES; l++) {
      sum += sums[l * COLUMNS + column];
    }
  }
  let z = sum.x + 1e-20;
  let dot = sum.y / z;
  for (var t = first; t < end; t += LANES) {
    let at = t * params.experts + e;
    var d = params.balance * softmax_term(logits[at], top, infinite) / z * (experts_of(t) - dot);
    if params.add == 1u {
      d += dlogits[at];
    }
    dlogits[at] = d;
  }
  if first == 0u && end > 0u {
    terms[e] = dot;
  }
}
