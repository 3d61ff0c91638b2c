//! Expert choice: each expert takes the tokens it scores highest, within each sequence (EC-DLM, arXiv 2604.01622),
//! and the same selection among bits already set: the capacity factor of token choice.
use super::not_zero;
use crate::device::Kernel;
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::error::{expect_len, expect_offsets, expect_rows};
use crate::plan::bits;
use crate::routing::order;
use crate::{BoundOp, Context, Result, Slice, Target};
use std::sync::Arc;

/// See `shaders/expert_choice.wgsl`.
pub const SPEC: Spec = Spec {
    name: "expert_choice",
    body: include_str!("../../shaders/expert_choice.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("values", 4),
        read("offsets", 8),
        read("lengths", 4),
        read("capacity", 4),
        write("assigned", 4),
        write("dropped", 4),
    ],
    variants: || [false, true].map(prelude).into(),
};

/// See `shaders/expert_choice_serial.wgsl`.
pub const SERIAL: Spec = Spec {
    name: "expert_choice_serial",
    body: include_str!("../../shaders/expert_choice_serial.wgsl"),
    variants: || {
        let mut all = vec![];
        for masked in [false, true] {
            for wide in [false, true] {
                all.push(serial_prelude(masked, wide));
            }
        }
        all
    },
    ..SPEC
};

params! { tokens: u32, experts: u32, sequences: u32, has_lengths: u32 }

/// Neighbouring experts of one workgroup, and lanes for each, of the layout for GPUs.
const EXPERTS: u32 = 8;
const LANES: u32 = 32;
/// Lanes of one workgroup of the serial layout, for two experts each.
const SERIAL_LANES: u32 = 8;
/// Most tokens of the serial layout. Its lanes loop over the words of 32 tokens in at most 17 passes, and some thousand times
/// over candidates; lavapipe (Mesa 22.3) ends the loops of an invocation, without a word, after 65,535 iterations in all.
const SERIAL_TOKENS: u32 = 100_000;

fn prelude(masked: bool) -> Prelude {
    Prelude::new(if masked { "among set bits" } else { "among all" })
        .constant("EXPERTS", EXPERTS)
        .constant("LANES", LANES)
        .constant("WG", EXPERTS * LANES)
        .flag("MASKED", masked)
        .piece(piece!("common/grid"))
        .piece(piece!("common/keys"))
        .piece(piece!("common/offsets"))
        .piece(piece!("common/bits"))
        .piece(piece!("choice/words"))
}

fn serial_prelude(masked: bool, wide: bool) -> Prelude {
    let mut prelude = Prelude::new(if masked { "among set bits" } else { "among all" });
    if wide {
        prelude.label += ", 64-bit loads";
        prelude = prelude.needs(wgpu::Features::SHADER_INT64);
    }
    prelude
        .constant("WG", SERIAL_LANES)
        .flag("MASKED", masked)
        .piece(piece!("common/grid"))
        .piece(piece!("common/keys"))
        .piece(piece!("common/offsets"))
        .piece(piece!("common/bits"))
        .piece(piece!("choice/words"))
        .piece(if wide { piece!("choice/pairs_wide") } else { piece!("choice/pairs") })
}

