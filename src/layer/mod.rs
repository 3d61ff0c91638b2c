//! A whole MoE layer: from hidden states to output, recorded in one pass.
use crate::ops::expert_choice::{self, DropArgs};
use crate::ops::grouped_matmul::{
    self as matmul, ItemKind, GroupedMatmul, Logits, LogitsArgs, SKINNY_ROWS, Stage, tile_rows,
};
use crate::ops::plan_count::{self, Gates, Scales};
use crate::ops::plan_scan::{self, Lost};
use crate::ops::{
    block_choice, block_plan, combine, coreset, gather, plan_fill, scores, sequence_top,
    token_choice,
};
use crate::plan::Stats;
use crate::plan::bits;
use crate::routing::{
    Activation, ExpertChoice, GateRule, Routing, Scope, SequenceTop, TokenChoice,
};
use crate::weights::{ExpertShape, ExpertWeights, PANEL};
use crate::{Context, Error, PlanShape, Result, Slice, BoundOp};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

pub mod cached;
mod foreign;
pub use crate::device::Tensor;
pub use foreign::{Assignments, ExpertBatch, MoeExperts};

/// A layer as plain data.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerConfig {
    /// D: hidden size.
    pub hidden: u32,
    /// F: intermediate size of one expert.
    pub intermediate: u32,
    /// E: routed experts.
    pub experts: u32,
    /// Shared experts, each of the routed ones' shape; a shared FFN of intermediate size m F is m of them.
    pub shared_experts: u32,
    /// Activation of the experts.
    pub activation: Activation,
    /// How experts and tokens find each other.
    pub routing: Routing,
}

impl LayerConfig {
    /// Shape of the layer's weights, shared experts included.
    pub fn expert_shape(&self, weight_type: crate::WeightType) -> ExpertShape {
        ExpertShape {
            experts: self.experts.saturating_add(self.shared_experts),
            hidden: self.hidden,
            intermediate: self.intermediate,
            weight_type,
        }
    }
}

/// The router's own weights.
#[derive(Clone, Debug)]
pub struct Router {
    /// `Wr [E, D]` f32.
    pub weight: Tensor,
    /// `[E]` f32, added to what experts are chosen by, never to what they weigh.
    pub bias: Option<Tensor>,
    /// `[E + 1]` f32: a factor for tokens that n experts took (EC-DLM's scaling table).
    pub by_count: Option<Tensor>,
    /// `[E]` f32: a factor of each expert's gates (DiffusionGemma).
    pub by_expert: Option<Tensor>,
}

/// Sequences of a batch, for expert choice within each (and [`SequenceTop`], by the offsets alone): token ranges and
/// capacities, read when the work runs.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// Sequences.
    pub count: u32,
    /// `[count + 1]` u32: token ranges.
    pub offsets: Slice<'a>,
    /// `[count]` u32: tokens of each that are not padding; all where absent.
    pub lengths: Option<Slice<'a>>,
    /// `[count]` u32: tokens that each expert takes of each sequence. Past what `max_experts_per_token` stands for, slots
    /// are cut off and counted as ignored.
    pub capacity: Slice<'a>,
}

/// Blocks of tokens that are decoded together, for block-level rules; read when the work runs.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a> {
    /// Blocks.
    pub count: u32,
    /// `[count + 1]` u32: token ranges, none across a sequence. Tokens outside all blocks are padding: no experts.
    pub offsets: Slice<'a>,
    /// `[tokens]` u32: tokens with 0 have no say in their block's coreset (TEAM); all have one where absent.
    pub voters: Option<Slice<'a>>,
}

/// Tokens of a block where a batch brings no blocks of its own, as LLaDA2.x decodes.
pub const BLOCK: u32 = 32;

/// What a layer is bound to.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// `[tokens, D]` f32, read.
    pub hidden: Slice<'a>,
    /// `[tokens, D]` f32, written; in a range apart from `hidden`, the same buffer allowed.
    pub out: Slice<'a>,
    /// T.
    pub tokens: u32,
    /// Whether the layer's output is added to what `out` holds (a residual) rather than replacing it.
    pub add: bool,
    /// Sequences of expert choice and of [`SequenceTop`] (which takes the offsets alone); one of all tokens, with the rule's own
    /// `experts_per_token`, where absent.
    pub sequences: Option<Sequences<'a>>,
    /// Blocks of a block-level rule; stretches of [`BLOCK`] tokens where absent.
    pub blocks: Option<Blocks<'a>>,
    /// Upper bound of the slots of expert choice, where the sequences' lengths are known better than the worst case that
    /// the layer must assume.
    pub routed_slots: Option<u32>,
    /// Scratch to share with other layers recorded in order on one queue; its own where absent.
    pub scratch: Option<&'a Scratch>,
}

impl<'a> Batch<'a> {
    /// One sequence of `tokens`, output replaced.
    pub fn new(hidden: Slice<'a>, out: Slice<'a>, tokens: u32) -> Self {
        Self {
            hidden,
            out,
            tokens,
            add: false,
            sequences: None,
            blocks: None,
            routed_slots: None,
            scratch: None,
        }
    }

    /// What the first half of the layer is bound to.
    pub(crate) fn routing(&self, scratch: &'a Scratch) -> RoutingBatch<'a> {
        let Self { hidden, tokens, sequences, blocks, routed_slots, .. } = *self;
        RoutingBatch { hidden, tokens, sequences, blocks, routed_slots, scratch: Some(scratch) }
    }
}

/// What the first half of a layer is bound to; fields as in [`Batch`].
#[derive(Clone, Copy, Debug)]
pub struct RoutingBatch<'a> {
    /// `[tokens, D]` f32, read.
    pub hidden: Slice<'a>,
    /// T.
    pub tokens: u32,
    /// Sequences of expert choice and of [`SequenceTop`].
    pub sequences: Option<Sequences<'a>>,
    /// Blocks of a block-level rule.
    pub blocks: Option<Blocks<'a>>,
    /// Upper bound of the slots of expert choice.
    pub routed_slots: Option<u32>,
    /// Scratch to share.
    pub scratch: Option<&'a Scratch>,
}

