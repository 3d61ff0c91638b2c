//! The types that tensors of GGUF files have. All of them, not only those that are computed with:
//! a file's other tensors must be sized too, to see that none overlaps another.

use crate::WeightType;

/// A type of ggml's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Type {
    /// Number in files.
    id: u32,
    /// ggml's name, which is also that of the [`WeightType`].
    pub(super) name: &'static str,
    /// Values of a block: a row is a whole number of them.
    pub(super) block: u64,
    /// Bytes of a block.
    pub(super) bytes: u64,
}

const fn row(id: u32, name: &'static str, block: u64, bytes: u64) -> Type {
    Type { id, name, block, bytes }
}

/// Those that are no [`WeightType`], as `GGML_QUANT_SIZES` of the package `gguf` 0.19.0 (PyPI) has them.
const OTHERS: [Type; 26] = [
    row(3, "Q4_1", 32, 20),
    row(6, "Q5_0", 32, 22),
    row(7, "Q5_1", 32, 24),
    row(9, "Q8_1", 32, 40),
    row(10, "Q2_K", 256, 84),
    row(11, "Q3_K", 256, 110),
    row(13, "Q5_K", 256, 176),
    row(15, "Q8_K", 256, 292),
    row(16, "IQ2_XXS", 256, 66),
    row(17, "IQ2_XS", 256, 74),
    row(18, "IQ3_XXS", 256, 98),
    row(19, "IQ1_S", 256, 50),
    row(20, "IQ4_NL", 32, 18),
    row(21, "IQ3_S", 256, 110),
    row(22, "IQ2_S", 256, 82),
    row(23, "IQ4_XS", 256, 136),
    row(24, "I8", 1, 1),
    row(25, "I16", 1, 2),
    row(26, "I32", 1, 4),
    row(27, "I64", 1, 8),
    row(28, "F64", 1, 8),
    row(29, "IQ1_M", 256, 56),
    row(34, "TQ1_0", 256, 54),
    row(35, "TQ2_0", 256, 66),
    row(40, "NVFP4", 64, 36),
    row(41, "Q1_0", 128, 18),
];

/// The type of this number.
pub(super) fn find(id: u32) -> Option<Type> {
    match WeightType::of_ggml_type(id) {
        Some(t) => Some(row(id, t.name(), t.block_values().into(), t.block_bytes())),
        None => OTHERS.into_iter().find(|t| t.id == id),
    }
}
