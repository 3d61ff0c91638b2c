// The body of plan_fill.wgsl for one column: its slots' tokens and gates, and the slots of its tokens. LANES
// lanes a token.
// Needs the column loaded. Contract: the kernel has its params, gates and plan, whose word 4 tells how many
// slots are cut, and active_bits_of(w), word w of the active tokens' bits.
fn put_slot(slot: u32, at: u32, t: u32, gate: f32) {
  if slot < params.slots {
    plan[params.token_of + slot] = t;
    plan[params.gate_of + slot] = bitcast<u32>(gate);
  }
  if at < params.slots {
    plan[params.slot_of + at] = slot;
  }
}

// A token's place among those that shared experts take, and whether it is one of them.
struct Shared { rank: u32, live: bool }

fn shared_place(t: u32, column: u32, columns: u32) -> Shared {
  if params.has_active == 0u || params.shared_experts == 0u {
    return Shared(t, true);
  }
  let word = active_bits_of(column);
  let bit = t % 32u;
  let lower = plan[params.ranks + params.experts * columns + column];
  return Shared(lower + countOneBits(word & ((1u << bit) - 1u)), ((word >> bit) & 1u) == 1u);
}

// One token where slots are cut: its list holds only those that are there, and so do the lists before.
fn fill_cut_token(t: u32, column: u32, columns: u32) {
  let chunks = (params.experts + 31u) / 32u;
  let bit = t % 32u;
  let below = (1u << bit) - 1u;
  let place = shared_place(t, column, columns);
  var at = params.shared_experts * place.rank;
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
  for (var i = 0u; i < params.shared_experts && place.live; i++) {
    put_slot(plan[params.expert_offsets + params.experts + i] + place.rank, at + i, t, 1.0);
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
  let place = shared_place(t, column, columns);
  for (var i = index % LANES; i < params.shared_experts && place.live; i += LANES) {
    put_slot(plan[params.expert_offsets + params.experts + i] + place.rank, at + i, t, 1.0);
  }
}