impl<'a> RoutingBatch<'a> {
    /// One sequence of `tokens`.
    pub fn new(hidden: Slice<'a>, tokens: u32) -> Self {
        Self { hidden, tokens, sequences: None, blocks: None, routed_slots: None, scratch: None }
    }
}

/// The context (by its address), the tensor's name, part and bytes.
type ScratchKey = (usize, &'static str, usize, u64);

/// Buffers between the kernels of a layer. Layers of one context that are bound to one share them: they must then run in order.
/// Nothing is freed before the scratch and all steps bound to it are.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    /// With their contexts, so that no other comes to lie at the address of one.
    buffers: Arc<Mutex<HashMap<ScratchKey, (Context, wgpu::Buffer)>>>,
}

impl Scratch {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    fn get(&self, ctx: &Context, name: &'static str, bytes: u64) -> Result<Tensor> {
        self.part(ctx, name, 0, bytes)
    }

    /// A part of a tensor that lies in several buffers.
    fn part(&self, ctx: &Context, name: &'static str, part: usize, bytes: u64) -> Result<Tensor> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (ctx.address(), name, part, bytes);
        if let Some((_, buffer)) = buffers.get(&key) {
            return Ok(Tensor { buffer: buffer.clone(), offset: 0, size: bytes });
        }
        let buffer = ctx.scratch(name, bytes)?;
        buffers.insert(key, (ctx.clone(), buffer.clone()));
        Ok(Tensor { buffer, offset: 0, size: bytes })
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        let buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        buffers.values().map(|(_, buffer)| buffer.size()).sum()
    }
}

/// A layer: its kernels, compiled, and its weights. Clones share both.
#[derive(Clone, Debug)]
pub struct MoeLayer {
    routing: MoeRouting,
    ffn: Ffn,
}

/// The first half of a layer, for engines that run the experts themselves: router, choice and plan.
#[derive(Clone, Debug)]
pub struct MoeRouting {
    ctx: Context,
    settings: LayerConfig,
    router: Router,
    kernels: Arc<RoutingKernels>,
}

#[derive(Debug)]
struct RoutingKernels {
    logits: Logits,
    scores: Option<scores::Scores>,
    choice: Choice,
    drop: Option<expert_choice::ExpertChoice>,
    plan: PlanKernels,
    block_plan: block_plan::BlockPlan,
}

/// A plan from any source of assignments.
#[derive(Debug)]
struct PlanKernels {
    count: plan_count::PlanCount,
    scan: plan_scan::PlanScan,
    fill: plan_fill::PlanFill,
}

impl PlanKernels {
    fn new(ctx: &Context) -> Result<Self> {
        Ok(Self {
            count: plan_count::PlanCount::new(ctx)?,
            scan: plan_scan::PlanScan::new(ctx)?,
            fill: plan_fill::PlanFill::new(ctx)?,
        })
    }
}

/// What runs a plan.
#[derive(Clone, Debug)]
pub(crate) struct Ffn {
    ctx: Context,
    weights: ExpertWeights,
    kernels: Arc<FfnKernels>,
}

#[derive(Debug)]
struct FfnKernels {
    gate_up: [GroupedMatmul; 2],
    down: [GroupedMatmul; 2],
    combine: combine::Combine,
    /// For hidden states larger than a binding.
    gather: gather::Gather,
}

#[derive(Debug)]
enum Choice {
    Experts(expert_choice::ExpertChoice),
    Tokens(token_choice::TokenChoice),
    Blocks(Box<BlockChoice>),
    Pairs(sequence_top::SequenceTop),
}

/// Each token's own choice, for the votes; the election; the choice inside the coreset.
#[derive(Debug)]
struct BlockChoice {
    /// All three at once, for few tokens; none where there are too many experts.
    fused: Option<block_choice::BlockChoice>,
    own: Option<token_choice::TokenChoice>,
    coreset: coreset::Coreset,
    inside: token_choice::TokenChoice,
}

impl MoeLayer {
    /// A layer from settings and weights. Compiles every kernel it can need, those that the context has not made yet.
    ///
    /// # Errors
    ///
    /// LayerConfig that make no sense ([`Routing::check`]), weights or router tensors of another shape, or what wgpu refuses.
    pub fn new(
        ctx: &Context,
        settings: LayerConfig,
        router: Router,
        weights: ExpertWeights,
    ) -> Result<Self> {
        crate::error::not_zero(&[("intermediate", settings.intermediate)])?;
        let routing = MoeRouting::new(ctx, settings, router)?;
        let shape = weights.shape();
        if shape != settings.expert_shape(shape.weight_type) {
            return Err(Error::invalid("weights", format!("{shape:?} do not fit {settings:?}")));
        }
        Ok(Self { routing, ffn: Ffn::new(ctx, settings.activation, weights)? })
    }

    /// The same router and experts under another rule; the weights' pages are shared, not copied.
    ///
    /// # Errors
    ///
    /// As [`MoeLayer::new`].
    pub fn with_routing(&self, routing: Routing) -> Result<Self> {
        let settings = LayerConfig { routing, ..*self.settings() };
        let routing = MoeRouting::new(&self.ffn.ctx, settings, self.router().clone())?;
        Ok(Self { routing, ffn: self.ffn.clone() })
    }

