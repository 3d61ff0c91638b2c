// Four values a 16-byte word (f32): two words of each column. Twin of pair_halves.wgsl, pair_rows.wgsl and
// pair_blocks.wgsl.
fn load_pair(up: bool, c: Columns, step: u32) -> Pair {
  let second = select(min(2u * step + 1u, weight_chunks() - 1u), 2u * step + 1u, WHOLE_STEPS);
  if PANEL == 1u && WHOLE_STEPS {
    let p = load_words(up, c.a + 2u * step, c.a + second);
    let q = load_words(up, c.b + 2u * step, c.b + second);
    return Pair(eight_of(p.a, p.b), eight_of(q.a, q.b));
  }
  let p = load_words(up, c.a + 2u * step * PANEL, c.b + 2u * step * PANEL);
  let q = load_words(up, c.a + second * PANEL, c.b + second * PANEL);
  var pair = Pair(eight_of(p.a, q.a), eight_of(p.b, q.b));
  if !WHOLE_STEPS {
    let inside = second == 2u * step + 1u;
    pair.a.hi = select(vec4(0.0), pair.a.hi, inside);
    pair.b.hi = select(vec4(0.0), pair.b.hi, inside);
  }
  return pair;
}
