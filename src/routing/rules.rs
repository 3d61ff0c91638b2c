//! The rules themselves. Their documentation with an example is that of the module above.
use super::{BlockRule, schedule};

/// Most experts a token can choose.
pub const MAX_TOP: u32 = 64;
/// Most groups of experts.
pub const MAX_GROUPS: u32 = 32;

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
}

/// Activation between the two expert matmuls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
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

/// How the gates of a token's experts come from its logits or scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GateRule {
    /// Softmax of the logits over the experts chosen.
    Softmax,
    /// Scores, divided by their sum over the experts chosen `+ 1e-20`.
    Normalised,
    /// Scores as they are.
    Unnormalised,
}

impl GateRule {
    /// What `rule` is in the WGSL.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Softmax => 1,
            Self::Normalised => 2,
            Self::Unnormalised => 3,
        }
    }
}

/// Groups of experts of which a token may use only some (DeepSeek-V3, LLaDA2.0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Groups {
    /// Equal groups of neighbouring experts, at most [`MAX_GROUPS`]; divides the experts. One group means no groups.
    pub count: u32,
    /// Groups a token may use: enough for its K experts.
    pub per_token: u32,
}

impl Groups {
    /// `per_token` of `count` groups.
    pub const fn new(count: u32, per_token: u32) -> Self {
        Self { count, per_token }
    }
}

/// Each token takes its highest experts.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct TokenChoice {
    /// Scores of logits.
    pub score: Score,
    /// Gates of the experts chosen. [`GateRule::Softmax`] chooses by logits, the others by scores.
    pub gate: GateRule,
    /// Whether the other gate rules choose by logits too. It makes a difference beside a bias: EC-DLM's
    /// token choice without a loss chooses by `logits + bias`, and weighs by softmax scores as they are.
    pub by_logits: bool,
    /// K: experts a token takes.
    pub experts_per_token: u32,
    /// Groups of experts of which a token may use only some.
    pub groups: Option<Groups>,
    /// `routed_scaling_factor`.
    pub scale: f32,
    /// An expert keeps at most `ceil(T K / E * factor)` tokens, those with the highest gates; none: dropless.
    pub capacity_factor: Option<f32>,
    /// How each block of tokens elects the experts that its tokens choose among; none: all.
    pub coreset: Option<BlockRule>,
}

impl TokenChoice {
    /// The `experts_per_token` highest by softmax scores, gates normalised; no groups, no factor, nothing dropped, no
    /// coreset.
    pub const fn new(experts_per_token: u32) -> Self {
        Self {
            score: Score::Softmax,
            gate: GateRule::Normalised,
            by_logits: false,
            experts_per_token,
            groups: None,
            scale: 1.0,
            capacity_factor: None,
            coreset: None,
        }
    }

    /// Other scores.
    #[must_use]
    pub const fn with_score(mut self, score: Score) -> Self {
        self.score = score;
        self
    }

    /// Other gates.
    #[must_use]
    pub const fn with_gate(mut self, gate: GateRule) -> Self {
        self.gate = gate;
        self
    }

    /// Experts are chosen by logits (and bias), whatever the gates.
    #[must_use]
    pub const fn with_choice_by_logits(mut self) -> Self {
        self.by_logits = true;
        self
    }

    /// Another K.
    #[must_use]
    pub const fn with_experts_per_token(mut self, experts_per_token: u32) -> Self {
        self.experts_per_token = experts_per_token;
        self
    }

    /// A token may use the experts of `per_token` of `count` groups. No groups: [`TokenChoice::without_groups`].
    #[must_use]
    pub const fn with_groups(mut self, count: u32, per_token: u32) -> Self {
        self.groups = Some(Groups::new(count, per_token));
        self
    }

    /// A token may use all experts.
    #[must_use]
    pub const fn without_groups(mut self) -> Self {
        self.groups = None;
        self
    }

    /// A constant factor of the gates.
    #[must_use]
    pub const fn with_scale(mut self, scale: f32) -> Self {
        self.scale = scale;
        self
    }

    /// Experts drop what is more than `factor` times their share.
    #[must_use]
    pub const fn with_capacity_factor(mut self, factor: f32) -> Self {
        self.capacity_factor = Some(factor);
        self
    }

    /// Blocks elect the experts that their tokens choose among. Groups stay: [`TokenChoice::without_groups`].
    #[must_use]
    pub const fn with_coreset(mut self, rule: BlockRule) -> Self {
        self.coreset = Some(rule);
        self
    }

    /// Tokens choose among all experts, whatever their block.
    #[must_use]
    pub const fn without_coreset(mut self) -> Self {
        self.coreset = None;
        self
    }

    /// Most tokens that an expert keeps of a batch of `tokens`; none where nothing is dropped.
    pub fn capacity(&self, tokens: u32, experts: u32) -> Option<u32> {
        self.capacity_factor.map(|factor| {
            let share = f64::from(tokens) * f64::from(self.experts_per_token) / f64::from(experts)
                * f64::from(factor);
            // Saturates: at most all tokens. The factor's own rounding must not cost a token more.
            (share - share * 1e-7).ceil().max(1.0) as u32
        })
    }
}

/// Each expert takes the tokens it scores highest (EC-DLM, arXiv 2604.01622), of each sequence apart. Where a batch names no
/// sequences, all its tokens are one.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ExpertChoice {
    /// Scores of logits.
    pub score: Score,
    /// When gates are normalised.
    pub normalise: Normalise,
    /// k: experts that a token has on average, where the batch brings no capacities of its own.
    pub experts_per_token: u32,
    /// Largest k that a batch's own capacities stand for: scratch is sized by it. At least `experts_per_token`.
    pub max_experts_per_token: u32,
}

