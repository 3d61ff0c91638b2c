//! The second half of a layer, for engines with a router of their own.
use super::batch::{Assignments, Batch};
use super::bound::BoundLayer;
use super::experts::Experts;
use super::planning::{PlanTensors, Planning};
use super::scratch::Scratch;
use crate::device::Tensor;
use crate::error::not_zero;
use crate::ops::assign::{self, Assign};
use crate::ops::assign_lists::{self, AssignLists};
use crate::ops::plan_scan::{Lost, OfTokens};
use crate::routing::check;
use crate::{Activation, BoundOp, Context, Error, ExpertWeights, PlanShape, Result, Slice};
use std::sync::Arc;

/// The second half of a layer, for engines with a router of their own: plan, experts, shared
/// experts and combination. Imports expert ids and gates from another router. Clones share kernels
/// and weights.
#[derive(Clone, Debug)]
pub struct MoeExperts {
    experts: Experts,
    shared_experts: u32,
    kernels: Arc<Kernels>,
}

#[derive(Debug)]
struct Kernels {
    assign: Assign,
    lists: AssignLists,
    planning: Planning,
}

impl MoeExperts {
    /// Experts of which the last `shared_experts` are shared: each takes every token with gate 1.
    /// Compiles every kernel it can need, those that the context has not made yet; those for f16 and
    /// bf16 wait for a `bind` of such slices.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for weights without a routed expert, or with more than
    /// [`MAX_EXPERTS`](crate::routing::MAX_EXPERTS); [`Error::Device`] where wgpu refuses a kernel.
    pub fn new(
        ctx: &Context,
        activation: Activation,
        shared_experts: u32,
        weights: ExpertWeights,
    ) -> Result<Self> {
        check::shared_of(weights.shape().experts, shared_experts)?;
        let kernels = Kernels {
            assign: Assign::new(ctx)?,
            lists: AssignLists::new(ctx)?,
            planning: Planning::new(ctx)?,
        };
        let experts = Experts::new(ctx, activation, weights)?;
        Ok(Self { experts, shared_experts, kernels: Arc::new(kernels) })
    }

    /// The weights.
    pub fn weights(&self) -> &ExpertWeights {
        &self.experts.weights
    }

    /// Makes what is needed to run the experts on these slices; the batch brings
    /// [`assignments`](Batch::assignments). Zero tokens make empty work.
    ///
    /// # Errors
    ///
    /// Slices that do not fit, missing or empty assignments, an argument that is for a router,
    /// scratch over the device's limits, or a `scratch_limit` that is too small ([`Error`]).
    pub fn bind(&self, batch: &Batch<'_>) -> Result<BoundLayer> {
        self.bind_whole(batch).map_err(Batch::own_names)
    }

    fn bind_whole(&self, batch: &Batch<'_>) -> Result<BoundLayer> {
        let (ctx, tokens) = (&self.experts.ctx, batch.tokens);
        let in_out = self.experts.in_out(batch)?;
        let router = "the choice is another router's";
        Batch::unused("sequences", batch.sequences.is_some(), router)?;
        Batch::unused("blocks", batch.blocks.is_some(), router)?;
        Batch::unused("experts_per_token", batch.experts_per_token.is_some(), router)?;
        let assignments = batch
            .assignments
            .ok_or_else(|| Error::invalid("assignments", "missing: `Batch::with_assignments`"))?;
        let experts = self.weights().shape().experts - self.shared_experts;
        if tokens == 0 {
            return BoundLayer::empty(ctx, experts);
        }
        batch.check_active()?;
        let (places, name) = match assignments {
            Assignments::OfTokens { experts_per_token, .. } => {
                (u64::from(experts_per_token) * u64::from(tokens), "experts_per_token")
            }
            Assignments::OfExperts { entries, .. } => (entries.into(), "entries"),
        };
        not_zero(&[(name, u32::from(places > 0))])?;
        let slots = places.min(u64::from(tokens) * u64::from(experts));
        let many = |_| Error::invalid(name, format!("{slots} slots do not fit 32 bits"));
        let slots = u32::try_from(slots).map_err(many)?;
        let slots = batch.routed_slots.map_or(slots, |bound| slots.min(bound)).max(1);
        let shape =
            PlanShape::new(ctx, tokens, experts, slots).with_shared_experts(self.shared_experts);
        let scratch = Scratch::of(batch.scratch, ctx)?.counting();
        let tensors = PlanTensors::new(&scratch, &scratch, shape, batch)?;
        let (assign, ignored, count) =
            self.bind_assign(assignments, batch.active, &tensors, &scratch)?;
        let of_tokens = OfTokens { active: batch.active, asked: None };
        let mut parts = vec![assign];
        let lost = Lost { counts: ignored.slice(), dropped: 0, ignored: count };
        parts.extend(self.kernels.planning.bind(&tensors.args(None, None, of_tokens), Some(lost))?);
        let (stats, routed) = tensors.routed(None, None);
        let mut bound = BoundLayer::new(parts, stats, routed);
        self.experts.extend(&mut bound, in_out, &scratch)?;
        Ok(bound)
    }

    /// The assignments as bit set and gates, and how many entries are ignored: a tensor of so many
    /// counts.
    fn bind_assign(
        &self,
        assignments: Assignments<'_>,
        active: Option<Slice<'_>>,
        tensors: &PlanTensors,
        scratch: &Scratch,
    ) -> Result<(BoundOp, Tensor, u32)> {
        let PlanShape { tokens, experts, .. } = tensors.shape;
        let (assigned, gates) = (tensors.assigned.slice(), tensors.gates.slice());
        match assignments {
            Assignments::OfTokens { experts_per_token, ids, gates: weights } => {
                let count = tokens.div_ceil(32);
                let ignored = scratch.get("ignored", u64::from(count) * 4)?;
                let args = assign::Args { ids, weights, assigned, gates, ignored: ignored.slice() };
                let dims = assign::Dims { tokens, experts, experts_per_token };
                let assign = self.kernels.assign.bind_among(&dims, args, active);
                Ok((assign.map_err(|e| e.renamed(&[("weights", "gates")]))?, ignored, count))
            }
            Assignments::OfExperts { entries, offsets, tokens: list, gates: weights } => {
                let ignored = scratch.get("ignored", u64::from(experts) * 4)?;
                let args = assign_lists::Args {
                    offsets,
                    list,
                    weights,
                    assigned,
                    gates,
                    ignored: ignored.slice(),
                };
                let dims = assign_lists::Dims { tokens, experts, entries };
                let own = [("list", "tokens"), ("weights", "gates")];
                let lists = self.kernels.lists.bind_among(&dims, args, active);
                Ok((lists.map_err(|e| e.renamed(&own))?, ignored, experts))
            }
        }
    }
}
