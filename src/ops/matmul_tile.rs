//! The grouped matmul for many rows on GPUs: tiles in workgroup memory. See [`matmul`](super::grouped_matmul).
use super::grouped_matmul::{BINDINGS, ItemKind, Layout, Params, Specialization};
use crate::device::shader::{Prelude, Spec};
use crate::weights::{PANEL, WeightType};

/// See `shaders/matmul_tile.wgsl`.
pub const SPEC: Spec = Spec {
    name: "matmul_tile",
    body: include_str!("../../shaders/matmul_tile.wgsl"),
    params: Params::FIELDS,
    bindings: BINDINGS,
    variants: || Specialization::all().iter().filter(|p| p.kind == ItemKind::Tile).map(prelude).collect(),
};

/// Rows of an item. 64 rows give 80 % multiply-adds in the loop on AMD's compiler; 32 keep more waves.
pub(crate) const TILE_ROWS: u32 = 64;

/// Columns that one workgroup makes.
pub(crate) fn tile_columns(problem: &Specialization) -> u32 {
    if problem.activation.is_some() { 64 } else { 128 }
}

pub(crate) fn prelude(problem: &Specialization) -> Prelude {
    let aligned = problem.depth_lanes.is_multiple_of(4) && problem.quad_columns;
    common(problem, Prelude::new(problem.label()).constant("TILE_ROWS", TILE_ROWS)).piece(
        if aligned {
            include_str!("../../shaders/lib/matmul/out_vec4.wgsl")
        } else {
            include_str!("../../shaders/lib/matmul/out_scalar.wgsl")
        },
    )
}

/// The pieces that the two GPU kernels share.
pub(crate) fn common(problem: &Specialization, prelude: Prelude) -> Prelude {
    let prelude = problem
        .constants(prelude)
        .constant("PANEL", if problem.layout == Layout::Packed { PANEL } else { 1 })
        .piece(super::GRID)
        .piece(include_str!("../../shaders/lib/matmul/params.wgsl"))
        .piece(problem.tile_piece())
        .piece(if problem.depth_lanes.is_multiple_of(4) {
            include_str!("../../shaders/lib/matmul/x_vec4.wgsl")
        } else {
            include_str!("../../shaders/lib/matmul/x_scalar.wgsl")
        })
        .piece(unpack(problem.weight_type))
        .piece(problem.activation_piece());
    weights(problem, prelude)
}

/// How 16 bytes become values.
pub(crate) fn unpack(weight_type: WeightType) -> &'static str {
    match weight_type {
        WeightType::F32 => include_str!("../../shaders/lib/matmul/unpack_f32.wgsl"),
        WeightType::F16 => include_str!("../../shaders/lib/matmul/unpack_f16.wgsl"),
        WeightType::Bf16 => include_str!("../../shaders/lib/matmul/unpack_bf16.wgsl"),
    }
}

/// Where weights lie, and their loads.
pub(crate) fn weights(problem: &Specialization, prelude: Prelude) -> Prelude {
    if problem.layout == Layout::AnyRows {
        prelude.piece(include_str!("../../shaders/lib/matmul/weights_rows.wgsl"))
    } else {
        prelude
            .piece(include_str!("../../shaders/lib/matmul/layout.wgsl"))
            .piece(include_str!("../../shaders/lib/matmul/weights.wgsl"))
    }
}
