// Values of a for eight slots, each loaded once, and handed round by shuffles. Needs a workgroup of one
// subgroup of at least 8 lanes in order of their index, which the host knows of the device. Twin of
// spread_none.wgsl. Lane i has the values of slot i: eight rows.
alias Spread = Eight;

fn load_spread(slot: u32, end: u32, n: u32, lane: u32) -> Spread {
  let own = slot + lane % 8u;
  return kept(load_a(a_row(min(own, end - 1u)), n), own < end);
}

// One value of each slot.
fn all_slots(v: f32) -> Eight {
  return Eight(
    vec4(subgroupShuffle(v, 0u), subgroupShuffle(v, 1u), subgroupShuffle(v, 2u), subgroupShuffle(v, 3u)),
    vec4(subgroupShuffle(v, 4u), subgroupShuffle(v, 5u), subgroupShuffle(v, 6u), subgroupShuffle(v, 7u)));
}

// Of row i of the eight; i is a constant wherever this is called.
fn row_of(s: Spread, i: u32) -> Eight {
  if i < 4u { return all_slots(s.lo[i]); }
  return all_slots(s.hi[i - 4u]);
}
