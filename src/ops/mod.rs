//! The kernels, one a file: what it computes, its CPU twin, its arguments, and how it is recorded.
//!
//! Every op is made from a [`Context`](crate::Context) (which compiles it), bound to
//! [`Slice`](crate::Slice)s (which checks them, and makes its uniform and bind group), and recorded as
//! a [`BoundOp`](crate::BoundOp) any number of times. [`layer`](crate::layer)s are put together from
//! them; `examples/single_op.rs` uses three of them alone.
//!
//! | step | ops |
//! |---|---|
//! | from hidden states to values | [`logits`], [`scores`] |
//! | from values to the choice, a [bit set](crate::plan::bits) | [`token_choice`], [`expert_choice`], [`sequence_top`]; [`coreset`] before [`token_choice`] for blocks, [`block_choice`] for both in one |
//! | another router's choice | [`assign`] (ids of each token), [`assign_lists`] (tokens of each expert) |
//! | before a choice | [`capacity`] (from mask ratios), [`active_rows`] (padding, and what is not active) |
//! | from the choice to the [plan](crate::plan) | [`plan_count`], [`plan_scan`], [`plan_fill`] in turn; [`block_plan`] for all three in one, up to 32 tokens |
//! | the experts | [`grouped_matmul`], which runs one of [`matmul_tile`], [`matmul_skinny`], [`matmul_register`] and [`matmul_matrix`]; then [`combine`] |
//! | training: the experts forwards | [`grouped_matmul`] by halves, which keeps the pre-activation; [`activation`] |
//! | and backwards | [`matmul_transposed`] and [`weight_gradient`], each by a kernel for GPUs ([`transposed_tile`], [`weight_gradient_tile`]), for matrix units ([`transposed_matrix`], [`weight_gradient_matrix`]) or for software drivers ([`transposed_register`], [`weight_gradient_register`]); [`activation_gradient`] between them |
//! | for experts of the caller's own | [`gather`] (rows in the plan's order), [`expert_lists`] (the choice as lists) |
//! | the backward pass | [`gates_backward`] (from gates to logits), [`combine`] again (sums of slots) |
//! | losses | [`router_loss`] (router z and Switch), [`balance_loss`] (expert choice), [`cross_entropy`]; [`loss_sum`] makes one value of their terms |
//! | once a step | [`bias_update`] (balance without a loss) |
//! | to look at a choice | [`expert_union`] (experts of each block, and the bytes of their weights), [`coverage`] (how far a block's coreset holds what its tokens would take) |
//!
//! The CPU twin of an op is a function `cpu` of its module, and needs no device. [`reference`] has all
//! of them in one place:
//!
//! ```
//! use wgmoe::ops::token_choice;
//! use wgmoe::plan::bits;
//!
//! // Values of 2 tokens for 4 experts; each token takes its two highest.
//! let values = [0.1, 0.9, 0.3, 0.2, 0.8, 0.1, 0.1, 0.7];
//! let assigned = token_choice::cpu(&values, 4, 2, None, &|_, _| true);
//! assert_eq!(bits::experts_of(&assigned, 2, 0), [1, 2]);
//! assert_eq!(bits::experts_of(&assigned, 2, 1), [0, 3]);
//! ```
//!
//! [`reference`]: crate::reference
use crate::Target;
use crate::device::Kernel;
use crate::device::quirks::LOOP_ITERATIONS;
use crate::device::shader::{Prelude, Spec, piece};
use crate::error::not_zero;
use crate::routing::few_experts;
use std::sync::Arc;

pub mod activation;
pub mod activation_gradient;
pub mod active_rows;
pub mod assign;
pub mod assign_lists;
pub mod balance_loss;
pub mod bias_update;
pub mod block_choice;
pub mod block_plan;
pub mod capacity;
pub mod combine;
pub mod coreset;
pub mod coverage;
pub mod cross_entropy;
pub mod expert_choice;
pub mod expert_lists;
pub mod expert_union;
pub mod gates_backward;
pub mod gather;
pub mod grouped_matmul;
pub mod logits;
pub mod loss_sum;
mod matmul_kernels;
pub mod matmul_matrix;
mod matmul_pieces;
pub mod matmul_register;
pub mod matmul_skinny;
pub mod matmul_tile;
pub mod matmul_transposed;
mod matrix_tiling;
pub mod plan_count;
pub mod plan_fill;
pub mod plan_scan;
pub mod router_loss;
pub mod scores;
pub mod sequence_top;
pub mod token_choice;
mod transposed_kernels;
pub mod transposed_matrix;
pub mod transposed_register;
pub mod transposed_tile;
pub mod weight_gradient;
pub mod weight_gradient_matrix;
pub mod weight_gradient_register;
pub mod weight_gradient_tile;

