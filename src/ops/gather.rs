//! Rows of the tokens that each slot stands for, by a plan ([`Gather::bind_plan`]) or by a list of
//! tokens ([`Gather::bind`]). The layer's matmuls gather as they load; this is for engines that run the
//! experts themselves.
use super::{by_width, copy_lanes, not_zero};
use crate::device::Kernel;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::error::expect_rows;
use crate::{BoundOp, Context, FloatType, Floats, PlanShape, Result, Slice, Target};
use std::ops::Range;
use std::sync::Arc;

/// See `shaders/gather.wgsl`.
pub const SPEC: Spec = Spec {
    name: "gather",
    body: include_str!("../../shaders/gather.wgsl"),
    params: Params::LAYOUT,
    bindings: &[read("x", 4), read("token_of", 4), write("out", 4)],
    variants: || {
        let all = Target::ALL.into_iter();
        all.flat_map(|target| widths(target).iter().map(move |&w| prelude(target, w))).collect()
    },
};

params! { tokens: u32, slots: u32, vectors: u32, lanes: u32, first_token: u32, first_slot: u32, keep: u32, planned: u32 }

/// Words of a vector, most first. Software drivers pay for a load by its components: 64-bit ones copy twice as much.
fn widths(target: Target) -> &'static [u32] {
    match target {
        Target::Wide => &[4, 1],
        Target::Serial => &[8, 4, 1],
    }
}

/// Most vectors that a lane copies of a row. A workgroup costs a software driver as much as four vectors of eight lanes: with
/// 8 vectors a lane, not 64, a copy took twice as long.
fn items(target: Target) -> u32 {
    match target {
        Target::Wide => 4,
        Target::Serial => 64,
    }
}

fn prelude(target: Target, width: u32) -> Prelude {
    let wg = copy_lanes(target);
    let prelude = Prelude::new(format!("vectors of {width}, {wg} lanes"))
        .constant("WG", wg)
        .alias("Vector", super::vector(width))
        .piece(piece!("common/grid"));
    if width == 8 { prelude.needs(wgpu::Features::SHADER_INT64) } else { prelude }
}

