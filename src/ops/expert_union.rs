//! The experts that a block's tokens use together: the bytes that decoding the block must read.
use super::{few_experts, or_nothing};
use crate::device::Kernel;
use crate::device::quirks::{check_loops, offset_iterations};
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::error::{expect_len, expect_offsets};
use crate::plan::bits;
use crate::{BoundOp, Context, Error, Result, Slice, Target, Variant};
use std::sync::Arc;

/// See `shaders/expert_union.wgsl`.
pub const SPEC: Spec = Spec {
    name: "expert_union",
    body: include_str!("../../shaders/expert_union.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("assigned", 4),
        read("offsets", 8),
        write("members", 4),
        write("counts", 4),
        write("bytes", 8),
        write("totals", 4),
    ],
    variants: || Prelude::distinct(Variant::EVERY.map(prelude)),
};

params! {
    tokens: u32, experts: u32, blocks: u32, expert_bytes_low: u32, expert_bytes_high: u32,
    has_totals: u32,
}

/// Lanes of a block; [`coverage`](super::coverage) shares them out alike.
pub(super) fn lanes(target: Target) -> u32 {
    if target == Target::Serial { 8 } else { 256 }
}

/// Iterations of one lane: for each of its experts, all columns of a block, which may be all there
/// are; its chunks, twice.
fn iterations(target: Target, dims: Dims) -> u64 {
    let experts = u64::from(dims.experts.div_ceil(lanes(target)));
    let columns = u64::from(dims.tokens.div_ceil(32));
    experts * (columns + 1) + 8 + offset_iterations(dims.blocks, lanes(target))
}

pub(super) fn prelude(variant: Variant) -> Prelude {
    let wg = lanes(variant.target);
    Prelude::new(format!("{wg} lanes a block"))
        .constant("WG", wg)
        .piece(piece!("common/grid"))
        .piece(piece!("common/offsets"))
        .piece(piece!("common/bits"))
}

/// The CPU twin: the members `[blocks, ceil(experts / 32)]`, counts, and bytes of each block.
///
/// # Panics
///
/// If `assigned` is not `experts * ceil(tokens / 32)` long, or if there are no `offsets`; the
/// message names the argument.
pub fn cpu(
    assigned: &[u32],
    tokens: usize,
    experts: usize,
    offsets: &[u32],
    expert_bytes: u64,
) -> (Vec<u32>, Vec<u32>, Vec<u64>) {
    expect_len("assigned", assigned.len(), experts * bits::columns(tokens));
    expect_offsets("offsets", offsets.len());
    let (mut members, mut counts) = (vec![], vec![]);
    for range in super::expert_choice::ranges(offsets, tokens) {
        let mut row = vec![0u32; experts.div_ceil(32)];
        for e in 0..experts {
            if range.clone().any(|t| bits::get(assigned, tokens, e, t)) {
                row[e / 32] |= 1 << (e % 32);
            }
        }
        counts.push(row.iter().map(|w| w.count_ones()).sum());
        members.extend(row);
    }
    let bytes = counts.iter().map(|&n: &u32| u64::from(n) * expert_bytes).collect();
    (members, counts, bytes)
}

/// A running mean of the experts of a block, as [`Args::totals`] keeps it on the device: exact, in
/// any order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Distinct experts, summed over blocks that have tokens.
    pub experts: u64,
    /// Those blocks.
    pub blocks: u64,
}

impl Totals {
    /// Bytes of the buffer.
    pub const BYTES: u64 = 16;

    /// From the words of the buffer.
    ///
    /// # Errors
    ///
    /// [`Error::Size`] unless there are 4.
    pub fn from_words(words: &[u32]) -> Result<Self> {
        match *words {
            [a, b, c, d] => {
                let wide = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
                Ok(Self { experts: wide(a, b), blocks: wide(c, d) })
            }
            _ => Err(Error::size("words", Self::BYTES, 4 * words.len() as u64)),
        }
    }

