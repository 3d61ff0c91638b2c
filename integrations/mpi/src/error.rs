//! What can go wrong, and on which rank.

/// What can go wrong. Every rank of a job gets an error that names the rank it is about: a rank that
/// fails tells the others ([`World::fail`](crate::World::fail)), and one that is silent is named by
/// those that wait for it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of the library on this rank.
    #[error(transparent)]
    Wgmoe(#[from] wgmoe::Error),
    /// An argument that makes no sense, here or on another rank.
    #[error("`{name}`: {reason}")]
    Invalid {
        /// Argument.
        name: &'static str,
        /// What is wrong, which ranks it is about, and what is allowed.
        reason: String,
    },
    /// Ranks that differ in what must be the same on all.
    #[error("rank {}: `{field}` is {theirs}, on the others it is {ours}", list(.ranks))]
    Differs {
        /// The ranks that differ from most.
        ranks: Vec<usize>,
        /// What differs.
        field: String,
        /// What the first of them has.
        theirs: String,
        /// What most have.
        ours: String,
    },
    /// Ranks that hold no expert, or bring no token.
    #[error("rank {} of {of}: {what}; `Options::with_idle_ranks` allows it", list(.ranks))]
    Idle {
        /// Those ranks.
        ranks: Vec<usize>,
        /// Ranks there are.
        of: usize,
        /// What they lack.
        what: String,
    },
    /// Another rank failed, and said so.
    #[error("rank {rank} failed: {reason}")]
    Rank {
        /// The rank that failed.
        rank: usize,
        /// What it said.
        reason: String,
    },
    /// Ranks that did not answer within the time limit: dead, stopped or busy with something else.
    #[error("rank {} silent for {seconds} s: {what}", list(.ranks))]
    Silent {
        /// The ranks that are waited for.
        ranks: Vec<usize>,
        /// The limit.
        seconds: f64,
        /// What was to come from them.
        what: String,
    },
    /// MPI refused a call.
    #[error("MPI: {0}")]
    Mpi(String),
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn invalid(name: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { name, reason: reason.into() }
    }

    /// The ranks that an error is about; none where it is about this one.
    pub fn ranks(&self) -> &[usize] {
        match self {
            Self::Differs { ranks, .. } | Self::Silent { ranks, .. } | Self::Idle { ranks, .. } => {
                ranks
            }
            Self::Rank { rank, .. } => std::slice::from_ref(rank),
            _ => &[],
        }
    }
}

/// Ranks as text: `2, 5`.
pub(crate) fn list(ranks: &[usize]) -> String {
    ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}
