//! The kernels of a plan: from the bit set to what the matmuls read.
use super::batch::Batch;
use super::bound::{Routed, Selection};
use super::scratch::Scratch;
use crate::device::Tensor;
use crate::ops::block_plan::{self, BlockPlan};
use crate::ops::expert_choice::{DropArgs, DropDims, ExpertChoice};
use crate::ops::plan_count::{self, Gates, PlanCount};
use crate::ops::plan_fill::{self, PlanFill};
use crate::ops::plan_scan::{self, Lost, OfTokens, PlanScan};
use crate::plan::{Stats, bits};
use crate::{BoundOp, Context, PlanShape, Result, Slice};

/// The kernels of a plan.
#[derive(Debug)]
pub(super) struct Planning {
    ctx: Context,
    count: PlanCount,
    scan: PlanScan,
    fill: PlanFill,
    /// All at once, for few tokens.
    block: BlockPlan,
}

/// What a plan is made of, and the statistics it writes.
pub(super) struct PlanArgs<'a> {
    pub(super) shape: &'a PlanShape,
    /// Tokens that kernels are chosen by.
    pub(super) whole: u32,
    pub(super) assigned: &'a Tensor,
    /// Gates to make; none where they are there.
    pub(super) gates: Option<Gates<'a>>,
    /// `[T, E]` f32.
    pub(super) gate_values: &'a Tensor,
    /// Offsets of the caller's whose clamped ones are counted.
    pub(super) offsets: Option<Slice<'a>>,
    pub(super) plan: &'a Tensor,
    pub(super) stats: &'a Tensor,
    pub(super) add_stats: bool,
    /// What the batch says of its tokens.
    pub(super) of_tokens: OfTokens<'a>,
}

impl Planning {
    pub(super) fn new(ctx: &Context) -> Result<Self> {
        Ok(Self {
            ctx: ctx.clone(),
            count: PlanCount::new(ctx)?,
            scan: PlanScan::new(ctx)?,
            fill: PlanFill::new(ctx)?,
            block: BlockPlan::new(ctx)?,
        })
    }

    /// The plan of a bit set. `lost` are counted by the kernels before.
    pub(super) fn bind(&self, args: &PlanArgs<'_>, lost: Option<Lost<'_>>) -> Result<Vec<BoundOp>> {
        match args.gates {
            Some(gates)
                if lost.is_none()
                    && args.whole <= block_plan::MAX_TOKENS
                    && BlockPlan::fits(args.shape, &gates, &args.of_tokens) =>
            {
                let args_of_block = block_plan::Args {
                    assigned: args.assigned.slice(),
                    gates,
                    offsets: args.offsets,
                    plan: args.plan.slice(),
                    stats: args.stats.slice(),
                    add_stats: args.add_stats,
                };
                Ok(vec![self.block.bind_of(args.shape, args_of_block, args.of_tokens)?])
            }
            _ => {
                let mut parts = vec![self.count(args, args.gates)?];
                parts.extend(self.lists(args, lost)?);
                Ok(parts)
            }
        }
    }

    /// The plan of a bit set of which each expert keeps at most `capacity[0]` tokens, those with the
    /// highest gates. Gates are made before tokens are dropped, and counts anew after.
    pub(super) fn bind_dropping(
        &self,
        args: &PlanArgs<'_>,
        drop: &ExpertChoice,
        capacity: &Tensor,
        scratch: &Scratch,
    ) -> Result<Vec<BoundOp>> {
        let PlanShape { tokens, experts, .. } = *args.shape;
        let dropped = scratch.get("dropped", u64::from(experts) * 4)?;
        let offsets = Tensor::new(&self.ctx, "offsets", &[0, tokens])?;
        let drop_args = DropArgs {
            gates: args.gate_values.slice(),
            offsets: offsets.slice(),
            capacity: capacity.slice(),
            assigned: args.assigned.slice(),
            dropped: dropped.slice(),
        };
        let lost = Lost { counts: dropped.slice(), dropped: experts, ignored: 0 };
        let mut parts = vec![
            self.count(args, args.gates)?,
            drop.bind_drop(&DropDims { tokens, experts }, drop_args)?,
            self.count(args, None)?,
        ];
        parts.extend(self.lists(args, Some(lost))?);
        Ok(parts)
    }

    pub(super) fn count(&self, args: &PlanArgs<'_>, gates: Option<Gates<'_>>) -> Result<BoundOp> {
        let (assigned, plan) = (args.assigned.slice(), args.plan.slice());
        let count = plan_count::Args { assigned, gates, plan };
        self.count.bind_part(args.shape, args.whole, count)
    }

    /// Offsets, items, statistics and lists, from counts.
    fn lists(&self, args: &PlanArgs<'_>, lost: Option<Lost<'_>>) -> Result<[BoundOp; 2]> {
        let (plan, stats) = (args.plan.slice(), args.stats.slice());
        let scan =
            plan_scan::Args { lost, offsets: args.offsets, plan, stats, add_stats: args.add_stats };
        let (assigned, gates) = (args.assigned.slice(), args.gate_values.slice());
        Ok([
            self.scan.bind_of(args.shape, scan, args.of_tokens)?,
            self.fill.bind_among(
                args.shape,
                plan_fill::Args { assigned, gates, plan },
                args.of_tokens.active,
            )?,
        ])
    }
}

/// The tensors that every routing makes, in scratch.
pub(super) struct PlanTensors {
    pub(super) shape: PlanShape,
    pub(super) assigned: Tensor,
    pub(super) gates: Tensor,
    pub(super) plan: Tensor,
    pub(super) stats: Tensor,
    add_stats: bool,
    whole: u32,
}

impl PlanTensors {
    /// Statistics go where the batch says; what a backward pass reads lies in `kept`.
    pub(super) fn new(
        kept: &Scratch,
        scratch: &Scratch,
        shape: PlanShape,
        batch: &Batch<'_>,
    ) -> Result<Self> {
        let PlanShape { tokens, experts, .. } = shape;
        let words = u64::from(experts) * bits::columns(tokens as usize) as u64;
        Ok(Self {
            assigned: kept.get("assigned", words * 4)?,
            gates: scratch.get("gates", u64::from(tokens) * u64::from(experts) * 4)?,
            plan: kept.get("plan", shape.bytes()?)?,
            stats: match batch.stats {
                None => kept.get("stats", Stats::bytes(experts))?,
                Some(stats) => {
                    stats.u32s("stats", &[Stats::bytes(experts) / 4])?;
                    stats.into()
                }
            },
            add_stats: batch.add_stats,
            whole: batch.whole(),
            shape,
        })
    }

    pub(super) fn args<'a>(
        &'a self,
        gates: Option<Gates<'a>>,
        offsets: Option<Slice<'a>>,
        of_tokens: OfTokens<'a>,
    ) -> PlanArgs<'a> {
        PlanArgs {
            shape: &self.shape,
            whole: self.whole,
            assigned: &self.assigned,
            gates,
            gate_values: &self.gates,
            offsets,
            plan: &self.plan,
            stats: &self.stats,
            add_stats: self.add_stats,
            of_tokens,
        }
    }

    pub(super) fn routed(
        self,
        coreset: Option<Tensor>,
        selection: Option<Selection>,
    ) -> (Tensor, Routed) {
        let Self { shape, assigned, gates, plan, stats, .. } = self;
        (
            stats,
            Routed {
                shape,
                plan,
                assigned,
                gates,
                chosen: None,
                dropped: None,
                coreset,
                selection,
            },
        )
    }
}
