//! EC-DLM's balance loss of expert choice (arXiv 2604.01622), with its gradient: tokens that many experts
//! took should score lower.
//!
//! T tokens, E experts, k experts a token on average, q the softmax of an expert's logits over ALL tokens
//! of the batch, m the experts that took each token; c the coefficient:
//! `a sum_t m_t sum_e q[t, e]`, `a = c / (E k)`; the gradient is `a q (m_t - sum_u q_u m_u)`.
//!
//! The counts are constants. A NaN logit counts for nothing.
use super::loss_sum::{self, LossSum};
use super::{few_experts, not_zero};
use crate::device::Kernel;
use crate::device::quirks::check_loops;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::error::{expect_len, expect_rows, expect_some};
use crate::{BoundOp, Context, Error, PlanShape, Result, Slice, Target};
use std::sync::Arc;

/// See `shaders/balance_loss.wgsl`.
pub const SPEC: Spec = Spec {
    name: "balance_loss",
    body: include_str!("../../shaders/balance_loss.wgsl"),
    params: Params::LAYOUT,
    bindings: &[read("logits", 4), read("taken", 4), write("dlogits", 4), write("terms", 4)],
    variants: || Target::ALL.map(prelude).into(),
};

params! { tokens: u32, experts: u32, balance: f32, add: u32, offsets: u32, first: u32, less: u32 }

/// Experts of a workgroup, and lanes of each.
fn layout(target: Target) -> [u32; 2] {
    match target {
        Target::Wide => [16, 16],
        Target::Serial => [8, 1],
    }
}

fn prelude(target: Target) -> Prelude {
    let [columns, lanes] = layout(target);
    Prelude::new(format!("{lanes} lanes an expert"))
        .constant("WG", columns * lanes)
        .constant("COLUMNS", columns)
        .constant("LANES", lanes)
        .piece(piece!("common/grid"))
        .piece(piece!("common/keys"))
        .piece(piece!("common/exp"))
}

/// Iterations of one lane.
fn iterations(target: Target, tokens: u32) -> u64 {
    let [_, lanes] = layout(target);
    3 * u64::from(tokens.div_ceil(lanes)) + 2 * u64::from(lanes)
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// T: rows; 0 is a no-op.
    pub tokens: u32,
    /// E: experts.
    pub experts: u32,
    /// k: experts that a token has on average; where sequences have a k each, their mean, truncated.
    pub experts_per_token: u32,
}

impl Dims {
    /// Factor of the sum over all experts.
    fn factor(&self, coefficient: f32) -> f64 {
        f64::from(coefficient) / (f64::from(self.experts) * f64::from(self.experts_per_token))
    }
}

/// The CPU twin: the value of the loss, and `dlogits [tokens, experts]`, in f64 rounded once. `taken`
/// `[tokens]` are the experts that took each token.
///
/// # Panics
///
/// If `experts_per_token` or `experts` is 0, or if `logits` or `taken` have not the sizes of `dims`; the
/// message names the argument.
pub fn cpu(dims: &Dims, coefficient: f32, logits: &[f32], taken: &[u32]) -> (f32, Vec<f32>) {
    let experts = dims.experts as usize;
    expect_some("experts_per_token", dims.experts_per_token as usize);
    expect_rows("logits", logits.len(), "experts", experts);
    expect_len("logits", logits.len(), dims.tokens as usize * experts);
    expect_len("taken", taken.len(), dims.tokens as usize);
    let factor = dims.factor(coefficient);
    let mut value = 0f64;
    let mut dlogits = vec![0f32; logits.len()];
    for e in 0..experts {
        let column = || logits.iter().skip(e).step_by(experts).copied();
        let highest = column().filter(|g| !g.is_nan()).fold(f32::NEG_INFINITY, f32::max);
        let term = |g: f32| match g {
            g if g.is_nan() || g == f32::NEG_INFINITY => 0.0,
            g if highest == f32::INFINITY => f64::from(u8::from(g == f32::INFINITY)),
            g => (f64::from(g) - f64::from(highest)).exp(),
        };
        let sum: f64 = column().map(term).sum::<f64>() + 1e-20;
        let dot: f64 = column().zip(taken).map(|(g, &m)| term(g) / sum * f64::from(m)).sum();
        value += factor * dot;
        for ((d, g), &m) in dlogits.iter_mut().skip(e).step_by(experts).zip(column()).zip(taken) {
            *d = (factor * term(g) / sum * (f64::from(m) - dot)) as f32;
        }
    }
    (value as f32, dlogits)
}

