// out[t, h] = (out[t, h] +) (residual[t, h] +) sum over the slots s of t, in expert order: gate * y[s, h]
//   gate = gate_of[s] where `weighted`, else 1
//   y [slots, hidden] f32; plan: token_offsets, slot_of, gate_of
//   residual [tokens, hidden] f32, where there is one
//   out [tokens, hidden] f32, f16 or bf16, rounded once; added to where `add`
// Grid: ceil(tokens * ceil(hidden / N) / WG) groups; one lane one Vector, of N elements, Stored in out.
// Pieces: common/grid, common/halves_f16 | common/halves_bf16 | nothing,
//   combine/floats | combine/halves_two | combine/halves_four.

struct Params {
  tokens: u32,
  slots: u32,
  vectors: u32,     // of a row of y
  out_vectors: u32, // of a row of out
  first_vector: u32, // of out's row
  add: u32,
  token_offsets: u32,
  slot_of: u32,
  gate_of: u32,
  weighted: u32,
  has_residual: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> y: array<Vector>;
@group(0) @binding(2) var<storage, read> plan: array<u32>;
@group(0) @binding(3) var<storage, read> residual: array<Vector>;
@group(0) @binding(4) var<storage, read_write> out: array<Stored>;

@compute @workgroup_size(WG)
fn combine(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let id = flat(group, groups) * WG + index;
  let t = id / params.vectors;
  let h = id % params.vectors;
  if t >= params.tokens {
    return;
  }
  let at = t * params.out_vectors + params.first_vector + h;
  var sum = Vector();
  let end = min(plan[params.token_offsets + t + 1u], params.slots);
  for (var i = plan[params.token_offsets + t]; i < end; i++) {
    let s = plan[params.slot_of + i];
    if s < params.slots {
      var gate = 1.0;
      if params.weighted == 1u {
        gate = bitcast<f32>(plan[params.gate_of + s]);
      }
      sum += gate * y[s * params.vectors + h];
    }
  }
  if params.has_residual == 1u {
    sum += residual[at];
  }
  if params.add == 1u {
    sum += widen(out[at]);
  }
  out[at] = narrow(sum);
}
