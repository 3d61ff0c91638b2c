//! The grouped matmul for a few rows on GPUs, where reading the weights is all it costs. See [`grouped_matmul`](super::grouped_matmul).
use super::matmul_kernels::{
    BINDINGS, ItemKind, MatmulKernel, Params, SKINNY_ROWS, SMALL_PART_ROWS, Specialization,
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
        let few = all.iter().filter(|p| p.kind != ItemKind::Tile);
        Prelude::distinct(
            few.flat_map(|p| [false, true].map(|small_items| prelude(p, small_items))),
        )
    },
};

/// Its row of the table.
pub(crate) const KERNEL: MatmulKernel = MatmulKernel {
    spec: &SPEC,
    // On matrix units tiles of a few rows cost no more than their rows.
    serves: |ctx, work| {
        let small = ctx.variant().small_items && (work.dense || ctx.matrix_in_use().is_none());
        ctx.variant().target == Target::Wide
            && (work.kind == ItemKind::Skinny || work.kind == ItemKind::Small && small)
    },
    tile_rows: |_| unreachable!("it serves no tiles"),
    prelude: |ctx, problem| prelude(problem, ctx.variant().small_items),
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

/// With loops of their own for fewer rows where there are small items.
pub(crate) fn prelude(problem: &Specialization, small_items: bool) -> Prelude {
    let problem = &problem.with_lanes(4).with_any_stores();
    let small = problem.kind == ItemKind::Small;
    let rows = if small { SMALL_PART_ROWS } else { SKINNY_ROWS };
    let loops = small || small_items;
    let label = problem.label() + if loops { ", loops by rows" } else { "" };
    let prelude = Prelude::new(label)
        .constant("COLUMNS", COLUMNS)
        .constant("SPLIT", SPLIT)
        .constant("TILE_ROWS", rows);
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
        .piece(if small {
            piece!("matmul/skinny/sixteen_rows")
        } else {
            piece!("matmul/skinny/eight_rows")
        })
        .piece(match (small, loops) {
            (true, _) => piece!("matmul/skinny/loops_of_sixteen"),
            (_, true) => piece!("matmul/skinny/loops_of_eight"),
            _ => piece!("matmul/skinny/one_loop"),
        })
}
