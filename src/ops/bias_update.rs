//! Balance without a loss (arXiv 2408.15664): once a step, the bias of each expert that had more tokens
//! than the mean goes down by a fixed rate, and that of each that had fewer goes up.
//!
//! `bias_e += rate * sign(mean(n) - n_e)`, n being summed over the micro-batches of the step, sign(0) = 0.
//! The mean is not rounded: the comparison is of whole numbers.
use super::{few_experts, not_zero};
use crate::device::Kernel;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::error::expect_len;
use crate::plan::Stats;
use crate::{BoundOp, Context, Result, Slice};
use std::cmp::Ordering;
use std::sync::Arc;

/// See `shaders/bias_update.wgsl`.
pub const SPEC: Spec = Spec {
    name: "bias_update",
    body: include_str!("../../shaders/bias_update.wgsl"),
    params: Params::LAYOUT,
    bindings: &[read("counts", 4), write("bias", 4)],
    variants: || vec![prelude()],
};

params! { experts: u32, first: u32, rate: f32 }

const WG: u32 = 64;

fn prelude() -> Prelude {
    Prelude::new("64 lanes").constant("WG", WG).piece(piece!("common/grid"))
}

/// The CPU twin: moves `bias [experts]` by `counts [experts]`, in f32.
///
/// # Panics
///
/// If `bias` is not as long as `counts`; the message names the argument.
pub fn cpu(bias: &mut [f32], counts: &[u32], rate: f32) {
    expect_len("bias", bias.len(), counts.len());
    let sum: u64 = counts.iter().map(|&n| u64::from(n)).sum();
    for (bias, &n) in bias.iter_mut().zip(counts) {
        match sum.cmp(&(counts.len() as u64 * u64::from(n))) {
            Ordering::Greater => *bias += rate,
            Ordering::Less => *bias -= rate,
            Ordering::Equal => {}
        }
    }
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[experts]` u32, or `[8 + experts]` [statistics](crate::plan::Stats), read: tokens of each
    /// expert, summed over the micro-batches of a step.
    pub counts: Slice<'a>,
    /// `[experts]` f32: the router's bias, moved where it lies.
    pub bias: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct BiasUpdate {
    ctx: Context,
    kernel: Arc<Kernel>,
}

impl BiasUpdate {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        Ok(Self { ctx: ctx.clone(), kernel: ctx.kernel(&SPEC, prelude())? })
    }

    /// Moves the biases of all experts by `rate`.
    ///
    /// # Errors
    ///
    /// Zero experts, or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, experts: u32, rate: f32, args: Args<'_>) -> Result<BoundOp> {
        not_zero(&[("experts", experts)])?;
        few_experts(experts)?;
        let of_stats = Stats::bytes(experts);
        let first = if args.counts.size == of_stats { 8 } else { 0 };
        if first == 0 {
            args.counts.u32s("counts", &[experts.into()])?;
        }
        args.bias.f32s("bias", &[experts.into()])?;
        let params = Params { experts, first, rate };
        let groups = u64::from(experts.div_ceil(WG));
        let slices = [args.counts, args.bias];
        Ok(self.kernel.dispatch(&self.ctx, &params, &slices, groups)?.into())
    }
}
