//! What the three matmul kernels are put together from: the choice among pieces that are twins, by the problem. Each kernel's
//! `prelude` lists its pieces in order, and so does its WGSL.
use super::grouped_matmul::{Layout, Problem};
use crate::device::shader::{Piece, piece};
use crate::routing::Activation;
use crate::weights::WeightType;

/// Where an item's rows and weights are.
pub(crate) fn tile(problem: &Problem) -> Piece {
    if problem.dense { piece!("matmul/tile_dense") } else { piece!("matmul/tile_plan") }
}

/// How 16 bytes of weights become values.
pub(crate) fn unpack(problem: &Problem) -> Piece {
    match problem.weight_type {
        WeightType::F32 => piece!("matmul/unpack_f32"),
        WeightType::F16 => piece!("matmul/unpack_f16"),
        WeightType::Bf16 => piece!("matmul/unpack_bf16"),
    }
}

/// Where the weights of a column lie.
pub(crate) fn layout(problem: &Problem) -> Piece {
    match problem.layout {
        Layout::Packed | Layout::Rows => piece!("matmul/layout"),
        Layout::AnyRows => piece!("matmul/layout_rows"),
    }
}

/// The loads of 16 bytes of weights.
pub(crate) fn weights(problem: &Problem) -> Piece {
    match problem.layout {
        Layout::Packed | Layout::Rows => piece!("matmul/weights"),
        Layout::AnyRows => piece!("matmul/weights_rows"),
    }
}

/// What joins the two products of a row.
pub(crate) fn activation(problem: &Problem) -> Piece {
    match problem.activation {
        None => piece!("matmul/activate_none"),
        Some(Activation::Silu) => piece!("matmul/activate_silu"),
        Some(Activation::Gelu) => piece!("matmul/activate_gelu"),
    }
}

/// Four values of a row of x, for the kernels of GPUs.
pub(crate) fn x(problem: &Problem) -> Piece {
    if problem.depth_lanes.is_multiple_of(4) {
        piece!("matmul/x_vec4")
    } else {
        piece!("matmul/x_scalar")
    }
}

/// Eight values of a row of x, for the register kernel; by 64-bit loads where `wide`.
pub(crate) fn eight(problem: &Problem, wide: bool) -> Piece {
    match problem.depth_lanes {
        _ if wide => piece!("matmul/register/eight_wide"),
        4 | 8 => piece!("matmul/register/eight_vec4"),
        _ => piece!("matmul/register/eight_scalar"),
    }
}

/// Eight values of two neighbouring columns, for the register kernel.
pub(crate) fn pair(problem: &Problem) -> Piece {
    match (problem.layout, problem.weight_type) {
        (Layout::AnyRows, _) => piece!("matmul/register/pair_rows"),
        (_, WeightType::F32) => piece!("matmul/register/pair_f32"),
        (_, WeightType::F16 | WeightType::Bf16) => piece!("matmul/register/pair_halves"),
    }
}
