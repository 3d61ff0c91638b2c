//! Losses of a router's logits under token choice: the router z-loss, which keeps logits small
//! (ST-MoE, arXiv 2202.08906), and the Switch Transformer's balance loss (arXiv 2101.03961), each with its
//! gradient.
//!
//! T tokens, E experts, K a token, p the softmax of a token's logits over all experts, n the tokens that
//! chose each expert, before any drop; c the coefficient:
//!
//! | loss | value | gradient |
//! |---|---|---|
//! | router z | `c / T sum_t lse_t²` | `2 c / T lse_t p` |
//! | balance | `a sum_e n_e sum_t p`, `a = c E / (T² K)` | `a p (n_e - sum_j p_j n_j)` |
//!
//! The counts are constants. A NaN logit counts for nothing. A row with no finite logit adds nothing; a
//! logit of +inf makes the z-loss infinite, and its row's gradients infinite or NaN.
use super::loss_sum::{self, LossSum};
use super::{few_experts, not_zero, or_nothing, row_groups, row_prelude};
use crate::device::Kernel;
use crate::device::shader::{Prelude, Spec, params, read, write};
use crate::error::{expect_len, expect_rows, expect_some};
use crate::{BoundOp, Context, Error, PlanShape, Result, Slice, Variant};
use std::sync::Arc;

/// See `shaders/router_loss.wgsl`.
pub const SPEC: Spec = Spec {
    name: "router_loss",
    body: include_str!("../../shaders/router_loss.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("logits", 4),
        read("counts", 4),
        read("dropped", 4),
        write("dlogits", 4),
        write("terms", 4),
    ],
    variants: || Prelude::distinct(Variant::EVERY.map(row_prelude)),
};

params! {
    tokens: u32, experts: u32, z_slope: f32, balance: f32, add: u32, has_counts: u32, offsets: u32, first: u32,
    has_dropped: u32,
}

/// How much each loss counts; 0 leaves it out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Coefficients {
    /// Router z-loss; EC-DLM trains with 1e-3.
    pub router_z: f32,
    /// Switch's balance loss; EC-DLM trains with 0.01.
    pub balance: f32,
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// T: rows; 0 is a no-op.
    pub tokens: u32,
    /// E: experts.
    pub experts: u32,
    /// K: experts that a token takes.
    pub experts_per_token: u32,
}

impl Dims {
    /// Factors of the sums over all tokens of the z-loss and the balance loss.
    fn factors(&self, of: Coefficients) -> [f64; 2] {
        let [t, e, k] = [self.tokens, self.experts, self.experts_per_token].map(f64::from);
        [f64::from(of.router_z) / t, f64::from(of.balance) * e / (t * t * k)]
    }
}

/// The CPU twin: the values of both losses, and `dlogits [tokens, experts]`, in f64 rounded once. `counts`
/// `[experts]` are the tokens that chose each expert, before any drop.
///
/// # Panics
///
/// If `experts_per_token` or `experts` is 0, or if `logits` or `counts` have not the sizes of `dims`; the
/// message names the argument.
pub fn cpu(
    dims: &Dims,
    coefficients: Coefficients,
    logits: &[f32],
    counts: &[u32],
) -> ([f32; 2], Vec<f32>) {
    let experts = dims.experts as usize;
    expect_some("experts_per_token", dims.experts_per_token as usize);
    let tokens = expect_rows("logits", logits.len(), "experts", experts);
    expect_len("logits", logits.len(), dims.tokens as usize * experts);
    expect_len("counts", counts.len(), experts);
    let [z, balance] = dims.factors(coefficients);
    let mut values = [0f64; 2];
    let mut dlogits = Vec::with_capacity(tokens * experts);
    for row in logits.chunks_exact(experts) {
        let (p, lse) = softmax(row);
        let dot: f64 = p.iter().zip(counts).map(|(p, &n)| p * f64::from(n)).sum();
        values[0] += z * lse * lse;
        values[1] += balance * dot;
        let gradient =
            |(p, &n): (&f64, &u32)| (p * (2.0 * z * lse + balance * (f64::from(n) - dot))) as f32;
        dlogits.extend(p.iter().zip(counts).map(gradient));
    }
    (values.map(|v| v as f32), dlogits)
}

/// The softmax of a row, and the logarithm of its sum of exponentials; 0 throughout for a row with no
/// finite logit.
fn softmax(row: &[f32]) -> (Vec<f64>, f64) {
    let highest = row.iter().filter(|g| !g.is_nan()).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let term = |g: f32| match g {
        g if g.is_nan() || g == f32::NEG_INFINITY => 0.0,
        g if highest == f32::INFINITY => f64::from(u8::from(g == f32::INFINITY)),
        g => (f64::from(g) - f64::from(highest)).exp(),
    };
    let sum: f64 = row.iter().map(|&g| term(g)).sum();
    let lse = if highest == f32::NEG_INFINITY { 0.0 } else { f64::from(highest) + sum.ln() };
    (row.iter().map(|&g| term(g) / (sum + 1e-20)).collect(), lse)
}