    /// The same router and experts with the kernels of another context of their device, so in another
    /// [`Variant`](crate::Variant); the weights' pages are shared, not copied.
    ///
    /// # Errors
    ///
    /// As [`MoeLayer::new`].
    pub fn with_context(&self, ctx: &Context) -> Result<Self> {
        Self::new(ctx, *self.settings(), self.router().clone(), self.weights().clone())
    }

    /// The context that the layer was made from.
    pub fn context(&self) -> &Context {
        &self.ffn.ctx
    }

    /// The settings.
    pub fn settings(&self) -> &LayerConfig {
        &self.routing.settings
    }

    /// The weights.
    pub fn weights(&self) -> &ExpertWeights {
        &self.ffn.weights
    }

    /// The router's own weights.
    pub fn router(&self) -> &Router {
        &self.routing.router
    }

    /// Makes what is needed to run the layer on these slices. Zero tokens make an empty step.
    ///
    /// # Errors
    ///
    /// Slices that do not fit, or scratch over the device's limits ([`Error`]).
    pub fn bind(&self, batch: &Batch<'_>) -> Result<BoundLayer> {
        let Batch { hidden, out, tokens, add, .. } = *batch;
        self.ffn.check(hidden, out, tokens)?;
        let own = Scratch::new();
        let scratch = batch.scratch.unwrap_or(&own);
        let mut step = self.routing.bind(&batch.routing(scratch))?;
        self.ffn.bind(&mut step, hidden, out, add, scratch)?;
        Ok(step)
    }
}

impl MoeRouting {
    /// The router of a layer. Compiles every kernel it can need. The experts of `settings` are not looked at: only how many
    /// there are.
    ///
    /// # Errors
    ///
    /// LayerConfig that make no sense ([`Routing::check`]), router tensors of another shape, or what wgpu refuses.
    pub fn new(ctx: &Context, settings: LayerConfig, router: Router) -> Result<Self> {
        let LayerConfig { hidden, experts, .. } = settings;
        crate::error::not_zero(&[("hidden", hidden)])?;
        settings.routing.check(experts)?;
        router.weight.slice().expect("router weight", &[experts.into(), hidden.into()], 4)?;
        for (name, tensor, length) in [
            ("router bias", &router.bias, experts),
            ("by_count", &router.by_count, experts + 1),
            ("by_expert", &router.by_expert, experts),
        ] {
            if let Some(tensor) = tensor {
                tensor.slice().expect(name, &[length.into()], 4)?;
            }
        }
        let routing = settings.routing;
        // Logits that are chosen by and weighed with as they are need no scores.
        let plain =
            routing.by_logits() && routing.gate() == GateRule::Softmax && router.bias.is_none();
        let drop = matches!(routing, Routing::TokenChoice(rule) if rule.capacity_factor.is_some());
        let kernels = RoutingKernels {
            logits: Logits::new(ctx, hidden, experts)?,
            scores: if plain { None } else { Some(scores::Scores::new(ctx)?) },
            choice: match routing {
                Routing::ExpertChoice(_) => Choice::Experts(expert_choice::ExpertChoice::new(ctx)?),
                Routing::TokenChoice(rule) => {
                    let own = |top| token_choice::TokenChoice::new(ctx, experts, top, None);
                    let inside =
                        token_choice::TokenChoice::new(ctx, experts, rule.top, rule.groups)?;
                    match rule.coreset {
                        None => Choice::Tokens(inside),
                        Some(block) => Choice::Blocks(Box::new(BlockChoice {
                            fused: if experts <= block_choice::MAX_EXPERTS {
                                let (top, groups) = (rule.top, rule.groups);
                                Some(block_choice::BlockChoice::new(
                                    ctx, experts, block, top, groups,
                                )?)
                            } else {
                                None
                            },
                            own: block.own_top(rule.top).map(own).transpose()?,
                            coreset: coreset::Coreset::new(ctx, experts, block)?,
                            inside,
                        })),
                    }
                }
                Routing::SequenceTop(_) => Choice::Pairs(sequence_top::SequenceTop::new(ctx)?),
            },
            drop: if drop { Some(expert_choice::ExpertChoice::new(ctx)?) } else { None },
            plan: PlanKernels::new(ctx)?,
            block_plan: block_plan::BlockPlan::new(ctx)?,
        };
        Ok(Self { ctx: ctx.clone(), settings, router, kernels: Arc::new(kernels) })
    }

    /// The settings.
    pub fn settings(&self) -> &LayerConfig {
        &self.settings
    }

    /// The router's own weights.
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// Bound of the routed slots of a batch.
    fn routed_slots(&self, batch: &RoutingBatch<'_>) -> Result<u32> {
        let (tokens, experts) = (batch.tokens, self.settings.experts);
        let slots = match self.settings.routing {
            Routing::TokenChoice(TokenChoice { top, .. })
            | Routing::SequenceTop(SequenceTop { top, .. }) => u64::from(tokens) * u64::from(top),
            Routing::ExpertChoice(rule) => match (batch.sequences, rule.scope) {
                (Some(sequences), Scope::Sequence) => {
                    // At most floor(N k / E), or 1, of each sequence: T k / E and one for each sequence, in sum.
                    let most = u64::from(tokens) * u64::from(rule.max_experts_per_token)
                        / u64::from(experts)
                        + u64::from(sequences.count);
                    most.min(tokens.into()) * u64::from(experts)
                }
                _ => {
                    let k = rule.max_experts_per_token;
                    u64::from(ExpertChoice::capacity(k, tokens, experts)) * u64::from(experts)
                }
            },
        };
        // A plan has room for one: no binding is empty.
        let slots = batch.routed_slots.map_or(slots, |bound| slots.min(bound.into())).max(1);
        u32::try_from(slots)
            .map_err(|_| Error::invalid("tokens", format!("{slots} slots do not fit 32 bits")))
    }