/// The CPU twin: the bit set `[experts, ceil(tokens / 32)]`. `values` is `[tokens, experts]`, `offsets`
/// `[sequences + 1]` (made monotone and at most `tokens`), `lengths` and `capacity` `[sequences]`.
///
/// # Panics
///
/// If `experts` is 0, if `values` are not whole rows of `experts`, if there are no `offsets`, or if
/// `lengths` or `capacity` are not one a sequence; the message names the argument.
pub fn cpu(
    values: &[f32],
    experts: usize,
    offsets: &[u32],
    lengths: Option<&[u32]>,
    capacity: &[u32],
) -> Vec<u32> {
    let tokens = expect_rows("values", values.len(), "experts", experts);
    let sequences = expect_offsets("offsets", offsets.len());
    if let Some(lengths) = lengths {
        expect_len("lengths", lengths.len(), sequences);
    }
    expect_len("capacity", capacity.len(), sequences);
    let mut assigned = bits::empty(tokens, experts);
    for (b, range) in ranges(offsets, tokens).into_iter().enumerate() {
        let length = lengths.map_or(range.len(), |l| range.len().min(l[b] as usize));
        let range = range.start..range.start + length;
        if range.is_empty() {
            continue;
        }
        let take = (capacity[b] as usize).clamp(1, length);
        for e in 0..experts {
            for t in order::top(range.clone(), take, |t| values[t * experts + e]) {
                bits::set(&mut assigned, tokens, e, t);
            }
        }
    }
    assigned
}

/// The CPU twin of the capacity factor: each expert keeps at most `capacity` of its tokens, those with the highest gates
/// `[tokens, experts]`. The bit set that is left, and how many each expert dropped.
///
/// # Panics
///
/// If `experts` is 0, if `gates` are not whole rows of `experts`, or if `assigned` is not
/// `experts * ceil(tokens / 32)` long; the message names the argument.
pub fn cpu_drop(
    gates: &[f32],
    experts: usize,
    assigned: &[u32],
    capacity: u32,
) -> (Vec<u32>, Vec<u32>) {
    let tokens = expect_rows("gates", gates.len(), "experts", experts);
    expect_len("assigned", assigned.len(), experts * bits::columns(tokens));
    let mut kept = bits::empty(tokens, experts);
    let mut dropped = vec![];
    for e in 0..experts {
        let mine = bits::tokens_of(assigned, tokens, e);
        dropped.push((mine.len() as u32).saturating_sub(capacity));
        for t in order::top(mine, capacity as usize, |t| gates[t * experts + e]) {
            bits::set(&mut kept, tokens, e, t);
        }
    }
    (kept, dropped)
}

