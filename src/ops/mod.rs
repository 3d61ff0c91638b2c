//! The kernels, one a file: what it computes, its CPU twin, its arguments, and how it is recorded.
//!
//! Every op is made from a [`Context`](crate::Context) (which compiles it), bound to [`Slice`](crate::Slice)s (which
//! checks them, and makes its uniform and bind group), and recorded as a [`BoundOp`](crate::BoundOp) any number of times.
use crate::device::shader::Spec;
use crate::error::not_zero;
use crate::routing::few_experts;

pub mod assign;
pub mod assign_lists;
pub mod block_choice;
pub mod block_plan;
pub mod capacity;
pub mod combine;
pub mod coreset;
pub mod expert_choice;
pub mod expert_lists;
pub mod expert_union;
pub mod gather;
pub mod grouped_matmul;
pub mod logits;
mod matmul_pieces;
pub mod matmul_register;
pub mod matmul_skinny;
pub mod matmul_tile;
pub mod plan_count;
pub mod plan_fill;
pub mod plan_scan;
pub mod scores;
pub mod sequence_top;
pub mod token_choice;

/// Every kernel.
#[doc(hidden)]
pub const SPECS: &[&Spec] = &[
    &scores::SPEC,
    &capacity::SPEC,
    &expert_choice::SPEC,
    &expert_choice::SERIAL,
    &token_choice::SPEC,
    &assign::SPEC,
    &assign_lists::SPEC,
    &coreset::SPEC,
    &sequence_top::SPEC,
    &plan_count::SPEC,
    &plan_scan::SPEC,
    &plan_fill::SPEC,
    &block_choice::SPEC,
    &block_plan::SPEC,
    &gather::SPEC,
    &matmul_register::SPEC,
    &matmul_tile::SPEC,
    &matmul_skinny::SPEC,
    &combine::SPEC,
    &expert_union::SPEC,
    &expert_lists::SPEC,
];

/// Optional input: the slice, or the context's stand-in.
pub(crate) fn or_nothing<'a>(
    ctx: &'a crate::Context,
    slice: Option<crate::Slice<'a>>,
) -> crate::Slice<'a> {
    slice.unwrap_or_else(|| ctx.nothing())
}

impl crate::Variant {
    /// The variant for kernels of which one lane loops over all columns of the bit set: with few lanes, more tokens than
    /// this take more iterations than lavapipe lets an invocation have (65,535 in all, Mesa 22.3).
    pub(crate) fn for_tokens(self, tokens: u32) -> Self {
        if tokens > 1 << 18 { Self { target: crate::Target::Wide, ..self } } else { self }
    }
}

/// The type `Vector` of kernels that move rows whole: `width` f32. Eight as 64-bit integers (`SHADER_INT64`), to copy only.
pub(crate) fn vector(width: u32) -> &'static str {
    match width {
        8 => "vec4<u64>",
        4 => "vec4<f32>",
        _ => "f32",
    }
}
