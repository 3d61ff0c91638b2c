// Two 16-byte words of weights by two loads: no feature, any alignment. Twin of words_wide.wgsl.
fn load_words(up: bool, a: u32, b: u32) -> Words {
  return Words(load_weights(up, a, 0u), load_weights(up, b, 0u));
}