    /// Makes what is needed to route these tokens: the step ends with the plan ([`BoundLayer::plan`]), and with the bit set
    /// and the gates that it was made of. Zero tokens make an empty step.
    ///
    /// # Errors
    ///
    /// Slices that do not fit, or scratch over the device's limits ([`Error`]).
    pub fn bind(&self, batch: &RoutingBatch<'_>) -> Result<BoundLayer> {
        let LayerConfig { hidden, experts, shared_experts, routing, .. } = self.settings;
        let (ctx, tokens, kernels) = (&self.ctx, batch.tokens, &*self.kernels);
        batch.hidden.expect("hidden", &[tokens.into(), hidden.into()], 4)?;
        let own = Scratch::new();
        let scratch = batch.scratch.unwrap_or(&own);
        let stats = scratch.get(ctx, "stats", Stats::bytes(experts))?;
        if tokens == 0 {
            return Ok(BoundLayer::empty(stats));
        }
        let shape = PlanShape {
            tokens,
            experts,
            shared_experts,
            routed_slots: self.routed_slots(batch)?,
            tile_rows: tile_rows(ctx),
            skinny_rows: SKINNY_ROWS,
        };
        let pairs = u64::from(tokens) * u64::from(experts) * 4;
        let get = |name, bytes| scratch.get(ctx, name, bytes);
        let logits = get("logits", pairs)?;
        let gates = get("gates", pairs)?;
        let assigned =
            get("assigned", u64::from(experts) * bits::columns(tokens as usize) as u64 * 4)?;
        let plan = get("plan", shape.bytes()?)?;
        let mut parts = vec![];

        // Router.
        for rows in windows(ctx, "hidden", tokens, hidden)? {
            let args = LogitsArgs {
                x: batch.hidden.rows(&rows, hidden),
                weights: self.router.weight.slice(),
                logits: logits.slice(),
            };
            parts.push(kernels.logits.bind_rows(tokens, rows, args)?);
        }
        let (s, r) = match &kernels.scores {
            None => (logits.clone(), logits.clone()),
            Some(scores) => {
                let (s, r) = (get("s", pairs)?, get("r", pairs)?);
                let args = scores::Args {
                    logits: logits.slice(),
                    bias: self.router.bias.as_ref().map(Tensor::slice),
                    s: s.slice(),
                    r: r.slice(),
                };
                parts.push(scores.bind(
                    scores::Dims { tokens, experts },
                    routing.score(),
                    routing.by_logits(),
                    args,
                )?);
                (s, r)
            }
        };
        let whole = Tensor::new(ctx, "offsets", &[0, tokens])?;
        let mut offsets = None;
        let mut coreset = None;
        match (&kernels.choice, routing) {
            (Choice::Experts(choice), Routing::ExpertChoice(rule)) => {
                let capacity = ExpertChoice::capacity(rule.experts_per_token, tokens, experts);
                let capacity = Tensor::new(ctx, "capacity", &[capacity])?;
                let alone = Sequences {
                    count: 1,
                    offsets: whole.slice(),
                    lengths: None,
                    capacity: capacity.slice(),
                };
                let sequences = batch.sequences.unwrap_or(alone);
                offsets = batch.sequences.map(|s| s.offsets);
                let dims = expert_choice::Dims { tokens, experts, sequences: sequences.count };
                let args = expert_choice::Args {
                    r: r.slice(),
                    offsets: sequences.offsets,
                    lengths: sequences.lengths,
                    capacity: sequences.capacity,
                    assigned: assigned.slice(),
                };
                parts.push(choice.bind(&dims, args)?);
            }
            (Choice::Tokens(choice), _) => {
                let args =
                    token_choice::Args { r: r.slice(), coresets: None, assigned: assigned.slice() };
                parts.push(choice.bind(tokens, args)?);
            }
            (Choice::Blocks(choice), _) => {
                let count = tokens.div_ceil(BLOCK);
                let ends: Vec<u32> =
                    (0..=count).map(|i| i.saturating_mul(BLOCK).min(tokens)).collect();
                let alone = Tensor::new(ctx, "blocks", &ends)?;
                let blocks =
                    batch.blocks.unwrap_or(Blocks { count, offsets: alone.slice(), voters: None });
                offsets = batch.blocks.map(|b| b.offsets);
                let chunks = u64::from(experts.div_ceil(32));
                let members = get("coreset", u64::from(blocks.count) * chunks * 4)?;
                let dims = block_choice::Dims { tokens, blocks: blocks.count };
                let fused = choice.fused.as_ref();
                if let Some(fused) = fused.filter(|_| block_choice::BlockChoice::fits(dims)) {
                    let args = block_choice::Args {
                        r: r.slice(),
                        offsets: blocks.offsets,
                        voters: blocks.voters,
                        assigned: assigned.slice(),
                        members: members.slice(),
                    };
                    parts.push(fused.bind(&dims, args)?);
                } else {
                    let block_of = get("block_of", u64::from(tokens) * 4)?;
                    // Each token's own choice stands where the final one will: it is read before that is written.
                    if let Some(own) = &choice.own {
                        let args = token_choice::Args {
                            r: r.slice(),
                            coresets: None,
                            assigned: assigned.slice(),
                        };
                        parts.push(own.bind(tokens, args)?);
                    }
                    let args = coreset::Args {
                        r: r.slice(),
                        own: choice.own.as_ref().map(|_| assigned.slice()),
                        offsets: blocks.offsets,
                        voters: blocks.voters,
                        members: members.slice(),
                        block_of: block_of.slice(),
                    };
                    parts.push(
                        choice
                            .coreset
                            .bind(&coreset::Dims { tokens, blocks: blocks.count }, args)?,
                    );
                    let coresets = token_choice::Coresets {
                        blocks: blocks.count,
                        coreset: members.slice(),
                        block_of: block_of.slice(),
                    };
                    let args = token_choice::Args {
                        r: r.slice(),
                        coresets: Some(coresets),
                        assigned: assigned.slice(),
                    };
                    parts.push(choice.inside.bind(tokens, args)?);
                }
                coreset = Some(members);
            }
            (Choice::Pairs(choice), Routing::SequenceTop(rule)) => {
                let sequences =
                    batch.sequences.map_or((1, whole.slice()), |s| (s.count, s.offsets));
                offsets = batch.sequences.map(|s| s.offsets);
                let dims =
                    sequence_top::Dims { tokens, experts, sequences: sequences.0, top: rule.top };
                let args = sequence_top::Args {
                    r: r.slice(),
                    offsets: sequences.1,
                    assigned: assigned.slice(),
                };
                parts.push(choice.bind(&dims, args)?);
            }
            (Choice::Experts(_) | Choice::Pairs(_), _) => {
                unreachable!("kernels are made for the routing")
            }
        }

        // Plan.
        let source = if routing.gate() == GateRule::Softmax { &logits } else { &s };
        let gate_args = Gates {
            rule: routing.gate(),
            source: source.slice(),
            scale: routing.scale(),
            scales: Scales {
                by_count: self.router.by_count.as_ref().map(Tensor::slice),
                by_expert: self.router.by_expert.as_ref().map(Tensor::slice),
            },
            gates: gates.slice(),
        };
        let count = |gates| {
            kernels.plan.count.bind(
                &shape,
                plan_count::Args { assigned: assigned.slice(), gates, plan: plan.slice() },
            )
        };
        if kernels.drop.is_none() && tokens <= block_plan::MAX_TOKENS {
            let args = block_plan::Args {
                assigned: assigned.slice(),
                gates: gate_args,
                offsets,
                plan: plan.slice(),
                stats: stats.slice(),
            };
            parts.push(kernels.block_plan.bind(&shape, args)?);
        } else {
            parts.push(count(Some(gate_args))?);
            let dropped = get("dropped", u64::from(experts) * 4)?;
            let mut lost = None;
            if let (Some(choice), Routing::TokenChoice(rule)) = (&kernels.drop, routing) {
                let capacity = Tensor::new(
                    ctx,
                    "capacity",
                    &[rule.capacity(tokens, experts).unwrap_or(tokens)],
                )?;
                let args = DropArgs {
                    gates: gates.slice(),
                    offsets: whole.slice(),
                    capacity: capacity.slice(),
                    assigned: assigned.slice(),
                    dropped: dropped.slice(),
                };
                parts.push(choice.bind_drop(tokens, experts, args)?);
                parts.push(count(None)?);
                lost = Some(Lost { counts: dropped.slice(), dropped: experts, ignored: 0 });
            }
            let args =
                plan_scan::Args { lost, offsets, plan: plan.slice(), stats: stats.slice() };
            parts.push(kernels.plan.scan.bind(&shape, args)?);
            let args = plan_fill::Args {
                assigned: assigned.slice(),
                gates: gates.slice(),
                plan: plan.slice(),
            };
            parts.push(kernels.plan.fill.bind(&shape, args)?);
        }

        Ok(BoundLayer {
            parts,
            stats,
            plan: Some((shape, plan)),
            assigned: Some(assigned),
            gates: Some(gates),
            coreset,
            selection: Some((logits, s, r)),
        })
    }
}

