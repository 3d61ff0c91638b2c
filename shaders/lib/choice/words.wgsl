// Words of a choice's bit set. Contract: the kernel has `assigned`, read and written, of atomics.

// Puts the bits of a word that are `own`; other sequences hold the rest of it.
fn put_word(word: u32, own: u32, take: u32) {
  if own == 0xffffffffu {
    atomicStore(&assigned[word], take);
  } else {
    atomicAnd(&assigned[word], take | ~own);
    atomicOr(&assigned[word], take);
  }
}
