//! Rows of the tokens that each slot stands for. (The layer's matmuls gather as they load; this is for engines that run
//! the experts themselves.)
use super::{GRID, not_zero};
use crate::kernel::{Kernel, Prelude, Spec, params, read, write};
use crate::{Context, PlanShape, Result, Slice, Step};
use std::ops::Range;
use std::sync::Arc;

/// See `shaders/gather.wgsl`.
pub const SPEC: Spec = Spec {
    name: "gather",
    body: include_str!("../../shaders/gather.wgsl"),
    params: Params::LAYOUT,
    bindings: &[read("x", 4), read("token_of", 4), write("out", 4)],
    variants: || vec![prelude(1), prelude(4)],
};

params! { tokens: u32, slots: u32, vectors: u32, first_token: u32, first_slot: u32, keep: u32 }

const WG: u32 = 64;
const ITEMS: u32 = 4;

fn prelude(vector: u32) -> Prelude {
    Prelude::new(format!("vectors of {vector}"))
        .constant("WG", WG)
        .constant("ITEMS", ITEMS)
        .piece(super::vector(vector))
        .piece(GRID)
}

/// The CPU twin. `x` is `[tokens, hidden]`, the result `[slots, hidden]`, 0 where `token_of` is out of range.
///
/// # Panics
///
/// If `x.len()` is not a multiple of `hidden`.
pub fn cpu(x: &[f32], hidden: usize, token_of: &[u32]) -> Vec<f32> {
    assert_eq!(x.len() % hidden, 0, "x: [tokens, hidden]");
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
    /// `[tokens, hidden]` f32, read.
    pub x: Slice<'a>,
    /// `[slots]` u32, read: token of each slot; `tokens` or more gives a row of zeros.
    pub token_of: Slice<'a>,
    /// `[slots, hidden]` f32, written whole.
    pub out: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct Gather {
    ctx: Context,
    scalar: Arc<Kernel>,
    vector: Arc<Kernel>,
}

impl Gather {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        let [scalar, vector] = [1, 4].map(|v| ctx.kernel(&SPEC, prelude(v)));
        Ok(Self { ctx: ctx.clone(), scalar: scalar?, vector: vector? })
    }

    /// Gathers rows.
    ///
    /// # Errors
    ///
    /// Zero tokens or elements a row, or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, dims: Dims, args: Args<'_>) -> Result<Step> {
        let Dims { tokens, slots, hidden } = dims;
        not_zero(&[("hidden", hidden), ("tokens", tokens)])?;
        if slots == 0 {
            return Ok(Step::default());
        }
        args.x.expect("x", &[tokens.into(), hidden.into()], 4)?;
        args.token_of.expect("token_of", &[slots.into()], 4)?;
        args.out.expect("out", &[slots.into(), hidden.into()], 4)?;
        let params = Params { tokens, slots, ..Params::default() };
        self.dispatch(params, hidden, [args.x, args.token_of, args.out])
    }

    /// The rows of some of a plan's slots whose tokens lie in a window of `x`; rows of other tokens are left alone.
    pub(crate) fn bind_window(&self, shape: &PlanShape, args: WindowArgs<'_>) -> Result<Step> {
        let params = Params {
            tokens: args.tokens.end - args.tokens.start,
            slots: args.slots.end - args.slots.start,
            first_token: args.tokens.start,
            first_slot: shape.sections()?.token_of + args.slots.start,
            keep: 1,
            vectors: 0,
        };
        self.dispatch(params, args.hidden, [args.x, args.plan, args.out])
    }

    fn dispatch(&self, params: Params, hidden: u32, slices: [Slice<'_>; 3]) -> Result<Step> {
        let (kernel, vectors) =
            if hidden % 4 == 0 { (&self.vector, hidden / 4) } else { (&self.scalar, hidden) };
        let groups = (u64::from(params.slots) * u64::from(vectors)).div_ceil((WG * ITEMS).into());
        Ok(kernel.dispatch(&self.ctx, &Params { vectors, ..params }, &slices, groups)?.into())
    }
}

/// Buffers of a dispatch over a window of `x`.
#[derive(Clone, Debug)]
pub(crate) struct WindowArgs<'a> {
    /// `[tokens of the window, hidden]` f32, read.
    pub(crate) x: Slice<'a>,
    /// The tokens of the window.
    pub(crate) tokens: Range<u32>,
    /// A plan, read.
    pub(crate) plan: Slice<'a>,
    /// The slots whose rows `out` holds.
    pub(crate) slots: Range<u32>,
    /// `[slots, hidden]` f32 or more, written where a slot's token is in the window.
    pub(crate) out: Slice<'a>,
    /// Elements of a row.
    pub(crate) hidden: u32,
}
