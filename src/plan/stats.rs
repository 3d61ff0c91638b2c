//! What a step did, as the device counts it.
use crate::{Error, Result};

/// What one step did, as [`PlanScan`] writes it: `[8 + experts]` u32.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// (token, expert) pairs, shared experts apart.
    pub slots: u32,
    /// Experts that some token uses.
    pub unique_experts: u32,
    /// Pairs dropped by the capacity factor.
    pub dropped: u32,
    /// Ids of another router that were out of range or repeated, and slots past the plan's bound.
    pub ignored: u32,
    /// Tokens that no expert took.
    pub untouched: u32,
    /// Offsets of blocks or sequences that decrease or exceed the tokens.
    pub clamped: u32,
    /// Tokens of each expert.
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
            [slots, unique_experts, dropped, ignored, untouched, clamped, _, _, rest @ ..] => {
                Ok(Self {
                    slots: *slots,
                    unique_experts: *unique_experts,
                    dropped: *dropped,
                    ignored: *ignored,
                    untouched: *untouched,
                    clamped: *clamped,
                    tokens_per_expert: rest.to_vec(),
                })
            }
            _ => Err(Error::Size { name: "words", expected: 32, got: 4 * words.len() as u64 }),
        }
    }
}
