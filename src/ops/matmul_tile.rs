//! The grouped matmul for many rows on GPUs: tiles in workgroup memory. See [`grouped_matmul`](super::grouped_matmul).
use super::matmul_kernels::{BINDINGS, ItemKind, MatmulKernel, Params, Specialization};
use super::matmul_pieces as pieces;
use crate::device::shader::{Prelude, Spec, piece};
use crate::{Target, TileShape};

/// See `shaders/matmul_tile.wgsl`.
pub const SPEC: Spec = Spec {
    name: "matmul_tile",
    body: include_str!("../../shaders/matmul_tile.wgsl"),
    params: Params::FIELDS,
    bindings: BINDINGS,
    variants: || {
        let all = Specialization::all();
        let tiles = all.iter().filter(|p| p.kind == ItemKind::Tile);
        Prelude::distinct(tiles.flat_map(|p| TileShape::ALL.map(|shape| prelude(p, shape))))
    },
};

/// Its row of the table.
pub(crate) const KERNEL: MatmulKernel = MatmulKernel {
    spec: &SPEC,
    serves: |ctx, work| ctx.variant().target == Target::Wide && work.kind == ItemKind::Tile,
    tile_rows: |ctx| rows(ctx.variant().tile),
    prelude: |ctx, problem| prelude(problem, ctx.variant().tile),
    group: |_, problem| [tile_columns(problem), 1],
    item_step: |_| 0,
    // Steps of eight values at least.
    iterations: |_, depth| u64::from(depth.div_ceil(8)),
};

/// Rows of an item, at most.
pub(crate) const TILE_ROWS: u32 = 64;

fn rows(shape: TileShape) -> u32 {
    if shape == TileShape::Small { TILE_ROWS / 2 } else { TILE_ROWS }
}

/// Columns that one workgroup makes.
pub(crate) fn tile_columns(problem: &Specialization) -> u32 {
    if problem.activation.is_some() { 64 } else { 128 }
}

pub(crate) fn prelude(problem: &Specialization, shape: TileShape) -> Prelude {
    let problem = &problem.with_lanes(4);
    let shape_label = match shape {
        TileShape::Large => "",
        TileShape::Halves => ", rows of both halves a lane",
        TileShape::Small => ", half the rows",
    };
    let prelude = Prelude::new(problem.label() + shape_label).constant("TILE_ROWS", rows(shape));
    problem
        .constants(prelude)
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
        .piece(match shape {
            TileShape::Halves => piece!("matmul/tile/split_rows"),
            TileShape::Large | TileShape::Small => piece!("matmul/tile/near_rows"),
        })
        .piece(pieces::activation(problem))
        .piece(pieces::layout(problem))
        .piece(pieces::weights(problem))
        .piece(pieces::out(problem))
}
