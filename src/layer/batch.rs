//! What a layer is bound to: the caller's slices.
use super::Scratch;
use crate::{Error, Floats, Result, Slice};

/// Tokens of a block where a batch brings no blocks of its own, as LLaDA2.x decodes.
pub const BLOCK: u32 = 32;

/// The slices that a layer, its routing alone or its experts alone read and write.
///
/// What the bound work does not use is an error of `bind`, not silence: sequences under a rule that
/// ignores them, blocks without a coreset, an output of a routing that writes none.
///
/// ```
/// # use wgmoe::layer::Batch;
/// # use wgmoe::Slice;
/// # fn f<'a>(hidden: Slice<'a>, out: Slice<'a>) -> Batch<'a> {
/// Batch::new(hidden, 32).into_out(out)
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Batch<'a> {
    /// `[T, D]`, rows of whole 32-bit words, read.
    pub hidden: Floats<'a>,
    /// T: tokens.
    pub tokens: u32,
    /// `[T, D]`, rows of whole 32-bit words, written; in a range apart from `hidden`, the same buffer
    /// allowed, the same type or another.
    pub out: Option<Floats<'a>>,
    /// Whether the output is added to what `out` holds (a residual) rather than replacing it.
    pub add: bool,
    /// Sequences; one of all tokens, with the rule's own experts per token, where absent.
    pub sequences: Option<Sequences<'a>>,
    /// Blocks of a block-level rule; stretches of [`BLOCK`] tokens where absent, counted from the
    /// batch's first, whatever its sequences.
    pub blocks: Option<Blocks<'a>>,
    /// `[ceil(T / 32)]` u32, read when the work runs: a bit a token, token t being bit `t % 32` of word
    /// `t / 32`; bits past the last token are ignored. A token with 0 is as if it were not there: no
    /// expert takes it, shared ones neither, it has no say in any choice and counts for no capacity. Its
    /// row of `out` stays as it is, in the residual form too. Router logits are computed of every row.
    /// Decided tokens of a block are such (Epoch, arXiv 2609.09748).
    pub active: Option<Slice<'a>>,
    /// `[T]` u32, read when the work runs: experts that each token takes under token choice, instead of
    /// the rule's K: the first so many of those it would take with K, and its gates are made from these
    /// (REFLEX, arXiv 2608.01784). 0 leaves the shared experts. More than K is K, and counted
    /// ([`Stats::clamped`](crate::plan::Stats::clamped)). Votes for coresets and capacity factors go by K all
    /// the same.
    pub experts_per_token: Option<Slice<'a>>,
    /// Which experts work on which tokens, for [`MoeExperts`](super::MoeExperts).
    pub assignments: Option<Assignments<'a>>,
    /// Upper bound of the routed slots, where it is known better than the worst case that the layer
    /// must assume. Slots past it are cut off and counted.
    pub routed_slots: Option<u32>,
    /// Scratch to share with other layers that run in order on one queue; the layer's own where
    /// absent.
    pub scratch: Option<&'a Scratch>,
    /// Most bytes of scratch that the layer takes for this batch. Where what lies between the experts'
    /// matmuls would take more, slots are computed in turns, for the same bits and more dispatches. What
    /// routing makes is not cut: some 16 bytes a token and expert, and the plan. Small tables do not count:
    /// 4 bytes a token under a capacity factor, some kilobytes a sequence under sequence top. An output that is added
    /// to, or not f32, then takes a row of f32 a token besides. Without a limit all slots are there at
    /// once: 4 F bytes each, and at most a binding.
    pub scratch_limit: Option<u64>,
    /// `[8 + E]` u32, written: where the [statistics](crate::plan::Stats) go; scratch where absent.
    pub stats: Option<Slice<'a>>,
    /// Whether the statistics are added to what `stats` holds: sums over steps and layers.
    pub add_stats: bool,
    /// Tokens of the whole batch, where these are only those of one of several devices.
    pub part_of: Option<u32>,
}

