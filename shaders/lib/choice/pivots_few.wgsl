// Bracket b of expert_choice_serial.wgsl narrowed by 8 pivots between lo and hi, which the keys of some words
// are counted by. Twin of pivots_many.wgsl, whose 16 SwiftShader compiles for minutes.
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
  let p = pivots_of(lo, hi, 9u, 1u);
  var c = Eights();
  for (var w = words.first; w < words.last; w += words.step) {
    if params.tokens * params.experts >= FAR {
      ask((w + words.step) * 32u, lane, e - 2u * lane);
    }
    let live = live_word(words.start, words.end, w, pair, columns);
    let t = w * 32u;
    c = count_keys(c, p, keys_of(t, e, live));
    c = count_keys(c, p, keys_of(t + 8u, e, live >> vec2(8u)));
    c = count_keys(c, p, keys_of(t + 16u, e, live >> vec2(16u)));
    c = count_keys(c, p, keys_of(t + 24u, e, live >> vec2(24u)));
  }
  return narrowed(b, ranks, p, c);
}
