//! What a cache is given, and what it counts.
use super::on_host::{self, MissesOnHost};
use super::policy::CachePolicy;
use crate::weights::ExpertTypes;
use crate::{Error, Result};

/// How much memory a [`CachedLayer`](super::CachedLayer) takes, and which experts it keeps there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    /// Most bytes of the cache on the device: the pages of experts, shared ones included, and a word for each expert.
    /// Router, scratch, and what wgpu holds of uploads under way are not in it.
    pub budget: u64,
    /// Most bytes of uploads under way at once, in whole experts, two at least. wgpu holds as many in memory that the
    /// host writes.
    pub staging: u64,
    /// What all experts are stored as on the device; what the [source](super::ExpertSource::types) says where
    /// absent.
    pub types: Option<ExpertTypes>,
    /// Bytes that a page may have at most; the device's limit where absent.
    pub page_limit: Option<u64>,
    /// When the experts on the device change.
    pub policy: CachePolicy,
    /// Routed experts that are brought in at once and never leave.
    pub pinned: Vec<u32>,
    /// Whether the host computes missing experts.
    pub host: MissesOnHost,
}

impl CacheOptions {
    /// The source's storage types, 64 MiB of uploads at once, the least recently used leaving, none
    /// pinned, none computed by the host.
    pub const fn new(budget: u64) -> Self {
        let (policy, host) = (CachePolicy::LeastRecentlyUsed, MissesOnHost::Never);
        let (types, page_limit, staging) = (None, None, 64 << 20);
        Self { budget, staging, types, page_limit, policy, pinned: vec![], host }
    }
}

/// What a cache did since it was made, or since [`CachedLayer::reset_stats`](super::CachedLayer::reset_stats).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Steps run.
    pub steps: u64,
    /// Routed experts that steps asked for and found, those prefetched included.
    pub hits: u64,
    /// Routed experts that steps asked for and that were not there.
    pub misses: u64,
    /// Those of them that the host computed.
    pub on_host: u64,
    /// Routed experts brought in ahead of a step.
    pub prefetched: u64,
    /// Routed experts that changed places with others at the end of an interval
    /// ([`CachePolicy::Interval`]); those among them that the step asked for are misses too, the others
    /// prefetched.
    pub exchanged: u64,
    /// Bytes uploaded for misses.
    pub miss_bytes: u64,
    /// Bytes uploaded ahead of steps.
    pub prefetch_bytes: u64,
    /// Submissions that ran experts: one a step where nothing is missing.
    pub rounds: u64,
    /// Most bytes of the cache that held experts at once.
    pub peak_bytes: u64,
}

/// Of several layers: sums of all, of the peaks too.
impl std::ops::AddAssign for CacheStats {
    fn add_assign(&mut self, other: Self) {
        let Self { steps, hits, misses, on_host, prefetched, exchanged, .. } = other;
        let Self { miss_bytes, prefetch_bytes, rounds, peak_bytes, .. } = other;
        self.steps += steps;
        self.hits += hits;
        self.misses += misses;
        self.on_host += on_host;
        self.prefetched += prefetched;
        self.exchanged += exchanged;
        self.miss_bytes += miss_bytes;
        self.prefetch_bytes += prefetch_bytes;
        self.rounds += rounds;
        self.peak_bytes += peak_bytes;
    }
}

impl CacheStats {
    /// Share of the experts asked for that were there; 1 where none was.
    pub fn hit_rate(&self) -> f64 {
        let all = self.hits + self.misses;
        if all == 0 { 1.0 } else { self.hits as f64 / all as f64 }
    }

    /// Bytes uploaded for steps and ahead of them.
    pub fn bytes(&self) -> u64 {
        self.miss_bytes + self.prefetch_bytes
    }
}

impl CacheOptions {
    /// Refuses a policy, or pinned experts, that leave no place for a missing one.
    pub(super) fn check(&self, places: u32, experts: u32) -> Result<()> {
        let Self { policy, pinned, host, .. } = self;
        if *host != MissesOnHost::Never && !on_host::IS_THERE {
            return Err(Error::invalid("host", "needs the feature `cpu-experts`, and threads"));
        }
        let mut known = std::collections::HashSet::new();
        if let Some(e) = pinned.iter().find(|&&e| e >= experts || !known.insert(e)) {
            let reason = format!("{e} of {experts} experts, each at most once");
            return Err(Error::invalid("pinned", reason));
        }
        let passing = match *policy {
            CachePolicy::Interval { steps: 0, .. } => return Err(Error::invalid("steps", "0")),
            CachePolicy::Interval { passing: 0, .. } => return Err(Error::invalid("passing", "0")),
            CachePolicy::Interval { passing, .. } => passing as usize,
            // One that any missing expert may come into, unless none can be missing.
            CachePolicy::LeastRecentlyUsed => usize::from(pinned.len() < experts as usize),
        };
        if pinned.len() + passing > places as usize {
            let reason = format!(
                "{places} experts fit; {} are pinned, {passing} must be free for others",
                pinned.len()
            );
            return Err(Error::invalid("budget", reason));
        }
        Ok(())
    }
}