impl Ffn {
    pub(crate) fn new(
        ctx: &Context,
        activation: Activation,
        weights: ExpertWeights,
    ) -> Result<Self> {
        let shape = weights.shape();
        let gate_up = |class| GroupedMatmul::new(ctx, &shape, Stage::GateUp(activation), class);
        let down = |class| GroupedMatmul::new(ctx, &shape, Stage::Down, class);
        let kernels = FfnKernels {
            gate_up: [gate_up(ItemKind::Skinny)?, gate_up(ItemKind::Tile)?],
            down: [down(ItemKind::Skinny)?, down(ItemKind::Tile)?],
            combine: combine::Combine::new(ctx)?,
            gather: gather::Gather::new(ctx)?,
        };
        Ok(Self { ctx: ctx.clone(), weights, kernels: Arc::new(kernels) })
    }

    /// Checks of the slices that a batch is read from and written to.
    pub(crate) fn check(&self, hidden: Slice<'_>, out: Slice<'_>, tokens: u32) -> Result<()> {
        let shape = [tokens.into(), self.weights.shape().hidden.into()];
        hidden.expect("hidden", &shape, 4)?;
        out.expect("out", &shape, 4)?;
        if hidden.overlaps(&out) {
            return Err(Error::Overlap { written: "out", other: "hidden" });
        }
        Ok(())
    }

    /// Adds the experts and the combination to a step that ends with its plan.
    fn bind(
        &self,
        step: &mut BoundLayer,
        x: Slice<'_>,
        out: Slice<'_>,
        add: bool,
        scratch: &Scratch,
    ) -> Result<()> {
        let Some((shape, plan)) = step.plan() else { return Ok(()) };
        let ExpertParts { gate_up, down } =
            self.parts((&shape, plan), (x, out, add), scratch, None)?;
        step.parts.extend(gate_up);
        for (matmuls, combine) in down {
            step.parts.extend(matmuls);
            step.parts.extend(combine);
        }
        Ok(())
    }