impl ExpertChoice {
    /// `experts_per_token` experts a token on average, chosen by logits; gates are a softmax over the experts that took a
    /// token. A batch's own capacities stand for no more.
    pub const fn new(experts_per_token: u32) -> Self {
        Self {
            score: Score::Softmax,
            normalise: Normalise::AfterSelection,
            experts_per_token,
            max_experts_per_token: experts_per_token,
        }
    }

    /// Another k.
    #[must_use]
    pub const fn with_experts_per_token(mut self, experts_per_token: u32) -> Self {
        self.experts_per_token = experts_per_token;
        self
    }

    /// Room for capacities of a batch's own that stand for up to `max_experts_per_token` experts a token.
    #[must_use]
    pub const fn with_max(mut self, max_experts_per_token: u32) -> Self {
        self.max_experts_per_token = max_experts_per_token;
        self
    }

    /// Other scores.
    #[must_use]
    pub const fn with_score(mut self, score: Score) -> Self {
        self.score = score;
        self
    }

    /// Gates normalised at another time.
    #[must_use]
    pub const fn with_normalise(mut self, normalise: Normalise) -> Self {
        self.normalise = normalise;
        self
    }

    /// Tokens that each expert takes of a sequence of `tokens`: [`schedule::capacity`] of the rule's `experts_per_token`.
    ///
    /// # Panics
    ///
    /// For zero experts.
    pub fn capacity(&self, tokens: u32, experts: u32) -> u32 {
        schedule::capacity(tokens, self.experts_per_token, experts)
    }
}

/// The `T K` highest (token, expert) pairs of each sequence (SeqTopK, arXiv 2511.06494): a token may get more than K experts,
/// or none.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct SequenceTop {
    /// Scores of logits.
    pub score: Score,
    /// Gates of the experts chosen. [`GateRule::Softmax`] chooses by logits, the others by scores.
    pub gate: GateRule,
    /// K: experts that a token has on average.
    pub experts_per_token: u32,
    /// Constant factor of the gates.
    pub scale: f32,
}

impl SequenceTop {
    /// `experts_per_token` experts a token on average, by softmax scores, gates normalised.
    pub const fn new(experts_per_token: u32) -> Self {
        Self { score: Score::Softmax, gate: GateRule::Normalised, experts_per_token, scale: 1.0 }
    }

    /// Another K.
    #[must_use]
    pub const fn with_experts_per_token(mut self, experts_per_token: u32) -> Self {
        self.experts_per_token = experts_per_token;
        self
    }

    /// Other scores.
    #[must_use]
    pub const fn with_score(mut self, score: Score) -> Self {
        self.score = score;
        self
    }

    /// Other gates.
    #[must_use]
    pub const fn with_gate(mut self, gate: GateRule) -> Self {
        self.gate = gate;
        self
    }

    /// A constant factor of the gates.
    #[must_use]
    pub const fn with_scale(mut self, scale: f32) -> Self {
        self.scale = scale;
        self
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

impl From<ExpertChoice> for Routing {
    fn from(rule: ExpertChoice) -> Self {
        Self::ExpertChoice(rule)
    }
}

impl From<TokenChoice> for Routing {
    fn from(rule: TokenChoice) -> Self {
        Self::TokenChoice(rule)
    }
}

impl From<SequenceTop> for Routing {
    fn from(rule: SequenceTop) -> Self {
        Self::SequenceTop(rule)
    }
}

impl Routing {
    /// What the rules are called.
    #[doc(hidden)]
    pub const NAMES: [&str; 3] = ["expert choice", "token choice", "sequence top"];

    /// What the rule is called.
    pub fn name(&self) -> &'static str {
        let [experts, tokens, pairs] = Self::NAMES;
        match self {
            Self::ExpertChoice(_) => experts,
            Self::TokenChoice(_) => tokens,
            Self::SequenceTop(_) => pairs,
        }
    }

    /// How logits become scores.
    pub fn score(&self) -> Score {
        match self {
            Self::ExpertChoice(rule) => rule.score,
            Self::TokenChoice(rule) => rule.score,
            Self::SequenceTop(rule) => rule.score,
        }
    }

    /// K: experts that a token takes, or has on average where the rule lets them differ.
    pub fn experts_per_token(&self) -> u32 {
        match self {
            Self::ExpertChoice(rule) => rule.experts_per_token,
            Self::TokenChoice(rule) => rule.experts_per_token,
            Self::SequenceTop(rule) => rule.experts_per_token,
        }
    }

    /// Whether experts are chosen by logits rather than by scores.
    pub fn by_logits(&self) -> bool {
        match self {
            Self::ExpertChoice(rule) => rule.normalise == Normalise::AfterSelection,
            Self::TokenChoice(rule) => rule.by_logits || rule.gate == GateRule::Softmax,
            Self::SequenceTop(rule) => rule.gate == GateRule::Softmax,
        }
    }

    pub(crate) fn gate(&self) -> GateRule {
        match self {
            Self::ExpertChoice(rule) => match (rule.normalise, rule.score) {
                (Normalise::AfterSelection, Score::Softmax) => GateRule::Softmax,
                (Normalise::AfterSelection, Score::Sigmoid) => GateRule::Normalised,
                (Normalise::BeforeSelection, _) => GateRule::Unnormalised,
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