impl<'a> Batch<'a> {
    /// `tokens` rows of hidden states `[T, D]`, one sequence: f32, or what [`Floats`] says. The kernels
    /// for f16 and bf16 are compiled when a context first binds such slices.
    pub fn new(hidden: impl Into<Floats<'a>>, tokens: u32) -> Self {
        Self {
            hidden: hidden.into(),
            tokens,
            out: None,
            add: false,
            sequences: None,
            blocks: None,
            active: None,
            experts_per_token: None,
            assignments: None,
            routed_slots: None,
            scratch: None,
            scratch_limit: None,
            stats: None,
            add_stats: false,
            part_of: None,
        }
    }

    /// Says that these tokens are a part of a batch of `tokens`, the rest of which other devices
    /// route. Logits and gates then have the bits that a device with the whole batch gives them: the
    /// kernels are those for so many tokens, whose sums have another order than those for few.
    #[must_use]
    pub fn as_part_of(self, tokens: u32) -> Self {
        Self { part_of: Some(tokens), ..self }
    }

    /// Tokens that kernels are chosen by.
    pub(crate) fn whole(&self) -> u32 {
        self.part_of.map_or(self.tokens, |whole| whole.max(self.tokens))
    }

    /// Writes the output `[T, D]` into `out`: f32, or what [`Floats`] says.
    #[must_use]
    pub fn into_out(self, out: impl Into<Floats<'a>>) -> Self {
        Self { out: Some(out.into()), add: false, ..self }
    }

    /// Adds the output `[T, D]` to what `out` holds, a residual: f32, or what [`Floats`] says. The sum
    /// is f32 and is rounded once.
    #[must_use]
    pub fn added_to(self, out: impl Into<Floats<'a>>) -> Self {
        Self { out: Some(out.into()), add: true, ..self }
    }

    /// Sequences of the batch.
    #[must_use]
    pub fn with_sequences(self, sequences: Sequences<'a>) -> Self {
        Self { sequences: Some(sequences), ..self }
    }

    /// Blocks of the batch.
    #[must_use]
    pub fn with_blocks(self, blocks: Blocks<'a>) -> Self {
        Self { blocks: Some(blocks), ..self }
    }

    /// Only tokens whose bit is set in `active`, `[ceil(T / 32)]` u32, take part; rows of `out` of the
    /// others stay as they are.
    #[must_use]
    pub fn with_active(self, active: impl Into<Slice<'a>>) -> Self {
        Self { active: Some(active.into()), ..self }
    }

    /// A number of experts for each token, `[T]` u32.
    #[must_use]
    pub fn with_experts_per_token(self, experts: impl Into<Slice<'a>>) -> Self {
        Self { experts_per_token: Some(experts.into()), ..self }
    }

    /// Another router's choice.
    #[must_use]
    pub fn with_assignments(self, assignments: Assignments<'a>) -> Self {
        Self { assignments: Some(assignments), ..self }
    }

    /// An upper bound of the routed slots.
    #[must_use]
    pub fn with_routed_slots(self, slots: u32) -> Self {
        Self { routed_slots: Some(slots), ..self }
    }

    /// Scratch to share.
    #[must_use]
    pub fn with_scratch(self, scratch: &'a Scratch) -> Self {
        Self { scratch: Some(scratch), ..self }
    }

    /// A limit of the scratch, in bytes: for long batches.
    #[must_use]
    pub fn with_scratch_limit(self, bytes: u64) -> Self {
        Self { scratch_limit: Some(bytes), ..self }
    }

    /// Writes the [statistics](crate::plan::Stats), `[8 + E]` u32, into the caller's own slice.
    #[must_use]
    pub fn with_stats(self, stats: impl Into<Slice<'a>>) -> Self {
        Self { stats: Some(stats.into()), add_stats: false, ..self }
    }

    /// Adds the statistics to what the slice holds, `[8 + E]` u32, zeros to begin with: sums over the
    /// steps and layers that share it.
    #[must_use]
    pub fn with_stats_added_to(self, stats: impl Into<Slice<'a>>) -> Self {
        Self { stats: Some(stats.into()), add_stats: true, ..self }
    }

    /// An error for bits of another number of tokens.
    pub(crate) fn check_active(&self) -> Result<()> {
        match self.active {
            Some(active) => active.u32s("active", &[self.tokens.div_ceil(32).into()]),
            None => Ok(()),
        }
    }

