//! The value of a loss: the sum of its terms, always in the same order.
use crate::device::Kernel;
use crate::device::quirks::check_loops;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::{BoundOp, Context, Error, Result, Slice};
use std::sync::Arc;

/// See `shaders/loss_sum.wgsl`.
pub const SPEC: Spec = Spec {
    name: "loss_sum",
    body: include_str!("../../shaders/loss_sum.wgsl"),
    params: Params::LAYOUT,
    bindings: &[read("terms", 4), write("values", 4)],
    variants: || vec![prelude()],
};

params! { first: u32, count: u32, at: u32, add: u32, scale: f32 }

const WG: u32 = 64;

fn prelude() -> Prelude {
    Prelude::new("64 lanes")
        .constant("WG", WG)
        .piece(piece!("common/grid"))
        .piece(piece!("common/reduce_workgroup"))
}

/// The CPU twin: `scale` times the sum of `terms`, in f64 rounded once.
pub fn cpu(terms: &[f32], scale: f32) -> f32 {
    let sum: f64 = terms.iter().map(|&term| f64::from(term)).sum();
    (f64::from(scale) * sum) as f32
}

/// Which terms, and what is made of their sum.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// First term.
    pub first: u32,
    /// Terms; 0 is a sum of 0.
    pub count: u32,
    /// Which of the values is written.
    pub at: u32,
    /// What the sum is multiplied by.
    pub scale: f32,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// f32, read.
    pub terms: Slice<'a>,
    /// f32: one of them is written, or added to.
    pub values: Slice<'a>,
    /// Whether to add to the value that is there.
    pub add: bool,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct LossSum {
    ctx: Context,
    kernel: Arc<Kernel>,
}

impl LossSum {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        Ok(Self { ctx: ctx.clone(), kernel: ctx.kernel(&SPEC, prelude())? })
    }

    /// The sum of some terms.
    ///
    /// # Errors
    ///
    /// Terms or a value past the end of its slice, or a slice that does not fit ([`Error`]).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        let Dims { first, count, at, scale } = *dims;
        for (name, end, slice) in [
            ("terms", u64::from(first) + u64::from(count), args.terms),
            ("values", u64::from(at) + 1, args.values),
        ] {
            if 4 * end > slice.size {
                return Err(Error::size(name, 4 * end, slice.size));
            }
        }
        check_loops(&self.ctx, "terms", count, u64::from(count.div_ceil(WG)))?;
        let params = Params { first, count, at, add: args.add.into(), scale };
        Ok(self.kernel.dispatch(&self.ctx, &params, &[args.terms, args.values], 1)?.into())
    }
}
