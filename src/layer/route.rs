//! The first half of a layer: router, choice and plan.
use super::batch::Batch;
use super::bound::{BoundLayer, Selection};
use super::choice::{Choice, ChoiceInput};
use super::config::{LayerConfig, Router};
use super::experts::windows;
use super::planning::{PlanTensors, Planning};
use super::scratch::Scratch;
use crate::device::{Tensor, both};
use crate::error::not_zero;
use crate::ops::logits::{self, Logits};
use crate::ops::plan_count::{Gates, Scales};
use crate::ops::plan_scan::{Asked, OfTokens};
use crate::ops::scores::{self, Scores};
use crate::routing::GateRule;
use crate::{BoundOp, Context, PlanShape, Result};
use std::sync::Arc;

/// The first half of a layer, for engines that run the experts themselves: router, choice and plan.
/// Clones share kernels and router.
#[derive(Clone, Debug)]
pub struct MoeRouting {
    pub(super) ctx: Context,
    config: LayerConfig,
    router: Router,
    pub(super) kernels: Arc<Kernels>,
}

#[derive(Debug)]
pub(super) struct Kernels {
    logits: Logits,
    /// None where experts are chosen and weighed by the logits as they are.
    scores: Option<Scores>,
    pub(super) choice: Choice,
    pub(super) planning: Planning,
}

impl MoeRouting {
    /// The router of a layer. Compiles every kernel it can need; those
    /// for f16 and bf16 wait for a `bind` of such slices. Of the experts of `config` only
    /// their number is looked at.
    ///
    /// # Errors
    ///
    /// A rule that makes no sense ([`Routing::check`](crate::routing::Routing::check)), router
    /// tensors of another shape, or what wgpu refuses.
    pub fn new(ctx: &Context, config: LayerConfig, router: Router) -> Result<Self> {
        Self::check(&config, &router)?;
        let LayerConfig { hidden, experts, routing, .. } = config;
        let plain =
            routing.by_logits() && routing.gate() == GateRule::Softmax && router.bias.is_none();
        let scores = || if plain { Ok(None) } else { Scores::new(ctx).map(Some) };
        let (logits_and_scores, choice_and_planning) = both(
            || (Logits::new(ctx, hidden, experts), scores()),
            || both(|| Choice::new(ctx, experts, routing), || Planning::new(ctx)),
        );
        let kernels = Kernels {
            logits: logits_and_scores.0?,
            scores: logits_and_scores.1?,
            choice: choice_and_planning.0?,
            planning: choice_and_planning.1?,
        };
        Ok(Self { ctx: ctx.clone(), config, router, kernels: Arc::new(kernels) })
    }

    /// Fails for a rule that makes no sense, and for router tensors of another shape.
    pub(super) fn check(config: &LayerConfig, router: &Router) -> Result<()> {
        let LayerConfig { hidden, experts, routing, .. } = *config;
        not_zero(&[("hidden", hidden)])?;
        routing.check(experts)?;
        router.check(hidden, experts)
    }

    /// The configuration.
    pub fn config(&self) -> &LayerConfig {
        &self.config
    }

    /// The router's own weights.
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// Makes what is needed to route these tokens. The bound work ends with the plan
    /// ([`BoundLayer::plan`]), the bit set and the gates. Zero tokens make an empty one.
    ///
    /// # Errors
    ///
    /// Slices that do not fit, an argument that the rule does not use, or scratch over the device's
    /// limits ([`Error`](crate::Error)).
    pub fn bind(&self, batch: &Batch<'_>) -> Result<BoundLayer> {
        Batch::unused("out", batch.out.is_some(), "routing alone writes no output")?;
        let limited = batch.scratch_limit.is_some();
        Batch::unused("scratch_limit", limited, "routing alone has nothing to cut")?;
        batch.check_overlaps()?;
        self.bind_of(batch)
    }

    /// As [`MoeRouting::bind`], for a whole layer: `out` is the experts'.
    pub(super) fn bind_of(&self, batch: &Batch<'_>) -> Result<BoundLayer> {
        self.bind_saving(batch, None).map_err(Batch::own_names)
    }

    /// Whether the rule reads scores.
    pub(super) fn has_scores(&self) -> bool {
        self.kernels.scores.is_some()
    }

    /// The plan's shape of so many tokens, in sequences where there are such, with the rule's bound of
    /// slots or a lower one.
    pub(super) fn plan_shape(
        &self,
        tokens: u32,
        sequences: Option<u32>,
        routed_slots: Option<u32>,
    ) -> Result<PlanShape> {
        let LayerConfig { experts, shared_experts, .. } = self.config;
        let slots = self.kernels.choice.slots(tokens, sequences, experts)?;
        // A plan has room for one slot: no binding is empty.
        let slots = routed_slots.map_or(slots, |bound| slots.min(bound)).max(1);
        Ok(PlanShape::new(&self.ctx, tokens, experts, slots).with_shared_experts(shared_experts))
    }