/// The CPU twin. `x` is `[tokens, hidden]`, the result `[slots, hidden]`, 0 where `token_of` is out of range.
///
/// # Panics
///
/// If `hidden` is 0, or if `x` is not whole rows of `hidden`; the message names the argument.
pub fn cpu(x: &[f32], hidden: usize, token_of: &[u32]) -> Vec<f32> {
    expect_rows("x", x.len(), "hidden", hidden);
    let rows: Vec<&[f32]> = x.chunks_exact(hidden).collect();
    token_of
        .iter()
        .flat_map(|&t| match rows.get(t as usize) {
            Some(row) => row.to_vec(),
            None => vec![0.0; hidden],
        })
        .collect()
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows of `x`.
    pub tokens: u32,
    /// Rows of `out`; 0 is a no-op.
    pub slots: u32,
    /// Elements of a row.
    pub hidden: u32,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, hidden]`, rows of whole 32-bit words, read.
    pub x: Floats<'a>,
    /// `[slots]` u32, read: token of each slot; `tokens` or more gives a row of zeros.
    pub token_of: Slice<'a>,
    /// `[slots, hidden]` of the type of `x`, written whole.
    pub out: Slice<'a>,
}

/// Buffers of a dispatch over the slots of a plan.
#[derive(Clone, Copy, Debug)]
pub struct PlanArgs<'a> {
    /// `[tokens, hidden]`, rows of whole 32-bit words, read.
    pub x: Floats<'a>,
    /// A plan of the shape, read where it lies.
    pub plan: Slice<'a>,
    /// `[slots, hidden]` of the type of `x`, all slots of the shape ([`PlanShape::slots`]), written whole: rows past
    /// the slots that the plan holds are 0.
    pub out: Slice<'a>,
    /// Elements of a row.
    pub hidden: u32,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct Gather {
    ctx: Context,
    /// By width of their vectors, widest first.
    kernels: Vec<(u32, Arc<Kernel>)>,
}

impl Gather {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        let target = ctx.variant().target;
        let kernels = by_width(ctx, &SPEC, widths(target), |width| prelude(target, width))?;
        Ok(Self { ctx: ctx.clone(), kernels })
    }

    /// Gathers the rows of a plan's slots: what an engine that runs the experts itself reads, in the
    /// order in which [`combine`](super::combine) takes its results.
    ///
    /// # Errors
    ///
    /// As [`PlanShape::sections`]; zero elements a row, or a slice that does not fit
    /// ([`Error`](crate::Error)).
    pub fn bind_plan(&self, shape: &PlanShape, args: PlanArgs<'_>) -> Result<BoundOp> {
        let at = shape.sections()?;
        let (tokens, slots, hidden) = (shape.tokens, shape.slots()?, args.hidden);
        not_zero(&[("hidden", hidden)])?;
        if slots == 0 {
            return Ok(BoundOp::default());
        }
        args.x.holds("x", tokens.into(), hidden.into())?;
        args.plan.u32s("plan", &[at.words.into()])?;
        Floats { slice: args.out, ..args.x }.holds("out", slots.into(), hidden.into())?;
        let params =
            Params { tokens, slots, first_slot: at.token_of, planned: 1, ..Params::default() };
        self.dispatch(params, hidden, args.x, [args.plan, args.out])
    }

    /// Gathers the rows of a list of tokens.
    ///
    /// # Errors
    ///
    /// Zero tokens or elements a row, or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        let Dims { tokens, slots, hidden } = *dims;
        not_zero(&[("hidden", hidden), ("tokens", tokens)])?;
        if slots == 0 {
            return Ok(BoundOp::default());
        }
        args.x.holds("x", tokens.into(), hidden.into())?;
        args.token_of.u32s("token_of", &[slots.into()])?;
        Floats { slice: args.out, ..args.x }.holds("out", slots.into(), hidden.into())?;
        let params = Params { tokens, slots, ..Params::default() };
        self.dispatch(params, hidden, args.x, [args.token_of, args.out])
    }

    /// The rows of some of a plan's slots whose tokens lie in a window of `x`; rows of other tokens are left alone.
    pub(crate) fn bind_window(&self, shape: &PlanShape, args: WindowArgs<'_>) -> Result<BoundOp> {
        let params = Params {
            tokens: args.tokens.end - args.tokens.start,
            slots: args.slots.end - args.slots.start,
            first_token: args.tokens.start,
            first_slot: shape.sections()?.token_of + args.slots.start,
            keep: 1,
            ..Params::default()
        };
        self.dispatch(params, args.hidden, args.x, [args.plan, args.out])
    }

    /// Rows are copied as they are, by words of 32 bits, whatever they hold.
    fn dispatch(
        &self,
        params: Params,
        hidden: u32,
        x: Floats<'_>,
        [token_of, out]: [Slice<'_>; 2],
    ) -> Result<BoundOp> {
        let words = match x.float_type {
            FloatType::F32 => hidden,
            FloatType::F16 | FloatType::Bf16 => hidden / 2,
        };
        let fits = self.kernels.iter().find(|(width, _)| words.is_multiple_of(*width));
        let (width, kernel) = fits.expect("every length is a multiple of 1");
        let target = self.ctx.variant().target;
        let vectors = words / width;
        let lanes = vectors.div_ceil(items(target));
        let groups =
            (u64::from(params.slots) * u64::from(lanes)).div_ceil(copy_lanes(target).into());
        let params = Params { vectors, lanes, ..params };
        Ok(kernel.dispatch(&self.ctx, &params, &[x.slice, token_of, out], groups)?.into())
    }
}

/// Buffers of a dispatch over a window of `x`.
#[derive(Clone, Debug)]
pub(crate) struct WindowArgs<'a> {
    /// `[tokens of the window, hidden]`, read.
    pub(crate) x: Floats<'a>,
    /// The tokens of the window.
    pub(crate) tokens: Range<u32>,
    /// A plan, read.
    pub(crate) plan: Slice<'a>,
    /// The slots whose rows `out` holds.
    pub(crate) slots: Range<u32>,
    /// `[slots, hidden]` of the type of `x` or more, written where a slot's token is in the window.
    pub(crate) out: Slice<'a>,
    /// Elements of a row.
    pub(crate) hidden: u32,
}
