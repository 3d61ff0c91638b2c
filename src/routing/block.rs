//! How blocks of tokens elect coresets.
use std::fmt;

/// How a block of tokens that are decoded together elects its coreset: the experts that its tokens
/// then choose among. A token's own top K is over all experts, groups apart; a vote for an expert
/// is the token's selection value.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum BlockRule {
    /// The fewest experts that together hold more than the share `p` of all votes, and at least
    /// `floor` (dMoE, arXiv 2605.30876, section 4). A `p` of 1 means every expert with a vote.
    /// Without votes, or where they sum to 0 or less: `floor`.
    Mass {
        /// Share of the votes, 0 to 1; exact to 2^-24.
        p: f32,
        /// Fewest experts, at most all; at least one is elected in any case.
        floor: u32,
    },
    /// The experts with the highest selection value that any token of the block gives them
    /// (LLaDA2.2, trained with 48 over blocks of 32).
    Capacity(u32),
    /// The experts with the most votes (DES-Vote, arXiv 2602.00879; M = beta E).
    Vote(u32),
    /// Every expert in some token's own top k' (DES-Seq, arXiv 2602.00879, k' of 2 or 3; the
    /// simplified OEA, arXiv 2511.02237, is the same). With voters, only marked tokens' (TEAM,
    /// arXiv 2602.08404).
    Union(u32),
}

impl BlockRule {
    /// What the rules are called. Their numbers in the WGSL are their places, from 1 on.
    #[doc(hidden)]
    pub const NAMES: [&str; 4] = ["mass", "capacity", "vote", "union"];

    /// [`BlockRule::Mass`] with the floor of dMoE's released code, 16.
    pub const fn mass(p: f32) -> Self {
        Self::Mass { p, floor: 16 }
    }

    /// Another floor of [`BlockRule::Mass`]. The other rules elect a number of their own, and stay
    /// as they are.
    #[must_use]
    pub const fn with_floor(self, floor: u32) -> Self {
        match self {
            Self::Mass { p, .. } => Self::Mass { p, floor },
            other => other,
        }
    }

    /// [`BlockRule::Capacity`].
    pub const fn capacity(experts: u32) -> Self {
        Self::Capacity(experts)
    }

    /// [`BlockRule::Vote`].
    pub const fn vote(experts: u32) -> Self {
        Self::Vote(experts)
    }

    /// [`BlockRule::Union`].
    pub const fn union(experts_per_token: u32) -> Self {
        Self::Union(experts_per_token)
    }

    /// What the rule is called.
    pub fn name(self) -> &'static str {
        let [mass, capacity, vote, union] = Self::NAMES;
        match self {
            Self::Mass { .. } => mass,
            Self::Capacity(_) => capacity,
            Self::Vote(_) => vote,
            Self::Union(_) => union,
        }
    }

    /// How many experts each token must choose over all experts for the block to elect its coreset,
    /// `experts_per_token` being K of the model; `None` where the rule looks at all selection
    /// values.
    pub fn own_top(self, experts_per_token: u32) -> Option<u32> {
        match self {
            Self::Mass { .. } | Self::Vote(_) => Some(experts_per_token),
            Self::Capacity(_) => None,
            Self::Union(count) => Some(count),
        }
    }

    /// The most experts that a block of `tokens` tokens can elect, `experts_per_token` being K of
    /// the model; with voters any block can elect all.
    pub fn most(self, tokens: u32, experts_per_token: u32, experts: u32) -> u32 {
        match self {
            Self::Mass { floor, .. } => {
                tokens.saturating_mul(experts_per_token).max(floor).min(experts)
            }
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

/// As the tables of rules call it, with its numbers: `vote(38)`.
impl fmt::Display for BlockRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name();
        match self {
            Self::Mass { p, floor } => write!(f, "{name}({p}, {floor})"),
            Self::Capacity(count) | Self::Vote(count) | Self::Union(count) => {
                write!(f, "{name}({count})")
            }
        }
    }
}

/// `p` in units of 2^-24, 2^24 and above meaning all.
pub(crate) fn mass_units(p: f32) -> u32 {
    (f64::from(p) * f64::from(1 << 24)).round_ties_even().min(f64::from(1 << 24)) as u32
}
