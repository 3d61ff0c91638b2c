//! Expert choice: each expert takes the tokens it scores highest, within each sequence (EC-DLM, arXiv 2604.01622),
//! and the same selection among bits already set: the capacity factor of token choice.
use super::not_zero;
use crate::device::Kernel;
use crate::device::quirks::{LOOP_ITERATIONS, check_loops, offset_iterations};
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
        read("rows", 4),
        write("assigned", 4),
        write("dropped", 4),
    ],
    variants: || [Take::All, Take::Long, Take::Masked].map(prelude).into(),
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

params! { tokens: u32, experts: u32, sequences: u32, has_lengths: u32, has_rows: u32 }

/// Neighbouring experts of one workgroup, and lanes for each, of the layout for GPUs.
const EXPERTS: u32 = 8;
const LANES: u32 = 32;
/// Lanes of one workgroup of the serial layout, for two experts each.
const SERIAL_LANES: u32 = 8;
/// Most tokens of a sequence of the serial layout. Its lanes go over the words of 32 tokens in at most 17 passes: 14 to narrow the
/// bracket, an eighth thrice before, the eligible ones, the bits. The rest of the iterations that software drivers allow is for
/// the candidates, some thousand, and for [`SERIAL_SEQUENCES`].
const SERIAL_TOKENS: u32 = (LOOP_ITERATIONS as u32 - SERIAL_REST) / 17 * 32;
const SERIAL_REST: u32 = 12_000;
/// Most sequences of the serial layout: two thirds of the rest for its lanes' share of the offsets.
const SERIAL_SEQUENCES: u32 = SERIAL_REST * 2 / 3 * SERIAL_LANES;

/// Iterations of one lane of the layout for GPUs, of a sequence of all tokens.
fn iterations(dims: Dims) -> u64 {
    // Words of 32 tokens of a lane.
    let words = u64::from(dims.tokens.div_ceil(32).div_ceil(LANES));
    // Those that are eligible; six passes to narrow the bracket (a wrong guess, then by 127 at least), each of eight fours of
    // tokens; the bits of eight fours, and a look at all lanes' counts.
    let passes = words * (1 + 6 * 9 + 9 + u64::from(LANES));
    // Of nine passes, the sample's among them: the bins are cleared, a stretch of them is summed and searched.
    let bins = 9 * u64::from(3 * 256 / LANES + LANES);
    // Candidates and ties.
    offset_iterations(dims.sequences, EXPERTS * LANES) + passes + bins + 1_000
}

/// Which sequences a dispatch of the layout for GPUs takes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Take {
    All,
    /// Those that are too long for the serial layout.
    Long,
    /// All, among bits already set.
    Masked,
}