/// Where the tokens of each expert are counted.
#[derive(Clone, Copy, Debug)]
pub enum Counts<'a> {
    /// `[experts]` u32.
    Given(Slice<'a>),
    /// A plan of this shape: its slots.
    Plan(PlanShape, Slice<'a>),
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, experts]` f32, read.
    pub logits: Slice<'a>,
    /// Tokens of each expert, read: needed by the balance loss, which is left out without them.
    pub counts: Option<Counts<'a>>,
    /// `[experts]` u32, read: what each expert dropped of those that chose it, to be added to the counts.
    pub dropped: Option<Slice<'a>>,
    /// `[tokens, experts]` f32: written whole, or added to.
    pub dlogits: Slice<'a>,
    /// Whether to add to what `dlogits` holds.
    pub add: bool,
    /// `[2, tokens]` f32, written: scratch.
    pub terms: Slice<'a>,
    /// `[2]` f32: the values of the z-loss and the balance loss, that of the latter only with counts.
    pub values: Slice<'a>,
    /// Whether to add to what `values` hold, sums over layers.
    pub add_values: bool,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct RouterLoss {
    ctx: Context,
    kernel: Arc<Kernel>,
    sum: LossSum,
}

impl RouterLoss {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        let kernel = ctx.kernel(&SPEC, row_prelude(ctx.variant()))?;
        Ok(Self { ctx: ctx.clone(), kernel, sum: LossSum::new(ctx)? })
    }

    /// Both losses of all tokens, and their gradients.
    ///
    /// # Errors
    ///
    /// Zero experts or experts per token, a balance loss without counts, or a slice that does not fit
    /// ([`Error`]).
    pub fn bind(&self, dims: &Dims, coefficients: Coefficients, args: Args<'_>) -> Result<BoundOp> {
        let Dims { tokens, experts, experts_per_token } = *dims;
        not_zero(&[("experts_per_token", experts_per_token)])?;
        few_experts(experts)?;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        if args.counts.is_none() && coefficients.balance != 0.0 {
            return Err(Error::invalid("counts", "missing: the balance loss needs them"));
        }
        let pairs = [tokens.into(), experts.into()];
        args.logits.f32s("logits", &pairs)?;
        args.dlogits.f32s("dlogits", &pairs)?;
        args.terms.f32s("terms", &[2, tokens.into()])?;
        args.values.f32s("values", &[2])?;
        if let Some(dropped) = args.dropped {
            dropped.u32s("dropped", &[experts.into()])?;
        }
        let (counts, offsets, first) = match args.counts {
            None => (None, 0, 0),
            Some(Counts::Given(counts)) => {
                counts.u32s("counts", &[experts.into()])?;
                (Some(counts), 0, 0)
            }
            Some(Counts::Plan(shape, plan)) => {
                let at = shape.sections()?;
                if shape.experts != experts {
                    let reason = format!("a plan of {} experts, not {experts}", shape.experts);
                    return Err(Error::invalid("counts", reason));
                }
                plan.u32s("counts", &[at.words.into()])?;
                (Some(plan), 1, at.expert_offsets)
            }
        };
        let [z, balance] = dims.factors(coefficients);
        let params = Params {
            tokens,
            experts,
            z_slope: (2.0 * z) as f32,
            balance: balance as f32,
            add: args.add.into(),
            has_counts: counts.is_some().into(),
            offsets,
            first,
            has_dropped: args.dropped.is_some().into(),
        };
        let [of_counts, dropped] = [counts, args.dropped].map(|s| or_nothing(&self.ctx, s));
        let slices = [args.logits, of_counts, dropped, args.dlogits, args.terms];
        let groups = row_groups(self.ctx.variant(), tokens);
        let mut step: BoundOp = self.kernel.dispatch(&self.ctx, &params, &slices, groups)?.into();
        let losses = if counts.is_some() { 2 } else { 1 };
        for (at, scale) in (0..losses).zip([z, balance]) {
            let dims =
                loss_sum::Dims { first: at * tokens, count: tokens, at, scale: scale as f32 };
            let args =
                loss_sum::Args { terms: args.terms, values: args.values, add: args.add_values };
            step = step.then(self.sum.bind(&dims, args)?);
        }
        Ok(step)
    }
}
