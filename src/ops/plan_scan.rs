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
    bindings: &[
        read("lost", 4),
        read("offsets", 4),
        read("active_bits", 4),
        read("experts_per_token", 4),
        write("plan", 4),
        write("stats", 4),
    ],
    variants: || Prelude::distinct(Variant::EVERY.map(prelude)),
};

params! {
    tokens: u32, experts: u32, shared_experts: u32, routed_slots: u32, add_stats: u32, drop_count: u32, ignore_count: u32, range_count: u32,
    tile_rows: u32, skinny_rows: u32, expert_offsets: u32, token_offsets: u32, active_experts: u32, skinny_offsets: u32,
    skinny_items: u32, tile_offsets: u32, tile_items: u32, ranks: u32, has_active: u32, most_experts: u32,
}

fn lanes(target: Target) -> u32 {
    if target == Target::Serial { 32 } else { 256 }
}

/// Iterations of one lane: its experts three times and their items, its tokens thrice, its words of active
/// ones twice, lost, offsets, and four prefix sums.
fn iterations(target: Target, params: &Params) -> u64 {
    let share = |n: u32| u64::from(n.div_ceil(lanes(target)));
    let experts = share(params.experts + params.shared_experts);
    // All rows may be those of one lane's experts, of which each can have every token.
    let shared = u64::from(params.shared_experts) * u64::from(params.tokens);
    let slots = u64::from(params.routed_slots) + shared;
    let rows = slots.min(experts * u64::from(params.tokens));
    let items = rows / u64::from(params.tile_rows.max(1)) + experts;
    let lost = share(params.drop_count.saturating_add(params.ignore_count));
    let sums = 4 * u64::from(lanes(target).ilog2());
    let active = 2 * u64::from(params.has_active) * share(params.tokens.div_ceil(32));
    let numbers = u64::from(params.most_experts.min(1)) * share(params.tokens);
    3 * experts
        + items
        + 2 * share(params.tokens)
        + active
        + numbers
        + lost
        + share(params.range_count)
        + sums
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

/// Numbers of experts that tokens ask for, of which too large ones are counted.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// `[tokens]` u32, read.
    pub experts_per_token: Slice<'a>,
    /// K: what a larger one is taken for; not 0.
    pub most: u32,
}

/// What a batch says of its tokens beside the choice.
#[derive(Clone, Copy, Debug, Default)]
pub struct OfTokens<'a> {
    /// `[ceil(tokens / 32)]` u32, read: shared experts take these tokens alone, and only these are
    /// counted where no expert took them; all where absent. [`plan_fill`](super::plan_fill) must have
    /// the same.
    pub active: Option<Slice<'a>>,
    /// Numbers of experts to look at.
    pub asked: Option<Asked<'a>>,
}

impl OfTokens<'_> {
    /// Errors for slices that do not fit.
    pub(super) fn check(&self, tokens: u32) -> Result<()> {
        if let Some(active) = self.active {
            active.u32s("active", &[tokens.div_ceil(32).into()])?;
        }
        if let Some(asked) = self.asked {
            asked.experts_per_token.u32s("experts_per_token", &[tokens.into()])?;
        }
        Ok(())
    }
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
        self.bind_of(shape, args, OfTokens::default())
    }

    /// As [`PlanScan::bind`], by what the batch says of its tokens.
    ///
    /// # Errors
    ///
    /// As [`PlanScan::bind`].
    pub fn bind_of(
        &self,
        shape: &PlanShape,
        args: Args<'_>,
        of_tokens: OfTokens<'_>,
    ) -> Result<BoundOp> {
        let at = shape.sections()?;
        of_tokens.check(shape.tokens)?;
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
            ranks: at.ranks,
            has_active: of_tokens.active.is_some().into(),
            most_experts: of_tokens.asked.map_or(0, |asked| asked.most),
        };
        let optional = [
            args.lost.map(|l| l.counts),
            args.offsets,
            of_tokens.active,
            of_tokens.asked.map(|asked| asked.experts_per_token),
        ];
        let [lost, offsets, active, tops] = optional.map(|slice| or_nothing(&self.ctx, slice));
        let slices = [lost, offsets, active, tops, args.plan, args.stats];
        let few = self.ctx.variant().for_tokens(shape.tokens);
        let variant = few.within_loops(iterations(few.target, &params));
        check_loops(&self.ctx, "tokens", shape.tokens, iterations(variant.target, &params))?;
        let kernel = self.ctx.kernel(&SPEC, prelude(variant))?;
        Ok(kernel.dispatch(&self.ctx, &params, &slices, 1)?.into())
    }
}
