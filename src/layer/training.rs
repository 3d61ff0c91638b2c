//! A layer's training step: a forward pass that keeps what its backward pass reads, and that pass.
//!
//! What is kept is the hidden states (the caller's), the pre-activation `z` of both halves, the plan, the
//! router's logits and scores, and the choice before any drop. Neither the gathered rows nor the
//! activation nor the experts' outputs are: they are made again, or not needed (the dataflow of SonicMoE).
use super::MoeLayer;
use super::batch::Batch;
use super::bound::{BoundLayer, Routed};
use super::scratch::Scratch;
use super::training_batch::{Losses, TrainingBatch};
use super::training_bytes::TrainingSizes;
use crate::device::Tensor;
use crate::ops::activation::{self, Activate};
use crate::ops::activation_gradient::{self, ActivationGradient};
use crate::ops::balance_loss::{self, BalanceLoss};
use crate::ops::combine::{self, Combine};
use crate::ops::gates_backward::{self, GatesBackward, Rule};
use crate::ops::grouped_matmul::{self, GroupedMatmul, Rows, SlotRows};
use crate::ops::matmul_transposed::{self, MatmulTransposed, Weights};
use crate::ops::plan_count::Scales;
use crate::ops::router_loss::{self, Coefficients, Counts, RouterLoss};
use crate::ops::weight_gradient::{self, Of, WeightGradient};
use crate::routing::{GateRule, Routing};
use crate::weights::{Projection, WeightType};
use crate::{BoundOp, Error, FloatType, PlanShape, Result, Slice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The backward pass of a [`BoundLayer`]: what [`MoeLayer::bind_training`] returns beside it.
#[derive(Clone, Debug)]
pub struct BoundBackward {
    parts: Vec<BoundOp>,
    forward: Arc<AtomicBool>,
    dlogits: Tensor,
    saved: Scratch,
}

impl BoundBackward {
    /// Records the backward pass into a compute pass of the caller's, after the forward pass.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where the forward pass was not recorded yet: what this one reads would not be
    /// there.
    pub fn record(&self, pass: &mut wgpu::ComputePass<'_>) -> Result<()> {
        if !self.forward.load(Ordering::Relaxed) {
            return Err(Error::invalid("backward", "recorded before its forward pass"));
        }
        for part in &self.parts {
            part.record(pass);
        }
        Ok(())
    }

    /// Records it as a pass of its own into `encoder`.
    ///
    /// # Errors
    ///
    /// As [`BoundBackward::record`].
    pub fn encode(&self, encoder: &mut wgpu::CommandEncoder) -> Result<()> {
        let descriptor = wgpu::ComputePassDescriptor {
            label: Some("moe layer, backward"),
            ..Default::default()
        };
        self.record(&mut encoder.begin_compute_pass(&descriptor))
    }

    /// The dispatches, in order.
    pub fn dispatches(&self) -> impl Iterator<Item = &crate::Dispatch> {
        self.parts.iter().flat_map(BoundOp::dispatches)
    }

    /// The gradient of the router's logits, `[T, E]` f32; there after the backward pass ran, until another
    /// layer uses the scratch.
    pub fn dlogits(&self) -> Slice<'_> {
        self.dlogits.slice()
    }

    /// Bytes on the device that the forward pass keeps for this one, the hidden states apart.
    pub fn saved_bytes(&self) -> u64 {
        self.saved.bytes()
    }
}

/// What both passes have in common.
struct Step<'a> {
    layer: &'a MoeLayer,
    of: &'a TrainingBatch<'a>,
    shape: PlanShape,
    routed: Routed,
    scratch: Scratch,
    z: Tensor,
}

/// What the matmuls call the layer's hidden states.
const OWN: [(&str, &str); 1] = [("x", "hidden")];

