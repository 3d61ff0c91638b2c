//! Rows of the tokens that each slot stands for. (The layer's matmuls gather as they load; this is for engines that run
//! the experts themselves.)
use super::{GRID, not_zero};
use crate::kernel::{Kernel, Prelude, Spec, params, read, write};
use crate::{Context, Result, Slice, Step};
use std::sync::Arc;

/// See `shaders/gather.wgsl`.
pub const SPEC: Spec = Spec {
    name: "gather",
    body: include_str!("../../shaders/gather.wgsl"),
    params: Params::LAYOUT,
    bindings: &[read("x", 4), read("token_of", 4), write("out", 4)],
    variants: || vec![prelude(1), prelude(4)],
};

params! { tokens: u32, slots: u32, vectors: u32 }

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
        let (kernel, vectors) =
            if hidden % 4 == 0 { (&self.vector, hidden / 4) } else { (&self.scalar, hidden) };
        let groups = (u64::from(slots) * u64::from(vectors)).div_ceil((WG * ITEMS).into());
        let params = Params { tokens, slots, vectors };
        Ok(kernel.dispatch(&self.ctx, &params, &[args.x, args.token_of, args.out], groups)?.into())
    }
}