    /// The same; what a backward pass reads goes to `saved`, where that is given, and the choice before
    /// any drop is kept.
    pub(super) fn bind_saving(
        &self,
        batch: &Batch<'_>,
        saved: Option<&Scratch>,
    ) -> Result<BoundLayer> {
        let LayerConfig { hidden, experts, .. } = self.config;
        let (ctx, tokens, kernels) = (&self.ctx, batch.tokens, &*self.kernels);
        batch.hidden.holds("hidden", tokens.into(), hidden.into())?;
        let chosen = batch.assignments.is_some();
        Batch::unused("assignments", chosen, "this router makes its own choice")?;
        kernels.choice.check(batch)?;
        if tokens == 0 {
            return BoundLayer::empty(ctx, experts);
        }
        batch.check_active()?;
        let scratch = Scratch::of(batch.scratch, ctx)?;
        let count = batch.sequences.map(|sequences| sequences.count);
        let shape = self.plan_shape(tokens, count, batch.routed_slots)?;
        let kept = saved.unwrap_or(&scratch);
        let (mut parts, selection) = self.bind_router(batch, kept, &scratch)?;
        let tensors = PlanTensors::new(kept, &scratch, shape, batch)?;
        let values = selection.values();
        let mut chosen = None;
        if let (Some(saved), Choice::Tokens { drop: Some(_), .. }) = (saved, &kernels.choice) {
            // A drop works on the choice where it lies: it is made once more.
            let first = saved.get("chosen", tensors.assigned.size)?;
            let input = ChoiceInput { tokens, experts, values, assigned: &first };
            parts.extend(kernels.choice.bind(ctx, &scratch, batch, &input)?.parts);
            chosen = Some(first);
        }
        let assigned = &tensors.assigned;
        let input = ChoiceInput { tokens, experts, values, assigned };
        let made = kernels.choice.bind(ctx, &scratch, batch, &input)?;
        parts.extend(made.parts);

        let gates = self.gates(&selection, &tensors);
        let args = tensors.args(Some(gates), made.offsets, self.of_tokens(batch));
        parts.extend(match &kernels.choice {
            Choice::Tokens { rule, drop: Some(drop), .. } => {
                let capacity = match made.capacity {
                    Some(capacity) => capacity,
                    None => {
                        let capacity = rule.capacity(tokens, experts).unwrap_or(tokens);
                        Tensor::new(ctx, "capacity", &[capacity])?
                    }
                };
                kernels.planning.bind_dropping(&args, drop, &capacity, kept)?
            }
            _ => kernels.planning.bind(&args, None)?,
        });
        let (stats, mut routed) = tensors.routed(made.coreset, Some(selection));
        if chosen.is_some() {
            routed.dropped = Some(kept.get("dropped", u64::from(experts) * 4)?);
        }
        routed.chosen = chosen;
        Ok(BoundLayer::new(parts, stats, routed))
    }

    /// What the plan is told of the batch's tokens.
    pub(super) fn of_tokens<'a>(&self, batch: &Batch<'a>) -> OfTokens<'a> {
        let most = self.config.routing.experts_per_token();
        let asked = |experts_per_token| Asked { experts_per_token, most };
        OfTokens { active: batch.active, asked: batch.experts_per_token.map(asked) }
    }

    /// How the gates of what is chosen are made.
    pub(super) fn gates<'a>(
        &'a self,
        selection: &'a Selection,
        tensors: &'a PlanTensors,
    ) -> Gates<'a> {
        let routing = self.config.routing;
        let by_logits = routing.gate() == GateRule::Softmax;
        let source = if by_logits { &selection.logits } else { selection.scores() };
        Gates {
            rule: routing.gate(),
            source: source.slice(),
            scale: routing.scale(),
            scales: Scales {
                scale_by_count: self.router.scale_by_count.as_ref().map(Tensor::slice),
                scale_by_expert: self.router.scale_by_expert.as_ref().map(Tensor::slice),
            },
            gates: tensors.gates.slice(),
        }
    }

    /// Logits, and scores where the rule needs them, in `kept`.
    pub(super) fn bind_router(
        &self,
        batch: &Batch<'_>,
        kept: &Scratch,
        scratch: &Scratch,
    ) -> Result<(Vec<BoundOp>, Selection)> {
        let LayerConfig { hidden, experts, routing, .. } = self.config;
        let tokens = batch.tokens;
        let pairs = u64::from(tokens) * u64::from(experts) * 4;
        let logits = kept.get("logits", pairs)?;
        let mut parts = vec![];
        for rows in windows(&self.ctx, "hidden", batch.hidden.float_type, [tokens, hidden])? {
            let args = logits::Args {
                x: batch.hidden.rows(&rows, hidden),
                weights: self.router.weight.slice(),
                logits: logits.slice(),
            };
            let own = [("x", "hidden"), ("weights", "router weight")];
            let logits = self.kernels.logits.bind_rows([tokens, batch.whole()], rows, args);
            parts.push(logits.map_err(|e| e.renamed(&own))?);
        }
        let Some(op) = &self.kernels.scores else {
            return Ok((parts, Selection { logits, scored: None }));
        };
        let (s, r) = (kept.get("scores", pairs)?, scratch.get("selection values", pairs)?);
        let args = scores::Args {
            logits: logits.slice(),
            bias: self.router.bias.as_ref().map(Tensor::slice),
            scores: s.slice(),
            values: r.slice(),
        };
        let (score, by_logits) = (routing.score(), routing.by_logits());
        let scores = op.bind(&scores::Dims { tokens, experts, score, by_logits }, args);
        parts.push(scores.map_err(|e| e.renamed(&[("bias", "router bias")]))?);
        Ok((parts, Selection { logits, scored: Some((s, r)) }))
    }
}
