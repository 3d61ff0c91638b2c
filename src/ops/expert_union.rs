//! The experts that a block's tokens use together: the bytes that decoding the block must read (METHODS 4).
use super::{GRID, OFFSETS, few_experts};
use crate::kernel::{Kernel, Prelude, Spec, params, read, write};
use crate::{Context, Result, Slice, Step, Target, Variant, bits};
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
    ],
    variants: || {
        [Target::Gpu, Target::Cpu]
            .map(|target| prelude(Variant { target, subgroups: false }))
            .into()
    },
};

params! { tokens: u32, experts: u32, blocks: u32, expert_bytes_low: u32, expert_bytes_high: u32 }

fn prelude(variant: Variant) -> Prelude {
    let wg = if variant.target == Target::Cpu { 8 } else { 256 };
    Prelude::new(format!("{wg} lanes a block")).constant("WG", wg).piece(GRID).piece(OFFSETS)
}

/// The CPU twin: the members `[blocks, ceil(experts / 32)]`, counts, and bytes of each block.
///
/// # Panics
///
/// If the lengths do not fit together.
pub fn cpu(
    assigned: &[u32],
    tokens: usize,
    experts: usize,
    offsets: &[u32],
    expert_bytes: u64,
) -> (Vec<u32>, Vec<u32>, Vec<u64>) {
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

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Tokens.
    pub tokens: u32,
    /// Experts, at most [`MAX_EXPERTS`](crate::plan::MAX_EXPERTS).
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
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct ExpertUnion {
    ctx: Context,
}

impl ExpertUnion {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        let op = Self { ctx: ctx.clone() };
        op.kernel(1, 1)?;
        Ok(op)
    }

    /// The kernel for these sizes, made now if it is the first of its kind. With few lanes a block of all tokens may take
    /// more iterations than lavapipe lets an invocation have (65,535 in all, Mesa 22.3).
    fn kernel(&self, experts: u32, columns: u32) -> Result<Arc<Kernel>> {
        let variant = self.ctx.variant();
        let long = u64::from(experts.div_ceil(8)) * u64::from(columns) > 32_768;
        self.ctx.kernel(
            &SPEC,
            prelude(Variant { target: if long { Target::Gpu } else { variant.target }, ..variant }),
        )
    }

    /// Unions of blocks.
    ///
    /// # Errors
    ///
    /// Zero or too many experts, or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, dims: Dims, args: Args<'_>) -> Result<Step> {
        let Dims { tokens, experts, blocks, expert_bytes } = dims;
        few_experts(experts)?;
        if blocks == 0 || tokens == 0 {
            return Ok(Step::default());
        }
        args.assigned.expect("assigned", &[experts.into(), tokens.div_ceil(32).into()], 4)?;
        args.offsets.expect("offsets", &[u64::from(blocks) + 1], 4)?;
        args.members.expect("members", &[blocks.into(), experts.div_ceil(32).into()], 4)?;
        args.counts.expect("counts", &[blocks.into()], 4)?;
        args.bytes.expect("bytes", &[blocks.into()], 8)?;
        let params = Params {
            tokens,
            experts,
            blocks,
            expert_bytes_low: expert_bytes as u32, // the low word
            expert_bytes_high: (expert_bytes >> 32) as u32,
        };
        let slices = [args.assigned, args.offsets, args.members, args.counts, args.bytes];
        let kernel = self.kernel(experts, tokens.div_ceil(32))?;
        Ok(kernel.dispatch(&self.ctx, &params, &slices, blocks.into())?.into())
    }
}
