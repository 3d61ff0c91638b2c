//! Storage types of weights: a row of the table a type.

/// Columns of a panel of packed weights.
pub const PANEL: u32 = 32;

/// Storage type of weights. Sums are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats; needs no `SHADER_F16`.
    F16,
    /// The upper half of 32-bit floats, as checkpoints have it.
    Bf16,
}

impl WeightType {
    /// Bytes of a value.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Values in 16 bytes.
    pub(crate) const fn lanes(self) -> u32 {
        (16 / self.bytes()) as u32
    }
}
