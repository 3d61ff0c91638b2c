// Eight values a 16-byte word (f16, bf16): one word of each column. Twin of pair_f32.wgsl, pair_rows.wgsl and
// pair_blocks.wgsl.
fn widen(w: vec4<u32>) -> Eight {
  return Eight(unpack_low(w), unpack_high(w));
}

fn load_pair(up: bool, c: Columns, step: u32) -> Pair {
  let p = load_words(up, c.a + step * PANEL, c.b + step * PANEL);
  return Pair(widen(p.a), widen(p.b));
}
