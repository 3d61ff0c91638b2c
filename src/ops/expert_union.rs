//! The experts that a block's tokens use together: the bytes that decoding the block must read.
use super::{few_experts, or_nothing};
use crate::device::Kernel;
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
    variants: || {
        [Target::Wide, Target::Serial]
            .map(|target| prelude(Variant { target, subgroups: false }))
            .into()
    },
};

params! { tokens: u32, experts: u32, blocks: u32, expert_bytes_low: u32, expert_bytes_high: u32, has_totals: u32 }

fn prelude(variant: Variant) -> Prelude {
    let wg = if variant.target == Target::Serial { 8 } else { 256 };
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
/// If `assigned` is not `experts * ceil(tokens / 32)` long, or if there are no `offsets`; the message
/// names the argument.
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

/// A running mean of the experts of a block, as [`ExpertUnion::bind_mean`] keeps it on the device: exact, in any order.
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
            _ => Err(Error::Size {
                name: "words",
                expected: Self::BYTES,
                got: 4 * words.len() as u64,
            }),
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
        for columns in [1, u32::MAX] {
            op.kernel(1, columns)?;
        }
        Ok(op)
    }

    /// The kernel for these sizes. With few lanes a block of all tokens may take
    /// more iterations than lavapipe lets an invocation have (65,535 in all, Mesa 22.3).
    fn kernel(&self, experts: u32, columns: u32) -> Result<Arc<Kernel>> {
        let variant = self.ctx.variant();
        let long = u64::from(experts.div_ceil(8)) * u64::from(columns) > 32_768;
        self.ctx.kernel(
            &SPEC,
            prelude(Variant {
                target: if long { Target::Wide } else { variant.target },
                ..variant
            }),
        )
    }

    /// Unions of blocks.
    ///
    /// # Errors
    ///
    /// Zero or too many experts, or a slice that does not fit ([`Error`]).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        let Dims { tokens, experts, blocks, expert_bytes } = *dims;
        few_experts(experts)?;
        if blocks == 0 || tokens == 0 {
            return Ok(BoundOp::default());
        }
        args.assigned.expect("assigned", &[experts.into(), tokens.div_ceil(32).into()], 4)?;
        args.offsets.expect("offsets", &[u64::from(blocks) + 1], 4)?;
        args.members.expect("members", &[blocks.into(), experts.div_ceil(32).into()], 4)?;
        args.counts.expect("counts", &[blocks.into()], 4)?;
        args.bytes.expect("bytes", &[blocks.into()], 8)?;
        if let Some(totals) = args.totals {
            totals.expect("totals", &[4], 4)?;
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
        let kernel = self.kernel(experts, tokens.div_ceil(32))?;
        Ok(kernel.dispatch(&self.ctx, &params, &slices, blocks.into())?.into())
    }
}
