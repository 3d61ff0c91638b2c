// bf16: 8 values a word, the even one in the low half; widened exactly by a shift.

fn widen(w: vec4<u32>) -> Eight {
  let even = bitcast<vec4<f32>>(w << vec4(16u));
  let odd = bitcast<vec4<f32>>(w & vec4(0xffff0000u));
  return Eight(vec4(even.x, odd.x, even.y, odd.y), vec4(even.z, odd.z, even.w, odd.w));
}

fn load_pair(up: bool, c: Columns, step: u32) -> Pair {
  let p = load_words(up, c.a + step * PANEL, c.b + step * PANEL);
  return Pair(widen(p.a), widen(p.b));
}
