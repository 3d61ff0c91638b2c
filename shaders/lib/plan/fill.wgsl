// The body of plan_fill.wgsl for one column: its slots' tokens and gates, and the slots of its tokens. LANES
// lanes a token.
// Needs the column loaded. Contract: the kernel has its params, gates and plan, whose word 4 tells how many
// slots are cut.
fn put_slot(slot: u32, at: u32, t: u32, gate: f32) {
  if slot < params.slots {
    plan[params.token_of + slot] = t;
    plan[params.gate_of + slot] = bitcast<u32>(gate);
  }
  if at < params.slots {
    plan[params.slot_of + at] = slot;
  }
}

// One token where slots are cut: its list holds only those that are there, and so do the lists before.
fn fill_cut_token(t: u32, column: u32, columns: u32) {
  let chunks = (params.experts + 31u) / 32u;
  let bit = t % 32u;
  let below = (1u << bit) - 1u;
  var at = params.shared_experts * t;
  for (var e = 0u; e < params.experts; e++) {
    let lower = plan[params.ranks + e * columns + column] + countOneBits(column_words[e] & below);
    at += min(lower, params.routed_slots - plan[params.expert_offsets + e]);
  }
  plan[params.token_offsets + t] = at;
  for (var c = 0u; c < chunks; c++) {
    var word = row_words[bit * chunks + c];
    while word != 0u {
      let e = c * 32u + firstTrailingBit(word);
      word &= word - 1u;
      let rank = plan[params.ranks + e * columns + column] + countOneBits(column_words[e] & below);
      let slot = plan[params.expert_offsets + e] + rank;
      if slot < params.routed_slots {
        put_slot(slot, at, t, gates[t * params.experts + e]);
        at++;
      }
    }
  }
  for (var i = 0u; i < params.shared_experts; i++) {
    put_slot(plan[params.expert_offsets + params.experts + i] + t, at + i, t, 1.0);
  }
}

fn fill_column(index: u32, column: u32, columns: u32) {
  let bit = index / LANES;
  let t = column * 32u + bit;
  if t >= params.tokens {
    return;
  }
  if plan[4] != 0u {
    if index % LANES == 0u {
      fill_cut_token(t, column, columns);
    }
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
