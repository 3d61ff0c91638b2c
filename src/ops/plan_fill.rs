//! Last part of a plan: token and gate of each slot, slots of each token. Its CPU twin, with the other
//! parts', is [`HostPlan::cpu`](crate::plan::HostPlan::cpu).
use super::or_nothing;
use crate::device::Kernel;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::{BoundOp, Context, PlanShape, Result, Slice, Target, Variant};
use std::sync::Arc;

/// See `shaders/plan_fill.wgsl`.
pub const SPEC: Spec = Spec {
    name: "plan_fill",
    body: include_str!("../../shaders/plan_fill.wgsl"),
    params: Params::LAYOUT,
    bindings: &[read("assigned", 4), read("gates", 4), read("active_bits", 4), write("plan", 4)],
    variants: || Prelude::distinct(Variant::EVERY.map(prelude)),
};

params! {
    tokens: u32, experts: u32, shared_experts: u32, slots: u32, routed_slots: u32, expert_offsets: u32, token_offsets: u32, ranks: u32,
    token_of: u32, gate_of: u32, slot_of: u32, has_active: u32,
}

fn prelude(variant: Variant) -> Prelude {
    let lanes = if variant.target == Target::Serial { 1 } else { 8 };
    Prelude::new(format!("{lanes} lanes a token"))
        .constant("WG", 32 * lanes)
        .constant("LANES", lanes)
        .piece(piece!("common/grid"))
        .piece(piece!("plan/column"))
        .piece(piece!("plan/fill"))
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[experts, ceil(tokens / 32)]` u32, read: the bit set.
    pub assigned: Slice<'a>,
    /// `[tokens, experts]` f32, read at assigned pairs.
    pub gates: Slice<'a>,
    /// A plan of the shape that holds offsets and ranks, read and written: its lists.
    pub plan: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct PlanFill {
    ctx: Context,
    kernel: Arc<Kernel>,
}

impl PlanFill {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        Ok(Self { ctx: ctx.clone(), kernel: ctx.kernel(&SPEC, prelude(ctx.variant()))? })
    }

    /// Lists of slots and tokens.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`], or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, shape: &PlanShape, args: Args<'_>) -> Result<BoundOp> {
        self.bind_among(shape, args, None)
    }

    /// As [`PlanFill::bind`], where shared experts take the tokens of a bit set `active`,
    /// `[ceil(tokens / 32)]` u32, read, alone: the same that [`plan_scan`](super::plan_scan) had.
    ///
    /// # Errors
    ///
    /// As [`PlanFill::bind`].
    pub fn bind_active(
        &self,
        shape: &PlanShape,
        args: Args<'_>,
        active: Slice<'_>,
    ) -> Result<BoundOp> {
        self.bind_among(shape, args, Some(active))
    }

    pub(crate) fn bind_among(
        &self,
        shape: &PlanShape,
        args: Args<'_>,
        active: Option<Slice<'_>>,
    ) -> Result<BoundOp> {
        let PlanShape { tokens, experts, shared_experts, .. } = *shape;
        let at = shape.sections()?;
        let columns = u64::from(tokens.div_ceil(32));
        args.assigned.u32s("assigned", &[experts.into(), columns])?;
        args.gates.f32s("gates", &[tokens.into(), experts.into()])?;
        args.plan.u32s("plan", &[at.words.into()])?;
        let params = Params {
            tokens,
            experts,
            shared_experts,
            slots: shape.slots()?,
            routed_slots: shape.routed_slots,
            expert_offsets: at.expert_offsets,
            token_offsets: at.token_offsets,
            ranks: at.ranks,
            token_of: at.token_of,
            gate_of: at.gate_of,
            slot_of: at.slot_of,
            has_active: active.is_some().into(),
        };
        if let Some(active) = active {
            active.u32s("active", &[columns])?;
        }
        let active = or_nothing(&self.ctx, active);
        let slices = [args.assigned, args.gates, active, args.plan];
        Ok(self.kernel.dispatch(&self.ctx, &params, &slices, columns)?.into())
    }
}
