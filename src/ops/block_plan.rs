//! The plan of up to 32 tokens in one dispatch: what [`plan_count`](super::plan_count),
//! [`plan_scan`](super::plan_scan) and [`plan_fill`](super::plan_fill) do one after the other. Its CPU twin is
//! [`HostPlan::cpu`](crate::plan::HostPlan::cpu), and for the gates [`plan_count::cpu`](super::plan_count::cpu).
use super::plan_count::{Gates, Scales};
use super::plan_scan::OfTokens;
use super::{few_experts, or_nothing};
use crate::device::Kernel;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::{BoundOp, Context, Error, PlanShape, Result, Slice, Target};
use std::sync::Arc;

/// See `shaders/block_plan.wgsl`.
pub const SPEC: Spec = Spec {
    name: "block_plan",
    body: include_str!("../../shaders/block_plan.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("assigned", 4),
        read("source", 4),
        read("offsets", 4),
        read("active_bits", 4),
        read("experts_per_token", 4),
        write("gates", 4),
        write("plan", 4),
        write("stats", 4),
    ],
    variants: || Target::ALL.map(prelude).into(),
};

/// See `shaders/block_plan_scaled.wgsl`: a kernel has bindings for the tables or for what a batch says of its tokens.
pub const SCALED: Spec = Spec {
    name: "block_plan_scaled",
    body: include_str!("../../shaders/block_plan_scaled.wgsl"),
    bindings: &[
        read("assigned", 4),
        read("source", 4),
        read("scale_by_count", 4),
        read("scale_by_expert", 4),
        read("offsets", 4),
        write("gates", 4),
        write("plan", 4),
        write("stats", 4),
    ],
    variants: || Target::ALL.map(scaled_prelude).into(),
    ..SPEC
};

params! {
    tokens: u32, experts: u32, shared_experts: u32, slots: u32, routed_slots: u32, add_stats: u32, rule: u32, scale: f32,
    drop_count: u32, ignore_count: u32, range_count: u32, tile_rows: u32, skinny_rows: u32, expert_offsets: u32,
    token_offsets: u32, active_experts: u32, skinny_offsets: u32, skinny_items: u32, tile_offsets: u32, tile_items: u32,
    ranks: u32, token_of: u32, gate_of: u32, slot_of: u32, has_active: u32, most_experts: u32,
    has_scale_by_count: u32, has_scale_by_expert: u32,
}

/// Most tokens: a column of the bit set.
pub const MAX_TOKENS: u32 = 32;

fn prelude(target: Target) -> Prelude {
    let lanes = if target == Target::Serial { 1 } else { 8 };
    Prelude::new(format!("{lanes} lanes a token"))
        .constant("WG", 32 * lanes)
        .constant("LANES", lanes)
        .constant("EXPERT_LANES", 1)
        .piece(piece!("common/grid"))
        .piece(piece!("common/keys"))
        .piece(piece!("common/exp"))
        .piece(piece!("plan/column"))
        .piece(piece!("plan/count"))
        .piece(piece!("plan/prefix_sums"))
        .piece(piece!("plan/scan"))
        .piece(piece!("plan/fill"))
        .piece(piece!("plan/whole"))
}

