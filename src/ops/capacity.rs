//! Capacities of expert choice from the mask ratios of a batch, on the device: a denoising step is one recording, whatever
//! its ratios (EC-DLM, arXiv 2604.01622).
use super::{few_experts, or_nothing};
use crate::device::Kernel;
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
        write("capacity_of", 4),
        write("k_of", 4),
    ],
    variants: || {
        [Target::Wide, Target::Serial]
            .map(|target| prelude(Variant { target, subgroups: false }))
            .into()
    },
};

params! { tokens: u32, experts: u32, sequences: u32, has_lengths: u32, source: u32, steps: u32 }

fn prelude(variant: Variant) -> Prelude {
    let wg = if variant.target == Target::Serial { 1 } else { 32 };
    Prelude::new(format!("{wg} lanes a sequence"))
        .constant("WG", wg)
        .piece(piece!("common/grid"))
        .piece(piece!("common/offsets"))
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

/// The CPU twin: the capacities and the experts per token, `[sequences]` each. `offsets` are `[sequences + 1]` (made monotone
/// and at most `tokens`), `lengths` `[sequences]`.
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

/// Where the experts per token of each sequence come from. Errors name what is given a sequence `mask`. `steps` is
/// [`Staircase::words`](schedule::Staircase::words) on the device, or any such `[steps, 2]` u32: it may be rewritten between steps too.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A schedule, at mask ratios: [`Schedule::k`].
    Ratios {
        /// `[sequences]` f32, read. Clamped to 0..=1; NaN means `k_min`.
        ratios: Slice<'a>,
        /// `[steps, 2]` u32, read.
        steps: Slice<'a>,
    },
    /// A schedule, at counts of masked tokens: [`Schedule::k_of_counts`] of the count and the sequence's length.
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
    /// `[sequences + 1]` u32, read: token ranges. Values that decrease or exceed `tokens` are clamped.
    pub offsets: Slice<'a>,
    /// `[sequences]` u32, read: tokens of a sequence that are not padding; all where absent.
    pub lengths: Option<Slice<'a>>,
    /// `[sequences]` u32, written whole: tokens that each expert takes, `clamp(floor(length k / experts), 1, length)`, 0 of an
    /// empty sequence. [`expert_choice`](super::expert_choice) reads it.
    pub capacity_of: Slice<'a>,
    /// `[sequences]` u32, written whole: experts per token, for reports.
    pub k_of: Slice<'a>,
}

/// The GPU kernel.
#[derive(Clone, Debug)]
pub struct Capacity {
    ctx: Context,
    kernel: Arc<Kernel>,
}

impl Capacity {
    /// Compiles the kernel.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses it.
    pub fn new(ctx: &Context) -> Result<Self> {
        Ok(Self { ctx: ctx.clone(), kernel: ctx.kernel(&SPEC, prelude(ctx.variant()))? })
    }

    /// Capacities of all sequences.
    ///
    /// # Errors
    ///
    /// Zero or too many experts, or a slice that does not fit ([`Error`]).
    pub fn bind(&self, dims: &Dims, args: Args<'_>) -> Result<BoundOp> {
        let Dims { tokens, experts, sequences } = *dims;
        few_experts(experts)?;
        if sequences == 0 {
            return Ok(BoundOp::default());
        }
        let n = [u64::from(sequences)];
        // A stand-in of its own: the context's may stand for the lengths.
        let nothing = self.ctx.scratch("no steps", 16)?;
        let (source, mask, steps) = match args.source {
            Source::Ratios { ratios, steps } => (0, ratios, steps),
            Source::Masked { masked, steps } => (1, masked, steps),
            Source::ExpertsPerToken(k) => (2, k, Slice::from(&nothing)),
        };
        mask.expect("mask", &n, 4)?;
        if steps.size < 8 || steps.size % 8 != 0 {
            return Err(Error::Size {
                name: "steps",
                expected: steps.size.next_multiple_of(8).max(8),
                got: steps.size,
            });
        }
        args.offsets.expect("offsets", &[n[0] + 1], 4)?;
        if let Some(lengths) = args.lengths {
            lengths.expect("lengths", &n, 4)?;
        }
        args.capacity_of.expect("capacity_of", &n, 4)?;
        args.k_of.expect("k_of", &n, 4)?;
        let params = Params {
            tokens,
            experts,
            sequences,
            has_lengths: args.lengths.is_some().into(),
            source,
            steps: u32::try_from(steps.size / 8)
                .map_err(|_| Error::invalid("steps", "too many"))?,
        };
        let slices = [
            mask,
            args.offsets,
            or_nothing(&self.ctx, args.lengths),
            steps,
            args.capacity_of,
            args.k_of,
        ];
        Ok(self.kernel.dispatch(&self.ctx, &params, &slices, n[0])?.into())
    }
}
