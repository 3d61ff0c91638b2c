//! Router logits `g = x Wr^T`: the grouped matmul with one dense expert and no plan.
use super::grouped_matmul::cpu_row;
use super::matmul_kernels::{ItemKind, Params, SKINNY_ROWS, SMALL_ROWS, Specialization};
use super::not_zero;
use crate::device::Kernel;
use crate::error::expect_rows;
use crate::{BoundOp, Context, FloatType, Floats, Result, Slice};
use std::ops::Range;
use std::sync::Arc;

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows of `x`; 0 is a no-op.
    pub tokens: u32,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, hidden]`, rows of whole 32-bit words, read.
    pub x: Floats<'a>,
    /// `[experts, hidden]` f32, row-major, read where it lies.
    pub weights: Slice<'a>,
    /// `[tokens, experts]` f32, written whole.
    pub logits: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct Logits {
    ctx: Context,
    hidden: u32,
    experts: u32,
    /// Of f32; those of f16 and bf16 are compiled when such rows are first bound.
    kernels: Vec<(Specialization, Arc<Kernel>)>,
}

impl Logits {
    /// Compiles the kernel for a router of this shape.
    ///
    /// # Errors
    ///
    /// Zero sizes; [`Error::Device`](crate::Error::Device) where wgpu refuses the kernel.
    pub fn new(ctx: &Context, hidden: u32, experts: u32) -> Result<Self> {
        not_zero(&[("hidden", hidden), ("experts", experts)])?;
        let make = |kind| {
            let problem = Specialization::of_logits([experts, hidden], kind);
            Ok((problem, problem.kernel(ctx)?))
        };
        let kernels = ItemKind::all(ctx, true).map(make).collect::<Result<_>>()?;
        Ok(Self { ctx: ctx.clone(), hidden, experts, kernels })
    }

    /// Logits of `tokens` rows; 0 is a no-op.
    ///
    /// # Errors
    ///
    /// A slice that does not fit; [`Error::Device`](crate::Error::Device) where wgpu refuses a kernel for
    /// f16 or bf16, which the first `bind` of such rows compiles.
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        let Dims { tokens } = *dims;
        self.bind_rows([tokens; 2], 0..tokens, args)
    }

    /// The same for some of the rows, which alone are `args.x`; by the kernel for `whole` rows.
    pub(crate) fn bind_rows(
        &self,
        [tokens, whole]: [u32; 2],
        of: Range<u32>,
        args: Args<'_>,
    ) -> Result<BoundOp> {
        let rows = of.end - of.start;
        if rows == 0 {
            return Ok(BoundOp::default());
        }
        let (hidden, experts) = (self.hidden, self.experts);
        args.x.holds("x", rows.into(), hidden.into())?;
        args.weights.f32s("weights", &[experts.into(), hidden.into()])?;
        args.logits.f32s("logits", &[tokens.into(), experts.into()])?;
        let takes = |kind| match kind {
            ItemKind::Skinny => whole <= SKINNY_ROWS,
            ItemKind::Small => whole <= SMALL_ROWS,
            ItemKind::Tile => true,
        };
        let of_f32 = self.kernels.iter().find(|(problem, _)| takes(problem.kind));
        let of_f32 = of_f32.expect("a kernel for any rows");
        of_f32.0.check_loops(&self.ctx, "hidden", hidden)?;
        if args.x.float_type != FloatType::F32 {
            // All at once, so that no later batch waits for a compiler.
            for (problem, _) in &self.kernels {
                problem.with_x_type(args.x.float_type).kernel(&self.ctx)?;
            }
        }
        let problem = of_f32.0.with_x_type(args.x.float_type);
        let kernel = problem.kernel_or(&self.ctx, of_f32)?;
        let mut params = Params {
            columns: experts,
            column_end: experts,
            depth: hidden,
            x_stride: hidden,
            out_stride: experts,
            experts: 1,
            slot_end: rows,
            out_slot: 0u32.wrapping_sub(of.start),
            ..Params::default()
        };
        let groups =
            problem.groups(&self.ctx, &mut params, rows.div_ceil(problem.item_rows(&self.ctx)));
        let nothing = self.ctx.nothing();
        let slices = [args.x.slice, nothing, args.weights, args.weights, nothing, args.logits];
        Ok(kernel.dispatch(&self.ctx, &params, &slices, groups)?.of_stage("logits").into())
    }
}

/// The CPU twin of [`Logits`]: `[tokens, experts]`, f64 sums rounded once.
///
/// # Panics
///
/// If `hidden` is 0, or if `x` or `weights` are not whole rows of `hidden`; the message names the
/// argument.
pub fn cpu(x: &[f32], weights: &[f32], hidden: usize) -> Vec<f32> {
    expect_rows("x", x.len(), "hidden", hidden);
    let experts = expect_rows("weights", weights.len(), "hidden", hidden);
    x.chunks_exact(hidden)
        .flat_map(|row| cpu_row(row, &|i| weights[i], experts))
        .map(|g| g as f32)
        .collect()
}
