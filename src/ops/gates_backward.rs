//! Backward of the gates: from the gradient of each slot's gate to that of the router's logits, under
//! every rule that makes gates of them.
//!
//! The choice, the counts of a token's experts, and all factors are constants. Gates are made over the
//! experts that a token was given before any drop: where a softmax over them is cut down by a capacity
//! factor, the logits of dropped experts have gradients too. Softmax scores that are not divided by a
//! sum give every expert's logit a gradient. Softmax scores that are divided by their sum over the
//! chosen are a softmax over the chosen: the logits of the others have none.
use super::plan_count::Scales;
use super::{few_experts, or_nothing, row_groups, row_prelude};
use crate::device::Kernel;
use crate::device::shader::{Prelude, Spec, params, read, write};
use crate::error::{expect_len, expect_rows};
use crate::plan::{HostPlan, bits};
use crate::routing::{GateRule, Score};
use crate::{BoundOp, Context, PlanShape, Result, Slice, Variant};
use std::sync::Arc;

/// See `shaders/gates_backward.wgsl`.
pub const SPEC: Spec = Spec {
    name: "gates_backward",
    body: include_str!("../../shaders/gates_backward.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("dgates", 4),
        read("plan", 4),
        read("chosen", 4),
        read("source", 4),
        read("scale_by_count", 4),
        read("scale_by_expert", 4),
        write("dlogits", 4),
    ],
    variants: || Prelude::distinct(Variant::EVERY.map(row_prelude)),
};

params! {
    tokens: u32, experts: u32, rule: u32, softmax: u32, has_scale_by_count: u32, has_scale_by_expert: u32,
    scale: f32, slots: u32, expert_offsets: u32, token_offsets: u32, slot_of: u32,
}

/// How the gates were made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// From what.
    pub gate: GateRule,
    /// How scores came from logits; [`GateRule::Softmax`] reads none.
    pub score: Score,
    /// Constant factor.
    pub scale: f32,
}