    /// The CPU twin: adds the counts of these blocks.
    ///
    /// # Panics
    ///
    /// If `offsets` are not one more than `counts`; the message names the argument.
    pub fn add(&mut self, counts: &[u32], offsets: &[u32], tokens: usize) {
        expect_len("offsets", offsets.len(), counts.len() + 1);
        let ranges = super::expert_choice::ranges(offsets, tokens);
        for (&n, _) in counts.iter().zip(ranges).filter(|(_, range)| !range.is_empty()) {
            self.experts += u64::from(n);
            self.blocks += 1;
        }
    }

    /// Distinct experts of a block in the mean; 0 without blocks.
    pub fn mean(&self) -> f64 {
        if self.blocks == 0 { 0.0 } else { self.experts as f64 / self.blocks as f64 }
    }
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Tokens.
    pub tokens: u32,
    /// Experts, at most [`MAX_EXPERTS`](crate::routing::MAX_EXPERTS).
    pub experts: u32,
    /// Blocks; 0 is a no-op.
    pub blocks: u32,
    /// Bytes of one expert's weights.
    pub expert_bytes: u64,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[experts, ceil(tokens / 32)]` u32, read: the bit set.
    pub assigned: Slice<'a>,
    /// `[blocks + 1]` u32, read: token ranges. Values that decrease or exceed `tokens` are clamped.
    pub offsets: Slice<'a>,
    /// `[blocks, ceil(experts / 32)]` u32, written whole: bit set of the experts used.
    pub members: Slice<'a>,
    /// `[blocks]` u32, written whole: how many.
    pub counts: Slice<'a>,
    /// `[blocks]` u64 (low word first), written whole: bytes of their weights.
    pub bytes: Slice<'a>,
    /// `[4]` u32, read and written: a running mean over layers and steps (see [`Totals`]; zeros to
    /// begin with). Any number of layers may add to one.
    pub totals: Option<Slice<'a>>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct ExpertUnion {
    ctx: Context,
}

impl ExpertUnion {
    /// Compiles the kernel, for few tokens and for many.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        let op = Self { ctx: ctx.clone() };
        for tokens in [1, u32::MAX] {
            op.kernel(Dims { tokens, experts: 1, blocks: 1, expert_bytes: 0 })?;
        }
        Ok(op)
    }

    /// The kernel for these sizes, and the iterations of its loops.
    fn kernel(&self, dims: Dims) -> Result<(Arc<Kernel>, u64)> {
        let few = self.ctx.variant();
        let variant = few.within_loops(iterations(few.target, dims));
        Ok((self.ctx.kernel(&SPEC, prelude(variant))?, iterations(variant.target, dims)))
    }

    /// Unions of blocks.
    ///
    /// # Errors
    ///
    /// Zero or too many experts, on a software driver too many tokens or blocks, or a slice that
    /// does not fit ([`Error`]).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        let Dims { tokens, experts, blocks, expert_bytes } = *dims;
        few_experts(experts)?;
        if blocks == 0 || tokens == 0 {
            return Ok(BoundOp::default());
        }
        let (kernel, iterations) = self.kernel(*dims)?;
        let (name, most) = if blocks > tokens { ("blocks", blocks) } else { ("tokens", tokens) };
        check_loops(&self.ctx, name, most, iterations)?;
        args.assigned.u32s("assigned", &[experts.into(), tokens.div_ceil(32).into()])?;
        args.offsets.u32s("offsets", &[u64::from(blocks) + 1])?;
        args.members.u32s("members", &[blocks.into(), experts.div_ceil(32).into()])?;
        args.counts.u32s("counts", &[blocks.into()])?;
        args.bytes.pairs("bytes", &[blocks.into()])?;
        if let Some(totals) = args.totals {
            totals.u32s("totals", &[4])?;
        }
        let params = Params {
            tokens,
            experts,
            blocks,
            expert_bytes_low: expert_bytes as u32, // the low word
            expert_bytes_high: (expert_bytes >> 32) as u32,
            has_totals: args.totals.is_some().into(),
        };
        let totals = or_nothing(&self.ctx, args.totals);
        let slices = [args.assigned, args.offsets, args.members, args.counts, args.bytes, totals];
        Ok(kernel.dispatch(&self.ctx, &params, &slices, blocks.into())?.into())
    }
}
