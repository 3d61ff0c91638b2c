//! The highest pairs of a sequence: as many as token choice would make, given out over all its tokens and experts, so that
//! hard tokens get more experts and easy ones fewer or none (SeqTopK, arXiv 2511.06494).
use super::{few_experts, not_zero};
use crate::device::Kernel;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::error::{expect_most, expect_offsets, expect_rows};
use crate::plan::bits;
use crate::routing::order;
use crate::{BoundOp, Context, Error, Result, Slice, Target};
use std::sync::Arc;

/// See `shaders/sequence_top.wgsl`.
pub const SPEC: Spec = Spec {
    name: "sequence_top",
    body: include_str!("../../shaders/sequence_top.wgsl"),
    params: Params::LAYOUT,
    bindings: &[read("values", 4), read("offsets", 8), write("counts", 4), write("assigned", 4)],
    variants: || [Target::Wide, Target::Serial].map(prelude).into(),
};

params! { tokens: u32, experts: u32, sequences: u32, top: u32, tile: u32, tiles: u32, round: u32 }

fn lanes(target: Target) -> u32 {
    if target == Target::Serial { 32 } else { 256 }
}

fn prelude(target: Target) -> Prelude {
    let wg = lanes(target);
    Prelude::new(format!("{wg} lanes a piece"))
        .constant("WG", wg)
        .piece(piece!("common/grid"))
        .piece(piece!("common/keys"))
        .piece(piece!("common/offsets"))
        .piece(piece!("common/bits"))
        .piece(piece!("choice/words"))
}

/// Tokens that one workgroup works on: a multiple of 32, few enough pieces for each of them to add up the counts of all, and
/// few enough pairs for its loops: Mesa's software driver (22.3) ends all loops of an invocation, without a word, once they
/// have come round 65,535 times.
fn tile(tokens: u32, experts: u32, lanes: u32) -> u32 {
    let even = tokens.div_ceil(64).next_multiple_of(32).max(256);
    even.min((16384 * lanes / experts.max(lanes) / 32 * 32).max(32))
}

/// The CPU twin: the bit set `[experts, ceil(tokens / 32)]` of the `top` times length highest pairs of each sequence. `values` is
/// `[tokens, experts]`, `offsets` `[sequences + 1]` (made monotone and at most `tokens`).
///
/// # Panics
///
/// If `experts` is 0, if `values` are not whole rows of `experts`, if `top` is above `experts`, or if there
/// are no `offsets`; the message names the argument.
pub fn cpu(values: &[f32], experts: usize, top: usize, offsets: &[u32]) -> Vec<u32> {
    let tokens = expect_rows("values", values.len(), "experts", experts);
    expect_most("top", top, experts);
    expect_offsets("offsets", offsets.len());
    let mut assigned = bits::empty(tokens, experts);
    for range in super::expert_choice::ranges(offsets, tokens) {
        let pairs = range.start * experts..range.end * experts;
        for pair in order::top(pairs, range.len() * top, |i| values[i]) {
            bits::set(&mut assigned, tokens, pair % experts, pair / experts);
        }
    }
    assigned
}

/// Sizes of one choice.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows of `values`; 0 is a no-op.
    pub tokens: u32,
    /// Experts, at most [`MAX_EXPERTS`](crate::routing::MAX_EXPERTS).
    pub experts: u32,
    /// Ranges of tokens that are chosen from apart.
    pub sequences: u32,
    /// K: experts of a token in the mean, at most `experts`.
    pub top: u32,
}

/// Buffers of one choice.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, experts]` f32, read: selection values.
    pub values: Slice<'a>,
    /// `[sequences + 1]` u32, read: token ranges. Values that decrease or exceed `tokens` are clamped.
    pub offsets: Slice<'a>,
    /// `[experts, ceil(tokens / 32)]` u32, written whole: the bit set.
    pub assigned: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct SequenceTop {
    ctx: Context,
    kernel: Arc<Kernel>,
}

impl SequenceTop {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        Ok(Self { ctx: ctx.clone(), kernel: ctx.kernel(&SPEC, prelude(ctx.variant().target))? })
    }

    /// Chooses `top` times its length pairs of each sequence: five dispatches, and scratch of 4 KiB a piece.
    ///
    /// # Errors
    ///
    /// Zero sequences, zero or too many experts, `top` of 0 or above `experts`, or a slice that does not fit ([`Error`]).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        let Dims { tokens, experts, sequences, top } = *dims;
        few_experts(experts)?;
        not_zero(&[("sequences", sequences), ("top", top)])?;
        if top > experts {
            return Err(Error::invalid("top", format!("{top} of {experts} experts")));
        }
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        args.values.expect("values", &[tokens.into(), experts.into()], 4)?;
        args.offsets.expect("offsets", &[u64::from(sequences) + 1], 4)?;
        args.assigned.expect("assigned", &[experts.into(), tokens.div_ceil(32).into()], 4)?;
        let tile = tile(tokens, experts, lanes(self.ctx.variant().target));
        let tiles = tokens.div_ceil(tile);
        let pieces = u64::from(tiles) + u64::from(sequences);
        let counts = self.ctx.scratch("counts", 4 * pieces * 256 * 4)?;
        let mut step = BoundOp::default();
        for round in 0..5 {
            let params = Params { tokens, experts, sequences, top, tile, tiles, round };
            let slices = [args.values, args.offsets, (&counts).into(), args.assigned];
            step = step.then(self.kernel.dispatch(&self.ctx, &params, &slices, pieces)?.into());
        }
        Ok(step)
    }
}
