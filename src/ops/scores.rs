//! Router scores: `s = softmax(g)` or `sigmoid(g)`, and what experts are chosen by,
//! `r = (g or s) + bias`.
use super::{EXP, GRID, KEYS, not_zero, or_nothing};
use crate::device::Kernel;
use crate::device::shader::{Prelude, Spec, params, read, write};
use crate::error::{expect_len, expect_rows};
use crate::routing::Score;
use crate::{Context, Result, Slice, Step, Target, Variant};
use std::sync::Arc;

/// See `shaders/scores.wgsl`.
pub const SPEC: Spec = Spec {
    name: "scores",
    body: include_str!("../../shaders/scores.wgsl"),
    params: Params::LAYOUT,
    bindings: &[read("logits", 4), read("bias", 4), write("s", 4), write("r", 4)],
    variants: || {
        [(Target::Gpu, false), (Target::Gpu, true), (Target::Cpu, false)]
            .map(|(target, subgroups)| prelude(Variant { target, subgroups }))
            .into()
    },
};

params! { tokens: u32, experts: u32, softmax: u32, from_logits: u32, has_bias: u32 }

fn prelude(variant: Variant) -> Prelude {
    let (label, [wg, lanes], reduce) = match (variant.target, variant.subgroups) {
        (Target::Cpu, _) => {
            ("one lane a row", [8, 1], include_str!("../../shaders/lib/reduce_serial.wgsl"))
        }
        (Target::Gpu, false) => (
            "workgroup reductions",
            [64, 64],
            include_str!("../../shaders/lib/reduce_workgroup.wgsl"),
        ),
        (Target::Gpu, true) => (
            "subgroup reductions",
            [128, 128],
            include_str!("../../shaders/lib/reduce_subgroup.wgsl"),
        ),
    };
    let subgroups = variant.subgroups && variant.target == Target::Gpu;
    Prelude::new(label)
        .needs(if subgroups { wgpu::Features::SUBGROUP } else { wgpu::Features::empty() })
        .constant("WG", wg)
        .constant("LANES", lanes)
        .constant("ROWS", wg / lanes)
        .piece(GRID)
        .piece(KEYS)
        .piece(EXP)
        .piece(reduce)
}

/// The CPU twin: `(s, r)`, each `[tokens, experts]`, in f64 rounded once. `bias` is `[experts]`.
///
/// - A NaN logit has `s = 0`, and `r = NaN` whatever its bias.
/// - In a softmax, logits of +inf share 1 equally and the others get 0; a row of only -inf and NaN
///   has `s = 0` throughout.
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
    let mut s = vec![];
    for row in logits.chunks_exact(experts) {
        let highest = row.iter().filter(|g| !g.is_nan()).fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        let term = |g: f32| match g {
            g if g.is_nan() || g == f32::NEG_INFINITY => 0.0,
            g if highest == f32::INFINITY => f64::from(u8::from(g == f32::INFINITY)),
            g => (f64::from(g) - f64::from(highest)).exp(),
        };
        let sum: f64 = row.iter().map(|&g| term(g)).sum();
        s.extend(row.iter().map(|&g| match score {
            _ if g.is_nan() => 0.0,
            Score::Softmax => (term(g) / (sum + 1e-20)) as f32,
            Score::Sigmoid => (1.0 / (1.0 + (-f64::from(g)).exp())) as f32,
        }));
    }
    let r = logits
        .iter()
        .zip(&s)
        .enumerate()
        .map(|(i, (&g, &s))| {
            let value = if from_logits || g.is_nan() { g } else { s };
            bias.map_or(value, |b| value + b[i % experts])
        })
        .collect();
    (s, r)
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows; 0 is a no-op.
    pub tokens: u32,
    /// Experts.
    pub experts: u32,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, experts]` f32, read.
    pub logits: Slice<'a>,
    /// `[experts]` f32, read.
    pub bias: Option<Slice<'a>>,
    /// `[tokens, experts]` f32, written whole.
    pub s: Slice<'a>,
    /// `[tokens, experts]` f32, written whole.
    pub r: Slice<'a>,
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
        Ok(Self { ctx: ctx.clone(), kernel: ctx.kernel(&SPEC, prelude(ctx.variant()))? })
    }

    /// Scores of all rows; `from_logits`: `r = g + bias`, else `r = s + bias`.
    ///
    /// # Errors
    ///
    /// Zero experts, or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(
        &self,
        dims: Dims,
        score: Score,
        from_logits: bool,
        args: Args<'_>,
    ) -> Result<Step> {
        let Dims { tokens, experts } = dims;
        not_zero(&[("experts", experts)])?;
        if tokens == 0 {
            return Ok(Step::default());
        }
        let shape = [tokens.into(), experts.into()];
        args.logits.expect("logits", &shape, 4)?;
        if let Some(bias) = args.bias {
            bias.expect("bias", &[experts.into()], 4)?;
        }
        args.s.expect("s", &shape, 4)?;
        args.r.expect("r", &shape, 4)?;
        let params = Params {
            tokens,
            experts,
            softmax: u32::from(score == Score::Softmax),
            from_logits: u32::from(from_logits),
            has_bias: u32::from(args.bias.is_some()),
        };
        let rows = if self.ctx.variant().target == Target::Cpu { 8 } else { 1 };
        let slices = [args.logits, or_nothing(&self.ctx, args.bias), args.s, args.r];
        Ok(self
            .kernel
            .dispatch(&self.ctx, &params, &slices, u64::from(tokens).div_ceil(rows))?
            .into())
    }
}