/// Where the experts of each token are counted.
#[derive(Clone, Copy, Debug)]
pub enum Taken<'a> {
    /// `[tokens]` u32.
    Given(Slice<'a>),
    /// A plan of this shape: its slots.
    Plan(PlanShape, Slice<'a>),
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, experts]` f32, read.
    pub logits: Slice<'a>,
    /// Experts that took each token, read.
    pub taken: Taken<'a>,
    /// `[tokens, experts]` f32: written whole, or added to.
    pub dlogits: Slice<'a>,
    /// Whether to add to what `dlogits` holds.
    pub add: bool,
    /// `[experts]` f32, written: scratch.
    pub terms: Slice<'a>,
    /// `[2]` f32: the second is the value, as [`router_loss`](super::router_loss) has them.
    pub values: Slice<'a>,
    /// Whether to add to the value that is there, a sum over layers.
    pub add_values: bool,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct BalanceLoss {
    ctx: Context,
    sum: LossSum,
}

impl BalanceLoss {
    /// Compiles the kernel, for few tokens and for many.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        let op = Self { ctx: ctx.clone(), sum: LossSum::new(ctx)? };
        for tokens in [1, u32::MAX] {
            op.kernel(tokens)?;
        }
        Ok(op)
    }

    /// The kernel for this many tokens.
    fn kernel(&self, tokens: u32) -> Result<(Target, Arc<Kernel>)> {
        let variant = self.ctx.variant();
        let target = variant.within_loops(iterations(variant.target, tokens)).target;
        Ok((target, self.ctx.kernel(&SPEC, prelude(target))?))
    }

    /// The loss of all experts, and its gradient.
    ///
    /// # Errors
    ///
    /// Zero experts or experts per token, more tokens than one invocation of a software driver can add
    /// up, or a slice that does not fit ([`Error`]).
    pub fn bind(&self, dims: &Dims, coefficient: f32, args: Args<'_>) -> Result<BoundOp> {
        let Dims { tokens, experts, experts_per_token } = *dims;
        not_zero(&[("experts_per_token", experts_per_token)])?;
        few_experts(experts)?;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        let pairs = [tokens.into(), experts.into()];
        args.logits.f32s("logits", &pairs)?;
        args.dlogits.f32s("dlogits", &pairs)?;
        args.terms.f32s("terms", &[experts.into()])?;
        args.values.f32s("values", &[2])?;
        let (taken, offsets, first, less) = match args.taken {
            Taken::Given(taken) => {
                taken.u32s("taken", &[tokens.into()])?;
                (taken, 0, 0, 0)
            }
            Taken::Plan(shape, plan) => {
                let at = shape.sections()?;
                if shape.tokens != tokens {
                    let reason = format!("a plan of {} tokens, not {tokens}", shape.tokens);
                    return Err(Error::invalid("taken", reason));
                }
                plan.u32s("taken", &[at.words.into()])?;
                (plan, 1, at.token_offsets, shape.shared_experts)
            }
        };
        let (target, kernel) = self.kernel(tokens)?;
        check_loops(&self.ctx, "tokens", tokens, iterations(target, tokens))?;
        let factor = dims.factor(coefficient) as f32;
        let params =
            Params { tokens, experts, balance: factor, add: args.add.into(), offsets, first, less };
        let slices = [args.logits, taken, args.dlogits, args.terms];
        let groups = u64::from(experts.div_ceil(layout(target)[0]));
        let step: BoundOp = kernel.dispatch(&self.ctx, &params, &slices, groups)?.into();
        let sum = loss_sum::Dims { first: 0, count: experts, at: 1, scale: factor };
        let args = loss_sum::Args { terms: args.terms, values: args.values, add: args.add_values };
        Ok(step.then(self.sum.bind(&sum, args)?))
    }
}
