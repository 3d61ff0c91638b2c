//! The grouped matmul for a few rows on GPUs, where reading the weights is all it costs. See [`grouped_matmul`](super::grouped_matmul).
use super::matmul_kernels::{
    BINDINGS, ItemKind, MatmulKernel, Params, SKINNY_ROWS, Specialization,
};
use super::matmul_pieces as pieces;
use crate::Target;
use crate::device::shader::{Prelude, Spec, piece};

/// See `shaders/matmul_skinny.wgsl`.
pub const SPEC: Spec = Spec {
    name: "matmul_skinny",
    body: include_str!("../../shaders/matmul_skinny.wgsl"),
    params: Params::FIELDS,
    bindings: BINDINGS,
    variants: || {
        let all = Specialization::all();
        Prelude::distinct(all.iter().filter(|p| p.kind == ItemKind::Skinny).map(prelude))
    },
};

/// Its row of the table.
pub(crate) const KERNEL: MatmulKernel = MatmulKernel {
    spec: &SPEC,
    serves: |ctx, work| ctx.variant().target == Target::Wide && work.kind == ItemKind::Skinny,
    tile_rows: |_| SKINNY_ROWS,
    prelude: |_, problem| prelude(problem),
    group: |_, problem| [tile_columns(problem), 1],
    item_step: |_| 0,
    // Steps are SPLIT runs, of 16 values at least; then come the sums over the parts.
    iterations: |_, depth| u64::from(depth.div_ceil(16 * SPLIT) + 2 * SPLIT),
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
    let problem = &problem.with_lanes(4).with_any_stores();
    let prelude = Prelude::new(problem.label())
        .constant("COLUMNS", COLUMNS)
        .constant("SPLIT", SPLIT)
        .constant("TILE_ROWS", SKINNY_ROWS);
    problem
        .constants(prelude)
        .piece(piece!("common/grid"))
        .piece(piece!("matmul/params"))
        .piece(pieces::tile(problem))
        .maybe_piece(pieces::halves(problem))
        .piece(pieces::x(problem))
        .piece(pieces::unpack(problem))
        .piece(pieces::run(problem))
        .maybe_piece(pieces::load_blocks(problem))
        .piece(pieces::activation(problem))
        .piece(pieces::layout(problem))
        .piece(pieces::weights(problem))
}
