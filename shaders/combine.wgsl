// out[t, h] = (out[t, h] +) (residual[t, h] +) sum over the slots s of t, in expert order: gate * y[s, h]
//   gate = gate_of[s] where `weighted`, else 1
//   y [slots, hidden] f32; plan: token_offsets, slot_of, gate_of
//   active [ceil(tokens / 32)] bit set, where has_active: rows of the other tokens are left alone
//   residual [tokens, hidden] f32, where has_residual
//   out [tokens, hidden] f32, f16 or bf16, rounded once; added to where `add`
// Where `y` holds some slots at a time, those from `first_slot` on, the sum goes from dispatch to dispatch
// through `out` in f32 (`continued`). Where `summed`, y holds the sums themselves, a row a token.
// Grid: ceil(vectors / stretch) * tokens groups, tokens slowest; a group takes `stretch` vectors of a row,
// every lane one (stretch is WG then), or every lane MANY, one after the other. A vector is a few elements: a
// Row of y and residual, Stored in out. All lanes of a group have one token, so what they read of the plan is
// read once. (Rows of fewer than WG vectors leave lanes idle.)
// Pieces: common/grid, common/halves_f16 | common/halves_bf16 | nothing,
//   common/eight_values | nothing, common/wide_floats | nothing, combine/rows | combine/rows_wide,
//   combine/floats | combine/floats_wide | combine/halves_two | combine/halves_four.

struct Params {
  tokens: u32,
  slots: u32,       // of y
  most_slots: u32,  // of the plan
  vectors: u32,     // of a row of y
  out_vectors: u32, // of a row of out
  first_vector: u32, // of out's row
  add: u32,
  token_offsets: u32,
  slot_of: u32,
  gate_of: u32,
  first_slot: u32, // of y's
  continued: u32,
  summed: u32,
  has_active: u32,
  first_token: u32, // of out's
  weighted: u32,
  has_residual: u32,
  stretch: u32,     // where MANY
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> y: array<Row>;
@group(0) @binding(2) var<storage, read> plan: array<u32>;
@group(0) @binding(3) var<storage, read> active_bits: array<u32>;
@group(0) @binding(4) var<storage, read> residual: array<Row>;
@group(0) @binding(5) var<storage, read_write> out: array<Stored>;

@compute @workgroup_size(WG)
fn combine(
  @builtin(local_invocation_index) index: u32,
  @builtin(workgroup_id) group: vec3<u32>,
  @builtin(num_workgroups) groups: vec3<u32>,
) {
  let stretch = select(WG, params.stretch, MANY);
  let across = (params.vectors + stretch - 1u) / stretch;
  let id = flat(group, groups);
  let t = id / across;
  let first = id % across * stretch;
  let end = min(first + stretch, params.vectors);
  var h = first + index;
  if t >= params.tokens || h >= end {
    return;
  }
  if params.has_active == 1u {
    let token = params.first_token + t;
    if ((active_bits[token / 32u] >> (token % 32u)) & 1u) == 0u {
      return;
    }
  }
  loop {
    combine_vector(t, h);
    continuing { h += WG; break if !MANY || h >= end; }
  }
}

fn combine_vector(t: u32, h: u32) {
  let at = t * params.out_vectors + params.first_vector + h;
  var sum = Vector();
  if params.continued == 1u {
    sum = widen(out[at]);
  }
  if params.summed == 1u {
    sum = opened(y[t * params.vectors + h]);
  } else {
    let end = min(plan[params.token_offsets + t + 1u], params.most_slots);
    var any = false;
    for (var i = plan[params.token_offsets + t]; i < end; i++) {
      let s = plan[params.slot_of + i];
      let row = s - params.first_slot; // past all rows where it lies before them
      if row < params.slots {
        var gate = 1.0;
        if params.weighted == 1u {
          gate = bitcast<f32>(plan[params.gate_of + s]);
        }
        sum += gate * opened(y[row * params.vectors + h]);
        any = true;
      } else if s >= params.first_slot {
        break; // a token's slots ascend
      }
    }
    if params.continued == 1u && !any {
      return; // what is there stays
    }
  }
  if params.has_residual == 1u {
    sum += opened(residual[at]);
  }
  if params.add == 1u {
    sum += widen(out[at]);
  }
  out[at] = narrow(sum);
}
