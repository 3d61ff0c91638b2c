//! The grouped matmul for a few rows on GPUs, where reading the weights is all it costs. See [`matmul`](super::grouped_matmul).
use super::grouped_matmul::{BINDINGS, ItemKind, Params, Specialization, SKINNY_ROWS};
use crate::device::shader::{Prelude, Spec};

/// See `shaders/matmul_skinny.wgsl`.
pub const SPEC: Spec = Spec {
    name: "matmul_skinny",
    body: include_str!("../../shaders/matmul_skinny.wgsl"),
    params: Params::FIELDS,
    bindings: BINDINGS,
    variants: || Specialization::all().iter().filter(|p| p.kind == ItemKind::Skinny).map(prelude).collect(),
};

/// Columns of weights side by side.
const COLUMNS: u32 = 64;
/// Parts of K that lanes share out.
const SPLIT: u32 = 4;

/// Columns that one workgroup makes.
pub(crate) fn tile_columns(problem: &Specialization) -> u32 {
    COLUMNS * if problem.activation.is_some() { 1 } else { 2 }
}

pub(crate) fn prelude(problem: &Specialization) -> Prelude {
    let prelude = Prelude::new(problem.label())
        .constant("COLUMNS", COLUMNS)
        .constant("SPLIT", SPLIT)
        .constant("TILE_ROWS", SKINNY_ROWS);
    super::matmul_tile::common(problem, prelude)
}
