//! Gradients of weights for GPUs: tiles in workgroup memory. See [`weight_gradient`](super::weight_gradient).
use super::weight_gradient::{BINDINGS, Params, Problem};
use crate::device::shader::{Prelude, Spec, piece};

/// See `shaders/weight_gradient_tile.wgsl`.
pub const SPEC: Spec = Spec {
    name: "weight_gradient_tile",
    body: include_str!("../../shaders/weight_gradient_tile.wgsl"),
    params: Params::FIELDS,
    bindings: BINDINGS,
    variants: || Problem::variants(prelude),
};

/// Rows and columns that one workgroup makes.
pub(super) const GROUP: [u32; 2] = [64, 128];

pub(super) fn prelude(problem: &Problem) -> Prelude {
    let problem = Problem { lanes: problem.lanes.min(4), ..*problem };
    problem
        .constants(Prelude::new(problem.label()))
        .piece(piece!("common/grid"))
        .piece(piece!("gradient/outer_sizes"))
        .piece(problem.fours())
        .piece(piece!("matmul/tile/outer"))
}