    /// The part of a step that follows its plan: `h` in stretches of slots, `y` in stretches of columns, each within a
    /// binding. With `places`, the weights hold only some experts at a time ([`matmul::Args::places`]), and each
    /// stretch of `y` keeps its own buffer, so that they can be computed expert by expert before any is combined.
    pub(crate) fn parts(
        &self,
        (shape, plan): (&PlanShape, Slice<'_>),
        (x, out, add): (Slice<'_>, Slice<'_>, bool),
        scratch: &Scratch,
        places: Option<Slice<'_>>,
    ) -> Result<ExpertParts> {
        let ExpertShape { hidden, intermediate, .. } = self.weights.shape();
        let (ctx, tokens, kernels) = (&self.ctx, shape.tokens, &*self.kernels);
        let slots = shape.slots()?;
        let x_windows = windows(ctx, "hidden", tokens, hidden)?;
        // Where `hidden` does not fit a binding, the rows of each stretch's slots are copied together, window by window.
        let gathered = x_windows.len() > 1;
        let widest = if gathered { intermediate.max(hidden) } else { intermediate };
        let most_rows = (ctx.max_binding() / 4 / u64::from(widest)).clamp(1, slots.into()) as u32;
        let x_rows = if gathered {
            let bytes = u64::from(most_rows) * u64::from(hidden) * 4;
            Some((&kernels.gather, scratch.get(ctx, "x", bytes)?))
        } else {
            None
        };
        let stretches: Vec<(Range<u32>, Tensor)> = chunks(slots, most_rows)
            .into_iter()
            .enumerate()
            .map(|(i, rows)| {
                let bytes = u64::from(rows.end - rows.start) * u64::from(intermediate) * 4;
                Ok((rows, scratch.part(ctx, "h", i, bytes)?))
            })
            .collect::<Result<_>>()?;
        let classes: &[usize] = if tokens <= SKINNY_ROWS { &[0] } else { &[0, 1] };
        let [gate_up_pages, down_pages] = self.weights.page_counts();
        let mut gate_up = vec![];
        for (rows, h) in &stretches {
            if let Some((gather, x_rows)) = &x_rows {
                for window in &x_windows {
                    gate_up.push(gather.bind_window(
                        shape,
                        gather::WindowArgs {
                            x: x.rows(window, hidden),
                            tokens: window.clone(),
                            plan,
                            slots: rows.clone(),
                            out: x_rows.slice(),
                            hidden,
                        },
                    )?);
                }
            }
            for page in 0..gate_up_pages {
                for &class in classes {
                    gate_up.push(kernels.gate_up[class].bind(matmul::Args {
                        x: x_rows.as_ref().map_or(x, |(_, x)| x.slice()),
                        gather: !gathered,
                        shape,
                        plan,
                        weights: &self.weights,
                        page,
                        places,
                        out: h.slice(),
                        slots: rows.clone(),
                        columns: 0..intermediate,
                        x_slot: rows.start,
                        out_slot: rows.start,
                    })?);
                }
            }
        }
        let most_columns = (ctx.max_binding() / 4 / u64::from(slots))
            .min(u64::from(hidden).next_multiple_of(PANEL.into()))
            as u32;
        let most_columns = most_columns / PANEL * PANEL;
        if most_columns == 0 {
            let need = u64::from(slots) * 4 * u64::from(PANEL);
            let limit = "max_storage_buffer_binding_size";
            return Err(Error::Limit { name: "tokens", limit, need, have: ctx.max_binding() });
        }
        let out_windows = windows(ctx, "out", tokens, hidden)?;
        let mut down = vec![];
        for (i, columns) in chunks(hidden, most_columns).into_iter().enumerate() {
            let bytes = u64::from(slots) * u64::from(columns.end - columns.start) * 4;
            let y = scratch.part(ctx, "y", if places.is_some() { i } else { 0 }, bytes)?;
            let mut matmuls = vec![];
            for (rows, h) in &stretches {
                for page in 0..down_pages {
                    for &class in classes {
                        matmuls.push(kernels.down[class].bind(matmul::Args {
                            x: h.slice(),
                            gather: false,
                            shape,
                            plan,
                            weights: &self.weights,
                            page,
                            places,
                            out: y.slice(),
                            slots: rows.clone(),
                            columns: columns.clone(),
                            x_slot: rows.start,
                            out_slot: 0,
                        })?);
                    }
                }
            }
            let mut combine = vec![];
            for window in &out_windows {
                let args = combine::Args {
                    y: y.slice(),
                    plan,
                    out: out.rows(window, hidden),
                    columns: columns.clone(),
                    hidden,
                    add,
                };
                combine.push(kernels.combine.bind_tokens(shape, window.clone(), args)?);
            }
            down.push((matmuls, combine));
        }
        Ok(ExpertParts { gate_up, down })
    }
}

/// The dispatches that follow a plan.
pub(crate) struct ExpertParts {
    pub(crate) gate_up: Vec<BoundOp>,
    /// The second matmul of each stretch of columns, and what combines it into `out`.
    pub(crate) down: Vec<(Vec<BoundOp>, Vec<BoundOp>)>,
}

/// Rows `[rows, width]` f32 in stretches that each fit a binding and start where one may start; one of all where they fit.
fn windows(ctx: &Context, name: &'static str, rows: u32, width: u32) -> Result<Vec<Range<u32>>> {
    let (have, row) = (ctx.max_binding(), u64::from(width) * 4);
    if u64::from(rows) * row <= have {
        return Ok(chunks(rows, rows.max(1)));
    }
    // A power of two, so that the rows from one aligned start to the next are one, too.
    let alignment = u64::from(ctx.limits().min_storage_buffer_offset_alignment);
    let apart = (alignment >> row.trailing_zeros()).max(1);
    let most = have / row / apart * apart;
    if most == 0 {
        let limit = "max_storage_buffer_binding_size";
        return Err(Error::Limit { name, limit, need: apart * row, have });
    }
    Ok(chunks(rows, most as u32)) // fewer than `rows`
}

/// `0..n` in stretches of at most `step`.
fn chunks(n: u32, step: u32) -> Vec<Range<u32>> {
    (0..n).step_by(step as usize).map(|i| i..i.saturating_add(step).min(n)).collect()
}

/// A layer bound to a batch. Recording it makes nothing; what the bound buffers hold is read when the work runs.
#[derive(Clone, Debug)]
pub struct BoundLayer {
    parts: Vec<BoundOp>,
    stats: Tensor,
    plan: Option<(PlanShape, Tensor)>,
    assigned: Option<Tensor>,
    gates: Option<Tensor>,
    coreset: Option<Tensor>,
    selection: Option<(Tensor, Tensor, Tensor)>,
}

impl BoundLayer {
    fn empty(stats: Tensor) -> Self {
        Self {
            parts: vec![],
            stats,
            plan: None,
            assigned: None,
            gates: None,
            coreset: None,
            selection: None,
        }
    }

