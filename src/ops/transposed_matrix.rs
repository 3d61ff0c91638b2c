//! The matmul by transposed weights for many rows on matrix units, at the precision of f32. See
//! [`matmul_transposed`](super::matmul_transposed), and [`MatrixUnits`](crate::MatrixUnits) for when
//! it is chosen.
use super::matmul_kernels::{ItemKind, Layout};
use super::matrix_tiling::{Matrices, STEP_DEPTH, Units, is_exact_in_half};
use super::transposed_kernels::{ALL_BINDINGS, Params, Problem};
use crate::device::shader::{Prelude, Spec, piece};

/// See `shaders/transposed_matrix.wgsl`.
pub const SPEC: Spec = Spec {
    name: "transposed_matrix",
    body: include_str!("../../shaders/transposed_matrix.wgsl"),
    params: Params::FIELDS,
    bindings: ALL_BINDINGS,
    variants: || {
        let all = Problem::all();
        let tiles = all.iter().filter(|problem| serves(problem));
        Prelude::distinct(
            tiles.flat_map(|problem| Units::all().into_iter().map(|units| prelude(problem, units))),
        )
    },
};

/// Whether it serves a problem. What goes back through the router stays with the other kernels, as its
/// logits do.
pub(super) fn serves(problem: &Problem) -> bool {
    problem.kind == ItemKind::Tile && !problem.dense
}

fn matrices(problem: &Problem) -> u32 {
    if problem.gated { 2 } else { 1 }
}

/// Columns that one workgroup makes.
pub(super) fn out_columns(problem: &Problem, units: Units) -> u32 {
    units.tiling(is_exact_in_half(problem.weight_type)).columns
}

/// Iterations that the loops of one invocation take at most: two attempts; then, where nothing is
/// finite, each lane's share of the tile without matrices.
pub(super) fn iterations(problem: &Problem, units: Units, rows: u32) -> u64 {
    let matrices = u64::from(matrices(problem));
    let steps = matrices * u64::from(rows.div_ceil(STEP_DEPTH));
    2 * (steps + 16) + 64 + units.most_plain() * (2 + matrices * u64::from(rows.div_ceil(4)))
}

pub(super) fn prelude(problem: &Problem, units: Units) -> Prelude {
    let problem = &problem.of_fours();
    let any = problem.layout == Layout::AnyRows;
    let fours = problem.weight_type.device_depth() == 4;
    let exact = is_exact_in_half(problem.weight_type);
    let matrices = Matrices { in_turn: matrices(problem), ..Matrices::ONE };
    problem
        .reads(units.prelude(&problem.label(), exact, matrices))
        .piece(piece!("matmul/matrix/memory"))
        .piece(piece!("matmul/matrix/exponent"))
        .piece(piece!("matmul/matrix/put"))
        .piece(piece!("matmul/matrix/square"))
        .piece(piece!("matmul/matrix/attempts"))
        .piece(piece!("matmul/matrix/rows_along"))
        .piece(piece!("matmul/matrix/across"))
        .piece(match (any, fours) {
            (true, _) => piece!("matmul/matrix/unit_any"),
            (_, true) => piece!("matmul/matrix/unit_fours"),
            (_, false) => piece!("matmul/matrix/unit_eights"),
        })
        .piece(piece!("matmul/matrix/columns_across"))
        .piece(if problem.column_lanes == 4 {
            piece!("matmul/transposed/out_fours")
        } else {
            piece!("matmul/transposed/out_ones")
        })
}