/// Every kernel.
#[doc(hidden)]
pub const SPECS: &[&Spec] = &[
    &scores::SPEC,
    &active_rows::SPEC,
    &capacity::SPEC,
    &expert_choice::SPEC,
    &expert_choice::SERIAL,
    &token_choice::SPEC,
    &assign::SPEC,
    &assign_lists::SPEC,
    &coreset::SPEC,
    &coverage::SPEC,
    &sequence_top::SPEC,
    &plan_count::SPEC,
    &plan_scan::SPEC,
    &plan_fill::SPEC,
    &block_choice::SPEC,
    &block_plan::SPEC,
    &block_plan::SCALED,
    &gather::SPEC,
    &matmul_register::SPEC,
    &matmul_tile::SPEC,
    &matmul_matrix::SPEC,
    &matmul_skinny::SPEC,
    &transposed_register::SPEC,
    &transposed_tile::SPEC,
    &transposed_matrix::SPEC,
    &activation::SPEC,
    &activation_gradient::SPEC,
    &weight_gradient_register::SPEC,
    &weight_gradient_tile::SPEC,
    &weight_gradient_matrix::SPEC,
    &combine::SPEC,
    &gates_backward::SPEC,
    &router_loss::SPEC,
    &balance_loss::SPEC,
    &cross_entropy::SPEC,
    &loss_sum::SPEC,
    &bias_update::SPEC,
    &expert_union::SPEC,
    &expert_lists::SPEC,
];

/// Rows of a workgroup where one lane has one, on software drivers.
const SERIAL_ROWS: u32 = 8;

/// What kernels begin with that give each row to a lane, or to a workgroup with its reductions.
pub(crate) fn row_prelude(variant: crate::Variant) -> Prelude {
    let (label, [wg, lanes], reduce) = match (variant.target, variant.subgroups) {
        (Target::Serial, _) => ("one lane a row", [SERIAL_ROWS, 1], piece!("common/reduce_serial")),
        (Target::Wide, false) => {
            ("workgroup reductions", [64, 64], piece!("common/reduce_workgroup"))
        }
        (Target::Wide, true) => {
            ("subgroup reductions", [128, 128], piece!("common/reduce_subgroup"))
        }
    };
    let subgroups = variant.subgroups && variant.target == Target::Wide;
    Prelude::new(label)
        .needs(if subgroups { wgpu::Features::SUBGROUP } else { wgpu::Features::empty() })
        .constant("WG", wg)
        .constant("LANES", lanes)
        .constant("ROWS", wg / lanes)
        .piece(piece!("common/grid"))
        .piece(piece!("common/keys"))
        .piece(piece!("common/exp"))
        .piece(reduce)
}

/// Workgroups of such a kernel for so many rows.
pub(crate) fn row_groups(variant: crate::Variant, rows: u32) -> u64 {
    u64::from(rows).div_ceil(if variant.target == Target::Serial { SERIAL_ROWS.into() } else { 1 })
}

/// Optional input: the slice, or the context's stand-in.
pub(crate) fn or_nothing<'a>(
    ctx: &'a crate::Context,
    slice: Option<crate::Slice<'a>>,
) -> crate::Slice<'a> {
    slice.unwrap_or_else(|| ctx.nothing())
}

/// Lanes of a workgroup that copies or sums rows. A software driver's loops are quickest with one subgroup.
pub(crate) fn copy_lanes(target: Target) -> u32 {
    match target {
        Target::Wide => 64,
        Target::Serial => 8,
    }
}

/// A kernel for each width of vectors that the device has the features for, in the order of `widths`.
pub(crate) fn by_width(
    ctx: &crate::Context,
    spec: &'static Spec,
    widths: &[u32],
    prelude: impl Fn(u32) -> Prelude,
) -> crate::Result<Vec<(u32, Arc<Kernel>)>> {
    let all = widths.iter().map(|&width| (width, prelude(width)));
    all.filter(|(_, prelude)| ctx.device().features().contains(prelude.features))
        .map(|(width, prelude)| Ok((width, ctx.kernel(spec, prelude)?)))
        .collect()
}

impl crate::PlanShape {
    /// A plan of tokens, routed experts and at most so many routed slots, for the matmuls of a
    /// context: its items have as many rows as those take.
    pub fn new(ctx: &crate::Context, tokens: u32, experts: u32, routed_slots: u32) -> Self {
        use grouped_matmul::{SKINNY_ROWS, tile_rows};
        Self::on_host(tokens, experts, routed_slots).with_item_rows(tile_rows(ctx), SKINNY_ROWS)
    }
}

impl crate::Variant {
    /// This variant, or one with more lanes where one lane's loops could take more iterations than
    /// software drivers allow.
    pub(crate) fn within_loops(self, iterations: u64) -> Self {
        let target = if iterations > LOOP_ITERATIONS { Target::Wide } else { self.target };
        Self { target, ..self }
    }

    /// The variant for the parts of a plan, of which one lane of few reads the columns of the bit
    /// set (32 tokens each) or the counts of as many tokens, twice. A quarter of the iterations
    /// there are: the items of its experts need the rest.
    pub(crate) fn for_tokens(self, tokens: u32) -> Self {
        self.within_loops(4 * 2 * u64::from(tokens.div_ceil(32)))
    }
}

/// The type `Vector` of kernels that move rows whole: `width` f32. Eight as 64-bit integers
/// (`SHADER_INT64`), to copy only.
pub(crate) fn vector(width: u32) -> &'static str {
    match width {
        8 => "vec4<u64>",
        4 => "vec4<f32>",
        2 => "vec2<f32>",
        _ => "f32",
    }
}
