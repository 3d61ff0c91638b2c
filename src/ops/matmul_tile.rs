//! The grouped matmul for many rows on GPUs: tiles in workgroup memory. See [`grouped_matmul`](super::grouped_matmul).
use super::matmul_kernels::{BINDINGS, ItemKind, MatmulKernel, Params, Specialization};
use super::matmul_pieces as pieces;
use crate::Target;
use crate::device::shader::{Prelude, Spec, piece};

/// See `shaders/matmul_tile.wgsl`.
pub const SPEC: Spec = Spec {
    name: "matmul_tile",
    body: include_str!("../../shaders/matmul_tile.wgsl"),
    params: Params::FIELDS,
    bindings: BINDINGS,
    variants: || {
        let all = Specialization::all();
        Prelude::distinct(all.iter().filter(|p| p.kind == ItemKind::Tile).map(prelude))
    },
};

/// Its row of the table.
pub(crate) const KERNEL: MatmulKernel = MatmulKernel {
    spec: &SPEC,
    serves: |ctx, work| ctx.variant().target == Target::Wide && work.kind == ItemKind::Tile,
    tile_rows: |_| TILE_ROWS,
    prelude: |_, problem| prelude(problem),
    group: |_, problem| [tile_columns(problem), 1],
    item_step: |_| 0,
    // Steps of eight values at least.
    iterations: |_, depth| u64::from(depth.div_ceil(8)),
};

/// Rows of an item. 64 rows give 80 % multiply-adds in the loop on AMD's compiler; 32 keep more waves.
pub(crate) const TILE_ROWS: u32 = 64;

/// Columns that one workgroup makes.
pub(crate) fn tile_columns(problem: &Specialization) -> u32 {
    if problem.activation.is_some() { 64 } else { 128 }
}

pub(crate) fn prelude(problem: &Specialization) -> Prelude {
    let problem = &problem.with_lanes(4);
    problem
        .constants(Prelude::new(problem.label()).constant("TILE_ROWS", TILE_ROWS))
        .piece(piece!("common/grid"))
        .piece(piece!("matmul/params"))
        .piece(pieces::tile(problem))
        .maybe_piece(pieces::halves(problem))
        .piece(pieces::x(problem))
        .piece(pieces::unpack(problem))
        .maybe_piece(pieces::blocks(problem))
        .maybe_piece(pieces::load_blocks(problem))
        .piece(pieces::bring(problem))
        .piece(piece!("matmul/tile/outer"))
        .piece(pieces::activation(problem))
        .piece(pieces::layout(problem))
        .piece(pieces::weights(problem))
        .piece(pieces::out(problem))
}
