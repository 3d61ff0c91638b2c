//! How far the coreset of a block covers what its tokens would take of all experts: what tells when a coreset that
//! was kept from an earlier step is worth electing anew.
use super::expert_union::{lanes, prelude};
use super::{few_experts, not_zero};
use crate::device::Kernel;
use crate::device::quirks::{check_loops, offset_iterations};
use crate::device::shader::{Prelude, Spec, params, read, write};
use crate::error::{expect_len, expect_offsets, expect_some};
use crate::plan::bits;
use crate::{BoundOp, Context, Result, Slice, Target, Variant};
use std::sync::Arc;

/// See `shaders/coverage.wgsl`.
pub const SPEC: Spec = Spec {
    name: "coverage",
    body: include_str!("../../shaders/coverage.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("own_choice", 4),
        read("members", 4),
        read("offsets", 8),
        write("coverage_of", 8),
    ],
    variants: || Prelude::distinct(Variant::EVERY.map(prelude)),
};

params! { tokens: u32, experts: u32, blocks: u32 }

/// Iterations of one lane: for each of its experts, all columns of a block, which may be all there are.
fn iterations(target: Target, dims: Dims) -> u64 {
    let experts = u64::from(dims.experts.div_ceil(lanes(target)));
    let columns = u64::from(dims.tokens.div_ceil(32));
    experts * (columns + 1) + offset_iterations(dims.blocks, lanes(target))
}

/// The CPU twin: for each block how many pairs its tokens would take, and how many of these lie in its coreset.
/// `own_choice` is the bit set `[experts, ceil(tokens / 32)]` of those pairs, `members` are the coresets
/// `[blocks, ceil(experts / 32)]`, `offsets` `[blocks + 1]`.
///
/// ```
/// use wgmoe::plan::bits;
///
/// // Two tokens of one block: the first would take experts 0 and 2, the second 1. The coreset is 0 and 1.
/// let own = bits::from_lists(2, &[vec![0], vec![1], vec![0]]);
/// assert_eq!(wgmoe::ops::coverage::cpu(&own, 2, 3, &[0b011], &[0, 2]), [[3, 2]]);
/// ```
///
/// # Panics
///
/// If `experts` is 0, if there are no `offsets`, if `own_choice` is not `experts * ceil(tokens / 32)` long, or if
/// `members` are not `blocks * ceil(experts / 32)`; the message names the argument.
pub fn cpu(
    own_choice: &[u32],
    tokens: usize,
    experts: usize,
    members: &[u32],
    offsets: &[u32],
) -> Vec<[u32; 2]> {
    expect_some("experts", experts);
    let blocks = expect_offsets("offsets", offsets.len());
    let words = experts.div_ceil(32);
    expect_len("own_choice", own_choice.len(), experts * bits::columns(tokens));
    expect_len("members", members.len(), blocks * words);
    let mut coverage = vec![];
    for (b, range) in super::expert_choice::ranges(offsets, tokens).into_iter().enumerate() {
        let mut of_block = [0, 0];
        for t in range {
            for e in bits::experts_of(own_choice, tokens, t) {
                of_block[0] += 1;
                of_block[1] += members[b * words + e / 32] >> (e % 32) & 1;
            }
        }
        coverage.push(of_block);
    }
    coverage
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Tokens; 0 is a no-op.
    pub tokens: u32,
    /// Experts, at most [`MAX_EXPERTS`](crate::routing::MAX_EXPERTS).
    pub experts: u32,
    /// Blocks.
    pub blocks: u32,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[experts, ceil(tokens / 32)]` u32, read: bit set of what each token would take of all experts.
    pub own_choice: Slice<'a>,
    /// `[blocks, ceil(experts / 32)]` u32, read: the coresets.
    pub members: Slice<'a>,
    /// `[blocks + 1]` u32, read: token ranges. Values that decrease or exceed `tokens` are clamped.
    pub offsets: Slice<'a>,
    /// `[blocks, 2]` u32, written whole: pairs of the own choice, and those of them inside the coreset.
    pub coverage: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct Coverage {
    ctx: Context,
}

impl Coverage {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        let op = Self { ctx: ctx.clone() };
        op.kernel(Dims { tokens: 1, experts: 1, blocks: 1 })?;
        Ok(op)
    }

    /// The kernel for these sizes, and the iterations of its loops.
    fn kernel(&self, dims: Dims) -> Result<(Arc<Kernel>, u64)> {
        let few = self.ctx.variant();
        let variant = few.within_loops(iterations(few.target, dims));
        Ok((self.ctx.kernel(&SPEC, prelude(variant))?, iterations(variant.target, dims)))
    }

    /// Counts what the coresets cover.
    ///
    /// # Errors
    ///
    /// Zero blocks, zero or too many experts, or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        let Dims { tokens, experts, blocks } = *dims;
        few_experts(experts)?;
        not_zero(&[("blocks", blocks)])?;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        let (kernel, iterations) = self.kernel(*dims)?;
        check_loops(&self.ctx, "tokens", tokens, iterations)?;
        args.own_choice.u32s("own_choice", &[experts.into(), tokens.div_ceil(32).into()])?;
        args.members.u32s("members", &[blocks.into(), experts.div_ceil(32).into()])?;
        args.offsets.u32s("offsets", &[u64::from(blocks) + 1])?;
        args.coverage.u32s("coverage", &[blocks.into(), 2])?;
        let params = Params { tokens, experts, blocks };
        let Args { own_choice, members, offsets, coverage } = args;
        let slices = [own_choice, members, offsets, coverage];
        let dispatch = kernel.dispatch(&self.ctx, &params, &slices, blocks.into());
        Ok(dispatch.map_err(|e| e.renamed(&[("coverage_of", "coverage")]))?.into())
    }
}
