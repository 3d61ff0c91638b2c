// The body of plan_fill.wgsl for one column: its slots' tokens and gates, and the slots of its tokens. LANES
// lanes a token.
// Needs the column loaded. Contract: the kernel has its params, gates and plan.
fn put_slot(slot: u32, at: u32, t: u32, gate: f32) {
  if slot < params.slots {
    plan[params.token_of + slot] = t;
    plan[params.gate_of + slot] = bitcast<u32>(gate);
  }
  if at < params.slots {
    plan[params.slot_of + at] = select(0xffffffffu, slot, slot < params.slots);
  }
}

fn fill_column(index: u32, column: u32, columns: u32) {
  let bit = index / LANES;
  let t = column * 32u + bit;
  if t >= params.tokens {
    return;
  }
  let chunks = (params.experts + 31u) / 32u;
  let below = (1u << bit) - 1u;
  var at = plan[params.token_offsets + t];
  for (var c = 0u; c < chunks; c++) {
    var word = row_words[bit * chunks + c];
    if c % LANES != index % LANES {
      at += countOneBits(word);
      continue;
    }
    while word != 0u {
      let e = c * 32u + firstTrailingBit(word);
      word &= word - 1u;
      let rank = plan[params.ranks + e * columns + column] + countOneBits(column_words[e] & below);
      put_slot(plan[params.expert_offsets + e] + rank, at, t, gates[t * params.experts + e]);
      at++;
    }
  }
  for (var i = index % LANES; i < params.shared_experts; i += LANES) {
    put_slot(plan[params.expert_offsets + params.experts + i] + t, at + i, t, 1.0);
  }
}
