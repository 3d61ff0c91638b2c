//! Gradients of experts' weights on matrix units, at the precision of f32. See
//! [`weight_gradient`](super::weight_gradient), and [`MatrixUnits`](crate::MatrixUnits) for when it is
//! chosen.
use super::matrix_tiling::{Matrices, STEP_DEPTH, Units};
use super::weight_gradient::{BINDINGS, Params, Problem};
use crate::device::shader::{Prelude, Spec, piece};

/// See `shaders/weight_gradient_matrix.wgsl`.
pub const SPEC: Spec = Spec {
    name: "weight_gradient_matrix",
    body: include_str!("../../shaders/weight_gradient_matrix.wgsl"),
    params: Params::FIELDS,
    bindings: BINDINGS,
    variants: || {
        let of = |units| {
            let planned = Problem::all().into_iter().filter(serves);
            planned.map(move |problem| prelude(&problem, units))
        };
        Prelude::distinct(Units::all().into_iter().flat_map(of))
    },
};

/// Whether it serves a problem. The router's gradient stays with the other kernels, as its logits do.
pub(super) fn serves(problem: &Problem) -> bool {
    problem.gather.is_some()
}

/// Rows and columns that one workgroup makes.
pub(super) fn group(units: Units) -> [u32; 2] {
    [units.tile_rows(), units.tiling(false).columns]
}

/// Iterations that the loops of one invocation take at most: two attempts; then, where nothing is
/// finite, each lane's share of the tile without matrices.
pub(super) fn iterations(units: Units, slots: u32) -> u64 {
    let steps = u64::from(slots.div_ceil(STEP_DEPTH));
    2 * (steps + 16) + 64 + units.most_plain() * (2 + u64::from(slots.div_ceil(4)))
}

pub(super) fn prelude(problem: &Problem, units: Units) -> Prelude {
    let problem = Problem { lanes: problem.lanes.min(4), ..*problem };
    // Both sides are f32.
    problem
        .constants(units.prelude(&problem.label(), false, Matrices::ONE))
        .piece(piece!("common/grid"))
        .piece(piece!("gradient/outer_sizes"))
        .piece(problem.fours())
        .piece(piece!("matmul/matrix/memory"))
        .piece(piece!("matmul/matrix/exponent"))
        .piece(piece!("matmul/matrix/put"))
        .piece(piece!("matmul/matrix/square"))
        .piece(piece!("matmul/matrix/attempts"))
        .piece(piece!("matmul/matrix/across"))
        .piece(piece!("matmul/matrix/rows_across"))
}
