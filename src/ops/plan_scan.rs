//! Second part of a plan: counts to offsets, active experts, items of the matmuls, statistics. Its CPU
//! twin, with the other parts', is [`HostPlan::cpu`](crate::plan::HostPlan::cpu).
use super::or_nothing;
use crate::device::Kernel;
use crate::device::quirks::check_loops;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::{BoundOp, Context, PlanShape, Result, Slice, Target, Variant};
use std::sync::Arc;

/// See `shaders/plan_scan.wgsl`.
pub const SPEC: Spec = Spec {
    name: "plan_scan",
    body: include_str!("../../shaders/plan_scan.wgsl"),
    params: Params::LAYOUT,
    bindings: &[read("lost", 4), read("offsets", 4), write("plan", 4), write("stats", 4)],
    variants: || Prelude::distinct(Variant::EVERY.map(prelude)),
};

params! {
    tokens: u32, experts: u32, shared_experts: u32, routed_slots: u32, add_stats: u32, drop_count: u32, ignore_count: u32, range_count: u32,
    tile_rows: u32, skinny_rows: u32, expert_offsets: u32, token_offsets: u32, active_experts: u32, skinny_offsets: u32,
    skinny_items: u32, tile_offsets: u32, tile_items: u32,
}

fn lanes(target: Target) -> u32 {
    if target == Target::Serial { 32 } else { 256 }
}

/// Iterations of one lane: its experts three times and their items, its tokens twice, lost, offsets, and three prefix sums.
fn iterations(target: Target, params: &Params) -> u64 {
    let share = |n: u32| u64::from(n.div_ceil(lanes(target)));
    let experts = share(params.experts + params.shared_experts);
    // All rows may be those of one lane's experts, of which each can have every token.
    let shared = u64::from(params.shared_experts) * u64::from(params.tokens);
    let slots = u64::from(params.routed_slots) + shared;
    let rows = slots.min(experts * u64::from(params.tokens));
    let items = rows / u64::from(params.tile_rows.max(1)) + experts;
    let lost = share(params.drop_count.saturating_add(params.ignore_count));
    let sums = 3 * u64::from(lanes(target).ilog2());
    3 * experts + items + 2 * share(params.tokens) + lost + share(params.range_count) + sums
}

fn prelude(variant: Variant) -> Prelude {
    let wg = lanes(variant.target);
    Prelude::new(format!("{wg} lanes"))
        .constant("WG", wg)
        .piece(piece!("plan/prefix_sums"))
        .piece(piece!("plan/scan"))
}

/// Numbers to add up into the statistics, from the kernels before.
#[derive(Clone, Copy, Debug)]
pub struct Lost<'a> {
    /// `[dropped + ignored]` u32, read.
    pub counts: Slice<'a>,
    /// How many of them count drops: [`expert_choice`](super::expert_choice)'s `[experts]`, or 0.
    pub dropped: u32,
    /// How many count ignored ids: [`assign`](super::assign)'s `[ceil(tokens / 32)]`, or 0.
    pub ignored: u32,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// Lost to report.
    pub lost: Option<Lost<'a>>,
    /// `[n]` u32, read: offsets whose clamped ones are to be counted.
    pub offsets: Option<Slice<'a>>,
    /// A plan of the shape that holds counts, read and written.
    pub plan: Slice<'a>,
    /// `[8 + experts]` u32, written whole: see [`Stats`](crate::plan::Stats).
    pub stats: Slice<'a>,
    /// Whether the statistics are added to what `stats` holds (zeros to begin with) rather than
    /// replacing it: sums over the steps and layers that share a buffer.
    pub add_stats: bool,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct PlanScan {
    ctx: Context,
}

impl PlanScan {
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

    /// Offsets, items and statistics.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`], or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, shape: &PlanShape, args: Args<'_>) -> Result<BoundOp> {
        let at = shape.sections()?;
        shape.slots()?;
        args.plan.u32s("plan", &[at.words.into()])?;
        args.stats.u32s("stats", &[8 + u64::from(shape.experts)])?;
        if let Some(l) = args.lost {
            l.counts.u32s("lost", &[u64::from(l.dropped) + u64::from(l.ignored)])?;
        }
        let params = Params {
            tokens: shape.tokens,
            experts: shape.experts,
            shared_experts: shape.shared_experts,
            routed_slots: shape.routed_slots,
            add_stats: args.add_stats.into(),
            drop_count: args.lost.map_or(0, |l| l.dropped),
            ignore_count: args.lost.map_or(0, |l| l.ignored),
            range_count: args.offsets.map_or(0, |o| (o.size / 4) as u32),
            tile_rows: shape.tile_rows,
            skinny_rows: shape.skinny_rows,
            expert_offsets: at.expert_offsets,
            token_offsets: at.token_offsets,
            active_experts: at.active,
            skinny_offsets: at.skinny_offsets,
            skinny_items: at.skinny_items,
            tile_offsets: at.tile_offsets,
            tile_items: at.tile_items,
        };
        let lost = or_nothing(&self.ctx, args.lost.map(|l| l.counts));
        let slices = [lost, or_nothing(&self.ctx, args.offsets), args.plan, args.stats];
        let few = self.ctx.variant().for_tokens(shape.tokens);
        let variant = few.within_loops(iterations(few.target, &params));
        check_loops(&self.ctx, "tokens", shape.tokens, iterations(variant.target, &params))?;
        let kernel = self.ctx.kernel(&SPEC, prelude(variant))?;
        Ok(kernel.dispatch(&self.ctx, &params, &slices, 1)?.into())
    }
}
