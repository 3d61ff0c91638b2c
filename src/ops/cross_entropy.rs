//! Cross entropy of rows of logits, each with a weight of its own, with its gradient: the loss of a masked
//! diffusion language model.
//!
//! [`masked_weights`] has the weights of EC-DLM (arXiv 2604.01622): masked tokens alone count, over the share
//! of their sequence that is masked, and over all tokens of the batch that the loss looks at.
use super::loss_sum::{self, LossSum};
use super::{not_zero, row_groups, row_prelude};
use crate::device::Kernel;
use crate::device::quirks::check_loops;
use crate::device::shader::{Prelude, Spec, params, read, write};
use crate::error::{expect_len, expect_offsets, expect_rows};
use crate::{BoundOp, Context, Error, Result, Slice, Target, Variant};
use std::sync::Arc;

/// See `shaders/cross_entropy.wgsl`.
pub const SPEC: Spec = Spec {
    name: "cross_entropy",
    body: include_str!("../../shaders/cross_entropy.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("logits", 4),
        read("targets", 4),
        read("weights", 4),
        write("dlogits", 4),
        write("terms", 4),
    ],
    variants: || Prelude::distinct(Variant::EVERY.map(row_prelude)),
};

params! { tokens: u32, classes: u32 }

/// Weights of the masked diffusion loss, `[tokens]`: `mask / p * loss_mask / sum(loss_mask)`, p being the
/// share of a sequence's tokens that is masked. Masked tokens count in p also where `loss_mask` is false;
/// without `by_ratio` p is 1. Sequences lie between `offsets`; a token outside them all has weight 0.
///
/// ```
/// // Two sequences of four tokens; one and two of them are masked.
/// let mask = [true, false, false, false, true, true, false, false];
/// let weights = wgmoe::ops::cross_entropy::masked_weights(&mask, &[true; 8], &[0, 4, 8], true);
/// assert_eq!(weights, [0.5, 0.0, 0.0, 0.0, 0.25, 0.25, 0.0, 0.0]);
/// ```
///
/// # Panics
///
/// If `loss_mask` is not as long as `mask`, or if `offsets` are none, decrease, or exceed the tokens; the
/// message names the argument.
pub fn masked_weights(
    mask: &[bool],
    loss_mask: &[bool],
    offsets: &[u32],
    by_ratio: bool,
) -> Vec<f32> {
    expect_len("loss_mask", loss_mask.len(), mask.len());
    expect_offsets("offsets", offsets.len());
    let most = offsets.last().map_or(0, |&end| end as usize);
    assert!(offsets.is_sorted() && most <= mask.len(), "`offsets`: not of {} tokens", mask.len());
    let counted = loss_mask.iter().filter(|&&m| m).count() as f64;
    let mut weights = vec![0.0; mask.len()];
    for ends in offsets.windows(2) {
        let range = ends[0] as usize..ends[1] as usize;
        let masked = mask[range.clone()].iter().filter(|&&m| m).count() as f64;
        let p = if by_ratio { masked / range.len() as f64 } else { 1.0 };
        for t in range.filter(|&t| mask[t] && loss_mask[t]) {
            weights[t] = (1.0 / p / counted) as f32;
        }
    }
    weights
}

