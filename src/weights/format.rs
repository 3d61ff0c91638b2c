//! Storage types of weights: ONE table, a row a type.
//!
//! To add a type, add a row to [`formats!`], the WGSL piece that it names, and an implementation of
//! [`Format`]: for types of one value a block by the macro `floats!` here, for the others in
//! `blocks.rs`. Kernels, packing, pages, checkpoints, tests and benches go over the table.
use super::blocks::{Fp8, Mxfp4, Q4_0, Q4_K, Q6_K, Q8_0};
use crate::device::shader::{Piece, piece};
use crate::{Error, Result};
use bytemuck::Pod;
use half::{bf16, f16};
use std::str::FromStr;

/// Columns of a panel of packed weights.
#[doc(hidden)]
pub const PANEL: u32 = 32;

/// What the columns of a panel have side by side.
pub(crate) type Word = [u8; 16];

/// How a storage type lies on the host and on the device.
pub(crate) trait Format: 'static {
    /// A block on the host: some values that follow one another along K.
    type Block: Pod;
    /// Values of a block.
    const VALUES: usize;
    /// Values of a column in a block on the device: whole blocks of the host.
    const DEPTH: usize;
    /// 16-byte words of a block on the device.
    const WORDS: usize;

    /// The values of a block. Exact, but for one rounding to f32 where the definition needs one.
    fn widen(block: &Self::Block, values: &mut [f32]);
    /// The block nearest to some values; fewer than a block has are followed by zeros.
    fn narrow(values: &[f32]) -> Self::Block;
    /// The words of a block on the device, zero before. Past the end of a column there are fewer
    /// blocks.
    fn place(blocks: &[Self::Block], words: &mut [Word]);
}

/// What is done for the format of a type that is known when it runs.
pub(crate) trait ForFormat {
    type Output;
    fn run<F: Format>(self) -> Self::Output;
}

