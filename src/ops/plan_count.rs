//! First part of a plan: the gates of each token, how many experts it has, how many tokens each
//! expert has, and ranks.
//!
//! Gates that are divided by a sum ([`GateRule::Softmax`], [`GateRule::Normalised`]) carry the error
//! of that sum in f32: for a token of n experts at most about `(n + 6) 2^-24` of the gate where the
//! terms have one sign, as softmax's and sigmoid's have. Scores of the caller's own may have both:
//! the bound then grows by `(sum of |s|) / |sum of s|`. Of 1,000 experts of mixed sign, gates off by
//! 4.6e-6 of their value were seen.
use super::{few_experts, or_nothing};
use crate::device::Kernel;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::error::{expect_len, expect_rows};
use crate::plan::bits;
use crate::routing::GateRule;
use crate::{BoundOp, Context, PlanShape, Result, Slice, Target, Variant};
use std::sync::Arc;

/// See `shaders/plan_count.wgsl`.
pub const SPEC: Spec = Spec {
    name: "plan_count",
    body: include_str!("../../shaders/plan_count.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("assigned", 4),
        read("source", 4),
        read("scale_by_count", 4),
        read("scale_by_expert", 4),
        write("gates", 4),
        write("plan", 4),
    ],
    variants: || Prelude::distinct(Variant::EVERY.map(prelude)),
};

params! {
    tokens: u32, experts: u32, rule: u32, has_scale_by_count: u32, has_scale_by_expert: u32, scale: f32,
    expert_offsets: u32, token_offsets: u32, ranks: u32,
}

fn lanes(target: Target) -> [u32; 2] {
    match target {
        Target::Wide => [8, 32],
        Target::Serial => [1, 1],
    }
}

fn prelude(variant: Variant) -> Prelude {
    let [lanes, expert_lanes] = lanes(variant.target);
    Prelude::new(if lanes > 1 { "many lanes a row" } else { "one lane a row" })
        .constant("WG", 32 * lanes)
        .constant("LANES", lanes)
        .constant("EXPERT_LANES", expert_lanes)
        .piece(piece!("common/grid"))
        .piece(piece!("common/keys"))
        .piece(piece!("common/exp"))
        .piece(piece!("plan/column"))
        .piece(piece!("plan/count"))
        .piece(piece!("plan/scales"))
}

/// What gates are multiplied by, beside a constant.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scales<T> {
    /// `[experts + 1]` f32: a factor for tokens that n experts took (EC-DLM's scaling table).
    pub scale_by_count: Option<T>,
    /// `[experts]` f32: a factor of each expert (DiffusionGemma).
    pub scale_by_expert: Option<T>,
}

/// The CPU twin: gates `[tokens, experts]`, 0 at pairs that are not assigned. `source` is
/// `[tokens, experts]`: logits for [`GateRule::Softmax`], else scores. In a softmax, logits of +inf
/// share 1 equally, the others then get 0; NaN and -inf have gate 0.
///
/// # Panics
///
/// If `experts` is 0, if `source` is not whole rows of `experts`, if `assigned` is not
/// `experts * ceil(tokens / 32)` long, `scale_by_count` not
/// `experts + 1` or `scale_by_expert` not `experts`; the message names the argument.
pub fn cpu(
    assigned: &[u32],
    source: &[f32],
    experts: usize,
    rule: GateRule,
    scale: f32,
    scales: Scales<&[f32]>,
) -> Vec<f32> {
    let tokens = expect_rows("source", source.len(), "experts", experts);
    expect_len("assigned", assigned.len(), experts * bits::columns(tokens));
    if let Some(factors) = scales.scale_by_count {
        expect_len("scale_by_count", factors.len(), experts + 1);
    }
    if let Some(factors) = scales.scale_by_expert {
        expect_len("scale_by_expert", factors.len(), experts);
    }
    let mut gates = vec![0.0; source.len()];
    for t in 0..tokens {
        let mine = bits::experts_of(assigned, tokens, t);
        let row = &source[t * experts..][..experts];
        let highest =
            mine.iter().map(|&e| row[e]).filter(|g| !g.is_nan()).fold(f32::NEG_INFINITY, f32::max);
        let term = |e: usize| -> f64 {
            match (rule, row[e]) {
                (GateRule::Softmax, g) if g.is_nan() || g == f32::NEG_INFINITY => 0.0,
                (GateRule::Softmax, g) if highest == f32::INFINITY => {
                    f64::from(u8::from(g == f32::INFINITY))
                }
                (GateRule::Softmax, g) => (f64::from(g) - f64::from(highest)).exp(),
                (_, s) => s.into(),
            }
        };
        let sum: f64 = mine.iter().map(|&e| term(e)).sum();
        for &e in &mine {
            let gate =
                if rule == GateRule::Unnormalised { term(e) } else { term(e) / (sum + 1e-20) };
            let scale_by_count = scales.scale_by_count.map_or(1.0, |s| s[mine.len()]);
            let scale_by_expert = scales.scale_by_expert.map_or(1.0, |s| s[e]);
            gates[t * experts + e] =
                (gate * f64::from(scale) * f64::from(scale_by_count) * f64::from(scale_by_expert))
                    as f32;
        }
    }
    gates
}

