//! Storage types whose values share scales: their blocks in files, and how those lie on the device.
//!
//! A block on the device holds 256 values of a column (a whole number of blocks of the files): first
//! one or two words of scales, then the codes, in the order in which the kernels want them. Nothing is
//! quantized again. Formulas: ggml's `ggml-quants.c`, OCP's MX specification 1.0, and e4m3 of
//! arXiv:2209.05433. The WGSL that reads them is in `shaders/lib/matmul/format/`.
//!
//! | type | words of scales | of codes |
//! |---|---|---|
//! | [`Q8_0`] | 8 d (f16) | 16: a byte a value, plus 128 |
//! | [`Q4_0`] | 8 d (f16) | 8: four bits a value |
//! | [`Q4_K`] | d, dmin (f16); 8 scales and 8 minima of 6 bits: low fours, low fours, high twos | 8 |
//! | [`Q6_K`] | 16 scales (i8); d (f32) | 8 of the low four bits, 4 of the high two |
//! | [`Mxfp4`] | 8 exponents (u8) | 8 |
//! | [`Fp8`] | 2 scales (f32) | 16: a byte a value |
//!
//! Codes of four bits: 32 values are a word; the low halves of its first four bytes are values 0 to 3,
//! the high halves 4 to 7, and so on, so that a mask makes bytes of four neighbours.
use super::format::{Format, Word};
use half::f16;

/// Values of a column in a block on the device.
const DEPTH: usize = 256;

fn half(bytes: [u8; 2]) -> f32 {
    f16::from_le_bytes(bytes).to_f32()
}

/// A scale as f16. Finite values stay finite.
fn stored_half(scale: f32) -> f16 {
    f16::from_f32(scale.clamp(-65504.0, 65504.0))
}

/// The value of largest magnitude, with its sign.
fn extreme(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most: f32, &v| if v.abs() > most.abs() { v } else { most })
}

/// The nearest multiple of a scale, ties to even, within bounds.
fn multiple(value: f32, scale: f32, low: f32, high: f32) -> i32 {
    // `as` takes NaN to 0.
    if scale == 0.0 { 0 } else { (value / scale).round_ties_even().clamp(low, high) as i32 }
}

/// Value `l` of 32 values of four bits as files have them: low halves first.
fn nibble(bytes: &[u8], l: usize) -> u8 {
    if l < 16 { bytes[l] & 15 } else { bytes[l - 16] >> 4 }
}

/// 32 values of four bits as files have them.
fn nibbles(codes: impl Fn(usize) -> u8) -> [u8; 16] {
    std::array::from_fn(|l| codes(l) | codes(l + 16) << 4)
}

/// A word of the device of 32 values of four bits.
fn fours(codes: impl Fn(usize) -> u8) -> Word {
    std::array::from_fn(|i| {
        let first = i / 4 * 8 + i % 4;
        codes(first) | codes(first + 4) << 4
    })
}

/// `d q`.
pub(crate) enum Q8_0 {}

impl Format for Q8_0 {
    /// d (f16), 32 signed bytes.
    type Block = [u8; 34];
    const VALUES: usize = 32;
    const DEPTH: usize = DEPTH;
    const WORDS: usize = 17;

    fn widen(block: &Self::Block, values: &mut [f32]) {
        let d = half([block[0], block[1]]);
        for (v, &q) in values.iter_mut().zip(&block[2..]) {
            *v = d * f32::from(q as i8);
        }
    }

    fn narrow(values: &[f32]) -> Self::Block {
        let d = extreme(values).abs() / 127.0;
        let mut block = [0; 34];
        block[..2].copy_from_slice(&stored_half(d).to_le_bytes());
        for (q, &v) in block[2..].iter_mut().zip(values) {
            *q = multiple(v, d, -127.0, 127.0) as i8 as u8;
        }
        block
    }

    fn place(blocks: &[Self::Block], words: &mut [Word]) {
        for (s, block) in blocks.iter().enumerate() {
            words[0][2 * s..2 * s + 2].copy_from_slice(&block[..2]);
            for (l, q) in block[2..].iter().enumerate() {
                words[1 + 2 * s + l / 16][l % 16] = q ^ 0x80;
            }
        }
    }
}

/// `d (q - 8)`.
pub(crate) enum Q4_0 {}

impl Format for Q4_0 {
    /// d (f16), 32 values of four bits.
    type Block = [u8; 18];
    const VALUES: usize = 32;
    const DEPTH: usize = DEPTH;
    const WORDS: usize = 9;

