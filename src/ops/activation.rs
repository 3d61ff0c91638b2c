//! The activation that joins the two halves of a pre-activation: `h = act(z[..F]) * z[F..]`.
//!
//! Inference has it in the epilogue of the first matmul, and never stores `z`. Training keeps `z`: the
//! two halves are made by [`grouped_matmul`](super::grouped_matmul) ([`Stage::Gate`] and
//! [`Stage::Up`]), on matrix units too, and joined here; from a `z` that was kept, `h` can be made again.
//!
//! [`Stage::Gate`]: super::grouped_matmul::Stage::Gate
//! [`Stage::Up`]: super::grouped_matmul::Stage::Up
use super::grouped_matmul::activate;
use super::not_zero;
use crate::device::shader::{Piece, Prelude, Spec, params, piece, read, write};
use crate::device::{Kernel, quirks};
use crate::error::expect_rows;
use crate::plan::Sections;
use crate::routing::Activation;
use crate::{BoundOp, Context, PlanShape, Result, Slice, Target};
use std::sync::Arc;

/// See `shaders/activation.wgsl`.
pub const SPEC: Spec = Spec {
    name: "activation",
    body: include_str!("../../shaders/activation.wgsl"),
    params: Params::LAYOUT,
    bindings: &[read("z", 4), read("plan", 4), write("h", 4)],
    variants: || {
        let of = |target| ALL.map(|activation| prelude(target, activation));
        Target::ALL.into_iter().flat_map(of).collect()
    },
};

params! { intermediate: u32, slots_at: u32 }

/// Every activation.
pub(super) const ALL: [Activation; 2] = [Activation::Silu, Activation::Gelu];

/// Lanes of a workgroup.
fn workgroup(target: Target) -> u32 {
    if target == Target::Serial { 8 } else { 64 }
}

fn joins(activation: Activation) -> Piece {
    match activation {
        Activation::Silu => piece!("matmul/activate_silu"),
        Activation::Gelu => piece!("matmul/activate_gelu"),
    }
}

fn prelude(target: Target, activation: Activation) -> Prelude {
    let wg = workgroup(target);
    Prelude::new(format!("{activation:?}, {wg} lanes"))
        .constant("WG", wg)
        .piece(piece!("common/grid"))
        .piece(joins(activation))
}

/// The CPU twin: `[slots, F]` from `z [slots, 2F]`, in f64 rounded once.
///
/// # Panics
///
/// If `intermediate` is 0, or if `z` is not whole rows; the message names the argument.
pub fn cpu(z: &[f32], intermediate: usize, activation: Activation) -> Vec<f32> {
    expect_rows("z", z.len(), "intermediate", 2 * intermediate);
    let row = |z: &[f32]| -> Vec<f32> {
        let (gate, up) = z.split_at(intermediate);
        let both = gate.iter().zip(up);
        both.map(|(&g, &u)| activate(activation, g.into(), u.into()) as f32).collect()
    };
    z.chunks_exact(2 * intermediate).flat_map(row).collect()
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[slots, 2F]` f32, all slots of the shape, read.
    pub z: Slice<'a>,
    /// A plan of the shape, read.
    pub plan: Slice<'a>,
    /// `[slots, F]` f32, written in the rows of the slots that the plan holds.
    pub h: Slice<'a>,
    /// F.
    pub intermediate: u32,
}

/// The word of a plan that holds its number of slots.
pub(super) fn slots_at(shape: &PlanShape, at: &Sections) -> u32 {
    at.expert_offsets + shape.all_experts()
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct Activate {
    ctx: Context,
    kernel: Arc<Kernel>,
}

impl Activate {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context, activation: Activation) -> Result<Self> {
        let kernel = ctx.kernel(&SPEC, prelude(ctx.variant().target, activation))?;
        Ok(Self { ctx: ctx.clone(), kernel })
    }

    /// The slots of a plan.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`]; F of 0, or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, shape: &PlanShape, args: Args<'_>) -> Result<BoundOp> {
        let at = shape.sections()?;
        let (slots, f) = (shape.slots()?, args.intermediate);
        not_zero(&[("intermediate", f)])?;
        if slots == 0 {
            return Ok(BoundOp::default());
        }
        let lanes = workgroup(self.ctx.variant().target);
        quirks::check_loops(&self.ctx, "intermediate", f, u64::from(f.div_ceil(lanes)))?;
        args.z.f32s("z", &[slots.into(), 2, f.into()])?;
        args.plan.u32s("plan", &[at.words.into()])?;
        args.h.f32s("h", &[slots.into(), f.into()])?;
        let params = Params { intermediate: f, slots_at: slots_at(shape, &at) };
        let slices = [args.z, args.plan, args.h];
        Ok(self.kernel.dispatch(&self.ctx, &params, &slices, slots.into())?.into())
    }
}