/// Where gates come from.
#[derive(Clone, Copy, Debug)]
pub struct Gates<'a> {
    /// How.
    pub rule: GateRule,
    /// `[tokens, experts]` f32, read at assigned pairs: logits or scores.
    pub source: Slice<'a>,
    /// Constant factor, LLaDA2's `routed_scaling_factor`.
    pub scale: f32,
    /// More factors.
    pub scales: Scales<Slice<'a>>,
    /// `[tokens, experts]` f32, written at assigned pairs.
    pub gates: Slice<'a>,
}

impl Gates<'_> {
    /// Whether a table scales them.
    pub(crate) fn has_tables(&self) -> bool {
        self.scales.scale_by_count.is_some() || self.scales.scale_by_expert.is_some()
    }

    /// Errors for slices that do not fit.
    pub(crate) fn check(&self, shape: &PlanShape) -> Result<()> {
        let PlanShape { tokens, experts, .. } = *shape;
        let pairs = [tokens.into(), experts.into()];
        self.source.f32s("source", &pairs)?;
        self.gates.f32s("gates", &pairs)?;
        if let Some(s) = self.scales.scale_by_count {
            s.f32s("scale_by_count", &[u64::from(experts) + 1])?;
        }
        if let Some(s) = self.scales.scale_by_expert {
            s.f32s("scale_by_expert", &[experts.into()])?;
        }
        Ok(())
    }
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[experts, ceil(tokens / 32)]` u32, read: the bit set.
    pub assigned: Slice<'a>,
    /// Gates to make; none where they are there already (another router's).
    pub gates: Option<Gates<'a>>,
    /// A plan of the shape, written: counts and ranks.
    pub plan: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct PlanCount {
    ctx: Context,
}

impl PlanCount {
    /// Compiles the kernel, for few tokens and for many.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        let op = Self { ctx: ctx.clone() };
        for tokens in [1, u32::MAX] {
            op.kernel(tokens)?;
        }
        Ok(op)
    }

    /// The kernel for this many tokens.
    fn kernel(&self, tokens: u32) -> Result<Arc<Kernel>> {
        self.ctx.kernel(&SPEC, prelude(self.ctx.variant().for_tokens(tokens)))
    }

    /// Counts, ranks and gates of an assignment.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`], or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, shape: &PlanShape, args: Args<'_>) -> Result<BoundOp> {
        self.bind_part(shape, shape.tokens, args)
    }

    /// The same by the kernel for `whole` tokens.
    pub(crate) fn bind_part(
        &self,
        shape: &PlanShape,
        whole: u32,
        args: Args<'_>,
    ) -> Result<BoundOp> {
        let PlanShape { tokens, experts, .. } = *shape;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        few_experts(experts)?;
        let at = shape.sections()?;
        let columns = u64::from(tokens.div_ceil(32));
        args.assigned.u32s("assigned", &[experts.into(), columns])?;
        args.plan.u32s("plan", &[at.words.into()])?;
        let mut params = Params {
            tokens,
            experts,
            scale: 1.0,
            expert_offsets: at.expert_offsets,
            token_offsets: at.token_offsets,
            ranks: at.ranks,
            ..Params::default()
        };
        let [mut source, mut scale_by_count, mut scale_by_expert] = [None; 3];
        let nothing;
        let gates;
        if let Some(g) = args.gates {
            g.check(shape)?;
            params.rule = g.rule.number();
            params.has_scale_by_count = g.scales.scale_by_count.is_some().into();
            params.has_scale_by_expert = g.scales.scale_by_expert.is_some().into();
            params.scale = g.scale;
            (source, scale_by_count, scale_by_expert) =
                (Some(g.source), g.scales.scale_by_count, g.scales.scale_by_expert);
            gates = g.gates;
        } else {
            // Bound to be written to, though nothing is.
            nothing = self.ctx.scratch("no gates", 16)?;
            gates = Slice::from(&nothing);
        }
        let [source, scale_by_count, scale_by_expert] =
            [source, scale_by_count, scale_by_expert].map(|s| or_nothing(&self.ctx, s));
        let slices = [args.assigned, source, scale_by_count, scale_by_expert, gates, args.plan];
        let [lanes, expert_lanes] = lanes(self.ctx.variant().for_tokens(whole).target);
        let groups = columns + u64::from(experts.div_ceil(32 * lanes / expert_lanes));
        Ok(self.kernel(whole)?.dispatch(&self.ctx, &params, &slices, groups)?.into())
    }
}
