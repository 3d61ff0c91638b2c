//! Routing of a part of a batch whose tokens lie on several devices, under rules by which experts
//! choose over the whole batch.
use super::batch::Batch;
use super::bound::BoundLayer;
use super::choice::{Choice, ChoiceInput};
use super::planning::PlanTensors;
use super::route::MoeRouting;
use super::scratch::Scratch;
use crate::device::Tensor;
use crate::routing::schedule;
use crate::{BoundOp, Error, PlanShape, Result, Slice};

/// The routing of a part of a batch, in two halves: between them the caller makes the experts' choice
/// over the whole batch, from the values of all its parts.
///
/// | rule | [`values`](BoundPart::values) | what an expert takes of the whole batch |
/// |---|---|---|
/// | expert choice | selection values `[T, E]` | the highest of all tokens ([`expert_choice`](crate::ops::expert_choice)) |
/// | token choice with a capacity factor | gates `[T, E]`, at the pairs that [`assigned`](BoundPart::assigned) has | the highest of its own tokens (the same op's drop) |
#[derive(Clone, Debug)]
pub struct BoundPart {
    before: Vec<BoundOp>,
    values: Option<Tensor>,
    after: BoundLayer,
}

impl BoundPart {
    /// Records the first half: the values, and the tokens' own choice where they have one.
    pub fn encode_values(&self, encoder: &mut wgpu::CommandEncoder) {
        if !self.before.is_empty() {
            let label = Some("moe routing, values");
            let descriptor = wgpu::ComputePassDescriptor { label, ..Default::default() };
            let mut pass = encoder.begin_compute_pass(&descriptor);
            for part in &self.before {
                part.record(&mut pass);
            }
        }
    }

    /// `[T, E]` f32, there after the first half; none for zero tokens.
    pub fn values(&self) -> Option<Slice<'_>> {
        self.values.as_ref().map(Tensor::slice)
    }

    /// The bit set `[E, ceil(T / 32)]` u32, to be written whole by the caller before the second half;
    /// its buffer can be copied to. None for zero tokens.
    pub fn assigned(&self) -> Option<Slice<'_>> {
        self.after.assigned()
    }

    /// The second half: gates and plan of what stands in [`BoundPart::assigned`]. Its statistics count
    /// no pair as dropped: what was dropped is known where the choice was made.
    pub fn after(&self) -> &BoundLayer {
        &self.after
    }
}

impl MoeRouting {
    /// Makes what is needed to route a part of a batch ([`Batch::as_part_of`]) under a rule by which
    /// experts choose over the whole batch. Zero tokens make an empty one.
    ///
    /// # Errors
    ///
    /// As [`MoeRouting::bind`]; [`Error::Invalid`] for sequences under expert choice, which are chosen
    /// from apart, and for a rule under which no expert chooses.
    pub fn bind_part(&self, batch: &Batch<'_>) -> Result<BoundPart> {
        let (ctx, tokens, kernels) = (&self.ctx, batch.tokens, &*self.kernels);
        let config = self.config();
        let experts = config.experts;
        Batch::unused("out", batch.out.is_some(), "routing alone writes no output")?;
        let limited = batch.scratch_limit.is_some();
        Batch::unused("scratch_limit", limited, "routing alone has nothing to cut")?;
        let chosen = batch.assignments.is_some();
        Batch::unused("assignments", chosen, "this router makes its own choice")?;
        batch.hidden.holds("hidden", tokens.into(), config.hidden.into())?;
        let others = "what experts choose from is made by other devices too: leave the rows out";
        Batch::unused("active", batch.active.is_some(), others)?;
        kernels.choice.check(batch)?;
        let slots = match &kernels.choice {
            Choice::Experts { rule, .. } => {
                let apart = "sequences are chosen from apart: `MoeRouting::bind`";
                Batch::unused("sequences", batch.sequences.is_some(), apart)?;
                let most = schedule::capacity(batch.whole(), rule.max_experts_per_token, experts);
                let slots = u64::from(experts) * u64::from(most.min(tokens));
                let many =
                    |_| Error::invalid("tokens", format!("{slots} slots do not fit 32 bits"));
                u32::try_from(slots).map_err(many)?
            }
            Choice::Tokens { drop: Some(_), .. } => {
                let count = batch.sequences.map(|sequences| sequences.count);
                kernels.choice.slots(batch.tokens, count, experts)?
            }
            _ => {
                let reason = "no expert chooses under this rule: `MoeRouting::bind`";
                return Err(Error::invalid("routing", reason));
            }
        };
        if tokens == 0 {
            let after = BoundLayer::empty(ctx, experts)?;
            return Ok(BoundPart { before: vec![], values: None, after });
        }
        let scratch = Scratch::of(batch.scratch, ctx)?;
        let slots = batch.routed_slots.map_or(slots, |bound| slots.min(bound)).max(1);
        let shape =
            PlanShape::new(ctx, tokens, experts, slots).with_shared_experts(config.shared_experts);
        let (mut before, selection) = self.bind_router(batch, &scratch, &scratch)?;
        let tensors = PlanTensors::new(&scratch, &scratch, shape, batch)?;
        let gates = self.gates(&selection, &tensors);
        let of_tokens = self.of_tokens(batch);
        let (values, parts, coreset) = match &kernels.choice {
            Choice::Experts { .. } => {
                let parts =
                    kernels.planning.bind(&tensors.args(Some(gates), None, of_tokens), None)?;
                (selection.values().clone(), parts, None)
            }
            _ => {
                let assigned = &tensors.assigned;
                let input = ChoiceInput { tokens, experts, values: selection.values(), assigned };
                let made = kernels.choice.bind(ctx, &scratch, batch, &input)?;
                before.extend(made.parts);
                // Gates before any token is dropped: what stays is not normalised anew.
                before.push(
                    kernels.planning.count(&tensors.args(None, None, of_tokens), Some(gates))?,
                );
                let parts =
                    kernels.planning.bind(&tensors.args(None, made.offsets, of_tokens), None)?;
                (tensors.gates.clone(), parts, made.coreset)
            }
        };
        let (stats, routed) = tensors.routed(coreset, Some(selection));
        let after = BoundLayer::new(parts, stats, routed);
        Ok(BoundPart { before, values: Some(values), after })
    }
}
