//! The second half of a layer, for engines with a router of their own.
use super::{Ffn, BoundLayer, PlanKernels, Scratch};
use crate::ops::assign::{self, Assign};
use crate::ops::assign_lists::{self, AssignLists};
use crate::ops::grouped_matmul::{SKINNY_ROWS, tile_rows};
use crate::ops::plan_scan::Lost;
use crate::ops::{plan_count, plan_fill, plan_scan};
use crate::plan::Stats;
use crate::plan::bits;
use crate::routing::few_experts;
use crate::{Activation, Context, Error, ExpertWeights, PlanShape, Result, Slice};
use std::sync::Arc;

/// Which experts work on which tokens, as another router decided; read when the work runs. Pairs that name no token or
/// expert, and those that come twice, are ignored and counted ([`Stats::ignored`]); `u32::MAX` is an empty place.
#[derive(Clone, Copy, Debug)]
pub enum Assignments<'a> {
    /// Each token's experts.
    OfTokens {
        /// K: places of a token.
        top: u32,
        /// `[tokens, K]` u32: expert ids, below E.
        ids: Slice<'a>,
        /// `[tokens, K]` f32.
        gates: Slice<'a>,
    },
    /// Each expert's tokens.
    OfExperts {
        /// Entries of all lists, empty places included; not 0.
        entries: u32,
        /// `[E + 1]` u32: the entries of each expert. Values that decrease or exceed `entries` are clamped.
        offsets: Slice<'a>,
        /// `[entries]` u32: tokens.
        tokens: Slice<'a>,
        /// `[entries]` f32.
        gates: Slice<'a>,
    },
}

/// What the second half of a layer is bound to.
#[derive(Clone, Copy, Debug)]
pub struct ExpertBatch<'a> {
    /// `[tokens, D]` f32, read.
    pub hidden: Slice<'a>,
    /// `[tokens, D]` f32, written; in a range apart from `hidden`, the same buffer allowed.
    pub out: Slice<'a>,
    /// T.
    pub tokens: u32,
    /// Whether the output is added to what `out` holds (a residual) rather than replacing it.
    pub add: bool,
    /// Who works on what.
    pub assignments: Assignments<'a>,
    /// Scratch to share with other layers recorded in order on one queue; its own where absent.
    pub scratch: Option<&'a Scratch>,
}

/// The second half of a layer, for engines with a router of their own: plan, experts, shared experts and combination.
/// Clones share kernels and weights.
#[derive(Clone, Debug)]
pub struct MoeExperts {
    ffn: Ffn,
    shared_experts: u32,
    kernels: Arc<Kernels>,
}

#[derive(Debug)]
struct Kernels {
    assign: Assign,
    lists: AssignLists,
    plan: PlanKernels,
}

impl MoeExperts {
    /// Experts of which the last `shared_experts` are shared: each takes every token with gate 1. Compiles every kernel it
    /// can need, those that the context has not made yet.
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
        few_experts(weights.shape().experts.saturating_sub(shared_experts))?;
        let kernels = Kernels {
            assign: Assign::new(ctx)?,
            lists: AssignLists::new(ctx)?,
            plan: PlanKernels::new(ctx)?,
        };
        let ffn = Ffn::new(ctx, activation, weights)?;
        Ok(Self { ffn, shared_experts, kernels: Arc::new(kernels) })
    }

    /// The weights.
    pub fn weights(&self) -> &ExpertWeights {
        &self.ffn.weights
    }

    /// Makes what is needed to run the experts on these slices. Zero tokens make an empty step.
    ///
    /// # Errors
    ///
    /// Slices that do not fit, zero places or entries, or scratch over the device's limits ([`Error`]).
    pub fn bind(&self, batch: &ExpertBatch<'_>) -> Result<BoundLayer> {
        let ExpertBatch { hidden, out, tokens, add, assignments, scratch } = *batch;
        let (ctx, kernels) = (&self.ffn.ctx, &*self.kernels);
        self.ffn.check(hidden, out, tokens)?;
        let own = Scratch::new();
        let scratch = scratch.unwrap_or(&own);
        let get = |name, bytes| scratch.get(ctx, name, bytes);
        let experts = self.weights().shape().experts - self.shared_experts;
        let stats = get("stats", Stats::bytes(experts))?;
        if tokens == 0 {
            return Ok(BoundLayer::empty(stats));
        }
        let (places, name) = match assignments {
            Assignments::OfTokens { top, .. } => (u64::from(top) * u64::from(tokens), "top"),
            Assignments::OfExperts { entries, .. } => (entries.into(), "entries"),
        };
        crate::error::not_zero(&[(name, u32::from(places > 0))])?;
        let pairs = u64::from(tokens) * u64::from(experts);
        let shape = PlanShape {
            tokens,
            experts,
            shared_experts: self.shared_experts,
            routed_slots: u32::try_from(places.min(pairs))
                .map_err(|_| Error::invalid(name, format!("{places} slots do not fit 32 bits")))?,
            tile_rows: tile_rows(ctx),
            skinny_rows: SKINNY_ROWS,
        };
        let columns = tokens.div_ceil(32);
        let assigned =
            get("assigned", u64::from(experts) * bits::columns(tokens as usize) as u64 * 4)?;
        let gates = get("gates", pairs * 4)?;
        let plan = get("plan", shape.bytes()?)?;

        let (assign, ignored, count) = match assignments {
            Assignments::OfTokens { top, ids, gates: weights } => {
                let ignored = get("ignored", u64::from(columns) * 4)?;
                let args = assign::Args {
                    ids,
                    weights,
                    assigned: assigned.slice(),
                    gates: gates.slice(),
                    ignored: ignored.slice(),
                };
                let dims = assign::Dims { tokens, experts, top };
                (kernels.assign.bind(&dims, args)?, ignored, columns)
            }
            Assignments::OfExperts { entries, offsets, tokens: list, gates: weights } => {
                let ignored = get("ignored", u64::from(experts) * 4)?;
                let args = assign_lists::Args {
                    offsets,
                    list,
                    weights,
                    assigned: assigned.slice(),
                    gates: gates.slice(),
                    ignored: ignored.slice(),
                };
                let dims = assign_lists::Dims { tokens, experts, entries };
                (kernels.lists.bind(&dims, args)?, ignored, experts)
            }
        };
        let (assigned_in, plan_in) = (assigned.slice(), plan.slice());
        let args = plan_count::Args { assigned: assigned_in, gates: None, plan: plan_in };
        let counted = kernels.plan.count.bind(&shape, args)?;
        let lost = Some(Lost { counts: ignored.slice(), dropped: 0, ignored: count });
        let args = plan_scan::Args { lost, offsets: None, plan: plan_in, stats: stats.slice() };
        let scanned = kernels.plan.scan.bind(&shape, args)?;
        let args = plan_fill::Args { assigned: assigned_in, gates: gates.slice(), plan: plan_in };
        let filled = kernels.plan.fill.bind(&shape, args)?;

        let mut step = BoundLayer {
            parts: vec![assign, counted, scanned, filled],
            plan: Some((shape, plan)),
            assigned: Some(assigned),
            gates: Some(gates),
            ..BoundLayer::empty(stats)
        };
        self.ffn.bind(&mut step, hidden, out, add, scratch)?;
        Ok(step)
    }
}
