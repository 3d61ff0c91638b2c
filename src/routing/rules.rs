//! Routing rules as plain data.
use super::MAX_EXPERTS;
use crate::error::not_zero;
use crate::{Error, Result};

/// Most experts a token can choose.
pub const MAX_TOP: u32 = 64;
/// Most groups of experts.
pub const MAX_GROUPS: u32 = 32;

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

/// When gates are normalised (EC-DLM).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Normalise {
    /// Experts choose by logits; a token's gates are normalised over the experts that took it.
    AfterSelection,
    /// Experts choose by scores, which are the gates as they are.
    BeforeSelection,
}

/// What expert choice chooses among.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// The tokens of each sequence apart.
    Sequence,
    /// All tokens of the batch.
    Batch,
}

/// Each expert takes the tokens it scores highest (EC-DLM, arXiv 2604.01622).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertChoice {
    /// Scores of logits.
    pub score: Score,
    /// When gates are normalised.
    pub normalise: Normalise,
    /// What is chosen among.
    pub scope: Scope,
    /// k: experts that a token has on average, where the batch brings no capacities of its own.
    pub experts_per_token: u32,
    /// Largest k that a batch's own capacities stand for: scratch is sized by it. At least `experts_per_token`.
    pub max_experts_per_token: u32,
}

impl ExpertChoice {
    /// Tokens that each expert takes from a range of `tokens`: `clamp(floor(N k / E), 1, N)`.
    pub fn capacity(experts_per_token: u32, tokens: u32, experts: u32) -> u32 {
        let share = u64::from(tokens) * u64::from(experts_per_token) / u64::from(experts.max(1));
        (share.min(tokens.into()) as u32).max(1.min(tokens))
    }
}

/// Each token takes its highest experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenChoice {
    /// Scores of logits.
    pub score: Score,
    /// Gates of the experts chosen. [`GateRule::Softmax`] chooses by logits, the others by scores.
    pub gate: GateRule,
    /// K: experts a token takes.
    pub top: u32,
    /// Groups of experts of which a token may use only some.
    pub groups: Option<Groups>,
    /// `routed_scaling_factor`.
    pub scale: f32,
    /// An expert keeps at most `ceil(T K / E * factor)` tokens, those with the highest gates; none: dropless.
    pub capacity_factor: Option<f32>,
    /// How each block of tokens elects the experts that its tokens choose among; none: all.
    pub coreset: Option<BlockRule>,
}

/// The `T K` highest (token, expert) pairs of each sequence (SeqTopK, arXiv 2511.06494): a token may get more than K experts,
/// or none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SequenceTop {
    /// Scores of logits.
    pub score: Score,
    /// Gates of the experts chosen. [`GateRule::Softmax`] chooses by logits, the others by scores.
    pub gate: GateRule,
    /// K: experts that a token has on average.
    pub top: u32,
    /// Constant factor of the gates.
    pub scale: f32,
}

impl TokenChoice {
    /// Most tokens of an expert, for a batch of `tokens`.
    pub fn capacity(&self, tokens: u32, experts: u32) -> Option<u32> {
        self.capacity_factor.map(|factor| {
            let share =
                f64::from(tokens) * f64::from(self.top) / f64::from(experts) * f64::from(factor);
            // Saturates: at most all tokens. The factor's own rounding must not cost a token more.
            (share - share * 1e-7).ceil().max(1.0) as u32
        })
    }
}

/// A routing rule.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Routing {
    /// Experts choose tokens.
    ExpertChoice(ExpertChoice),
    /// Tokens choose experts.
    TokenChoice(TokenChoice),
    /// The highest pairs of a sequence.
    SequenceTop(SequenceTop),
}

