//! Storage types of weights: ONE table, a row a type.
//!
//! To add a type, add a row to [`formats!`], the WGSL piece that it names, and, where no type of the
//! half crate or of Rust has its values, an implementation of [`Value`]. Kernels, packing, pages,
//! checkpoints, tests and benches go over the table.
use crate::device::shader::{Piece, piece};
use bytemuck::Pod;
use half::{bf16, f16};

/// Columns of a panel of packed weights.
#[doc(hidden)]
pub const PANEL: u32 = 32;

/// A storage type's values on the host, as bytes that lie anywhere.
pub(crate) trait Value: 'static {
    type Bytes: Pod;
    /// Exact.
    fn widen(bytes: Self::Bytes) -> f32;
    /// Rounds to nearest.
    fn narrow(value: f32) -> Self::Bytes;
}

/// What is done for the values of a type that is known when it runs.
pub(crate) trait ForValue {
    type Output;
    fn run<V: Value>(self) -> Self::Output;
}

macro_rules! formats {
    ($($(#[$doc:meta])+ $type:ident: $value:ty, $dtype:literal, $unpack:literal;)+) => {
        /// Storage type of weights. Sums are always f32.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum WeightType { $($(#[$doc])+ $type),+ }

        impl WeightType {
            /// Every type.
            pub const ALL: &[Self] = &[$(Self::$type),+];

            /// Bytes of a value.
            pub const fn bytes(self) -> u64 {
                match self {
                    $(Self::$type => size_of::<<$value as Value>::Bytes>() as u64),+
                }
            }

            /// Its name in safetensors files, in capitals.
            pub const fn dtype(self) -> &'static str {
                match self { $(Self::$type => $dtype),+ }
            }

            /// The WGSL that makes values of 16 bytes.
            pub(crate) fn unpack(self) -> Piece {
                match self { $(Self::$type => piece!($unpack)),+ }
            }

            /// Does something for its values.
            pub(crate) fn run<F: ForValue>(self, f: F) -> F::Output {
                match self { $(Self::$type => f.run::<$value>()),+ }
            }
        }
    };
}

// Type: value on the host, name in safetensors, WGSL piece.
formats! {
    /// 32-bit floats.
    F32: f32, "F32", "matmul/unpack_f32";
    /// 16-bit floats; needs no `SHADER_F16`.
    F16: f16, "F16", "matmul/unpack_f16";
    /// The upper half of 32-bit floats, as checkpoints have it.
    Bf16: bf16, "BF16", "matmul/unpack_bf16";
}

impl WeightType {
    /// The type of this name in safetensors files.
    pub fn of_dtype(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|t| t.dtype() == name)
    }

    /// A value as it is stored, rounded to nearest, and widened again.
    ///
    /// ```
    /// assert_eq!(wgmoe::WeightType::Bf16.round(1.001), 1.0);
    /// ```
    pub fn round(self, value: f32) -> f32 {
        struct Round(f32);
        impl ForValue for Round {
            type Output = f32;
            fn run<V: Value>(self) -> f32 {
                V::widen(V::narrow(self.0))
            }
        }
        self.run(Round(value))
    }

    /// Values as they are stored, rounded to nearest, little endian.
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        struct Encode<'a>(&'a [f32]);
        impl ForValue for Encode<'_> {
            type Output = Vec<u8>;
            fn run<V: Value>(self) -> Vec<u8> {
                let narrow = self.0.iter().map(|&v| V::narrow(v));
                bytemuck::pod_collect_to_vec(&narrow.collect::<Vec<V::Bytes>>())
            }
        }
        self.run(Encode(values))
    }

    /// Values in 16 bytes.
    pub(crate) const fn lanes(self) -> u32 {
        (16 / self.bytes()) as u32
    }
}

macro_rules! value {
    ($type:ty, $bytes:literal, $widen:expr, $narrow:expr) => {
        impl Value for $type {
            type Bytes = [u8; $bytes];
            fn widen(bytes: Self::Bytes) -> f32 {
                $widen(<$type>::from_le_bytes(bytes))
            }
            fn narrow(value: f32) -> Self::Bytes {
                $narrow(value).to_le_bytes()
            }
        }
    };
}
value!(f32, 4, |v| v, |v: f32| v);
value!(f16, 2, f16::to_f32, f16::from_f32);
value!(bf16, 2, bf16::to_f32, bf16::from_f32);
