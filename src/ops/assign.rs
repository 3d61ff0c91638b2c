//! Imports another router's choice into the bit set: the expert ids and gates of each token.
use super::{few_experts, not_zero, or_nothing};
use crate::device::Kernel;
use crate::device::quirks::check_loops;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::error::{expect_len, expect_rows, expect_some};
use crate::plan::bits;
use crate::{BoundOp, Context, Result, Slice};
use std::sync::Arc;

/// See `shaders/assign.wgsl`.
pub const SPEC: Spec = Spec {
    name: "assign",
    body: include_str!("../../shaders/assign.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("ids", 4),
        read("weights", 4),
        read("rows", 4),
        write("assigned", 4),
        write("gates", 4),
        write("ignored", 4),
    ],
    variants: || vec![prelude()],
};

params! { tokens: u32, experts: u32, top: u32, has_rows: u32 }

fn prelude() -> Prelude {
    Prelude::new("one lane a token").piece(piece!("common/grid"))
}

/// The CPU twin: the bit set, the gates `[tokens, experts]` (0 elsewhere), and how many ids of each
/// 32 tokens were ignored. `ids` and `weights` are `[tokens, experts_per_token]`.
///
/// # Panics
///
/// If `experts_per_token` or `experts` is 0, if `ids` are not whole rows of `experts_per_token`, or
/// if `weights` are not as many as `ids`; the message names the argument.
pub fn cpu(
    ids: &[u32],
    weights: &[f32],
    experts_per_token: usize,
    experts: usize,
) -> (Vec<u32>, Vec<f32>, Vec<u32>) {
    let tokens = expect_rows("ids", ids.len(), "experts_per_token", experts_per_token);
    expect_some("experts", experts);
    expect_len("weights", weights.len(), ids.len());
    let mut assigned = bits::empty(tokens, experts);
    let mut gates = vec![0.0; tokens * experts];
    let mut ignored = vec![0; bits::columns(tokens)];
    for (i, (&id, &weight)) in ids.iter().zip(weights).enumerate() {
        let (t, e) = (i / experts_per_token, id as usize);
        if e < experts && !bits::get(&assigned, tokens, e, t) {
            bits::set(&mut assigned, tokens, e, t);
            gates[t * experts + e] = weight;
        } else if id != u32::MAX {
            ignored[t / 32] += 1;
        }
    }
    (assigned, gates, ignored)
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Tokens; 0 is a no-op.
    pub tokens: u32,
    /// Experts, at most [`MAX_EXPERTS`](crate::routing::MAX_EXPERTS).
    pub experts: u32,
    /// Places of a token.
    pub experts_per_token: u32,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, experts_per_token]` u32, read: expert ids. Out of range or repeated: ignored and
    /// counted; `u32::MAX`: empty.
    pub ids: Slice<'a>,
    /// `[tokens, experts_per_token]` f32, read: gates.
    pub weights: Slice<'a>,
    /// `[experts, ceil(tokens / 32)]` u32, written whole: the bit set.
    pub assigned: Slice<'a>,
    /// `[tokens, experts]` f32, written at assigned pairs.
    pub gates: Slice<'a>,
    /// `[ceil(tokens / 32)]` u32, written whole: ids ignored.
    pub ignored: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct Assign {
    ctx: Context,
    kernel: Arc<Kernel>,
}

impl Assign {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        Ok(Self { ctx: ctx.clone(), kernel: ctx.kernel(&SPEC, prelude())? })
    }

    /// Brings `[tokens, experts_per_token]` ids into the bit set.
    ///
    /// # Errors
    ///
    /// Zero experts or places, too many experts, on a software driver too many places, or a slice
    /// that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, None)
    }

    /// As [`Assign::bind`], for the tokens of a bit set `rows`, `[ceil(tokens / 32)]` u32, read
    /// ([`active_rows`](super::active_rows)): the ids of the others are left out, and not counted.
    ///
    /// # Errors
    ///
    /// As [`Assign::bind`].
    pub fn bind_active(&self, dims: &Dims, args: Args<'_>, rows: Slice<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, Some(rows))
    }

    pub(crate) fn bind_among(
        &self,
        dims: &Dims,
        args: Args<'_>,
        rows: Option<Slice<'_>>,
    ) -> Result<BoundOp> {
        let Dims { tokens, experts, experts_per_token: top } = *dims;
        few_experts(experts)?;
        not_zero(&[("experts_per_token", top)])?;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        // One lane reads a token's places, and of the experts its share, twice.
        let iterations = u64::from(top) + 2 * u64::from(experts.div_ceil(32));
        check_loops(&self.ctx, "experts_per_token", top, iterations)?;
        let columns = u64::from(tokens.div_ceil(32));
        args.ids.u32s("ids", &[tokens.into(), top.into()])?;
        args.weights.f32s("weights", &[tokens.into(), top.into()])?;
        args.assigned.u32s("assigned", &[experts.into(), columns])?;
        args.gates.f32s("gates", &[tokens.into(), experts.into()])?;
        args.ignored.u32s("ignored", &[columns])?;
        if let Some(rows) = rows {
            rows.u32s("rows", &[columns])?;
        }
        let params = Params { tokens, experts, top, has_rows: rows.is_some().into() };
        let rows = or_nothing(&self.ctx, rows);
        let slices = [args.ids, args.weights, rows, args.assigned, args.gates, args.ignored];
        Ok(self.kernel.dispatch(&self.ctx, &params, &slices, columns)?.into())
    }
}
