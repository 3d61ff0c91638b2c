//! The bit set that every router ends in and every consumer starts from: `assigned [experts, ceil(tokens / 32)]`, one bit
//! a (expert, token) pair, token `t` being bit `t % 32` of word `t / 32`.

/// Words of one expert.
pub const fn columns(tokens: usize) -> usize {
    tokens.div_ceil(32)
}

/// Whether expert `e` works on token `t`, of `tokens`.
///
/// # Panics
///
/// If the pair lies outside `words`.
pub fn get(words: &[u32], tokens: usize, e: usize, t: usize) -> bool {
    words[e * columns(tokens) + t / 32] >> (t % 32) & 1 == 1
}

/// Assigns token `t` to expert `e`.
///
/// # Panics
///
/// If the pair lies outside `words`.
pub fn set(words: &mut [u32], tokens: usize, e: usize, t: usize) {
    words[e * columns(tokens) + t / 32] |= 1 << (t % 32);
}

/// No pair assigned.
pub fn empty(tokens: usize, experts: usize) -> Vec<u32> {
    vec![0; experts * columns(tokens)]
}

/// The experts of token `t`, ascending.
///
/// # Panics
///
/// If `words` is not `[experts, ceil(tokens / 32)]`.
pub fn experts_of(words: &[u32], tokens: usize, t: usize) -> Vec<usize> {
    let experts = words.len() / columns(tokens).max(1);
    (0..experts).filter(|&e| get(words, tokens, e, t)).collect()
}

/// The tokens of expert `e`, ascending.
///
/// # Panics
///
/// If the expert lies outside `words`.
pub fn tokens_of(words: &[u32], tokens: usize, e: usize) -> Vec<usize> {
    (0..tokens).filter(|&t| get(words, tokens, e, t)).collect()
}