    /// Records the layer as one pass of `encoder`.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder) {
        if !self.parts.is_empty() {
            let descriptor =
                wgpu::ComputePassDescriptor { label: Some("moe layer"), ..Default::default() };
            self.record_in(&mut encoder.begin_compute_pass(&descriptor));
        }
    }

    /// Records the layer into a pass of the caller's.
    pub fn record_in(&self, pass: &mut wgpu::ComputePass<'_>) {
        for part in &self.parts {
            part.record(pass);
        }
    }

    /// The dispatches, in order.
    pub fn dispatches(&self) -> impl Iterator<Item = &crate::Dispatch> {
        self.parts.iter().flat_map(BoundOp::dispatches)
    }

    /// What the step did, `[8 + E]` u32 ([`Stats::from_words`]); there after it ran.
    pub fn stats(&self) -> Slice<'_> {
        self.stats.slice()
    }

    /// The plan and its shape; none for a step of zero tokens.
    pub fn plan(&self) -> Option<(PlanShape, Slice<'_>)> {
        self.plan.as_ref().map(|(shape, plan)| (*shape, plan.slice()))
    }

    /// The bit set `[E, ceil(T / 32)]`.
    pub fn assigned(&self) -> Option<Slice<'_>> {
        self.assigned.as_ref().map(Tensor::slice)
    }

    /// Gates `[T, E]` f32, at assigned pairs.
    pub fn gates(&self) -> Option<Slice<'_>> {
        self.gates.as_ref().map(Tensor::slice)
    }

    /// The coresets `[blocks, ceil(E / 32)]` of a block-level rule.
    pub fn coreset(&self) -> Option<Slice<'_>> {
        self.coreset.as_ref().map(Tensor::slice)
    }

    /// Logits, scores `s` and selection values `r`, each `[T, E]` f32 (one buffer where a rule needs no scores).
    pub fn selection(&self) -> Option<[Slice<'_>; 3]> {
        self.selection.as_ref().map(|(g, s, r)| [g.slice(), s.slice(), r.slice()])
    }
}

/// The router on the host.
#[derive(Clone, Copy, Debug)]
pub struct HostRouter<'a> {
    /// `[E, D]`.
    pub weight: &'a [f32],
    /// `[E]`.
    pub bias: Option<&'a [f32]>,
    /// `[E + 1]`.
    pub by_count: Option<&'a [f32]>,
    /// `[E]`.
    pub by_expert: Option<&'a [f32]>,
}

/// Sequences on the host: offsets `[n + 1]`, lengths `[n]`, capacities `[n]`.
#[derive(Clone, Copy, Debug)]
pub struct HostSequences<'a> {
    /// Token ranges.
    pub offsets: &'a [u32],
    /// Tokens that are not padding.
    pub lengths: Option<&'a [u32]>,
    /// Tokens that each expert takes.
    pub capacity: &'a [u32],
}

/// Blocks on the host: offsets `[n + 1]`, voters `[T]`.
#[derive(Clone, Copy, Debug)]
pub struct HostBlocks<'a> {
    /// Token ranges.
    pub offsets: &'a [u32],
    /// Tokens with 0 have no say.
    pub voters: Option<&'a [u32]>,
}

/// What a batch brings of its own, on the host; as in [`Batch`] where absent.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostBatch<'a> {
    /// Sequences of expert choice and of [`SequenceTop`](Routing::SequenceTop).
    pub sequences: Option<HostSequences<'a>>,
    /// Blocks of block-level rules.
    pub blocks: Option<HostBlocks<'a>>,
}

/// A layer's routing on the CPU: what each twin makes of the values before it.
#[derive(Clone, Debug, PartialEq)]
pub struct HostRouting {
    /// The coresets `[blocks, ceil(E / 32)]` of a block-level rule.
    pub coreset: Option<Vec<u32>>,
    /// The bit set `[E, ceil(T / 32)]`.
    pub assigned: Vec<u32>,
    /// Gates `[T, E]`, 0 elsewhere.
    pub gates: Vec<f32>,
    /// Tokens that each expert dropped.
    pub dropped: Vec<u32>,
}