fn prelude(take: Take) -> Prelude {
    let masked = take == Take::Masked;
    let label = match take {
        Take::All => "among all",
        Take::Long => "among all, long sequences",
        Take::Masked => "among set bits",
    };
    Prelude::new(label)
        .constant("EXPERTS", EXPERTS)
        .constant("LANES", LANES)
        .constant("WG", EXPERTS * LANES)
        .constant("SHORT", if take == Take::Long { SERIAL_TOKENS } else { 0 })
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
        .constant("SHORT", SERIAL_TOKENS)
        .flag("MASKED", masked)
        .piece(piece!("common/grid"))
        .piece(piece!("common/keys"))
        .piece(piece!("common/offsets"))
        .piece(piece!("common/bits"))
        .piece(piece!("choice/words"))
        .piece(if wide { piece!("choice/pairs_wide") } else { piece!("choice/pairs") })
        .piece(if wide { piece!("choice/pivots_many") } else { piece!("choice/pivots_few") })
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
            // Few and many tokens; one long sequence, and some that may be.
            for (tokens, experts, sequences) in
                [(1, 1, 1), (1, 2, 1), (SERIAL_TOKENS + 1, 1, 1), (SERIAL_TOKENS + 1, 1, 2)]
            {
                op.kernels(Dims { tokens, experts, sequences }, masked)?;
            }
        }
        Ok(op)
    }

    /// The kernels for these sizes, one after the other, and the experts of a workgroup. With [`Target::Serial`] the serial layout
    /// takes all sequences that are not too long for it, of which the host does not know whether there are any.
    fn kernels(&self, dims: Dims, masked: bool) -> Result<Vec<(Arc<Kernel>, u32)>> {
        let Dims { tokens, experts, sequences } = dims;
        let serial = self.ctx.variant().target == Target::Serial && sequences <= SERIAL_SEQUENCES;
        let all_short = serial && tokens <= SERIAL_TOKENS;
        let some_short = serial && sequences > 1;
        let mut kernels = vec![];
        if all_short || some_short {
            let features = self.ctx.device().features();
            let wide = experts.is_multiple_of(2) && features.contains(wgpu::Features::SHADER_INT64);
            let kernel = self.ctx.kernel(&SERIAL, serial_prelude(masked, wide))?;
            kernels.push((kernel, 2 * SERIAL_LANES));
        }
        if !all_short {
            let take = match (masked, some_short) {
                (true, _) => Take::Masked,
                (false, true) => Take::Long,
                (false, false) => Take::All,
            };
            check_loops(&self.ctx, "tokens", tokens, iterations(dims))?;
            kernels.push((self.ctx.kernel(&SPEC, prelude(take))?, EXPERTS));
        }
        Ok(kernels)
    }

    /// Chooses `capacity[b]` tokens of each sequence for each expert.
    ///
    /// # Errors
    ///
    /// Zero experts or sequences, or a slice that does not fit ([`Error`](crate::Error)).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, None)
    }

    /// As [`ExpertChoice::bind`], among the tokens of a bit set `rows`, `[ceil(tokens / 32)]` u32, read
    /// ([`active_rows`](super::active_rows)): the others are never chosen, and a capacity is clamped to
    /// how many of a sequence there are.
    ///
    /// # Errors
    ///
    /// As [`ExpertChoice::bind`].
    pub fn bind_active(&self, dims: &Dims, args: Args<'_>, rows: Slice<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, Some(rows))
    }

    pub(crate) fn bind_among(
        &self,
        dims: &Dims,
        args: Args<'_>,
        rows: Option<Slice<'_>>,
    ) -> Result<BoundOp> {
        let Dims { tokens, experts, sequences } = *dims;
        not_zero(&[("experts", experts), ("sequences", sequences)])?;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        let columns = tokens.div_ceil(32);
        args.values.f32s("values", &[tokens.into(), experts.into()])?;
        args.offsets.u32s("offsets", &[u64::from(sequences) + 1])?;
        if let Some(lengths) = args.lengths {
            lengths.u32s("lengths", &[sequences.into()])?;
        }
        args.capacity.u32s("capacity", &[sequences.into()])?;
        args.assigned.u32s("assigned", &[experts.into(), columns.into()])?;
        if let Some(rows) = rows {
            rows.u32s("rows", &[columns.into()])?;
        }
        let (has_lengths, has_rows) = (args.lengths.is_some().into(), rows.is_some().into());
        let params = Params { tokens, experts, sequences, has_lengths, has_rows };
        let Args { values, offsets, capacity, assigned, .. } = args;
        // The stand-in cannot be bound twice where one binding is `read_write`, as that of `dropped` is.
        let [lengths, rows] = [args.lengths, rows].map(|slice| slice.unwrap_or(capacity));
        let slices = [values, offsets, lengths, capacity, rows, assigned, self.ctx.nothing()];
        let mut step = BoundOp::default();
        for (kernel, tile) in self.kernels(*dims, false)? {
            let groups = u64::from(experts.div_ceil(tile)) * u64::from(sequences);
            step = step.then(kernel.dispatch(&self.ctx, &params, &slices, groups)?.into());
        }
        Ok(step)
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
        args.gates.f32s("gates", &[tokens.into(), experts.into()])?;
        args.offsets.u32s("offsets", &[2])?;
        args.capacity.u32s("capacity", &[1])?;
        args.assigned.u32s("assigned", &[experts.into(), columns.into()])?;
        args.dropped.u32s("dropped", &[experts.into()])?;
        let params = Params { tokens, experts, sequences: 1, ..Params::default() };
        let DropArgs { gates, offsets, capacity, assigned, dropped } = args;
        let slices = [gates, offsets, capacity, capacity, capacity, assigned, dropped];
        let mut step = BoundOp::default();
        for (kernel, tile) in self.kernels(Dims { tokens, experts, sequences: 1 }, true)? {
            let groups = experts.div_ceil(tile).into();
            step = step.then(kernel.dispatch(&self.ctx, &params, &slices, groups)?.into());
        }
        Ok(step)
    }
}