impl MoeLayer {
    /// Makes what is needed to train the layer on these slices: its forward pass, which keeps what the
    /// backward pass reads, and that one. Both are recorded as often as the step is to run, one after the
    /// other; nothing is read back. [`MoeLayer::training_bytes`] says beforehand what they take.
    ///
    /// Selection, coreset, counts, factors and bias are constants: nothing is a gradient of them. Gradients
    /// that are written, not added, are zeros for experts without tokens. A NaN in `dout` goes through to
    /// what hangs on it.
    ///
    /// # Errors
    ///
    /// As [`MoeLayer::bind`]; zero tokens; hidden states or gradients that are not f32 of the right shape,
    /// or share memory; gradients of weights in a format that cannot learn (f32 and bf16 can); a balance
    /// loss under a rule that has none; tensors that do not fit the device's bindings ([`Error::Limit`]).
    pub fn bind_training(&self, of: &TrainingBatch<'_>) -> Result<(BoundLayer, BoundBackward)> {
        self.check_training(of)?;
        let batch = &of.batch;
        self.experts.in_out(batch)?;
        let scratch = Scratch::of(batch.scratch, self.context())?;
        let saved = Scratch::new(self.context());
        let batch = batch.with_scratch(&scratch);
        let mut forward = self.routing.bind_saving(&batch, Some(&saved))?;
        let routed =
            forward.routed().ok_or_else(|| Error::invalid("tokens", "must not be 0"))?.clone();
        let shape = routed.shape;
        let slots = u64::from(shape.slots()?);
        let halves = 8 * slots * u64::from(self.config().intermediate);
        let z = if of.recompute_z { &scratch } else { &saved }.get("z", halves)?;
        let step = Step { layer: self, of, shape, routed, scratch, z };

        forward.extend(step.pre_activation()?);
        let h = step.slot_rows("h", self.config().intermediate)?;
        let args = activation::Args {
            z: step.z.slice(),
            plan: step.plan(),
            h: h.slice(),
            intermediate: self.config().intermediate,
        };
        let activate = Activate::new(self.context(), self.config().activation)?;
        forward.extend([activate.bind(&shape, args)?]);
        forward.extend(step.outputs(&h)?);
        let (parts, dlogits) = step.backward()?;
        let backward = BoundBackward { parts, forward: forward.recorded().clone(), dlogits, saved };
        Ok((forward, backward))
    }

    /// Everything that can be said before anything is made.
    fn check_training(&self, of: &TrainingBatch<'_>) -> Result<()> {
        let Batch { tokens, hidden, sequences, routed_slots, active, scratch_limit, .. } = of.batch;
        crate::error::not_zero(&[("tokens", tokens)])?;
        Batch::unused("active", active.is_some(), "training takes every token")?;
        Batch::unused("scratch_limit", scratch_limit.is_some(), "training is not cut")?;
        let [t, d, e] = [tokens, self.config().hidden, self.config().experts].map(u64::from);
        if hidden.float_type != FloatType::F32 {
            let reason = format!("{}, training takes f32", hidden.float_type.name());
            return Err(Error::invalid("hidden", reason));
        }
        of.dout.f32s("dout", &[t, d])?;
        of.dhidden.f32s("dhidden", &[t, d])?;
        for (other, slice) in [("hidden", hidden.slice), ("dout", of.dout)] {
            if of.dhidden.overlaps(&slice) {
                return Err(Error::Overlap { written: "dhidden", other });
            }
        }
        if let Some(router) = of.router {
            router.f32s("router", &[e, d])?;
        }
        if let Some(experts) = of.experts {
            let (own, given) = (self.weights().shape(), experts.shape());
            let sizes = [own, given].map(|s| [s.experts, s.hidden, s.intermediate]);
            if sizes[0] != sizes[1] {
                let reason =
                    format!("[experts, D, F] of {:?}, the weights' are {:?}", sizes[1], sizes[0]);
                return Err(Error::invalid("experts", reason));
            }
            let learns = |t: &WeightType| matches!(t, WeightType::F32 | WeightType::Bf16);
            let all = Projection::ALL.into_iter().flat_map(|p| own.types_there(p));
            if let Some(fixed) = all.into_iter().find(|t| !learns(t)) {
                let reason = format!("{} weights cannot learn: f32 and bf16 can", fixed.name());
                return Err(Error::invalid("experts", reason));
            }
        }
        if let Some(losses) = of.losses {
            let balanced = losses.coefficients.balance != 0.0;
            if balanced && matches!(self.config().routing, Routing::SequenceTop(_)) {
                return Err(Error::invalid("losses", "this rule has no balance loss"));
            }
        }
        let mut sizes = TrainingSizes::new(tokens);
        sizes.sequences = sequences.map(|sequences| sequences.count);
        sizes.routed_slots = routed_slots;
        sizes.recompute_z = of.recompute_z;
        let (saved, scratch) = self.training_tensors(&sizes)?;
        for (name, bytes) in saved.into_iter().chain(scratch) {
            self.context().within(name, bytes)?;
        }
        Ok(())
    }
}

