//! The table of single works: `tests/suite/works.rs` compares each in every variant, the benches
//! time it.

/// A choice by experts: tokens, experts, tokens of each expert.
pub const CHOICES: [(&str, [u32; 3]); 3] = [
    ("OP1a T512 E512 C32", [512, 512, 32]),
    ("OP1b T4096 E64 C256", [4096, 64, 256]),
    ("EC-DLM T512 E512 C20", [512, 512, 20]),
];

/// The plan of a choice by tokens: tokens, experts, experts of each token.
pub const PLANS: [(&str, [u32; 3]); 3] = [
    ("T32 E256 K8", [32, 256, 8]),
    ("T512 E64 K8", [512, 64, 8]),
    ("T4096 E256 K8", [4096, 256, 8]),
];

/// Rows by index: rows, and values of each.
pub const GATHERS: [(&str, [u32; 2]); 2] =
    [("OP3 4096 rows of 2048", [4096, 2048]), ("600000 rows of 16", [600_000, 16])];
