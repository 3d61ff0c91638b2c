//! Gradients of weights for CPU-type devices: all in registers. See
//! [`weight_gradient`](super::weight_gradient).
use super::matmul_register::Features;
use super::weight_gradient::{BINDINGS, Params, Problem};
use crate::device::shader::{Prelude, Spec, piece};

/// See `shaders/weight_gradient_register.wgsl`.
pub const SPEC: Spec = Spec {
    name: "weight_gradient_register",
    body: include_str!("../../shaders/weight_gradient_register.wgsl"),
    params: Params::FIELDS,
    bindings: BINDINGS,
    variants: || {
        let of = |features| Problem::variants(|problem| prelude(problem, features));
        Prelude::distinct(Features::ALL.into_iter().flat_map(of))
    },
};

/// Lanes of a workgroup: one subgroup.
const WG: u32 = 8;

/// Stretches of columns that a workgroup takes one after the other.
const SPAN: u32 = 2;

/// Rows and columns that one workgroup makes.
pub(super) const GROUP: [u32; 2] = [16, SPAN * WG * 8];

pub(super) fn prelude(problem: &Problem, features: Features) -> Prelude {
    let mut prelude = problem.constants(Prelude::new(problem.label()));
    let wide = features.wide && problem.lanes == 8;
    if wide {
        prelude.label += ", 64-bit loads and stores";
        prelude = prelude.needs(wgpu::Features::SHADER_INT64);
    }
    if features.shuffle {
        prelude.label += ", shuffled rows";
        prelude = prelude.needs(wgpu::Features::SUBGROUP);
    }
    prelude
        .constant("WG", WG)
        .constant("SPAN", SPAN)
        .piece(piece!("common/grid"))
        .piece(piece!("gradient/outer_sizes"))
        .piece(piece!("common/eight_values"))
        .maybe_piece(wide.then_some(piece!("common/wide_floats")))
        .piece(match problem.lanes {
            8 if wide => piece!("gradient/sides_wide"),
            8 | 4 => piece!("gradient/sides_vec4"),
            _ => piece!("gradient/sides_scalar"),
        })
        .piece(if wide { piece!("common/store_eights") } else { piece!("common/store_ones") })
        .piece(if features.shuffle {
            piece!("gradient/spread_shuffle")
        } else {
            piece!("gradient/spread_none")
        })
}
