//! The highest pairs of a sequence: as many as token choice would make, given out over all its
//! tokens and experts, so that hard tokens get more experts and easy ones fewer or none (SeqTopK,
//! arXiv 2511.06494).
use super::{not_zero, or_nothing};
use crate::device::Kernel;
use crate::device::quirks::{LOOP_ITERATIONS, check_loops, offset_iterations};
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::error::{expect_most, expect_offsets, expect_rows};
use crate::plan::bits;
use crate::routing::{check, order};
use crate::{BoundOp, Context, Result, Slice, Target};
use std::sync::Arc;

/// See `shaders/sequence_top.wgsl`.
pub const SPEC: Spec = Spec {
    name: "sequence_top",
    body: include_str!("../../shaders/sequence_top.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("values", 4),
        read("offsets", 8),
        read("lengths", 4),
        read("rows", 4),
        write("counts", 4),
        write("assigned", 4),
    ],
    variants: || Target::ALL.map(prelude).into(),
};

params! {
    tokens: u32, experts: u32, sequences: u32, top: u32, tile: u32, tiles: u32, round: u32,
    has_lengths: u32, has_rows: u32,
}

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

/// Tokens that one workgroup works on: a multiple of 32, few enough pieces for each of them to add
/// up the counts of all, and few enough pairs for its loops, see [`iterations`].
fn tile(tokens: u32, experts: u32, lanes: u32) -> u32 {
    let even = tokens.div_ceil(64).next_multiple_of(32).max(256);
    even.min((PAIRS * lanes / experts.max(lanes) / 32 * 32).max(32))
}

/// Most (token, expert) pairs of a lane. The last round visits each twice at most, once as an
/// expert's token and once as a tie: half of the iterations that software drivers allow. The rest
/// is for [`iterations`]' other terms.
const PAIRS: u32 = (LOOP_ITERATIONS as u32).div_ceil(4);

/// Iterations of one lane in the last round: the offsets of three sequences, the counts of all
/// pieces in each of the four rounds before (a stretch of the 256 bins, and the other lanes'
/// totals), the pairs.
fn iterations(lanes: u32, dims: Dims, tile: u32) -> u64 {
    let tiles = u64::from(dims.tokens.div_ceil(tile));
    let stretch = u64::from(256 / lanes);
    // The first of them once more where only some tokens take part.
    let counts = 4 * (2 * stretch + stretch * tiles + u64::from(lanes)) + u64::from(lanes);
    let experts = u64::from(dims.experts.div_ceil(lanes));
    let words = u64::from(tile.div_ceil(32)) + 1;
    let chunks = u64::from(dims.experts.div_ceil(32));
    // Of an expert and a word: the 32 tokens, as many ties, and for the token of which some are
    // taken the chunks before.
    let pairs = words * (experts * (2 + 64 + chunks) + 32);
    3 * offset_iterations(dims.sequences, lanes) + counts + pairs
}

/// The CPU twin: the bit set `[experts, ceil(tokens / 32)]` of the `top` times length highest pairs
/// of each sequence. `values` is `[tokens, experts]`, `offsets` `[sequences + 1]` (made monotone
/// and at most `tokens`).
///
/// # Panics
///
/// If `experts` is 0, if `values` are not whole rows of `experts`, if `top` is above `experts`, or
/// if there are no `offsets`; the message names the argument.
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
    pub experts_per_token: u32,
}

/// Buffers of one choice.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// `[tokens, experts]` f32, read: selection values.
    pub values: Slice<'a>,
    /// `[sequences + 1]` u32, read: token ranges. Values that decrease or exceed `tokens` are
    /// clamped.
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
    /// [`Error::Device`](crate::Error::Device) where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        Ok(Self { ctx: ctx.clone(), kernel: ctx.kernel(&SPEC, prelude(ctx.variant().target))? })
    }

    /// Chooses `experts_per_token` times its length pairs of each sequence: five dispatches, and
    /// scratch of 4 KiB a piece.
    ///
    /// # Errors
    ///
    /// Zero sequences, zero or too many experts, `experts_per_token` of 0 or above `experts`, on a
    /// software driver too many tokens or sequences, or a slice that does not fit
    /// ([`Error`](crate::Error)).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, None, None)
    }

    /// As [`SequenceTop::bind`], for the first tokens of each sequence: `lengths`, `[sequences]`
    /// u32, read. What follows in a sequence is padding; it is never chosen, and does not count.
    ///
    /// # Errors
    ///
    /// As [`SequenceTop::bind`].
    pub fn bind_padded(&self, dims: &Dims, args: Args<'_>, lengths: Slice<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, Some(lengths), None)
    }

    /// As [`SequenceTop::bind`], among the tokens of a bit set `rows`, `[ceil(tokens / 32)]` u32, read
    /// ([`active_rows`](super::active_rows)): the others are never chosen, and do not count.
    ///
    /// # Errors
    ///
    /// As [`SequenceTop::bind`].
    pub fn bind_active(&self, dims: &Dims, args: Args<'_>, rows: Slice<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, None, Some(rows))
    }

    pub(crate) fn bind_among(
        &self,
        dims: &Dims,
        args: Args<'_>,
        lengths: Option<Slice<'_>>,
        rows: Option<Slice<'_>>,
    ) -> Result<BoundOp> {
        let Dims { tokens, experts, sequences, experts_per_token: top } = *dims;
        check::sequence_top(experts, top)?;
        not_zero(&[("sequences", sequences)])?;
        if tokens == 0 {
            return Ok(BoundOp::default());
        }
        args.values.f32s("values", &[tokens.into(), experts.into()])?;
        args.offsets.u32s("offsets", &[u64::from(sequences) + 1])?;
        args.assigned.u32s("assigned", &[experts.into(), tokens.div_ceil(32).into()])?;
        if let Some(lengths) = lengths {
            lengths.u32s("lengths", &[sequences.into()])?;
        }
        if let Some(rows) = rows {
            rows.u32s("rows", &[tokens.div_ceil(32).into()])?;
        }
        let (has_lengths, has_rows) = (lengths.is_some().into(), rows.is_some().into());
        let [lengths, rows] = [lengths, rows].map(|slice| or_nothing(&self.ctx, slice));
        let lanes = lanes(self.ctx.variant().target);
        let tile = tile(tokens, experts, lanes);
        let (name, most) =
            if sequences > tokens { ("sequences", sequences) } else { ("tokens", tokens) };
        check_loops(&self.ctx, name, most, iterations(lanes, *dims, tile))?;
        let tiles = tokens.div_ceil(tile);
        let pieces = u64::from(tiles) + u64::from(sequences);
        let counts = self.ctx.scratch("counts", 4 * pieces * 256 * 4)?;
        let mut step = BoundOp::default();
        for round in 0..5 {
            let params = Params {
                tokens,
                experts,
                sequences,
                top,
                tile,
                tiles,
                round,
                has_lengths,
                has_rows,
            };
            let Args { values, offsets, assigned } = args;
            let slices = [values, offsets, lengths, rows, (&counts).into(), assigned];
            step = step.then(self.kernel.dispatch(&self.ctx, &params, &slices, pieces)?.into());
        }
        Ok(step)
    }
}