/// The token ranges that offsets of any value stand for: a running maximum, at most `tokens`.
pub fn ranges(offsets: &[u32], tokens: usize) -> Vec<std::ops::Range<usize>> {
    let mut highest = 0;
    let clean: Vec<usize> = offsets
        .iter()
        .map(|&o| {
            highest = highest.max((o as usize).min(tokens));
            highest
        })
        .collect();
    clean.windows(2).map(|w| w[0]..w[1]).collect()
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Rows of `values`; 0 is a no-op.
    pub tokens: u32,
    /// Experts.
    pub experts: u32,
    /// Ranges of tokens that are chosen from apart; 1 for a choice over the batch.
    pub sequences: u32,
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, experts]` f32, read: selection values.
    pub values: Slice<'a>,
    /// `[sequences + 1]` u32, read: token ranges. Values that decrease or exceed `tokens` are clamped.
    pub offsets: Slice<'a>,
    /// `[sequences]` u32, read: tokens of a sequence that are not padding; all where absent.
    pub lengths: Option<Slice<'a>>,
    /// `[sequences]` u32, read: tokens that each expert takes, clamped to 1 and the sequence's length.
    pub capacity: Slice<'a>,
    /// `[experts, ceil(tokens / 32)]` u32, written whole: the bit set.
    pub assigned: Slice<'a>,
}

/// Sizes of a drop.
#[derive(Clone, Copy, Debug)]
pub struct DropDims {
    /// Tokens; 0 is a no-op.
    pub tokens: u32,
    /// Experts.
    pub experts: u32,
}

/// Buffers of a drop.
#[derive(Clone, Copy, Debug)]
pub struct DropArgs<'a> {
    /// `[tokens, experts]` f32, read at assigned pairs.
    pub gates: Slice<'a>,
    /// `[2]` u32, read: 0 and the number of tokens.
    pub offsets: Slice<'a>,
    /// `[1]` u32, read: most tokens of an expert.
    pub capacity: Slice<'a>,
    /// `[experts, ceil(tokens / 32)]` u32, read and written: the bit set.
    pub assigned: Slice<'a>,
    /// `[experts]` u32, written whole: tokens dropped.
    pub dropped: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct ExpertChoice {
    ctx: Context,
}

impl ExpertChoice {
    /// Compiles the kernels for few and for many tokens, and their variants that drop.
    ///
    /// # Errors
    ///
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        let op = Self { ctx: ctx.clone() };
        for masked in [false, true] {
            for (tokens, experts) in [(1, 1), (1, 2), (u32::MAX, 1)] {
                op.kernel(tokens, experts, masked)?;
            }
        }
        Ok(op)
    }

    /// The kernel for this many tokens and experts, and the experts of a workgroup.
    fn kernel(&self, tokens: u32, experts: u32, masked: bool) -> Result<(Arc<Kernel>, u32)> {
        if self.ctx.variant().target == Target::Wide || tokens > SERIAL_TOKENS {
            return Ok((self.ctx.kernel(&SPEC, prelude(masked))?, EXPERTS));
        }
        let features = self.ctx.device().features();
        let wide = experts.is_multiple_of(2) && features.contains(wgpu::Features::SHADER_INT64);
        Ok((self.ctx.kernel(&SERIAL, serial_prelude(masked, wide))?, 2 * SERIAL_LANES))
    }

    /// Chooses `capacity[b]` tokens of each sequence for each expert.
    ///
    /// # Errors
    ///
    /// Zero experts or sequences, or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        let Dims { tokens, experts, sequences } = *dims;
        not_zero(&[("experts", experts), ("sequences", sequences)])?;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        let columns = tokens.div_ceil(32);
        args.values.expect("values", &[tokens.into(), experts.into()], 4)?;
        args.offsets.expect("offsets", &[u64::from(sequences) + 1], 4)?;
        if let Some(lengths) = args.lengths {
            lengths.expect("lengths", &[sequences.into()], 4)?;
        }
        args.capacity.expect("capacity", &[sequences.into()], 4)?;
        args.assigned.expect("assigned", &[experts.into(), columns.into()], 4)?;
        let params =
            Params { tokens, experts, sequences, has_lengths: u32::from(args.lengths.is_some()) };
        // The stand-in cannot be bound twice where one binding is `read_write`, as that of `dropped` is.
        let lengths = args.lengths.unwrap_or(args.capacity);
        let slices =
            [args.values, args.offsets, lengths, args.capacity, args.assigned, self.ctx.nothing()];
        let (kernel, tile) = self.kernel(tokens, experts, false)?;
        let groups = u64::from(experts.div_ceil(tile)) * u64::from(sequences);
        Ok(kernel.dispatch(&self.ctx, &params, &slices, groups)?.into())
    }

    /// Drops the lowest gates of experts that hold more tokens than `capacity[0]`.
    ///
    /// # Errors
    ///
    /// Zero experts, or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind_drop(&self, dims: &DropDims, args: DropArgs<'_>) -> Result<BoundOp> {
        let DropDims { tokens, experts } = *dims;
        not_zero(&[("experts", experts)])?;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        let columns = tokens.div_ceil(32);
        args.gates.expect("gates", &[tokens.into(), experts.into()], 4)?;
        args.offsets.expect("offsets", &[2], 4)?;
        args.capacity.expect("capacity", &[1], 4)?;
        args.assigned.expect("assigned", &[experts.into(), columns.into()], 4)?;
        args.dropped.expect("dropped", &[experts.into()], 4)?;
        let params = Params { tokens, experts, sequences: 1, has_lengths: 0 };
        let slices =
            [args.gates, args.offsets, args.capacity, args.capacity, args.assigned, args.dropped];
        let (kernel, tile) = self.kernel(tokens, experts, true)?;
        let groups = experts.div_ceil(tile).into();
        Ok(kernel.dispatch(&self.ctx, &params, &slices, groups)?.into())
    }
}
