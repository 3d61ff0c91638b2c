//! The rules that the picture shows: what each is in plain words, which numbers it uses, and its routing.
use serde::{Deserialize, Serialize};

/// A rule of the picture.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Rule {
    TokenChoice,
    ExpertChoice,
    SequenceTop,
    Mass,
    Capacity,
    Vote,
    Union,
    MaskedUnion,
}

/// What the page says of a rule, and how it lets it be moved.
#[derive(Serialize)]
pub(crate) struct Told {
    id: Rule,
    name: &'static str,
    words: &'static str,
    /// Names of the numbers that it uses, of `Settings`.
    uses: &'static [&'static str],
    /// The one that "Play" moves.
    play: &'static str,
    sources: &'static [Source],
}

/// Where a rule is from.
#[derive(Clone, Copy, Serialize)]
struct Source {
    name: &'static str,
    href: &'static str,
}

const fn source(name: &'static str, href: &'static str) -> Source {
    Source { name, href }
}

const DES: Source = source("DES, arXiv 2602.00879", "https://arxiv.org/abs/2602.00879");
const OEA: Source = source("OEA, arXiv 2511.02237", "https://arxiv.org/abs/2511.02237");
const TEAM: Source = source("TEAM, arXiv 2602.08404", "https://arxiv.org/abs/2602.08404");
const DMOE: Source = source("dMoE, arXiv 2605.30876", "https://arxiv.org/abs/2605.30876");
const EC_DLM: Source = source("EC-DLM, arXiv 2604.01622", "https://arxiv.org/abs/2604.01622");
const SEQ_TOP_K: Source = source("SeqTopK, arXiv 2511.06494", "https://arxiv.org/abs/2511.06494");
const DEEPSEEK: Source =
    source("DeepSeek-V3, arXiv 2412.19437", "https://arxiv.org/abs/2412.19437");
const MINNOW: Source =
    source("LLaDA2.2, as the engine minnow runs it", "https://github.com/coder543/minnow");

impl Rule {
    pub(crate) const ALL: [Self; 8] = [
        Self::TokenChoice,
        Self::ExpertChoice,
        Self::SequenceTop,
        Self::Mass,
        Self::Capacity,
        Self::Vote,
        Self::Union,
        Self::MaskedUnion,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::TokenChoice => "Tokens choose experts",
            Self::ExpertChoice => "Experts choose tokens",
            Self::SequenceTop => "The best pairs of all",
            Self::Mass => "The block elects: share of votes",
            Self::Capacity => "The block elects: highest score",
            Self::Vote => "The block elects: most votes",
            Self::Union => "The block elects: everyone’s first two",
            Self::MaskedUnion => "The block elects: first two of masked tokens",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::TokenChoice => {
                "Each token takes the K experts that it scores highest. This is the usual rule. Tokens choose alone, so a block reads many different experts."
            }
            Self::ExpertChoice => {
                "Each expert takes the tokens that score highest for it, all experts equally many. No expert is busier than another. The fewer tokens are still to be written, the more each expert takes: K experts a token at the end, a quarter of that at the start, but one token at least."
            }
            Self::SequenceTop => {
                "The 32 times K highest scores of the whole block win, wherever they are. A token may get many experts, or none."
            }
            Self::Mass => {
                "First the block elects experts: each token votes for its top K with their scores, and the fewest experts that together hold more than the share p of all votes are elected, at least the floor. Then each token takes its K best of those."
            }
            Self::Capacity => {
                "First the block elects as many experts as the capacity says: those with the highest score that any of its tokens gives them. Then each token takes its K best of those."
            }
            Self::Vote => {
                "First the block elects as many experts as the capacity says: those with the most votes of its tokens. Then each token takes its K best of those."
            }
            Self::Union => {
                "First the block elects every expert that is among the two highest of some token. Then each token takes its K best of those."
            }
            Self::MaskedUnion => {
                "First the block elects every expert that is among the two highest of some token that is still to be written: the others have no say. Then each token takes its K best of those. Where no token is left to be written, all experts stay."
            }
        }
    }

    /// What it uses, the number that "Play" moves first.
    fn uses(self) -> &'static [&'static str] {
        match self {
            Self::TokenChoice | Self::SequenceTop | Self::Union => &["k"],
            Self::ExpertChoice | Self::MaskedUnion => &["mask", "k"],
            Self::Mass => &["p", "k", "floor"],
            Self::Capacity | Self::Vote => &["capacity", "k"],
        }
    }

    fn sources(self) -> &'static [Source] {
        match self {
            Self::TokenChoice => &[DEEPSEEK],
            Self::ExpertChoice => &[EC_DLM],
            Self::SequenceTop => &[SEQ_TOP_K],
            Self::Mass => &[DMOE],
            Self::Capacity => &[MINNOW],
            Self::Vote => &[DES],
            Self::Union => &[DES, OEA],
            Self::MaskedUnion => &[TEAM],
        }
    }

    pub(crate) fn told(self) -> Told {
        let uses = self.uses();
        Told {
            id: self,
            name: self.name(),
            words: self.words(),
            uses,
            play: uses[0],
            sources: self.sources(),
        }
    }
}