    /// An error for a slice that is written and overlaps another one: what one kernel reads another may have written by
    /// then, so that kernels which see only their own slices cannot tell.
    pub(crate) fn check_overlaps(&self) -> Result<()> {
        let (sequences, blocks) = (self.sequences, self.blocks);
        let kept = blocks.and_then(|blocks| blocks.kept);
        let written = [
            ("out", self.out.map(|out| out.slice)),
            ("stats", self.stats),
            ("coresets", kept.map(|kept| kept.coresets)),
            ("coverage", blocks.and_then(|blocks| blocks.coverage)),
        ];
        let mut read = vec![
            ("hidden", Some(self.hidden.slice)),
            ("offsets", sequences.map(|sequences| sequences.offsets)),
            ("lengths", sequences.and_then(|sequences| sequences.lengths)),
            ("capacity", sequences.and_then(|sequences| sequences.capacity)),
            ("offsets", blocks.map(|blocks| blocks.offsets)),
            ("voters", blocks.and_then(|blocks| blocks.voters)),
            ("refresh", kept.map(|kept| kept.refresh)),
            ("active", self.active),
            ("experts_per_token", self.experts_per_token),
        ];
        match self.assignments {
            None => {}
            Some(Assignments::OfTokens { ids, gates, .. }) => {
                read.extend([("ids", Some(ids)), ("gates", Some(gates))]);
            }
            Some(Assignments::OfExperts { offsets, tokens, gates, .. }) => {
                read.extend(
                    [("offsets", offsets), ("tokens", tokens), ("gates", gates)]
                        .map(|(n, s)| (n, Some(s))),
                );
            }
        }
        for (i, (name, slice)) in written.iter().enumerate() {
            for (other, with) in read.iter().chain(&written[i + 1..]) {
                if slice.zip(*with).is_some_and(|(slice, with)| slice.overlaps(&with)) {
                    return Err(Error::Overlap { written: name, other });
                }
            }
        }
        Ok(())
    }

    /// What the kernels call the bits of active tokens.
    pub(crate) fn own_names(e: Error) -> Error {
        e.renamed(&[("active_bits", "active"), ("rows", "active")])
    }

    /// An error for an argument that the bound work would not read.
    pub(crate) fn unused(name: &'static str, given: bool, reason: &str) -> Result<()> {
        if given { Err(Error::invalid(name, reason)) } else { Ok(()) }
    }
}

/// Sequences of a batch: token ranges, padding and capacities, read when the work runs.
///
/// | rule | offsets | lengths | capacity |
/// |---|---|---|---|
/// | expert choice | each is chosen from apart | padding | yes |
/// | sequence top | each is chosen from apart | padding | an error |
/// | token choice | where padding lies | padding; an error without | an error |
///
/// Padding gets no expert and has no say in any choice: the other tokens are routed as if they were
/// alone, and a capacity factor counts only them. It lies past the lengths and outside all sequences.
/// Its rows of the output are 0, or the residual alone. Shared experts know nothing of padding: they
/// take every token that is [active](Batch::active).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Sequences<'a> {
    /// Sequences.
    pub count: u32,
    /// `[count + 1]` u32: token ranges. Values that decrease or exceed the tokens are clamped.
    pub offsets: Slice<'a>,
    /// `[count]` u32: tokens of each that are not padding; all where absent.
    pub lengths: Option<Slice<'a>>,
    /// `[count]` u32: tokens that each expert takes of each sequence; by the rule's own experts per
    /// token where absent. Slots beyond the space reserved by `max_experts_per_token` are dropped
    /// and counted in [`Stats`](crate::plan::Stats).
    pub capacity: Option<Slice<'a>>,
}

impl<'a> Sequences<'a> {
    /// `count` sequences at offsets `[count + 1]` u32.
    pub fn new(count: u32, offsets: impl Into<Slice<'a>>) -> Self {
        Self { count, offsets: offsets.into(), lengths: None, capacity: None }
    }

    /// Lengths `[count]` u32: what follows in a sequence is padding.
    #[must_use]
    pub fn with_lengths(self, lengths: impl Into<Slice<'a>>) -> Self {
        Self { lengths: Some(lengths.into()), ..self }
    }

    /// Capacities `[count]` u32 of expert choice.
    #[must_use]
    pub fn with_capacity(self, capacity: impl Into<Slice<'a>>) -> Self {
        Self { capacity: Some(capacity.into()), ..self }
    }
}

