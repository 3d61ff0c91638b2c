//! What the matmul kernels are put together from: the choice among pieces that are twins, by the problem. Each kernel's
//! `prelude` lists its pieces in order, and so does its WGSL.
use super::matmul_kernels::{ItemKind, Layout, Specialization};
use crate::FloatType;
use crate::device::shader::{Piece, piece};
use crate::routing::Activation;

/// Where an item's rows and weights are.
pub(crate) fn tile(problem: &Specialization) -> Piece {
    match (problem.dense, problem.kind) {
        (true, _) => piece!("matmul/tile_dense"),
        (_, ItemKind::Small) => piece!("matmul/tile_rest"),
        _ => piece!("matmul/tile_plan"),
    }
}

/// How words of weights become values.
pub(crate) fn unpack(problem: &Specialization) -> Piece {
    problem.weight_type.unpack()
}

/// What a lane loads of a column at once, and its values.
pub(crate) fn run(problem: &Specialization) -> Piece {
    blocks(problem).unwrap_or(piece!("matmul/run_words"))
}

/// The same for kernels that load floats in ways of their own.
pub(crate) fn blocks(problem: &Specialization) -> Option<Piece> {
    problem.weight_type.has_blocks().then_some(piece!("matmul/run_blocks"))
}

/// The loads of blocks, a column at a time.
pub(crate) fn load_blocks(problem: &Specialization) -> Option<Piece> {
    problem.weight_type.has_blocks().then_some(piece!("matmul/load_blocks"))
}

/// What a lane brings to a step of the tile kernel.
pub(crate) fn bring(problem: &Specialization) -> Piece {
    if problem.weight_type.has_blocks() {
        piece!("matmul/tile/bring_blocks")
    } else {
        piece!("matmul/tile/bring_words")
    }
}

/// Where the weights of a column lie.
pub(crate) fn layout(problem: &Specialization) -> Piece {
    match problem.layout {
        Layout::Packed | Layout::Rows => piece!("matmul/layout"),
        Layout::AnyRows => piece!("matmul/layout_rows"),
    }
}

/// The loads of 16 bytes of weights.
pub(crate) fn weights(problem: &Specialization) -> Piece {
    match problem.layout {
        Layout::Packed | Layout::Rows => piece!("matmul/weights"),
        Layout::AnyRows => piece!("matmul/weights_rows"),
    }
}

/// What joins the two products of a row.
pub(crate) fn activation(problem: &Specialization) -> Piece {
    match problem.activation {
        None => piece!("matmul/activate_none"),
        Some(Activation::Silu) => piece!("matmul/activate_silu"),
        Some(Activation::Gelu) => piece!("matmul/activate_gelu"),
    }
}

/// How halves of x become f32.
pub(crate) fn halves(problem: &Specialization) -> Option<Piece> {
    problem.x_type.halves()
}

/// Four values of a row of x, for the kernels of GPUs.
pub(crate) fn x(problem: &Specialization) -> Piece {
    match (problem.x_type, problem.depth_lanes.is_multiple_of(4)) {
        (FloatType::F32, true) => piece!("matmul/x_vec4"),
        (FloatType::F32, false) => piece!("matmul/x_scalar"),
        (_, true) => piece!("matmul/x_halves"),
        (_, false) => piece!("matmul/x_half_pairs"),
    }
}

/// The stores of four neighbouring columns, for the kernels of many rows on GPUs.
pub(crate) fn out(problem: &Specialization) -> Piece {
    if problem.quad_columns { piece!("matmul/out_vec4") } else { piece!("matmul/out_scalar") }
}

/// Eight values of a row of x, for the register kernel; by 64-bit loads where `wide`.
pub(crate) fn eight(problem: &Specialization, wide: bool) -> Piece {
    match (problem.x_type, problem.depth_lanes) {
        (FloatType::F32, _) if wide => piece!("matmul/register/eight_wide"),
        (FloatType::F32, 4 | 8) => piece!("matmul/register/eight_vec4"),
        (FloatType::F32, _) => piece!("matmul/register/eight_scalar"),
        (_, 8) => piece!("matmul/register/eight_halves"),
        _ => piece!("matmul/register/eight_half_pairs"),
    }
}

/// Eight values of two neighbouring columns, for the register kernel.
pub(crate) fn pair(problem: &Specialization) -> Piece {
    let weight_type = problem.weight_type;
    match (problem.layout, weight_type.has_blocks(), weight_type.device_depth()) {
        (Layout::AnyRows, ..) => piece!("matmul/register/pair_rows"),
        (_, true, _) => piece!("matmul/register/pair_blocks"),
        (_, _, 4) => piece!("matmul/register/pair_f32"),
        _ => piece!("matmul/register/pair_halves"),
    }
}

/// How many of its steps the register kernel takes with one load of weights.
pub(crate) fn register_run(problem: &Specialization) -> Piece {
    if problem.weight_type.has_blocks() {
        piece!("matmul/register/run_four")
    } else {
        piece!("matmul/register/run_one")
    }
}
