//! What a step did.
use crate::exchange::Part;
use crate::split::{Schedule, Split};
use std::time::{Duration, Instant};

/// What one rank did in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Step {
    /// Slots of each expert, over all ranks.
    pub tokens_per_expert: Vec<u32>,
    /// Slots of this rank's tokens.
    pub sent_slots: u32,
    /// Slots that this rank's experts computed.
    pub slots: u32,
    /// Rounds that rows travelled in.
    pub rounds: u32,
    /// Bytes of hidden rows sent to the experts of other ranks.
    pub sent_bytes: u64,
    /// Bytes returned to the tokens of other ranks.
    pub returned_bytes: u64,
    /// Messages of both kinds.
    pub messages: u32,
    /// Time by part.
    pub times: Times,
}

/// The time of a step by part. Transfers run while the device computes: a moment in which it does
/// counts as `compute`, so the others are what transfers cost beside it. Where a driver does the work
/// of one submission within the next, as software drivers do, it counts as whatever that is;
/// [`Options::with_timed`](crate::Options::with_timed) tells the parts apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Times {
    /// Router, choice, plan, and the counts of all ranks.
    pub route: Duration,
    /// Waiting for rows on their way to experts.
    pub send: Duration,
    /// Waiting for the experts.
    pub compute: Duration,
    /// Waiting for rows on their way back, and submitting the combination.
    pub back: Duration,
}

impl Times {
    /// All of it.
    pub fn total(&self) -> Duration {
        self.route + self.send + self.compute + self.back
    }
}

/// What a moment counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doing {
    Route,
    Send,
    Compute,
    Return,
}

/// Adds up time by part.
pub(crate) struct Clock {
    last: Instant,
    pub(crate) times: Times,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { last: Instant::now(), times: Times::default() }
    }

    /// Counts the time since it was last asked.
    pub(crate) fn now(&mut self, as_of: Doing) {
        let now = Instant::now();
        let part = match as_of {
            Doing::Route => &mut self.times.route,
            Doing::Send => &mut self.times.send,
            Doing::Compute => &mut self.times.compute,
            Doing::Return => &mut self.times.back,
        };
        *part += now - self.last;
        self.last = now;
    }
}

impl Step {
    pub(crate) fn new(schedule: &Schedule, split: &Split, rank: usize) -> Self {
        let tokens_per_expert = schedule.tokens_per_expert().to_vec();
        let own = split.experts_of(rank);
        Self {
            slots: tokens_per_expert[own.start as usize..own.end as usize].iter().sum(),
            sent_slots: schedule.slots_of(rank),
            rounds: schedule.rounds() as u32,
            tokens_per_expert,
            sent_bytes: 0,
            returned_bytes: 0,
            messages: 0,
            times: Times::default(),
        }
    }

    fn count(&mut self, parts: &[Part<'_>]) -> u64 {
        self.messages += parts.len() as u32;
        parts.iter().map(|p| p.bytes.end - p.bytes.start).sum()
    }

    pub(crate) fn sent(&mut self, parts: &[Part<'_>]) {
        self.sent_bytes += self.count(parts);
    }

    pub(crate) fn returned(&mut self, parts: &[Part<'_>]) {
        self.returned_bytes += self.count(parts);
    }
}
