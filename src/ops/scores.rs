//! Router scores: `scores = softmax(g)` or `sigmoid(g)`, and what experts are chosen by,
//! `values = (g or scores) + bias`.
use super::{not_zero, or_nothing, row_groups, row_prelude};
use crate::device::Kernel;
use crate::device::shader::{Prelude, Spec, params, read, write};
use crate::error::{expect_len, expect_rows};
use crate::routing::Score;
use crate::{BoundOp, Context, Result, Slice, Variant};
use std::sync::Arc;

/// See `shaders/scores.wgsl`.
pub const SPEC: Spec = Spec {
    name: "scores",
    body: include_str!("../../shaders/scores.wgsl"),
    params: Params::LAYOUT,
    bindings: &[read("logits", 4), read("bias", 4), write("score_of", 4), write("values", 4)],
    variants: || Prelude::distinct(Variant::EVERY.map(row_prelude)),
};

params! { tokens: u32, experts: u32, softmax: u32, from_logits: u32, has_bias: u32 }

/// The CPU twin: `(scores, values)`, each `[tokens, experts]`, in f64 rounded once. `bias` is
/// `[experts]`.
///
/// - A NaN logit has score 0, and the value NaN whatever its bias.
/// - In a softmax, logits of +inf share 1 equally and the others get 0; a row of only -inf and NaN
///   has scores of 0 throughout.
///
/// # Panics
///
/// If `experts` is 0, if `logits` are not whole rows of `experts`, or if `bias` is not `experts`
/// long; the message names the argument.
pub fn cpu(
    logits: &[f32],
    experts: usize,
    score: Score,
    from_logits: bool,
    bias: Option<&[f32]>,
) -> (Vec<f32>, Vec<f32>) {
    expect_rows("logits", logits.len(), "experts", experts);
    if let Some(bias) = bias {
        expect_len("bias", bias.len(), experts);
    }
    let mut scores = vec![];
    for row in logits.chunks_exact(experts) {
        let highest = row.iter().filter(|g| !g.is_nan()).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        let term = |g: f32| match g {
            g if g.is_nan() || g == f32::NEG_INFINITY => 0.0,
            g if highest == f32::INFINITY => f64::from(u8::from(g == f32::INFINITY)),
            g => (f64::from(g) - f64::from(highest)).exp(),
        };
        let sum: f64 = row.iter().map(|&g| term(g)).sum();
        scores.extend(row.iter().map(|&g| match score {
            _ if g.is_nan() => 0.0,
            Score::Softmax => (term(g) / (sum + 1e-20)) as f32,
            Score::Sigmoid => (1.0 / (1.0 + (-f64::from(g)).exp())) as f32,
        }));
    }
    let values = logits
        .iter()
        .zip(&scores)
        .enumerate()
        .map(|(i, (&g, &scores))| {
            let value = if from_logits || g.is_nan() { g } else { scores };
            bias.map_or(value, |b| value + b[i % experts])
        })
        .collect();
    (scores, values)
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows; 0 is a no-op.
    pub tokens: u32,
    /// Experts.
    pub experts: u32,
    /// How logits become scores.
    pub score: Score,
    /// Whether experts are chosen by `logits + bias` rather than by `scores + bias`.
    pub by_logits: bool,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, experts]` f32, read.
    pub logits: Slice<'a>,
    /// `[experts]` f32, read.
    pub bias: Option<Slice<'a>>,
    /// `[tokens, experts]` f32, written whole.
    pub scores: Slice<'a>,
    /// `[tokens, experts]` f32, written whole.
    pub values: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct Scores {
    ctx: Context,
    kernel: Arc<Kernel>,
}

impl Scores {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        Ok(Self { ctx: ctx.clone(), kernel: ctx.kernel(&SPEC, row_prelude(ctx.variant()))? })
    }

    /// Scores and selection values of all rows.
    ///
    /// # Errors
    ///
    /// Zero experts, or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        let Dims { tokens, experts, score, by_logits } = *dims;
        not_zero(&[("experts", experts)])?;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        let shape = [tokens.into(), experts.into()];
        args.logits.f32s("logits", &shape)?;
        if let Some(bias) = args.bias {
            bias.f32s("bias", &[experts.into()])?;
        }
        args.scores.f32s("scores", &shape)?;
        args.values.f32s("values", &shape)?;
        let params = Params {
            tokens,
            experts,
            softmax: u32::from(score == Score::Softmax),
            from_logits: u32::from(by_logits),
            has_bias: u32::from(args.bias.is_some()),
        };
        let slices = [args.logits, or_nothing(&self.ctx, args.bias), args.scores, args.values];
        let groups = row_groups(self.ctx.variant(), tokens);
        let dispatch = self.kernel.dispatch(&self.ctx, &params, &slices, groups);
        // WGSL has the kernel itself under the name of what it makes.
        Ok(dispatch.map_err(|e| e.renamed(&[("score_of", "scores")]))?.into())
    }
}