/// The CPU twin: `dlogits [tokens, experts]`, in f64 rounded once. `dgates` has a value for each slot of
/// the plan, and perhaps more; those of shared experts are not read. `chosen` is the bit set
/// `[experts, ceil(tokens / 32)]` of the experts that gates were made over; `source` is
/// `[tokens, experts]`: logits for [`GateRule::Softmax`], else scores.
///
/// # Panics
///
/// If `experts` is 0, if `source` is not whole rows of `experts`, if `dgates` are fewer than the plan's
/// slots, or as [`plan_count::cpu`](super::plan_count::cpu) does for bit set and scales; the message
/// names the argument.
pub fn cpu(
    plan: &HostPlan,
    dgates: &[f32],
    chosen: &[u32],
    source: &[f32],
    experts: usize,
    rule: Rule,
    scales: Scales<&[f32]>,
) -> Vec<f32> {
    let tokens = expect_rows("source", source.len(), "experts", experts);
    expect_len("chosen", chosen.len(), experts * bits::columns(tokens));
    let slots = plan.token_of.len();
    assert!(dgates.len() >= slots, "`dgates`: expected {slots} values, got {}", dgates.len());
    if let Some(factors) = scales.scale_by_count {
        expect_len("scale_by_count", factors.len(), experts + 1);
    }
    if let Some(factors) = scales.scale_by_expert {
        expect_len("scale_by_expert", factors.len(), experts);
    }
    let mut of_gates = vec![0f64; source.len()];
    for e in 0..experts {
        for slot in plan.expert_offsets[e]..plan.expert_offsets[e + 1] {
            let slot = slot as usize;
            of_gates[plan.token_of[slot] as usize * experts + e] = dgates[slot].into();
        }
    }
    let mut dlogits = vec![];
    for (t, row) in source.chunks_exact(experts).enumerate() {
        let mine = bits::experts_of(chosen, tokens, t);
        let by_count = scales.scale_by_count.map_or(1.0, |s| s[mine.len()]);
        let u = |e: usize| {
            let by_expert = scales.scale_by_expert.map_or(1.0, |s| s[e]);
            let factor = f64::from(rule.scale) * f64::from(by_count) * f64::from(by_expert);
            factor * of_gates[t * experts + e]
        };
        let highest =
            mine.iter().map(|&e| row[e]).filter(|g| !g.is_nan()).fold(f32::NEG_INFINITY, f32::max);
        let term = |e: usize| -> f64 {
            match (rule.gate, row[e]) {
                (GateRule::Softmax, g) if g.is_nan() || g == f32::NEG_INFINITY => 0.0,
                (GateRule::Softmax, g) if highest == f32::INFINITY => {
                    f64::from(u8::from(g == f32::INFINITY))
                }
                (GateRule::Softmax, g) => (f64::from(g) - f64::from(highest)).exp(),
                (_, s) => s.into(),
            }
        };
        // The slope of a score, its own logit moving; in a softmax the sum has the rest.
        let slope = |e: usize| match (rule.gate, rule.score) {
            (GateRule::Normalised | GateRule::Unnormalised, Score::Sigmoid) => {
                term(e) * (1.0 - term(e))
            }
            _ => term(e),
        };
        let sum: f64 = mine.iter().map(|&e| term(e)).sum::<f64>() + 1e-20;
        let dot: f64 = mine.iter().map(|&e| term(e) * u(e)).sum();
        dlogits.extend((0..experts).map(|e| {
            let of_chosen = mine.contains(&e);
            let d = match (rule.gate, rule.score) {
                (GateRule::Unnormalised, Score::Softmax) => slope(e) * (u(e) - dot),
                _ if !of_chosen => 0.0,
                (GateRule::Unnormalised, Score::Sigmoid) => slope(e) * u(e),
                (GateRule::Softmax | GateRule::Normalised, _) => {
                    slope(e) / sum * (u(e) - dot / sum)
                }
            };
            d as f32
        }));
    }
    dlogits
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[slots]` f32, all slots of the plan's shape, read: the gradient of each routed slot's gate.
    pub dgates: Slice<'a>,
    /// A plan of the shape, read.
    pub plan: Slice<'a>,
    /// `[experts, ceil(tokens / 32)]` u32, read: the experts that gates were made over, those that were
    /// dropped after among them.
    pub chosen: Slice<'a>,
    /// `[tokens, experts]` f32, read: what gates were made of, logits for [`GateRule::Softmax`], else
    /// scores.
    pub source: Slice<'a>,
    /// More factors of the gates.
    pub scales: Scales<Slice<'a>>,
    /// `[tokens, experts]` f32, written whole.
    pub dlogits: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct GatesBackward {
    ctx: Context,
    kernel: Arc<Kernel>,
}

impl GatesBackward {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        Ok(Self { ctx: ctx.clone(), kernel: ctx.kernel(&SPEC, row_prelude(ctx.variant()))? })
    }

    /// The gradient of all logits.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`], or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, shape: &PlanShape, rule: Rule, args: Args<'_>) -> Result<BoundOp> {
        let PlanShape { tokens, experts, .. } = *shape;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        few_experts(experts)?;
        let at = shape.sections()?;
        let slots = shape.slots()?;
        let pairs = [tokens.into(), experts.into()];
        args.dgates.f32s("dgates", &[slots.into()])?;
        args.plan.u32s("plan", &[at.words.into()])?;
        args.chosen.u32s("chosen", &[experts.into(), tokens.div_ceil(32).into()])?;
        args.source.f32s("source", &pairs)?;
        args.dlogits.f32s("dlogits", &pairs)?;
        let Scales { scale_by_count, scale_by_expert } = args.scales;
        if let Some(s) = scale_by_count {
            s.f32s("scale_by_count", &[u64::from(experts) + 1])?;
        }
        if let Some(s) = scale_by_expert {
            s.f32s("scale_by_expert", &[experts.into()])?;
        }
        let params = Params {
            tokens,
            experts,
            rule: rule.gate.number(),
            softmax: u32::from(rule.score == Score::Softmax),
            has_scale_by_count: scale_by_count.is_some().into(),
            has_scale_by_expert: scale_by_expert.is_some().into(),
            scale: rule.scale,
            slots,
            expert_offsets: at.expert_offsets,
            token_offsets: at.token_offsets,
            slot_of: at.slot_of,
        };
        let [by_count, by_expert] =
            [scale_by_count, scale_by_expert].map(|s| or_nothing(&self.ctx, s));
        let Args { dgates, plan, chosen, source, dlogits, .. } = args;
        let slices = [dgates, plan, chosen, source, by_count, by_expert, dlogits];
        let groups = row_groups(self.ctx.variant(), tokens);
        Ok(self.kernel.dispatch(&self.ctx, &params, &slices, groups)?.into())
    }
}
