//! The numbers of all inputs, from a hash of (seed, index).
//!
//! W1, W2 and OP1 to OP3 are what other implementations (Burn, ggml, candle, PyTorch) are timed on
//! as well: all of them, in whatever language, draw their inputs from this hash, so that they
//! compute on the same numbers.

/// Seeds that other implementations share.
pub const X: u32 = 1;
pub const ROUTER: u32 = 2;
pub const GATE: u32 = 3;
pub const UP: u32 = 4;
pub const DOWN: u32 = 5;
pub const SCORES: u32 = 6;
pub const TABLE: u32 = 7;
pub const INDEX: u32 = 8;
/// Seeds of ours.
pub const BIAS: u32 = 20;
pub const BLOCK: u32 = 21;

/// 32 bits of (seed, index).
pub fn mix(seed: u32, i: u32) -> u32 {
    let mut h = i.wrapping_mul(0x9E37_79B1) ^ seed.wrapping_mul(0x85EB_CA77);
    h ^= h >> 16;
    h = h.wrapping_mul(0x7FEB_352D);
    h ^= h >> 15;
    h = h.wrapping_mul(0x846C_A68B);
    h ^ h >> 16
}

/// Uniform in [-scale / 2, scale / 2), 24 bits.
pub fn uniform(seed: u32, i: u32, scale: f32) -> f32 {
    ((mix(seed, i) >> 8) as f32 * (1.0 / 16_777_216.0) - 0.5) * scale
}

/// Values `first..first + n` of a seed.
pub fn stretch(seed: u32, first: u32, n: u32, scale: f32) -> Vec<f32> {
    (0..n).map(|i| uniform(seed, first.wrapping_add(i), scale)).collect()
}

/// The first `n` values of a seed.
pub fn fill(seed: u32, n: u32, scale: f32) -> Vec<f32> {
    stretch(seed, 0, n, scale)
}
