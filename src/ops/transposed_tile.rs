//! The matmul by transposed weights for GPUs: tiles in workgroup memory. See
//! [`matmul_transposed`](super::matmul_transposed).
use super::matmul_kernels::{ItemKind, Layout};
use super::matmul_tile::TILE_ROWS;
use super::transposed_kernels::{ALL_BINDINGS, Params, Problem};
use crate::device::shader::{Prelude, Spec, piece};

/// See `shaders/transposed_tile.wgsl`.
pub const SPEC: Spec = Spec {
    name: "transposed_tile",
    body: include_str!("../../shaders/transposed_tile.wgsl"),
    params: Params::FIELDS,
    bindings: ALL_BINDINGS,
    variants: || Problem::variants(prelude),
};

/// Columns that one workgroup makes.
pub(super) const OUT_COLUMNS: u32 = 128;

/// Iterations that the loops of one invocation take at most: steps of four rows of either matrix at
/// least.
pub(super) fn iterations(rows: u32) -> u64 {
    rows.div_ceil(4).into()
}

pub(super) fn prelude(problem: &Problem) -> Prelude {
    let problem = &problem.of_fours();
    let any = problem.layout == Layout::AnyRows;
    let fours = problem.weight_type.device_depth() == 4;
    // A few rows: lanes that have none leave the multiply-adds out.
    let rows = if problem.kind == ItemKind::Skinny { 32 } else { TILE_ROWS };
    problem
        .reads(Prelude::new(problem.label()).constant("TILE_ROWS", rows))
        .piece(match (any, fours) {
            (true, _) => piece!("matmul/transposed/bring_any"),
            (_, true) => piece!("matmul/transposed/bring_fours"),
            (_, false) => piece!("matmul/transposed/bring_eights"),
        })
        .piece(piece!("matmul/tile/outer"))
        .piece(if problem.column_lanes == 4 {
            piece!("matmul/transposed/out_fours")
        } else {
            piece!("matmul/transposed/out_ones")
        })
}