    fn widen(block: &Self::Block, values: &mut [f32]) {
        let d = half([block[0], block[1]]);
        for (l, v) in values.iter_mut().enumerate() {
            *v = d * (f32::from(nibble(&block[2..], l)) - 8.0);
        }
    }

    fn narrow(values: &[f32]) -> Self::Block {
        let d = extreme(values) / -8.0;
        let code = |l: usize| values.get(l).map_or(8, |&v| multiple(v, d, -8.0, 7.0) + 8) as u8;
        let mut block = [0; 18];
        block[..2].copy_from_slice(&stored_half(d).to_le_bytes());
        block[2..].copy_from_slice(&nibbles(code));
        block
    }

    fn place(blocks: &[Self::Block], words: &mut [Word]) {
        for (s, block) in blocks.iter().enumerate() {
            words[0][2 * s..2 * s + 2].copy_from_slice(&block[..2]);
            words[1 + s] = fours(|l| nibble(&block[2..], l));
        }
    }
}

/// `d sc q - dmin m`, sc and m of each 32 values.
#[expect(non_camel_case_types, reason = "GGUF's own name")]
pub(crate) enum Q4_K {}

impl Q4_K {
    /// Scale and minimum of 32 values.
    fn scale(block: &[u8; 144], j: usize) -> [u8; 2] {
        let s = &block[4..16];
        if j < 4 {
            [s[j] & 63, s[j + 4] & 63]
        } else {
            let [low, high] = [s[j + 4], s[j + 4] >> 4];
            [low & 15 | s[j - 4] >> 6 << 4, high | s[j] >> 6 << 4]
        }
    }

    fn code(block: &[u8; 144], j: usize, l: usize) -> u8 {
        block[16 + 32 * (j / 2) + l] >> (4 * (j % 2)) & 15
    }
}

impl Format for Q4_K {
    /// d, dmin (f16), 12 bytes of scales, 256 values of four bits.
    type Block = [u8; 144];
    const VALUES: usize = 256;
    const DEPTH: usize = DEPTH;
    const WORDS: usize = 9;

    fn widen(block: &Self::Block, values: &mut [f32]) {
        let [d, dmin] = [half([block[0], block[1]]), half([block[2], block[3]])];
        for (j, values) in values.chunks_mut(32).enumerate() {
            let [sc, m] = Self::scale(block, j).map(f32::from);
            for (l, v) in values.iter_mut().enumerate() {
                // Both products are exact.
                *v = d * sc * f32::from(Self::code(block, j, l)) - dmin * m;
            }
        }
    }

    fn narrow(values: &[f32]) -> Self::Block {
        // Lowest value, at most 0, and step of each 32.
        let mut ranges = [[0f32; 2]; 8];
        for (range, values) in ranges.iter_mut().zip(values.chunks(32)) {
            let low = values.iter().fold(0.0, |a: f32, &b| a.min(b));
            let high = values.iter().fold(0.0, |a: f32, &b| a.max(b));
            *range = [-low, (high - low) / 15.0];
        }
        let largest = |i: usize| ranges.iter().map(|r| r[i]).fold(0.0, f32::max) / 63.0;
        let [dmin, d] = [largest(0), largest(1)].map(stored_half);
        let mut block = [0; 144];
        block[..2].copy_from_slice(&d.to_le_bytes());
        block[2..4].copy_from_slice(&dmin.to_le_bytes());
        let [d, dmin] = [d.to_f32(), dmin.to_f32()];
        for (j, &[low, step]) in ranges.iter().enumerate() {
            let sc = multiple(step, d, 0.0, 63.0) as u8;
            let m = multiple(low, dmin, 0.0, 63.0) as u8;
            let s = &mut block[4..16];
            if j < 4 {
                s[j] |= sc;
                s[j + 4] |= m;
            } else {
                s[j + 4] |= sc & 15 | m << 4;
                s[j - 4] |= sc >> 4 << 6;
                s[j] |= m >> 4 << 6;
            }
            let [step, low] = [d * f32::from(sc), dmin * f32::from(m)];
            for l in 0..32 {
                let v = values.get(32 * j + l).copied().unwrap_or(0.0);
                let code = multiple(v + low, step, 0.0, 15.0) as u8;
                block[16 + 32 * (j / 2) + l] |= code << (4 * (j % 2));
            }
        }
        block
    }

