//! The numbers of all inputs, from a hash of (seed, index).
//!
//! W1, W2 and OP1 to OP3 are what other implementations (Burn, ggml, candle, PyTorch) are timed on as well: all of them, in
//! whatever language, draw their inputs from this hash, so that they compute on the same numbers.

/// Seeds that other implementations share.
pub(crate) const X: u32 = 1;
pub(crate) const ROUTER: u32 = 2;
pub(crate) const GATE: u32 = 3;
pub(crate) const UP: u32 = 4;
pub(crate) const DOWN: u32 = 5;
pub(crate) const SCORES: u32 = 6;
pub(crate) const TABLE: u32 = 7;
pub(crate) const INDEX: u32 = 8;
/// Seeds of ours.
pub(crate) const BIAS: u32 = 20;
pub(crate) const BLOCK: u32 = 21;

/// 32 bits of (seed, index).
pub(crate) fn mix(seed: u32, i: u32) -> u32 {
    let mut h = i.wrapping_mul(0x9E37_79B1) ^ seed.wrapping_mul(0x85EB_CA77);
    h ^= h >> 16;
    h = h.wrapping_mul(0x7FEB_352D);
    h ^= h >> 15;
    h = h.wrapping_mul(0x846C_A68B);
    h ^ h >> 16
}

/// Uniform in [-scale / 2, scale / 2), 24 bits.
pub(crate) fn uniform(seed: u32, i: u32, scale: f32) -> f32 {
    ((mix(seed, i) >> 8) as f32 * (1.0 / 16_777_216.0) - 0.5) * scale
}

/// Values `first..first + n` of a seed.
pub(crate) fn stretch(seed: u32, first: u32, n: u32, scale: f32) -> Vec<f32> {
    (0..n).map(|i| uniform(seed, first.wrapping_add(i), scale)).collect()
}

/// The first `n` values of a seed.
pub(crate) fn fill(seed: u32, n: u32, scale: f32) -> Vec<f32> {
    stretch(seed, 0, n, scale)
}
