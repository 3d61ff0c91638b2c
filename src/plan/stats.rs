//! What a step did, as the device counts it.
use crate::{Error, Result};

/// What one step did, as the plan's kernels write it: `[8 + experts]` u32.
///
/// What adds up, of (token, expert) pairs of the routed experts:
///
/// - `slots` is the sum of `tokens_per_expert`: what the experts compute.
/// - `slots + cut` is what was chosen, and left by the capacity factor.
/// - `slots + cut + dropped` is what was chosen. Of another router's ids, `ignored` come on top.
///
/// Added up over steps ([`plan_scan::Args::add_stats`](crate::ops::plan_scan::Args::add_stats)), each
/// is a sum, `unique_experts` included. A sum stays at `u32::MAX` rather than passing it: 2^32 slots
/// are 32,768 layers of 16,384 tokens with 8 experts each, so read and clear it before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// (token, expert) pairs that the plan holds, shared experts apart.
    pub slots: u32,
    /// Experts that hold a slot.
    pub unique_experts: u32,
    /// Pairs dropped by the capacity factor.
    pub dropped: u32,
    /// Ids of another router that were out of range or repeated.
    pub ignored: u32,
    /// Active tokens that no expert took, padding among them. A token whose slots are all cut was taken.
    pub untouched: u32,
    /// Offsets of blocks or sequences that exceed the tokens or are below the offset just before, as
    /// the caller gave them: after 0, 40, 30, 35 only the 30 counts, though 35 is clamped to 40 too. Also
    /// active tokens that ask for more experts than the rule's K
    /// ([`Batch::experts_per_token`](crate::layer::Batch::experts_per_token)).
    pub clamped: u32,
    /// Pairs past the plan's bound ([`PlanShape::routed_slots`](crate::PlanShape::routed_slots)).
    pub cut: u32,
    /// Slots of each expert.
    pub tokens_per_expert: Vec<u32>,
}

impl Stats {
    /// Bytes of the buffer.
    pub fn bytes(experts: u32) -> u64 {
        4 * (8 + u64::from(experts))
    }

    /// From the words of the buffer.
    ///
    /// # Errors
    ///
    /// [`Error::Size`] for fewer than 8.
    pub fn from_words(words: &[u32]) -> Result<Self> {
        match words {
            [slots, unique_experts, dropped, ignored, untouched, clamped, cut, _, rest @ ..] => {
                Ok(Self {
                    slots: *slots,
                    unique_experts: *unique_experts,
                    dropped: *dropped,
                    ignored: *ignored,
                    untouched: *untouched,
                    clamped: *clamped,
                    cut: *cut,
                    tokens_per_expert: rest.to_vec(),
                })
            }
            _ => Err(Error::size("words", 32, 4 * words.len() as u64)),
        }
    }
}