/// Blocks of tokens that are decoded together, for block-level rules; read when the work runs.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Blocks<'a> {
    /// Blocks.
    pub count: u32,
    /// `[count + 1]` u32: token ranges, none across a sequence. Tokens outside all blocks are
    /// padding: no experts.
    pub offsets: Slice<'a>,
    /// `[tokens]` u32: tokens with 0 have no say in their block's coreset (TEAM, arXiv 2602.08404);
    /// all have one where absent.
    pub voters: Option<Slice<'a>>,
    /// Coresets of the caller's, kept from step to step; elected anew at each where absent.
    pub kept: Option<KeptCoresets<'a>>,
    /// `[count, 2]` u32, written: how many pairs the tokens of each block would take of all experts, and
    /// how many of these lie in its coreset. The share tells when a kept coreset is worth electing
    /// anew; a kernel of the engine's may write [`KeptCoresets::refresh`] by it. It costs a second choice
    /// and one more dispatch. A batch of no tokens leaves it as it is.
    pub coverage: Option<Slice<'a>>,
}

/// Coresets that outlive a step (Epoch, arXiv 2609.09748), or that the caller gives; read when the work
/// runs, so that a step that elects and one that does not are the same recording.
#[derive(Clone, Copy, Debug)]
pub struct KeptCoresets<'a> {
    /// `[blocks, ceil(E / 32)]` u32, read and written: a bit set of each block's experts. One of no
    /// experts gives its tokens none; bits of experts that are not there are ignored.
    pub coresets: Slice<'a>,
    /// `[blocks]` u32, read: a block with 0 chooses inside its coreset as it is, another elects one and
    /// writes it. In another buffer than `coresets`.
    pub refresh: Slice<'a>,
}

impl<'a> Blocks<'a> {
    /// `count` blocks at offsets `[count + 1]` u32; every token votes.
    pub fn new(count: u32, offsets: impl Into<Slice<'a>>) -> Self {
        Self { count, offsets: offsets.into(), voters: None, kept: None, coverage: None }
    }

    /// Only tokens with a value other than 0 in `voters`, `[tokens]` u32, vote.
    #[must_use]
    pub fn with_voters(self, voters: impl Into<Slice<'a>>) -> Self {
        Self { voters: Some(voters.into()), ..self }
    }

    /// Coresets `[count, ceil(E / 32)]` u32 of the caller's, which blocks with 0 in `refresh`, `[count]`
    /// u32, keep and the others elect.
    #[must_use]
    pub fn with_kept(self, coresets: impl Into<Slice<'a>>, refresh: impl Into<Slice<'a>>) -> Self {
        let kept = KeptCoresets { coresets: coresets.into(), refresh: refresh.into() };
        Self { kept: Some(kept), ..self }
    }

    /// Writes how far each coreset covers what its block's tokens would take, into `[count, 2]` u32.
    #[must_use]
    pub fn with_coverage(self, coverage: impl Into<Slice<'a>>) -> Self {
        Self { coverage: Some(coverage.into()), ..self }
    }
}

/// Which experts work on which tokens, as another router decided; read when the work runs.
///
/// Pairs that name no token or expert, and those that come twice, are ignored and counted
/// ([`Stats::ignored`](crate::plan::Stats::ignored)); `u32::MAX` is an empty place.
#[derive(Clone, Copy, Debug)]
pub enum Assignments<'a> {
    /// Each token's experts.
    OfTokens {
        /// K: places of a token.
        experts_per_token: u32,
        /// `[tokens, K]` u32: expert ids, below E (`topk_ids`).
        ids: Slice<'a>,
        /// `[tokens, K]` f32 (`topk_weights`).
        gates: Slice<'a>,
    },
    /// Each expert's tokens.
    OfExperts {
        /// Entries of all lists, empty places included; not 0.
        entries: u32,
        /// `[E + 1]` u32: the entries of each expert. Values that decrease or exceed `entries` are
        /// clamped.
        offsets: Slice<'a>,
        /// `[entries]` u32: tokens.
        tokens: Slice<'a>,
        /// `[entries]` f32.
        gates: Slice<'a>,
    },
}
