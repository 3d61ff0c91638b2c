// f16: 8 values a word, the even one in the low half.

fn widen(w: vec4<u32>) -> Eight {
  return Eight(vec4(unpack2x16float(w.x), unpack2x16float(w.y)), vec4(unpack2x16float(w.z), unpack2x16float(w.w)));
}

fn load_pair(up: bool, c: Columns, step: u32) -> Pair {
  let p = load_words(up, c.a + step * PANEL, c.b + step * PANEL);
  return Pair(widen(p.a), widen(p.b));
}
