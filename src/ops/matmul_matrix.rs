//! The grouped matmul for many rows on matrix units, at the precision of f32. See
//! [`grouped_matmul`](super::grouped_matmul), and [`MatrixUnits`](crate::MatrixUnits) for when it
//! is chosen.
use super::matmul_kernels::{BINDINGS, ItemKind, MatmulKernel, Params, Specialization};
use super::matmul_pieces as pieces;
use super::matrix_tiling::{Matrices, STEP_DEPTH, Units, is_exact_in_half};
use crate::Context;
use crate::device::shader::{Prelude, Spec, piece};

/// See `shaders/matmul_matrix.wgsl`.
pub const SPEC: Spec = Spec {
    name: "matmul_matrix",
    body: include_str!("../../shaders/matmul_matrix.wgsl"),
    params: Params::FIELDS,
    bindings: BINDINGS,
    variants: || {
        let all = Specialization::all();
        let tiles = all.iter().filter(|p| p.kind == ItemKind::Tile && !p.dense);
        Prelude::distinct(
            tiles.flat_map(|problem| Units::all().into_iter().map(|units| prelude(problem, units))),
        )
    },
};

/// Its row of the table.
pub(crate) const KERNEL: MatmulKernel = MatmulKernel {
    spec: &SPEC,
    // The router's logits stay with the other kernels: choices hang on them.
    serves: |ctx, work| ctx.matrix_in_use().is_some() && work.kind == ItemKind::Tile && !work.dense,
    tile_rows: |ctx| units(ctx).tile_rows(),
    prelude: |ctx, problem| prelude(problem, units(ctx)),
    group: |ctx, problem| [out_columns(problem, units(ctx)), 1],
    item_step: |_| 0,
    iterations,
};

/// Of a context whose kernels use them.
fn units(ctx: &Context) -> Units {
    Units::in_use(ctx).expect("matrix units in use")
}

/// Two attempts; then, where nothing is finite, four columns in turn of each of at most 32 fours of
/// the output.
fn iterations(problem: &Specialization, depth: u32) -> u64 {
    let steps = u64::from(depth.div_ceil(STEP_DEPTH));
    2 * (steps + 16) + 64 + 32 * 4 * u64::from(matrices(problem)) * (steps + 2)
}

fn matrices(problem: &Specialization) -> u32 {
    if problem.activation.is_some() { 2 } else { 1 }
}

/// Columns of the output that a workgroup makes.
fn out_columns(problem: &Specialization, units: Units) -> u32 {
    units.tiling(is_exact_in_half(problem.weight_type)).columns / matrices(problem)
}

fn prelude(problem: &Specialization, units: Units) -> Prelude {
    let problem = &problem.with_lanes(4);
    let exact = is_exact_in_half(problem.weight_type);
    let matrices = Matrices { side_by_side: matrices(problem), ..Matrices::ONE };
    problem
        .constants(units.prelude(&problem.label(), exact, matrices))
        .piece(piece!("common/grid"))
        .piece(piece!("matmul/params"))
        .piece(pieces::tile(problem))
        .maybe_piece(pieces::halves(problem))
        .piece(pieces::x(problem))
        .piece(pieces::unpack(problem))
        .maybe_piece(pieces::blocks(problem))
        .maybe_piece(pieces::load_blocks(problem))
        .piece(piece!("matmul/matrix/memory"))
        .piece(piece!("matmul/matrix/exponent"))
        .piece(piece!("matmul/matrix/put"))
        .piece(piece!("matmul/matrix/square"))
        .piece(piece!("matmul/matrix/attempts"))
        .piece(piece!("matmul/matrix/rows_along"))
        .piece(if problem.weight_type.has_blocks() {
            piece!("matmul/matrix/carry_blocks")
        } else {
            piece!("matmul/matrix/carry_words")
        })
        .piece(piece!("matmul/matrix/columns_along"))
        .piece(piece!("matmul/matrix/plain_along"))
        .piece(pieces::activation(problem))
        .piece(pieces::layout(problem))
        .piece(pieces::weights(problem))
        .piece(pieces::out(problem))
}