impl Step<'_> {
    fn plan(&self) -> Slice<'_> {
        self.routed.plan.slice()
    }

    /// `[slots, width]` f32 in scratch.
    fn slot_rows(&self, name: &'static str, width: u32) -> Result<Tensor> {
        self.scratch.get(name, 4 * u64::from(self.shape.slots()?) * u64::from(width))
    }

    /// Both halves of `z`.
    fn pre_activation(&self) -> Result<Vec<BoundOp>> {
        let Self { layer, shape, .. } = self;
        let (ctx, weights) = (layer.context(), layer.weights());
        let mut parts = vec![];
        for stage in [grouped_matmul::Stage::Gate, grouped_matmul::Stage::Up] {
            let args = grouped_matmul::Args {
                x: Rows::Tokens(self.of.batch.hidden),
                plan: self.plan(),
                weights,
                places: None,
                out: SlotRows::from(self.z.slice()),
                slots: 0..shape.slots()?,
                columns: 0..layer.config().intermediate,
            };
            let matmul = GroupedMatmul::new(ctx, &weights.shape(), stage)?.bind(shape, args);
            parts.push(matmul.map_err(|e| e.renamed(&OWN))?);
        }
        Ok(parts)
    }

    /// The second matmul, and the combination into the output.
    fn outputs(&self, h: &Tensor) -> Result<[BoundOp; 2]> {
        let Self { layer, shape, .. } = self;
        let (ctx, weights) = (layer.context(), layer.weights());
        let hidden = layer.config().hidden;
        let y = self.slot_rows("y", hidden)?;
        let args = grouped_matmul::Args {
            x: Rows::Slots(SlotRows::from(h)),
            plan: self.plan(),
            weights,
            places: None,
            out: SlotRows::from(&y),
            slots: 0..shape.slots()?,
            columns: 0..hidden,
        };
        let down = GroupedMatmul::new(ctx, &weights.shape(), grouped_matmul::Stage::Down)?;
        let down = down.bind(shape, args)?;
        let Batch { out, add, .. } = self.of.batch;
        let out = out.ok_or_else(|| Error::invalid("out", "missing: `Batch::into_out`"))?;
        let (y, columns) = (y.slice(), 0..hidden);
        let args = combine::Args { y, plan: self.plan(), out, columns, hidden, add };
        Ok([down, Combine::new(ctx)?.bind(shape, args)?])
    }

    /// The whole backward pass, and the gradient of the logits.
    fn backward(&self) -> Result<(Vec<BoundOp>, Tensor)> {
        let [hidden, intermediate] = [self.layer.config().hidden, self.layer.config().intermediate];
        let dz = self.slot_rows("dz", 2 * intermediate)?;
        let hg = self.slot_rows("h", intermediate)?;
        let dgates = self.slot_rows("dgates", 1)?;
        let dx = self.slot_rows("y", hidden)?;
        let mut parts = if self.of.recompute_z { self.pre_activation()? } else { vec![] };
        parts.extend(self.experts(&dz, &hg, &dgates, &dx)?);
        let (of_logits, dlogits) = self.logits(&dgates)?;
        parts.extend(of_logits);
        parts.extend(self.inputs(&dx, &dlogits)?);
        Ok((parts, dlogits))
    }

    /// Through the experts: from `dout` to the gradients of `z`, of the gates, of the weights, and to rows
    /// of slots of the hidden states' gradient.
    fn experts(
        &self,
        dz: &Tensor,
        hg: &Tensor,
        dgates: &Tensor,
        dx: &Tensor,
    ) -> Result<Vec<BoundOp>> {
        let Self { layer, of, shape, .. } = self;
        let (ctx, plan, weights) = (layer.context(), self.plan(), layer.weights());
        let [hidden, intermediate] = [layer.config().hidden, layer.config().intermediate];
        let transposed = |stage, g: Slice<'_>, out: &Tensor, out_stride| {
            let op = MatmulTransposed::new(ctx, &weights.shape(), stage)?;
            let (weights, out) = (Weights::Packed(weights), out.slice());
            let args = matmul_transposed::Args { g, plan, weights, places: None, out, out_stride };
            op.bind(shape, args)
        };
        let gradient = |of_what| -> Result<Option<BoundOp>> {
            let Some(out) = of.experts else { return Ok(None) };
            let op = WeightGradient::new(ctx, &weights.shape())?;
            let args = weight_gradient::Args { of: of_what, plan, out, add: of.add };
            op.bind(shape, args).map(Some)
        };
        let through = activation_gradient::Args {
            z: self.z.slice(),
            plan,
            dz: dz.slice(),
            hg: hg.slice(),
            dgate: dgates.slice(),
            intermediate,
        };
        let through =
            ActivationGradient::new(ctx, layer.config().activation)?.bind(shape, through)?;
        let down = transposed(matmul_transposed::Stage::Down, of.dout, dz, 2 * intermediate);
        let mut parts = vec![down.map_err(|e| e.renamed(&[("g", "dout")]))?, through];
        parts.extend(gradient(Of::Down { dy: of.dout, hg: hg.slice() })?);
        parts.push(transposed(matmul_transposed::Stage::GateUp, dz.slice(), dx, hidden)?);
        parts.extend(gradient(Of::GateUp { dz: dz.slice(), x: of.batch.hidden.slice })?);
        Ok(parts)
    }

    /// From the gates to the logits, losses added.
    fn logits(&self, dgates: &Tensor) -> Result<(Vec<BoundOp>, Tensor)> {
        let Self { layer, shape, routed, .. } = self;
        let PlanShape { tokens, experts, .. } = *shape;
        let (ctx, routing) = (layer.context(), layer.config().routing);
        let missing = || Error::invalid("router", "missing");
        let selection = routed.selection.as_ref().ok_or_else(missing)?;
        let dlogits = self.scratch.get("dlogits", 4 * u64::from(tokens) * u64::from(experts))?;
        let rule = Rule { gate: routing.gate(), score: routing.score(), scale: routing.scale() };
        let by_logits = rule.gate == GateRule::Softmax;
        let router = layer.router();
        let args = gates_backward::Args {
            dgates: dgates.slice(),
            plan: self.plan(),
            chosen: routed.chosen.as_ref().unwrap_or(&routed.assigned).slice(),
            source: if by_logits { &selection.logits } else { selection.scores() }.slice(),
            scales: Scales {
                scale_by_count: router.scale_by_count.as_ref().map(Tensor::slice),
                scale_by_expert: router.scale_by_expert.as_ref().map(Tensor::slice),
            },
            dlogits: dlogits.slice(),
        };
        let mut parts = vec![GatesBackward::new(ctx)?.bind(shape, rule, args)?];
        if let Some(losses) = &self.of.losses {
            parts.extend(self.losses(losses, &selection.logits, &dlogits)?);
        }
        Ok((parts, dlogits))
    }

    fn losses(
        &self,
        losses: &Losses<'_>,
        logits: &Tensor,
        dlogits: &Tensor,
    ) -> Result<Vec<BoundOp>> {
        let Self { layer, shape, routed, .. } = self;
        let PlanShape { tokens, experts, .. } = *shape;
        let (ctx, routing) = (layer.context(), layer.config().routing);
        let experts_per_token = losses.experts_per_token.unwrap_or(routing.experts_per_token());
        let terms = self.scratch.get("terms", 4 * u64::from(2 * tokens).max(experts.into()))?;
        let terms = |count: u32| Slice::new(&terms.buffer, 0, 4 * u64::from(count));
        let Coefficients { router_z, balance } = losses.coefficients;
        let by_tokens = matches!(routing, Routing::TokenChoice(_));
        let counts = by_tokens.then(|| Counts::Plan(*shape, self.plan()));
        // Where some are dropped, the forward pass has counted them.
        let dropped = match &routed.chosen {
            Some(_) if by_tokens => routed.dropped.as_ref().map(Tensor::slice),
            _ => None,
        };
        let args = router_loss::Args {
            logits: logits.slice(),
            counts,
            dropped,
            dlogits: dlogits.slice(),
            add: true,
            terms: terms(2 * tokens),
            values: losses.values,
            add_values: losses.add_values,
        };
        let dims = router_loss::Dims { tokens, experts, experts_per_token };
        let own = Coefficients { router_z, balance: if by_tokens { balance } else { 0.0 } };
        let mut parts = vec![RouterLoss::new(ctx)?.bind(&dims, own, args)?];
        if matches!(routing, Routing::ExpertChoice(_)) {
            let args = balance_loss::Args {
                logits: logits.slice(),
                taken: balance_loss::Taken::Plan(*shape, self.plan()),
                dlogits: dlogits.slice(),
                add: true,
                terms: terms(experts),
                values: losses.values,
                add_values: losses.add_values,
            };
            let dims = balance_loss::Dims { tokens, experts, experts_per_token };
            parts.push(BalanceLoss::new(ctx)?.bind(&dims, balance, args)?);
        }
        Ok(parts)
    }

    /// What slots, logits and the residual give the hidden states, and the gradient of the router.
    fn inputs(&self, dx: &Tensor, dlogits: &Tensor) -> Result<Vec<BoundOp>> {
        let Self { layer, of, shape, .. } = self;
        let (ctx, hidden) = (layer.context(), layer.config().hidden);
        let PlanShape { tokens, experts, .. } = *shape;
        let args = combine::Args {
            y: dx.slice(),
            plan: self.plan(),
            out: of.dhidden.into(),
            columns: 0..hidden,
            hidden,
            add: false,
        };
        let names = [("out", "dhidden"), ("residual", "dout")];
        let sum = Combine::new(ctx)?.bind_sum(shape, args, of.residual.then_some(of.dout));
        let args = matmul_transposed::DenseArgs {
            g: dlogits.slice(),
            weights: layer.router().weight.slice(),
            out: of.dhidden,
            add: true,
        };
        let share = matmul_transposed::Dense::new(ctx, experts, hidden)?.bind(tokens, args);
        let mut parts = vec![sum.map_err(|e| e.renamed(&names))?];
        let names = [("weights", "router weight"), ("out", "dhidden")];
        parts.push(share.map_err(|e| e.renamed(&names))?);
        if let Some(out) = of.router {
            let args = weight_gradient::DenseArgs {
                a: dlogits.slice(),
                b: of.batch.hidden.slice,
                out,
                add: of.add,
            };
            let gradient = weight_gradient::Dense::new(ctx, experts, hidden)?.bind(tokens, args);
            let names = [("b", "hidden"), ("out", "router")];
            parts.push(gradient.map_err(|e| e.renamed(&names))?);
        }
        Ok(parts)
    }
}