fn scaled_prelude(target: Target) -> Prelude {
    prelude(target).piece(piece!("plan/scales"))
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[experts]` u32, read: the bit set.
    pub assigned: Slice<'a>,
    /// Gates to make.
    pub gates: Gates<'a>,
    /// `[n]` u32, read: offsets whose clamped ones are to be counted.
    pub offsets: Option<Slice<'a>>,
    /// A plan of the shape, written whole.
    pub plan: Slice<'a>,
    /// `[8 + experts]` u32, written whole: see [`Stats`](crate::plan::Stats).
    pub stats: Slice<'a>,
    /// Whether the statistics are added to what `stats` holds, as for
    /// [`plan_scan`](super::plan_scan::Args::add_stats).
    pub add_stats: bool,
}

/// The GPU kernel. Another one, for gates with [tables](Scales), is compiled when the first such work is bound.
#[derive(Clone, Debug)]
pub struct BlockPlan {
    ctx: Context,
    kernel: Arc<Kernel>,
}

impl BlockPlan {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        Ok(Self { ctx: ctx.clone(), kernel: ctx.kernel(&SPEC, prelude(ctx.variant().target))? })
    }

    /// Whether one dispatch can make the plan: of at most [`MAX_TOKENS`] tokens, without tables beside what the batch
    /// says of its tokens.
    pub(crate) fn fits(shape: &PlanShape, gates: &Gates<'_>, of_tokens: &OfTokens<'_>) -> bool {
        let says = of_tokens.active.is_some() || of_tokens.asked.is_some();
        shape.tokens <= MAX_TOKENS && !(gates.has_tables() && says)
    }

    /// Gates, and the whole plan.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`]; [`Error::Invalid`] for more than [`MAX_TOKENS`] tokens; or a slice that does not fit.
    pub fn bind(&self, shape: &PlanShape, args: Args<'_>) -> Result<BoundOp> {
        self.bind_of(shape, args, OfTokens::default())
    }

    /// As [`BlockPlan::bind`], by what the batch says of its tokens.
    ///
    /// # Errors
    ///
    /// As [`BlockPlan::bind`]; [`Error::Invalid`] for tables that scale gates beside what the batch says, which one
    /// kernel has no bindings for.
    pub fn bind_of(
        &self,
        shape: &PlanShape,
        args: Args<'_>,
        of_tokens: OfTokens<'_>,
    ) -> Result<BoundOp> {
        let PlanShape { tokens, experts, shared_experts, tile_rows, skinny_rows, .. } = *shape;
        if tokens > MAX_TOKENS {
            return Err(Error::invalid("tokens", format!("{tokens}, at most {MAX_TOKENS}")));
        }
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        few_experts(experts)?;
        let at = shape.sections()?;
        args.assigned.u32s("assigned", &[experts.into()])?;
        args.plan.u32s("plan", &[at.words.into()])?;
        args.stats.u32s("stats", &[8 + u64::from(experts)])?;
        args.gates.check(shape)?;
        of_tokens.check(tokens)?;
        let Scales { scale_by_count, scale_by_expert } = args.gates.scales;
        if !Self::fits(shape, &args.gates, &of_tokens) {
            return Err(Error::invalid("gates", "with tables, the three kernels apart read it"));
        }
        let params = Params {
            tokens,
            experts,
            shared_experts,
            slots: shape.slots()?,
            routed_slots: shape.routed_slots,
            add_stats: args.add_stats.into(),
            rule: args.gates.rule.number(),
            scale: args.gates.scale,
            drop_count: 0,
            ignore_count: 0,
            range_count: args.offsets.map_or(0, |o| (o.size / 4) as u32),
            tile_rows,
            skinny_rows,
            expert_offsets: at.expert_offsets,
            token_offsets: at.token_offsets,
            active_experts: at.active,
            skinny_offsets: at.skinny_offsets,
            skinny_items: at.skinny_items,
            tile_offsets: at.tile_offsets,
            tile_items: at.tile_items,
            ranks: at.ranks,
            token_of: at.token_of,
            gate_of: at.gate_of,
            slot_of: at.slot_of,
            has_active: of_tokens.active.is_some().into(),
            most_experts: of_tokens.asked.map_or(0, |asked| asked.most),
            has_scale_by_count: scale_by_count.is_some().into(),
            has_scale_by_expert: scale_by_expert.is_some().into(),
        };
        let or_nothing = |slice| or_nothing(&self.ctx, slice);
        let (offsets, gates) = (or_nothing(args.offsets), args.gates);
        let (read, written) = ([args.assigned, gates.source], [gates.gates, args.plan, args.stats]);
        if gates.has_tables() {
            let kernel = self.ctx.kernel(&SCALED, scaled_prelude(self.ctx.variant().target))?;
            let tables = [scale_by_count, scale_by_expert].map(or_nothing);
            let slices = [&read[..], &tables, &[offsets], &written].concat();
            return Ok(kernel.dispatch(&self.ctx, &params, &slices, 1)?.into());
        }
        let asked = of_tokens.asked.map(|asked| asked.experts_per_token);
        let of_tokens = [of_tokens.active, asked].map(or_nothing);
        let slices = [&read[..], &[offsets], &of_tokens, &written].concat();
        Ok(self.kernel.dispatch(&self.ctx, &params, &slices, 1)?.into())
    }
}