impl Routing {
    /// Checks the rule for this many experts.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for zero or too many experts, a K of 0 or (tokens choosing) above the experts or [`MAX_TOP`], groups that do not divide the experts, a factor that is not positive and finite.
    pub fn check(&self, experts: u32) -> Result<()> {
        not_zero(&[("experts", experts)])?;
        if experts > MAX_EXPERTS {
            return Err(Error::invalid("experts", format!("{experts}, at most {MAX_EXPERTS}")));
        }
        match self {
            Self::ExpertChoice(rule) => {
                not_zero(&[("experts_per_token", rule.experts_per_token)])?;
                if rule.max_experts_per_token < rule.experts_per_token {
                    return Err(Error::invalid(
                        "max_experts_per_token",
                        "less than experts_per_token",
                    ));
                }
            }
            Self::TokenChoice(rule) => {
                not_zero(&[("top", rule.top)])?;
                let most = experts.min(MAX_TOP);
                if rule.top > most {
                    return Err(Error::invalid(
                        "top",
                        format!("{}, at most {most} of {experts} experts", rule.top),
                    ));
                }
                if let Some(Groups { count, top }) = rule.groups {
                    not_zero(&[("group count", count), ("group top", top)])?;
                    if !experts.is_multiple_of(count) || count > MAX_GROUPS || top > count {
                        let reason = format!(
                            "{top} of {count} groups: they must divide {experts} experts and be at most {MAX_GROUPS}"
                        );
                        return Err(Error::invalid("groups", reason));
                    }
                }
                if !rule.scale.is_finite() {
                    return Err(Error::invalid("scale", "must be finite"));
                }
                if rule.capacity_factor.is_some_and(|f| !f.is_finite() || f <= 0.0) {
                    return Err(Error::invalid("capacity_factor", "must be positive and finite"));
                }
                if let Some(coreset) = rule.coreset {
                    coreset.check(experts)?;
                }
            }
            Self::SequenceTop(rule) => {
                not_zero(&[("top", rule.top)])?;
                if rule.top > experts {
                    return Err(Error::invalid(
                        "top",
                        format!("{} of {experts} experts", rule.top),
                    ));
                }
                if !rule.scale.is_finite() {
                    return Err(Error::invalid("scale", "must be finite"));
                }
            }
        }
        Ok(())
    }

    /// How logits become scores.
    pub fn score(&self) -> Score {
        match self {
            Self::ExpertChoice(rule) => rule.score,
            Self::TokenChoice(rule) => rule.score,
            Self::SequenceTop(rule) => rule.score,
        }
    }

    /// Whether experts are chosen by logits rather than by scores.
    pub fn by_logits(&self) -> bool {
        match self {
            Self::ExpertChoice(rule) => rule.normalise == Normalise::AfterSelection,
            Self::TokenChoice(TokenChoice { gate, .. })
            | Self::SequenceTop(SequenceTop { gate, .. }) => *gate == GateRule::Softmax,
        }
    }

    pub(crate) fn gate(&self) -> GateRule {
        match self {
            Self::ExpertChoice(rule) => match (rule.normalise, rule.score) {
                (Normalise::AfterSelection, Score::Softmax) => GateRule::Softmax,
                (Normalise::AfterSelection, Score::Sigmoid) => GateRule::Normalised,
                (Normalise::BeforeSelection, _) => GateRule::Plain,
            },
            Self::TokenChoice(rule) => rule.gate,
            Self::SequenceTop(rule) => rule.gate,
        }
    }

    pub(crate) fn scale(&self) -> f32 {
        match self {
            Self::ExpertChoice(_) => 1.0,
            Self::TokenChoice(rule) => rule.scale,
            Self::SequenceTop(rule) => rule.scale,
        }
    }
}

/// How a block of tokens that are decoded together elects its coreset: the experts that its tokens then choose among
///. A token's own top K is over all experts, groups apart; a vote for an expert is the token's selection value.
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
    /// 2511.02237, is the same). With voters, only marked tokens' (TEAM, arXiv 2602.08404).
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

    /// The most experts that a block of `tokens` tokens can elect, `top` being K of the model; with voters any block can elect
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

/// How the gates of a token's experts come from its logits or scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GateRule {
    /// Softmax of the logits over the experts chosen.
    Softmax,
    /// Scores, divided by their sum over the experts chosen `+ 1e-20`.
    Normalised,
    /// Scores as they are.
    Plain,
}

impl GateRule {
    /// What `rule` is in the WGSL.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Softmax => 1,
            Self::Normalised => 2,
            Self::Plain => 3,
        }
    }
}

/// Groups of experts of which a token may use only some (DeepSeek-V3, LLaDA2.0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Groups {
    /// Equal groups of neighbouring experts, at most [`MAX_GROUPS`]; divides the experts.
    pub count: u32,
    /// Groups a token may use.
    pub top: u32,
}

/// `p` in units of 2^-24, 2^24 and above meaning all.
pub(crate) fn mass_units(p: f32) -> u32 {
    (f64::from(p) * f64::from(1 << 24)).round_ties_even().min(f64::from(1 << 24)) as u32
}