macro_rules! formats {
    ($($(#[$doc:meta])+ $type:ident: $format:ty, $name:literal, $ggml:expr, $unpack:literal;)+) => {
        /// Storage type of weights. Sums are always f32.
        ///
        /// A type of blocks stores values in groups along K that share a scale. The device computes
        /// with the value that the type defines, to the bit.
        ///
        /// | type | values of a block | bits a value in files | on the device |
        /// |---|---|---|---|
        /// | `F32` | 1 | 32 | 32 |
        /// | `F16`, `Bf16` | 1 | 16 | 16 |
        /// | `Q8_0` | 32 | 8.5 | 8.5 |
        /// | `Fp8` | 128 | 8.25 (128 x 128: 8.002) | 8.5 |
        /// | `Q6_K` | 256 | 6.5625 | 7 |
        /// | `Q4_0`, `Q4_K` | 32, 256 | 4.5 | 4.5 |
        /// | `Mxfp4` | 32 | 4.25 | 4.5 |
        ///
        /// On the device the columns of types of blocks are padded to a multiple of 256 values.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        #[expect(non_camel_case_types, reason = "GGUF's own names")]
        pub enum WeightType { $($(#[$doc])+ $type),+ }

        impl WeightType {
            /// Every type.
            pub const ALL: &[Self] = &[$(Self::$type),+];

            /// Its name in capitals, as safetensors or GGUF files have it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$type => $name),+ }
            }

            /// Its number in GGUF files (`ggml_type`), where it has one.
            pub const fn ggml_type(self) -> Option<u32> {
                match self { $(Self::$type => $ggml),+ }
            }

            /// The WGSL that makes values of words.
            pub(crate) fn unpack(self) -> Piece {
                match self { $(Self::$type => piece!($unpack)),+ }
            }

            /// Does something for its format.
            pub(crate) fn run<F: ForFormat>(self, f: F) -> F::Output {
                match self { $(Self::$type => f.run::<$format>()),+ }
            }

            const fn sizes(self) -> Sizes {
                match self { $(Self::$type => Sizes::of::<$format>()),+ }
            }
        }
    };
}

// Type: format on the host, name, number in GGUF files, WGSL piece.
formats! {
    /// 32-bit floats.
    F32: f32, "F32", Some(0), "matmul/format/f32";
    /// 16-bit floats; needs no `SHADER_F16`.
    F16: f16, "F16", Some(1), "matmul/format/f16";
    /// The upper half of 32-bit floats, as checkpoints have it.
    Bf16: bf16, "BF16", Some(30), "matmul/format/bf16";
    /// GGUF's Q8_0: 32 signed bytes times an f16.
    Q8_0: Q8_0, "Q8_0", Some(8), "matmul/format/q8_0";
    /// GGUF's Q4_0: 32 numbers from -8 to 7 times an f16.
    Q4_0: Q4_0, "Q4_0", Some(2), "matmul/format/q4_0";
    /// GGUF's Q4_K: 256 numbers from 0 to 15, each 32 with a scale and a minimum of 6 bits.
    Q4_K: Q4_K, "Q4_K", Some(12), "matmul/format/q4_k";
    /// GGUF's Q6_K: 256 numbers from -32 to 31, each 16 with a scale of 8 bits.
    Q6_K: Q6_K, "Q6_K", Some(14), "matmul/format/q6_k";
    /// OCP's MXFP4 as GGUF has it: 32 floats of 4 bits times a power of two.
    Mxfp4: Mxfp4, "MXFP4", Some(39), "matmul/format/mxfp4";
    /// 8-bit floats (e4m3, no infinities), each 128 along K times an f32.
    Fp8: Fp8, "F8_E4M3", None, "matmul/format/fp8";
}

/// The numbers of a [`Format`].
#[derive(Clone, Copy)]
struct Sizes {
    values: usize,
    bytes: usize,
    depth: usize,
    words: usize,
}

impl Sizes {
    const fn of<F: Format>() -> Self {
        let bytes = size_of::<F::Block>();
        Self { values: F::VALUES, bytes, depth: F::DEPTH, words: F::WORDS }
    }
}

/// By its name, in capitals or not.
impl FromStr for WeightType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let named = Self::ALL.iter().copied().find(|t| t.name().eq_ignore_ascii_case(name));
        named.ok_or_else(|| {
            Error::invalid("weight type", format!("{name}, expected one of {}", Self::names()))
        })
    }
}

impl WeightType {
    /// [`WeightType::Q8_0`]: what is stored as 8-bit integers in groups of 32.
    pub const INT8: Self = Self::Q8_0;
    /// [`WeightType::Q4_0`]: what is stored as 4-bit integers in groups of 32.
    pub const INT4: Self = Self::Q4_0;

    /// All names, for messages.
    pub(crate) fn names() -> String {
        Self::ALL.iter().map(|t| t.name()).collect::<Vec<_>>().join(", ")
    }

    /// The type of this number in GGUF files.
    pub fn of_ggml_type(number: u32) -> Option<Self> {
        Self::ALL.iter().copied().find(|t| t.ggml_type() == Some(number))
    }

    /// Values of a block on the host: 1, or a group along K that shares a scale.
    pub const fn block_values(self) -> u32 {
        self.sizes().values as u32
    }

    /// Bytes of a block on the host.
    pub const fn block_bytes(self) -> u64 {
        self.sizes().bytes as u64
    }

    /// Bytes of a row of `depth` values on the host: whole blocks.
    pub const fn row_bytes(self, depth: u32) -> u64 {
        depth.div_ceil(self.block_values()) as u64 * self.block_bytes()
    }

    /// Bits of a value on the device, scales included, padding not.
    pub fn device_bits(self) -> f64 {
        self.device_words() as f64 * 128.0 / self.device_depth() as f64
    }

    /// Rows of `depth` values as they are stored: each rounded to the nearest that the type has.
    ///
    /// Rows of types of blocks end with a whole block, filled up by zeros. How blocks are made:
    ///
    /// | type | by | error of a value |
    /// |---|---|---|
    /// | `F16`, `Bf16` | nearest, ties to even | 2^-11, 2^-8 of it, and 2^-25 (f16) |
    /// | `Q8_0` | `d = max / 127` of the block's magnitudes | d / 2, and 2^-11 of it |
    /// | `Q4_0` | `d =` the value of largest magnitude `/ -8` | d / 2 (d on the other side), and 2^-11 of it |
    /// | `Q4_K` | scales and minima of 6 bits of the extremes of 32 values | half a step of the block's largest scale, and as much of the minimum's |
    /// | `Q6_K` | scales of 8 bits of the extremes of 16 values | a step and a quarter of the block's largest scale |
    /// | `Mxfp4` | the power of two below the largest magnitude | a quarter of the largest magnitude |
    /// | `Fp8` | `max / 448` of 128 values of a row | 2^-4 of the value, or 2^-10 of the scale |
    ///
    /// Scales of GGUF's types are f16. Those below 2^-14 are coarser (a `Q8_0` block whose largest
    /// magnitude is below 0.0078), those below 2^-25 are zero, and those above 65,504 are cut to it. NaN
    /// becomes zero, and so does all of a block with an infinity.
    ///
    /// # Panics
    ///
    /// If `values` are not whole rows.
    pub fn encode(self, values: &[f32], depth: usize) -> Vec<u8> {
        struct Encode<'a>(&'a [f32], usize);
        impl ForFormat for Encode<'_> {
            type Output = Vec<u8>;
            fn run<F: Format>(self) -> Vec<u8> {
                let rows = self.0.chunks_exact(self.1);
                let blocks = rows.flat_map(|row| row.chunks(F::VALUES).map(F::narrow));
                bytemuck::pod_collect_to_vec(&blocks.collect::<Vec<F::Block>>())
            }
        }
        whole_rows(values.len(), depth);
        self.run(Encode(values, depth))
    }

    /// The values of rows of `depth` stored ones.
    ///
    /// # Panics
    ///
    /// If `bytes` are not whole rows.
    pub fn decode(self, bytes: &[u8], depth: usize) -> Vec<f32> {
        struct Decode<'a>(&'a [u8], usize);
        impl ForFormat for Decode<'_> {
            type Output = Vec<f32>;
            fn run<F: Format>(self) -> Vec<f32> {
                let blocks: &[F::Block] = bytemuck::cast_slice(self.0);
                let mut values = vec![];
                let mut one = vec![0.0; F::VALUES];
                for row in blocks.chunks_exact(self.1.div_ceil(F::VALUES)) {
                    let end = values.len() + self.1;
                    for block in row {
                        F::widen(block, &mut one);
                        values.extend_from_slice(&one);
                    }
                    values.truncate(end);
                }
                values
            }
        }
        let row = depth.div_ceil(self.sizes().values) * self.sizes().bytes;
        whole_rows(bytes.len(), row);
        self.run(Decode(bytes, depth))
    }

    /// Rows of `depth` values, as they are stored and read again.
    ///
    /// ```
    /// assert_eq!(wgmoe::WeightType::Bf16.round(&[1.001], 1), [1.0]);
    /// ```
    ///
    /// # Panics
    ///
    /// If `values` are not whole rows.
    pub fn round(self, values: &[f32], depth: usize) -> Vec<f32> {
        self.decode(&self.encode(values, depth), depth)
    }

    /// Values of a column in a block on the device.
    pub(crate) const fn device_depth(self) -> u32 {
        self.sizes().depth as u32
    }

    /// 16-byte words of a block on the device.
    pub(crate) const fn device_words(self) -> u32 {
        self.sizes().words as u32
    }

    /// Whether values share scales.
    pub(crate) const fn has_blocks(self) -> bool {
        self.sizes().values > 1
    }
}