/// The CPU twin: the loss of each row `[tokens]`, and `dlogits [tokens, classes]`, in f64 rounded once. Rows
/// of weight 0, or whose target is no class, have neither.
///
/// # Panics
///
/// If `classes` is 0, if `logits` are not whole rows of it, or if `targets` or `weights` are not as many as
/// rows; the message names the argument.
pub fn cpu(
    logits: &[f32],
    classes: usize,
    targets: &[u32],
    weights: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let tokens = expect_rows("logits", logits.len(), "classes", classes);
    expect_len("targets", targets.len(), tokens);
    expect_len("weights", weights.len(), tokens);
    let (mut losses, mut dlogits) = (vec![0.0; tokens], vec![0.0; logits.len()]);
    for (t, row) in logits.chunks_exact(classes).enumerate() {
        let (target, weight) = (targets[t] as usize, f64::from(weights[t]));
        if target >= classes || weight == 0.0 {
            continue;
        }
        let highest = row.iter().filter(|g| !g.is_nan()).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        let term = |g: f32| match g {
            g if g.is_nan() || g == f32::NEG_INFINITY => 0.0,
            g if highest == f32::INFINITY => f64::from(u8::from(g == f32::INFINITY)),
            g => (f64::from(g) - f64::from(highest)).exp(),
        };
        let sum: f64 = row.iter().map(|&g| term(g)).sum();
        let lse = f64::from(highest) + sum.ln();
        losses[t] = (weight * (lse - f64::from(row[target]))) as f32;
        for (v, &g) in row.iter().enumerate() {
            let p = term(g) / (sum + 1e-20);
            dlogits[t * classes + v] = (weight * (p - f64::from(u8::from(v == target)))) as f32;
        }
    }
    (losses, dlogits)
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows; 0 is a no-op.
    pub tokens: u32,
    /// Logits of a row.
    pub classes: u32,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, classes]` f32, read.
    pub logits: Slice<'a>,
    /// `[tokens]` u32, read: the class of each row.
    pub targets: Slice<'a>,
    /// `[tokens]` f32, read.
    pub weights: Slice<'a>,
    /// `[tokens, classes]` f32, written whole.
    pub dlogits: Slice<'a>,
    /// `[tokens]` f32, written: the loss of each row.
    pub losses: Slice<'a>,
    /// `[1]` f32, written: their sum.
    pub value: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct CrossEntropy {
    ctx: Context,
    sum: LossSum,
}

impl CrossEntropy {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        let op = Self { ctx: ctx.clone(), sum: LossSum::new(ctx)? };
        for classes in [1, u32::MAX] {
            op.kernel(classes)?;
        }
        Ok(op)
    }

    /// The kernel for rows of this many logits.
    fn kernel(&self, classes: u32) -> Result<(Variant, Arc<Kernel>)> {
        let variant = self.ctx.variant().within_loops(3 * u64::from(classes));
        Ok((variant, self.ctx.kernel(&SPEC, row_prelude(variant))?))
    }

    /// The loss of all rows, and its gradient.
    ///
    /// # Errors
    ///
    /// Zero classes, more of them than one invocation of a software driver can go over, or a slice that
    /// does not fit ([`Error`]).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        let Dims { tokens, classes } = *dims;
        not_zero(&[("classes", classes)])?;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        let shape = [tokens.into(), classes.into()];
        args.logits.f32s("logits", &shape)?;
        args.targets.u32s("targets", &[tokens.into()])?;
        args.weights.f32s("weights", &[tokens.into()])?;
        args.dlogits.f32s("dlogits", &shape)?;
        args.losses.f32s("losses", &[tokens.into()])?;
        args.value.f32s("value", &[1])?;
        let (variant, kernel) = self.kernel(classes)?;
        let lanes = if variant.target == Target::Serial { 1 } else { 64 };
        check_loops(&self.ctx, "classes", classes, 3 * u64::from(classes.div_ceil(lanes)))?;
        let slices = [args.logits, args.targets, args.weights, args.dlogits, args.losses];
        let groups = row_groups(variant, tokens);
        let names = [("terms", "losses")];
        let renamed = |e: Error| e.renamed(&names);
        let params = Params { tokens, classes };
        let step: BoundOp =
            kernel.dispatch(&self.ctx, &params, &slices, groups).map_err(renamed)?.into();
        let sum = loss_sum::Dims { first: 0, count: tokens, at: 0, scale: 1.0 };
        let args = loss_sum::Args { terms: args.losses, values: args.value, add: false };
        let names = [("terms", "losses"), ("values", "value")];
        Ok(step.then(self.sum.bind(&sum, args).map_err(|e| e.renamed(&names))?))
    }
}
