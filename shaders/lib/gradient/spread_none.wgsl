// Values of a for eight slots, loaded by every lane. Twin of spread_shuffle.wgsl.
struct Spread { s0: Eight, s1: Eight, s2: Eight, s3: Eight, s4: Eight, s5: Eight, s6: Eight, s7: Eight }

fn load_own(slot: u32, end: u32, n: u32) -> Eight {
  return kept(load_a(a_row(min(slot, end - 1u)), n), slot < end);
}

fn load_spread(slot: u32, end: u32, n: u32, lane: u32) -> Spread {
  return Spread(
    load_own(slot, end, n), load_own(slot + 1u, end, n), load_own(slot + 2u, end, n),
    load_own(slot + 3u, end, n), load_own(slot + 4u, end, n), load_own(slot + 5u, end, n),
    load_own(slot + 6u, end, n), load_own(slot + 7u, end, n));
}

fn value_of(e: Eight, i: u32) -> f32 {
  switch i {
    case 0u: { return e.lo.x; }
    case 1u: { return e.lo.y; }
    case 2u: { return e.lo.z; }
    case 3u: { return e.lo.w; }
    case 4u: { return e.hi.x; }
    case 5u: { return e.hi.y; }
    case 6u: { return e.hi.z; }
    default: { return e.hi.w; }
  }
}

// Of row i of the eight; i is a constant wherever this is called.
fn row_of(s: Spread, i: u32) -> Eight {
  return Eight(
    vec4(value_of(s.s0, i), value_of(s.s1, i), value_of(s.s2, i), value_of(s.s3, i)),
    vec4(value_of(s.s4, i), value_of(s.s5, i), value_of(s.s6, i), value_of(s.s7, i)));
}
