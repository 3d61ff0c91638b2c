//! What a layer is made and bound with.
use wgmoe::Slice;
use wgmoe::layer::Blocks;

/// How a layer on several ranks works. The same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// Most rows that a rank computes at once: while it does, the next ones travel. Rounded up to
    /// whole tiles of the matmul.
    pub chunk_rows: u32,
    /// Rounds under way at once, each with buffers of its own.
    pub rounds: u32,
    /// Whether ranks may hold no expert, or bring no token.
    pub idle_ranks: bool,
    /// The engine's own version, or what else must be the same on every rank; may be empty.
    pub engine: &'static str,
    /// Whether a step waits for the device after each of its parts.
    pub timed: bool,
}

impl Default for Options {
    /// Chunks of 512 rows, three rounds, no idle ranks.
    fn default() -> Self {
        Self { chunk_rows: 512, rounds: 3, idle_ranks: false, engine: "", timed: false }
    }
}

impl Options {
    /// Chunks of at most so many rows.
    #[must_use]
    pub const fn with_chunk_rows(self, chunk_rows: u32) -> Self {
        Self { chunk_rows, ..self }
    }

    /// So many rounds under way at once; at least one.
    #[must_use]
    pub const fn with_rounds(self, rounds: u32) -> Self {
        Self { rounds: if rounds == 0 { 1 } else { rounds }, ..self }
    }

    /// The engine's own version, or what else must be the same on every rank.
    #[must_use]
    pub const fn with_engine(self, engine: &'static str) -> Self {
        Self { engine, ..self }
    }

    /// Waits for the device after each part of a step, so that [`Times`](crate::Times) are those of the
    /// parts whatever the driver does while work is submitted. Nothing overlaps then.
    #[must_use]
    pub const fn with_timed(self) -> Self {
        Self { timed: true, ..self }
    }

    /// Allows ranks without experts, as where ranks are more than experts, and ranks without tokens.
    /// They take part in every call.
    #[must_use]
    pub const fn with_idle_ranks(self) -> Self {
        Self { idle_ranks: true, ..self }
    }
}

/// The tokens of one rank.
///
/// Without sequences, expert choice is over the tokens of all ranks; so is a capacity factor, with or
/// without.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Batch<'a> {
    /// `[T, D]` f32, read.
    pub hidden: Slice<'a>,
    /// T: tokens of this rank.
    pub tokens: u32,
    /// `[T, D]` f32, written.
    pub out: Slice<'a>,
    /// Whether the output is added to what `out` holds (a residual).
    pub add: bool,
    /// Sequences of this rank's tokens; none crosses ranks.
    pub sequences: Option<Sequences<'a>>,
    /// Blocks of this rank's tokens, as in [`wgmoe::layer::Batch::blocks`]; none crosses ranks.
    pub blocks: Option<Blocks<'a>>,
}

impl<'a> Batch<'a> {
    /// `tokens` rows of hidden states, whose output is written into `out`.
    pub fn new(hidden: impl Into<Slice<'a>>, tokens: u32, out: impl Into<Slice<'a>>) -> Self {
        let (hidden, out) = (hidden.into(), out.into());
        Self { hidden, tokens, out, add: false, sequences: None, blocks: None }
    }

    /// Adds the output to what `out` holds: a residual.
    #[must_use]
    pub const fn added(self) -> Self {
        Self { add: true, ..self }
    }

    /// Sequences of the tokens.
    #[must_use]
    pub const fn with_sequences(self, sequences: Sequences<'a>) -> Self {
        Self { sequences: Some(sequences), ..self }
    }

    /// Blocks of the tokens.
    #[must_use]
    pub const fn with_blocks(self, blocks: Blocks<'a>) -> Self {
        Self { blocks: Some(blocks), ..self }
    }
}

/// Sequences of a rank's tokens, on the host: what an engine that plans its batches knows. With it,
/// expert choice needs no readback.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Sequences<'a> {
    /// Token ranges: `[n + 1]`, not decreasing, from 0 to at most the tokens.
    pub offsets: &'a [u32],
    /// `[n]`: tokens of each that are not padding; all where absent.
    pub lengths: Option<&'a [u32]>,
    /// `[n]`: tokens that each expert takes of each sequence, under expert choice; by the rule's own
    /// experts per token where absent.
    pub capacity: Option<&'a [u32]>,
}

impl<'a> Sequences<'a> {
    /// Sequences at these offsets.
    pub const fn new(offsets: &'a [u32]) -> Self {
        Self { offsets, lengths: None, capacity: None }
    }

    /// Lengths: what follows in a sequence is padding.
    #[must_use]
    pub const fn with_lengths(self, lengths: &'a [u32]) -> Self {
        Self { lengths: Some(lengths), ..self }
    }

    /// Capacities of expert choice, such as those of a
    /// [schedule](wgmoe::routing::schedule) by mask ratio.
    #[must_use]
    pub const fn with_capacity(self, capacity: &'a [u32]) -> Self {
        Self { capacity: Some(capacity), ..self }
    }

    /// Tokens of each sequence that are not padding.
    pub(crate) fn real(&self) -> Vec<u32> {
        let all = self.offsets.windows(2).map(|w| w[1] - w[0]);
        match self.lengths {
            Some(lengths) => all.zip(lengths).map(|(all, n)| all.min(*n)).collect(),
            None => all.collect(),
        }
    }
}