/// The CPU twin of a layer's choice and gates, from logits, scores and selection values `[T, E]` (the device's own, for an
/// exact comparison, or [`matmul::cpu_logits`] and [`scores::cpu`]).
///
/// # Panics
///
/// If the lengths do not fit together.
pub fn cpu_routing(
    settings: &LayerConfig,
    router: &HostRouter<'_>,
    batch: HostBatch<'_>,
    [logits, s, r]: [&[f32]; 3],
) -> HostRouting {
    let experts = settings.experts as usize;
    let tokens = (logits.len() / experts) as u32;
    let routing = settings.routing;
    let mut coreset = None;
    let assigned = match routing {
        Routing::ExpertChoice(rule) => {
            let capacity =
                [ExpertChoice::capacity(rule.experts_per_token, tokens, settings.experts)];
            let alone = HostSequences { offsets: &[0, tokens], lengths: None, capacity: &capacity };
            let HostSequences { offsets, lengths, capacity } = batch.sequences.unwrap_or(alone);
            expert_choice::cpu(r, experts, offsets, lengths, capacity)
        }
        Routing::TokenChoice(TokenChoice { top, groups, coreset: None, .. }) => {
            token_choice::cpu(r, experts, top as usize, groups, &|_, _| true)
        }
        Routing::TokenChoice(TokenChoice { top, groups, coreset: Some(rule), .. }) => {
            let ends: Vec<u32> =
                (0..=tokens.div_ceil(BLOCK)).map(|i| (i * BLOCK).min(tokens)).collect();
            let blocks = batch.blocks.unwrap_or(HostBlocks { offsets: &ends, voters: None });
            let own = rule
                .own_top(top)
                .map(|top| token_choice::cpu(r, experts, top as usize, None, &|_, _| true));
            let own = own.unwrap_or_default();
            let (members, block_of) =
                coreset::cpu(rule, r, experts, &own, blocks.offsets, blocks.voters);
            let eligible = |t: usize, e: usize| {
                let row = block_of[t] as usize * experts.div_ceil(32);
                block_of[t] != u32::MAX && members[row + e / 32] >> (e % 32) & 1 == 1
            };
            let assigned = token_choice::cpu(r, experts, top as usize, groups, &eligible);
            coreset = Some(members);
            assigned
        }
        Routing::SequenceTop(rule) => {
            let whole = [0, tokens];
            let offsets = batch.sequences.map_or(&whole[..], |s| s.offsets);
            sequence_top::cpu(r, experts, rule.top as usize, offsets)
        }
    };
    let source = if routing.gate() == GateRule::Softmax { logits } else { s };
    let scales = Scales { by_count: router.by_count, by_expert: router.by_expert };
    let mut gates =
        plan_count::cpu(&assigned, source, experts, routing.gate(), routing.scale(), scales);
    let capacity = match routing {
        Routing::TokenChoice(rule) => rule.capacity(tokens, settings.experts),
        Routing::ExpertChoice(_) | Routing::SequenceTop(_) => None,
    };
    let Some(capacity) = capacity else {
        return HostRouting { coreset, assigned, gates, dropped: vec![0; experts] };
    };
    let (kept, dropped) = expert_choice::cpu_drop(&gates, experts, &assigned, capacity);
    for t in 0..tokens as usize {
        for e in 0..experts {
            if !bits::get(&kept, tokens as usize, e, t) {
                gates[t * experts + e] = 0.0;
            }
        }
    }
    HostRouting { coreset, assigned: kept, gates, dropped }
}

/// An expert's matrix on the host, `[out, in]`; shared experts follow the routed ones.
pub type HostExperts<'a> =
    &'a (dyn Fn(u32, crate::weights::Projection) -> crate::weights::HostWeights<'a> + Sync);

/// The CPU twin of a layer's experts: the output row `[D]` of one token, whose hidden state is `x [D]`, given its gates
/// `[E]` and which experts took it.
///
/// # Panics
///
/// If the lengths do not fit together.
pub fn cpu_token(
    settings: &LayerConfig,
    experts: HostExperts<'_>,
    x: &[f32],
    chosen: &[(u32, f32)],
) -> Vec<f32> {
    use crate::weights::Projection::{Down, Gate, Up};
    let mut out = vec![0f64; x.len()];
    let shared = (settings.experts..settings.experts + settings.shared_experts).map(|e| (e, 1.0));
    for (e, gate) in chosen.iter().copied().chain(shared) {
        let [g, u, d] = [Gate, Up, Down].map(|p| experts(e, p));
        let weights: [&dyn Fn(usize) -> f32; 3] = [&|i| g.get(i), &|i| u.get(i), &|i| d.get(i)];
        let y = matmul::cpu_expert(x, settings.intermediate as usize, settings.activation, weights);
        for (out, y) in out.iter_mut().zip(y) {
            *out += f64::from(gate) * f64::from(y);
        }
    }
    out.into_iter().map(|v| v as f32).collect()
}

/// The CPU twin of a whole layer: the output `[T, D]` for hidden states `x [T, D]`. Where two selection values lie within
/// rounding of each other, a device may choose the other one; [`cpu_routing`] takes the device's own values instead.
///
/// # Panics
///
/// If the lengths do not fit together.
pub fn cpu(
    settings: &LayerConfig,
    router: &HostRouter<'_>,
    batch: HostBatch<'_>,
    experts: HostExperts<'_>,
    x: &[f32],
) -> Vec<f32> {
    let (d, e) = (settings.hidden as usize, settings.experts as usize);
    let logits = matmul::cpu_logits(x, router.weight, d);
    let LayerConfig { routing, .. } = settings;
    let (s, r) = scores::cpu(&logits, e, routing.score(), routing.by_logits(), router.bias);
    let chosen = cpu_routing(settings, router, batch, [&logits, &s, &r]);
    let tokens = x.len() / d;
    let of_token = |t: usize| -> Vec<(u32, f32)> {
        let experts = bits::experts_of(&chosen.assigned, tokens, t);
        experts.into_iter().map(|i| (i as u32, chosen.gates[t * e + i])).collect()
    };
    let rows = x.chunks_exact(d).enumerate();
    rows.flat_map(|(t, row)| cpu_token(settings, experts, row, &of_token(t))).collect()
}
