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
    // Loads are of four values at most.
    let [row_lanes, column_lanes] = [problem.row_lanes, problem.column_lanes].map(|n| n.min(4));
    let problem = &Problem { row_lanes, column_lanes, ..*problem };
    let any = problem.layout == Layout::AnyRows;
    let fours = problem.weight_type.device_depth() == 4;
    let [run, part] = problem.blocks();
    problem
        .constants(Prelude::new(problem.label()))
        // A few rows: lanes that have none leave the multiply-adds out.
        .constant("TILE_ROWS", if problem.kind == ItemKind::Skinny { 32 } else { TILE_ROWS })
        .piece(piece!("common/grid"))
        .piece(piece!("matmul/transposed/sizes"))
        .piece(problem.items())
        .piece(if row_lanes == 4 { piece!("matmul/x_vec4") } else { piece!("matmul/x_scalar") })
        .piece(problem.weight_type.unpack())
        .maybe_piece(run)
        .maybe_piece(part)
        .piece(problem.places())
        .maybe_piece((!any).then_some(piece!("matmul/weights")))
        .maybe_piece(problem.eighth())
        .piece(match (any, fours) {
            (true, _) => piece!("matmul/transposed/bring_any"),
            (_, true) => piece!("matmul/transposed/bring_fours"),
            (_, false) => piece!("matmul/transposed/bring_eights"),
        })
        .piece(piece!("matmul/tile/outer"))
        .piece(if column_lanes == 4 {
            piece!("matmul/transposed/out_fours")
        } else {
            piece!("matmul/transposed/out_ones")
        })
}
