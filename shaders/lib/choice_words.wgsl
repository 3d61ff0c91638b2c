// Words of a choice's bit set. Contract: the kernel has `assigned`, read and written, of atomics.

// Bits low..high, each at most 32.
fn bits_between(low: u32, high: u32) -> u32 {
    return select((0xffffffffu >> (32u - (high - low))) << low, 0u, low >= high);
}

// Puts the bits of a word that are `own`; other sequences hold the rest of it.
fn put(word: u32, own: u32, take: u32) {
    if own == 0xffffffffu {
        atomicStore(&assigned[word], take);
    } else {
        atomicAnd(&assigned[word], take | ~own);
        atomicOr(&assigned[word], take);
    }
}
