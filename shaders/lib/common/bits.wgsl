// Words with some of their bits set.

// Bits low..high of a word; low < high <= 32.
fn bits_between(low: u32, high: u32) -> u32 {
  return (0xffffffffu >> ((low - high) & 31u)) << low;
}

// The same, and none where low >= high.
fn bits_between_or_none(low: u32, high: u32) -> u32 {
  return select(bits_between(low, high), 0u, low >= high);
}
