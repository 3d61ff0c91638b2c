//! The bit set that every router ends in and every consumer starts from:
//! `assigned [experts, ceil(tokens / 32)]`, one bit a (expert, token) pair, token `t` being bit
//! `t % 32` of word `t / 32`.
//!
//! ```
//! use wgmoe::plan::bits;
//!
//! // Two experts, 40 tokens: the first takes tokens 3 and 35, the second none.
//! let words = bits::from_lists(40, &[vec![3, 35], vec![]]);
//! assert_eq!(words, [1 << 3, 1 << 3, 0, 0]);
//! assert_eq!(bits::tokens_of(&words, 40, 0), [3, 35]);
//!
//! let mut other = words.clone();
//! bits::set(&mut other, 40, 1, 7);
//! assert_eq!(bits::first_difference(&words, &other, 40), Some((1, 7)));
//! ```
use crate::error::expect_len;

/// Words of one expert.
pub const fn columns(tokens: usize) -> usize {
    tokens.div_ceil(32)
}

/// Where the pair stands: its word, and its bit there.
#[track_caller]
fn place(words: usize, tokens: usize, e: usize, t: usize) -> (usize, u32) {
    assert!(t < tokens, "`t`: token {t} of {tokens}");
    let experts = words / columns(tokens);
    assert!(e < experts, "`e`: expert {e} of {experts}");
    (e * columns(tokens) + t / 32, 1 << (t % 32))
}

/// Whether expert `e` works on token `t`, of `tokens`.
///
/// # Panics
///
/// If `t` is not below `tokens`, or if `words` do not reach to expert `e`; the message names `t` or
/// `e`.
pub fn get(words: &[u32], tokens: usize, e: usize, t: usize) -> bool {
    let (word, bit) = place(words.len(), tokens, e, t);
    words[word] & bit != 0
}

/// Assigns token `t` to expert `e`.
///
/// # Panics
///
/// As [`get`].
pub fn set(words: &mut [u32], tokens: usize, e: usize, t: usize) {
    let (word, bit) = place(words.len(), tokens, e, t);
    words[word] |= bit;
}

/// No pair assigned.
pub fn empty(tokens: usize, experts: usize) -> Vec<u32> {
    vec![0; experts * columns(tokens)]
}

/// The bit set of experts that work on these tokens each; the order of a list does not matter, nor
/// does a token that comes twice.
///
/// # Panics
///
/// If a token is not below `tokens`; the message names `lists`.
pub fn from_lists(tokens: usize, lists: &[impl AsRef<[u32]>]) -> Vec<u32> {
    let mut words = empty(tokens, lists.len());
    for (e, list) in lists.iter().enumerate() {
        for &t in list.as_ref() {
            assert!((t as usize) < tokens, "`lists`: token {t} of {tokens}, for expert {e}");
            set(&mut words, tokens, e, t as usize);
        }
    }
    words
}

/// The first (expert, token) that is assigned in one bit set and not in the other; bits past the last
/// token count for nothing.
///
/// # Panics
///
/// If the two are not of one length, or not whole rows of `ceil(tokens / 32)` words; the message
/// names `b` or `a`.
pub fn first_difference(a: &[u32], b: &[u32], tokens: usize) -> Option<(usize, usize)> {
    expect_len("b", b.len(), a.len());
    let columns = columns(tokens);
    if columns == 0 {
        expect_len("a", a.len(), 0);
        return None;
    }
    assert!(a.len().is_multiple_of(columns), "`a`: expected rows of {columns}, got {}", a.len());
    let experts = a.len() / columns;
    let mut pairs = (0..experts).flat_map(|e| (0..tokens).map(move |t| (e, t)));
    pairs.find(|&(e, t)| get(a, tokens, e, t) != get(b, tokens, e, t))
}

/// The experts of token `t`, ascending.
///
/// # Panics
///
/// If `t` is not below `tokens`, of which there must be one; the message names `t`.
pub fn experts_of(words: &[u32], tokens: usize, t: usize) -> Vec<usize> {
    let experts = words.len() / columns(tokens).max(1);
    (0..experts).filter(|&e| get(words, tokens, e, t)).collect()
}

/// The tokens of expert `e`, ascending.
///
/// # Panics
///
/// If `words` do not reach to expert `e`; the message names it.
pub fn tokens_of(words: &[u32], tokens: usize, e: usize) -> Vec<usize> {
    (0..tokens).filter(|&t| get(words, tokens, e, t)).collect()
}
