// Bracket b of expert_choice_serial.wgsl narrowed by 16 pivots between lo and hi, which the keys of some
// words are counted by: fewer passes over many tokens than with the 8 of its twin, pivots_few.wgsl.
fn counted(
  b: Bracket,
  ranks: Ranks,
  lo: vec2<u32>,
  hi: vec2<u32>,
  words: Words,
  e: u32,
  pair: vec2<u32>,
  columns: u32,
  lane: u32,
) -> Bracket {
  let p = pivots_of(lo, hi, 17u, 1u);
  let q = pivots_of(lo, hi, 17u, 9u);
  var c = Eights();
  var d = Eights();
  for (var w = words.first; w < words.last; w += words.step) {
    if params.tokens * params.experts >= FAR {
      ask((w + words.step) * 32u, lane, e - 2u * lane);
    }
    let live = live_word(words.start, words.end, w, pair, columns);
    let t = w * 32u;
    let k0 = keys_of(t, e, live);
    c = count_keys(c, p, k0);
    d = count_keys(d, q, k0);
    let k1 = keys_of(t + 8u, e, live >> vec2(8u));
    c = count_keys(c, p, k1);
    d = count_keys(d, q, k1);
    let k2 = keys_of(t + 16u, e, live >> vec2(16u));
    c = count_keys(c, p, k2);
    d = count_keys(d, q, k2);
    let k3 = keys_of(t + 24u, e, live >> vec2(24u));
    c = count_keys(c, p, k3);
    d = count_keys(d, q, k3);
  }
  return narrowed(narrowed(b, ranks, p, c), ranks, q, d);
}
