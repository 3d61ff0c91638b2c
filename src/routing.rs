//! Routing rules as plain data, and the models that use them (METHODS 2, 3, 4, 6).
use crate::ops::coreset::mass_units;
use crate::{Error, Result};

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
}

/// Activation between the two expert matmuls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `silu(gate) * up` (SwiGLU).
    Silu,
    /// `gelu(gate) * up`, tanh form.
    Gelu,
}

/// How a block of tokens that are decoded together elects its coreset: the experts that its tokens then choose among
/// (METHODS 4). A token's own top K is over all experts, groups apart; a vote for an expert is the token's selection value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BlockRule {
    /// The fewest experts that together hold more than the share `p` of all votes, and at least `floor` (dMoE, arXiv
    /// 2605.30876, section 4; its code uses 0.6 and 16). From `p` of 1 on: every expert with a vote. Without votes, or where
    /// they sum to 0 or less: `floor`.
    Mass {
        /// Share of the votes, 0 or more; exact to 2^-24.
        p: f32,
        /// Fewest experts, at most all; at least one is elected in any case.
        floor: u32,
    },
    /// The experts with the highest selection value that any token of the block gives them (LLaDA2.2, trained with 48 over
    /// blocks of 32).
    Capacity(u32),
    /// The experts with the most votes (DES-Vote, arXiv 2602.00879; M = beta E).
    Vote(u32),
    /// Every expert in some token's own top k' (DES-Seq, arXiv 2602.00879, k' of 2 or 3; the simplified OEA, arXiv
    /// 2511.02237, is the same). With marks, only marked tokens' (TEAM, arXiv 2602.08404).
    Union(u32),
}

impl BlockRule {
    /// Checks the rule's numbers against the experts.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a share that is negative or NaN, a count of 0, or a count or floor above `experts`.
    pub fn check(self, experts: u32) -> Result<()> {
        let (name, count) = match self {
            Self::Mass { p, .. } if p.is_nan() || p < 0.0 => {
                return Err(Error::invalid("p", format!("{p}, must be 0 or more")));
            }
            Self::Mass { floor, .. } => ("floor", floor.max(1)),
            Self::Capacity(count) => ("capacity", count),
            Self::Vote(count) => ("vote", count),
            Self::Union(count) => ("union", count),
        };
        match count {
            0 => Err(Error::invalid(name, "must not be 0")),
            n if n > experts => {
                Err(Error::invalid(name, format!("{n}, at most the {experts} experts")))
            }
            _ => Ok(()),
        }
    }

    /// How many experts each token must choose over all experts for the block to elect its coreset, `top` being K of the
    /// model; `None` where the rule looks at all selection values.
    pub fn own_top(self, top: u32) -> Option<u32> {
        match self {
            Self::Mass { .. } | Self::Vote(_) => Some(top),
            Self::Capacity(_) => None,
            Self::Union(count) => Some(count),
        }
    }

    /// The most experts that a block of `tokens` tokens can elect, `top` being K of the model; with marks any block can elect
    /// all.
    pub fn most(self, tokens: u32, top: u32, experts: u32) -> u32 {
        match self {
            Self::Mass { floor, .. } => tokens.saturating_mul(top).max(floor).min(experts),
            Self::Capacity(count) | Self::Vote(count) => count.min(experts),
            Self::Union(count) => tokens.saturating_mul(count).min(experts),
        }
    }

    /// Experts elected (at least, for a mass), and the mass in units of 2^-24.
    pub(crate) fn count_and_mass(self) -> (u32, u32) {
        match self {
            Self::Mass { p, floor } => (floor.max(1), mass_units(p)),
            Self::Capacity(count) | Self::Vote(count) | Self::Union(count) => (count, 0),
        }
    }
}