    fn place(blocks: &[Self::Block], words: &mut [Word]) {
        let block = &blocks[0];
        let scales: [[u8; 2]; 8] = std::array::from_fn(|j| Self::scale(block, j));
        let bits = |f: &dyn Fn([u8; 2]) -> u8| {
            let all = scales.iter().enumerate();
            all.fold(0u32, |word, (j, &s)| word | u32::from(f(s)) << (4 * j)).to_le_bytes()
        };
        words[0][..4].copy_from_slice(&block[..4]);
        words[0][4..8].copy_from_slice(&bits(&|[sc, _]| sc & 15));
        words[0][8..12].copy_from_slice(&bits(&|[_, m]| m & 15));
        words[0][12..].copy_from_slice(&bits(&|[sc, m]| sc >> 4 | m >> 4 << 2));
        for (j, word) in words[1..].iter_mut().enumerate() {
            *word = fours(|l| Self::code(block, j, l));
        }
    }
}

/// `d sc (q - 32)`, sc of each 16 values.
#[expect(non_camel_case_types, reason = "GGUF's own name")]
pub(crate) enum Q6_K {}

impl Q6_K {
    /// Where the bits of value `i` are: byte and shift of the low four, byte and shift of the high two.
    fn places(i: usize) -> [usize; 4] {
        let (n, k, l) = (i / 128, i / 32 % 4, i % 32);
        [64 * n + 32 * (k % 2) + l, k / 2 * 4, 128 + 32 * n + l, 2 * k]
    }

    fn code(block: &[u8; 210], i: usize) -> u8 {
        let [low, low_shift, high, high_shift] = Self::places(i);
        block[low] >> low_shift & 15 | (block[high] >> high_shift & 3) << 4
    }

    fn d(block: &[u8; 210]) -> f32 {
        half([block[208], block[209]])
    }
}

impl Format for Q6_K {
    /// Low four bits, high two bits, 16 scales (i8), d (f16).
    type Block = [u8; 210];
    const VALUES: usize = 256;
    const DEPTH: usize = DEPTH;
    const WORDS: usize = 14;

    fn widen(block: &Self::Block, values: &mut [f32]) {
        for (i, v) in values.iter_mut().enumerate() {
            let sc = f32::from(block[192 + i / 16] as i8);
            *v = Self::d(block) * sc * (f32::from(Self::code(block, i)) - 32.0);
        }
    }

    fn narrow(values: &[f32]) -> Self::Block {
        let mut steps = [0f32; 16];
        for (step, values) in steps.iter_mut().zip(values.chunks(16)) {
            *step = extreme(values) / -32.0;
        }
        let d = stored_half(extreme(&steps) / -128.0);
        let mut block = [0; 210];
        block[208..].copy_from_slice(&d.to_le_bytes());
        let d = d.to_f32();
        for (s, &step) in steps.iter().enumerate() {
            let sc = multiple(step, d, -128.0, 127.0);
            block[192 + s] = sc as i8 as u8;
            for i in 16 * s..16 * s + 16 {
                let v = values.get(i).copied().unwrap_or(0.0);
                let code = (multiple(v, d * sc as f32, -32.0, 31.0) + 32) as u8;
                let [low, low_shift, high, high_shift] = Self::places(i);
                block[low] |= (code & 15) << low_shift;
                block[high] |= code >> 4 << high_shift;
            }
        }
        block
    }

    fn place(blocks: &[Self::Block], words: &mut [Word]) {
        let block = &blocks[0];
        words[0].copy_from_slice(&block[192..208]);
        words[1][..4].copy_from_slice(&Self::d(block).to_le_bytes());
        for s in 0..8 {
            words[2 + s] = fours(|l| Self::code(block, 32 * s + l) & 15);
            // Two bits of 32 values: byte b of the first four has values b, 4 + b, 8 + b, 12 + b.
            for (i, byte) in words[10 + s / 2][8 * (s % 2)..][..8].iter_mut().enumerate() {
                let code = |four: usize| {
                    Self::code(block, 32 * s + 16 * (i / 4) + 4 * four + i % 4) >> 4 << (2 * four)
                };
                *byte = code(0) | code(1) | code(2) | code(3);
            }
        }
    }
}

/// `2^(e - 128)` times one of 16 numbers.
pub(crate) enum Mxfp4 {}

impl Mxfp4 {
    /// Twice the values of e2m1.
    const VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

    /// `2^(e - 128)` in two factors that are normal numbers.
    fn scales(e: u8) -> [f32; 2] {
        let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
        let half = i32::from(e) / 2;
        [power(half - 64), power(i32::from(e) - half - 64)]
    }
}