fn whole_rows(have: usize, row: usize) {
    assert!(row > 0 && have.is_multiple_of(row), "{have}, expected whole rows of {row}");
}

/// Types of one value a block: it is what the device has, too.
macro_rules! floats {
    ($($type:ty, $bytes:literal, $widen:expr, $narrow:expr;)+) => {$(
        impl Format for $type {
            type Block = [u8; $bytes];
            const VALUES: usize = 1;
            const DEPTH: usize = 16 / $bytes;
            const WORDS: usize = 1;
            #[inline]
            fn widen(block: &Self::Block, values: &mut [f32]) {
                values[0] = $widen(<$type>::from_le_bytes(*block));
            }
            #[inline]
            fn narrow(values: &[f32]) -> Self::Block {
                $narrow(values[0]).to_le_bytes()
            }
            #[inline]
            fn place(blocks: &[Self::Block], words: &mut [Word]) {
                let bytes: &[u8] = bytemuck::cast_slice(blocks);
                match <Word>::try_from(bytes) {
                    Ok(word) => words[0] = word,
                    Err(_) => words[0][..bytes.len()].copy_from_slice(bytes),
                }
            }
        }
    )+};
}
floats! {
    f32, 4, |v| v, |v: f32| v;
    f16, 2, f16::to_f32, f16::from_f32;
    bf16, 2, bf16::to_f32, bf16::from_f32;
}
