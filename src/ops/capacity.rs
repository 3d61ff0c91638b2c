//! Capacities of expert choice from the mask ratios of a batch, on the device: a denoising step is
//! one recording, whatever its ratios (EC-DLM, arXiv 2604.01622).
use super::{few_experts, or_nothing};
use crate::device::Kernel;
use crate::device::quirks::{check_loops, offset_iterations};
use crate::device::shader::{Prelude, Spec, params, piece, read, write};
use crate::error::{expect_len, expect_offsets, expect_some};
use crate::routing::schedule::{self, Schedule};
use crate::{BoundOp, Context, Error, Result, Slice, Target, Variant};
use std::sync::Arc;

/// See `shaders/capacity.wgsl`.
pub const SPEC: Spec = Spec {
    name: "capacity",
    body: include_str!("../../shaders/capacity.wgsl"),
    params: Params::LAYOUT,
    bindings: &[
        read("mask", 4),
        read("offsets", 8),
        read("lengths", 4),
        read("steps", 8),
        read("rows", 4),
        write("capacity_of", 4),
        write("k_of", 4),
    ],
    variants: || Prelude::distinct(Variant::EVERY.map(prelude)),
};

params! { tokens: u32, experts: u32, sequences: u32, has_lengths: u32, source: u32, steps: u32, has_rows: u32 }

fn lanes(target: Target) -> u32 {
    if target == Target::Serial { 1 } else { 32 }
}

/// Iterations of one lane: the offsets, the bits of a quotient (32), the steps by halving (32), its
/// share of `words` of rows.
fn iterations(target: Target, sequences: u32, words: u32) -> u64 {
    let lanes = lanes(target);
    offset_iterations(sequences, lanes) + 64 + u64::from(words.div_ceil(lanes) + lanes)
}

fn prelude(variant: Variant) -> Prelude {
    let wg = lanes(variant.target);
    Prelude::new(format!("{wg} lanes a sequence"))
        .constant("WG", wg)
        .piece(piece!("common/grid"))
        .piece(piece!("common/offsets"))
        .piece(piece!("common/bits"))
}

/// Where the experts per token of each sequence come from, on the host.
#[derive(Clone, Copy, Debug)]
pub enum HostSource<'a> {
    /// A schedule, at these mask ratios.
    Ratios(&'a Schedule, &'a [f32]),
    /// A schedule, at these counts of masked tokens.
    Masked(&'a Schedule, &'a [u32]),
    /// As given.
    ExpertsPerToken(&'a [u32]),
}

/// The CPU twin: the capacities and the experts per token, `[sequences]` each. `offsets` are
/// `[sequences + 1]` (made monotone and at most `tokens`), `lengths` `[sequences]`.
///
/// # Panics
///
/// If `experts` is 0, if there are no `offsets`, or if `lengths` or the source's values (`ratios`,
/// `masked`, `experts_per_token`) are not one a sequence; the message names the argument.
pub fn cpu(
    source: HostSource<'_>,
    tokens: usize,
    experts: u32,
    offsets: &[u32],
    lengths: Option<&[u32]>,
) -> (Vec<u32>, Vec<u32>) {
    expect_some("experts", experts as usize);
    let sequences = expect_offsets("offsets", offsets.len());
    if let Some(lengths) = lengths {
        expect_len("lengths", lengths.len(), sequences);
    }
    match source {
        HostSource::Ratios(_, ratios) => expect_len("ratios", ratios.len(), sequences),
        HostSource::Masked(_, masked) => expect_len("masked", masked.len(), sequences),
        HostSource::ExpertsPerToken(k) => expect_len("experts_per_token", k.len(), sequences),
    }
    let ranges = super::expert_choice::ranges(offsets, tokens);
    let rows = ranges.iter().enumerate().map(|(b, range)| {
        let length = lengths.map_or(range.len(), |l| range.len().min(l[b] as usize)) as u32;
        let k = match source {
            HostSource::Ratios(schedule, ratios) => schedule.k(ratios[b]),
            HostSource::Masked(schedule, masked) => schedule.k_of_counts(masked[b], length),
            HostSource::ExpertsPerToken(k) => k[b],
        };
        (schedule::capacity(length, k, experts), k)
    });
    rows.unzip()
}

/// Sizes of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Dims {
    /// Tokens of the batch.
    pub tokens: u32,
    /// Experts, at most [`MAX_EXPERTS`](crate::routing::MAX_EXPERTS).
    pub experts: u32,
    /// Sequences; 0 is a no-op.
    pub sequences: u32,
}