impl Format for Mxfp4 {
    /// e, 32 values of four bits.
    type Block = [u8; 17];
    const VALUES: usize = 32;
    const DEPTH: usize = DEPTH;
    const WORDS: usize = 9;

    fn widen(block: &Self::Block, values: &mut [f32]) {
        let [a, b] = Self::scales(block[0]);
        for (l, v) in values.iter_mut().enumerate() {
            *v = f32::from(Self::VALUES[usize::from(nibble(&block[1..], l))]) * a * b;
        }
    }

    fn narrow(values: &[f32]) -> Self::Block {
        // So that the largest magnitude is below 8 halves of the power of two; 7 and more become 6.
        let largest = extreme(values).abs();
        let exponent = (largest.to_bits() >> 23) as i32 - 127;
        let e = if largest == 0.0 { 0 } else { (exponent - 2 + 127).clamp(0, 254) };
        let [a, b] = Self::scales(e as u8);
        let code = |l: usize| {
            let v = values.get(l).copied().unwrap_or(0.0);
            let distance = |q: &u8| (f32::from(Self::VALUES[usize::from(*q)]) * a * b - v).abs();
            // The first of two that are as near: the smaller, as the larger is odd or even in turn.
            let codes = if v < 0.0 { 8..16u8 } else { 0..8 };
            codes.min_by(|p, q| distance(p).total_cmp(&distance(q))).unwrap_or(0)
        };
        let mut block = [0; 17];
        block[0] = e as u8;
        block[1..].copy_from_slice(&nibbles(code));
        block
    }

    fn place(blocks: &[Self::Block], words: &mut [Word]) {
        for (s, block) in blocks.iter().enumerate() {
            words[0][s] = block[0];
            words[1 + s] = fours(|l| nibble(&block[1..], l));
        }
    }
}

/// e4m3 times a scale. Files have the scales apart, one for a tile of 128 x 128; here each 128 values
/// of a row carry theirs.
pub(crate) enum Fp8 {}

impl Fp8 {
    /// Bytes of the scale.
    pub(crate) const SCALE: usize = 4;

    fn value(code: u8) -> f32 {
        let magnitude = match (code >> 3 & 15, code & 7) {
            (15, 7) => f32::NAN,
            (0, m) => f32::from(m) / 512.0,
            (e, m) => f32::from_bits((u32::from(e) + 120) << 23 | u32::from(m) << 20),
        };
        if code < 128 { magnitude } else { -magnitude }
    }

    /// The nearest code, ties to even; what is larger than 448 becomes 448.
    fn code(value: f32) -> u8 {
        let sign = (value.to_bits() >> 24 & 128) as u8;
        let magnitude = value.abs();
        let code = if magnitude.is_nan() {
            127
        } else if magnitude >= 448.0 {
            126
        } else if magnitude < 1.0 / 64.0 {
            (magnitude * 512.0).round_ties_even() as u8
        } else {
            let bits = magnitude.to_bits();
            (((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - (120 << 3)) as u8
        };
        sign | code
    }
}

impl Format for Fp8 {
    /// The scale (f32), 128 values.
    type Block = [u8; 132];
    const VALUES: usize = 128;
    const DEPTH: usize = DEPTH;
    const WORDS: usize = 17;

    fn widen(block: &Self::Block, values: &mut [f32]) {
        let scale = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        for (v, &code) in values.iter_mut().zip(&block[Self::SCALE..]) {
            *v = Self::value(code) * scale;
        }
    }

    fn narrow(values: &[f32]) -> Self::Block {
        let scale = extreme(values).abs() / 448.0;
        let mut block = [0; 132];
        block[..Self::SCALE].copy_from_slice(&scale.to_le_bytes());
        for (code, &v) in block[Self::SCALE..].iter_mut().zip(values) {
            *code = if scale == 0.0 { 0 } else { Self::code(v / scale) };
        }
        block
    }

    /// The kernels know no NaN among the codes: their scale becomes NaN instead, which takes the column
    /// of `out` to NaN just so.
    fn place(blocks: &[Self::Block], words: &mut [Word]) {
        for (s, block) in blocks.iter().enumerate() {
            let (scale, codes) = block.split_at(Self::SCALE);
            words[0][4 * s..4 * s + 4].copy_from_slice(scale);
            if codes.iter().any(|code| code & 127 == 127) {
                words[0][4 * s..4 * s + 4].copy_from_slice(&f32::NAN.to_le_bytes());
            }
            for (l, &code) in codes.iter().enumerate() {
                words[1 + 8 * s + l / 16][l % 16] = code;
            }
        }
    }
}