/// Where the experts per token of each sequence come from. `steps` is
/// [`Staircase::words`](schedule::Staircase::words) on the device, or any such `[steps, 2]` u32: it
/// may be rewritten between steps too.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A schedule, at mask ratios: [`Schedule::k`].
    Ratios {
        /// `[sequences]` f32, read. Clamped to 0..=1; NaN means `k_min`.
        ratios: Slice<'a>,
        /// `[steps, 2]` u32, read.
        steps: Slice<'a>,
    },
    /// A schedule, at counts of masked tokens: [`Schedule::k_of_counts`] of the count and the
    /// sequence's length.
    Masked {
        /// `[sequences]` u32, read. More than the sequence has count as all of them.
        masked: Slice<'a>,
        /// `[steps, 2]` u32, read.
        steps: Slice<'a>,
    },
    /// `[sequences]` u32, read: experts per token as given.
    ExpertsPerToken(Slice<'a>),
}

/// Buffers of one dispatch.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    /// Where k comes from.
    pub source: Source<'a>,
    /// `[sequences + 1]` u32, read: token ranges. Values that decrease or exceed `tokens` are
    /// clamped.
    pub offsets: Slice<'a>,
    /// `[sequences]` u32, read: tokens of a sequence that are not padding; all where absent.
    pub lengths: Option<Slice<'a>>,
    /// `[sequences]` u32, written whole: tokens that each expert takes,
    /// `clamp(floor(length k / experts), 1, length)`, 0 of an empty sequence.
    /// [`expert_choice`](super::expert_choice) reads it.
    pub capacity_of: Slice<'a>,
    /// `[sequences]` u32, written whole: experts per token, for reports.
    pub k_of: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct Capacity {
    ctx: Context,
}

impl Capacity {
    /// Compiles the kernel, for few sequences and for many.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        let op = Self { ctx: ctx.clone() };
        for sequences in [1, u32::MAX] {
            op.kernel(sequences, 0)?;
        }
        Ok(op)
    }

    /// The kernel for this many sequences and words of rows, and the iterations of its loops.
    fn kernel(&self, sequences: u32, words: u32) -> Result<(Arc<Kernel>, u64)> {
        let few = self.ctx.variant();
        let variant = few.within_loops(iterations(few.target, sequences, words));
        let kernel = self.ctx.kernel(&SPEC, prelude(variant))?;
        Ok((kernel, iterations(variant.target, sequences, words)))
    }

    /// Capacities of all sequences.
    ///
    /// # Errors
    ///
    /// Zero or too many experts, on a software driver too many sequences, or a slice that does not
    /// fit ([`Error`]).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        self.bind_among(dims, args, None)
    }

    /// As [`Capacity::bind`], of the tokens of a bit set `rows`, `[ceil(tokens / 32)]` u32, read
    /// ([`active_rows`](super::active_rows)): the others do not count.
    ///
    /// # Errors
    ///
    /// As [`Capacity::bind`].
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
        few_experts(experts)?;
        if sequences == 0 {
            return Ok(BoundOp::default());
        }
        let columns = tokens.div_ceil(32);
        let words = if rows.is_some() { columns } else { 0 };
        let (kernel, iterations) = self.kernel(sequences, words)?;
        if let Some(rows) = rows {
            rows.u32s("rows", &[columns.into()])?;
        }
        check_loops(&self.ctx, "sequences", sequences, iterations)?;
        let n = [u64::from(sequences)];
        // A stand-in of its own: the context's may stand for the lengths.
        let nothing = self.ctx.scratch("no steps", 16)?;
        let (source, name, mask, steps) = match args.source {
            Source::Ratios { ratios, steps } => {
                ratios.f32s("ratios", &n)?;
                (0, "ratios", ratios, steps)
            }
            Source::Masked { masked, steps } => {
                masked.u32s("masked", &n)?;
                (1, "masked", masked, steps)
            }
            Source::ExpertsPerToken(k) => {
                k.u32s("experts_per_token", &n)?;
                (2, "experts_per_token", k, Slice::from(&nothing))
            }
        };
        if steps.size < 8 || steps.size % 8 != 0 {
            // Down: the next multiple above may be none.
            let pairs = (steps.size / 8).max(1);
            return Err(Error::Size {
                name: "steps",
                expected: pairs * 8,
                got: steps.size,
                shape: Some(format!("[{pairs}, 2] u32")),
            });
        }
        args.offsets.u32s("offsets", &[n[0] + 1])?;
        if let Some(lengths) = args.lengths {
            lengths.u32s("lengths", &n)?;
        }
        args.capacity_of.u32s("capacity_of", &n)?;
        args.k_of.u32s("k_of", &n)?;
        let params = Params {
            tokens,
            experts,
            sequences,
            has_lengths: args.lengths.is_some().into(),
            source,
            steps: u32::try_from(steps.size / 8)
                .map_err(|_| Error::invalid("steps", "too many"))?,
            has_rows: rows.is_some().into(),
        };
        let slices = [
            mask,
            args.offsets,
            or_nothing(&self.ctx, args.lengths),
            steps,
            or_nothing(&self.ctx, rows),
            args.capacity_of,
            args.k_of,
        ];
        let dispatch = kernel.dispatch(&self.ctx, &params, &slices, n[0]);
        Ok(dispatch.map_err(|e| e.renamed(&[("mask", name)]))?.into())
    }
}
