//! What a routing did to a batch: loads of the experts, dropped pairs, padded rows.
//!
//! These are the figures that EC-DLM reports of expert choice, of token choice, and of a checkpoint
//! moved from one to the other (arXiv 2604.01622, "retrofit").
//!
//! ```
//! use wgmoe::{plan::Stats, report::Report};
//!
//! let tokens_per_expert = vec![4, 2, 2, 0];
//! let stats = Stats { slots: 8, tokens_per_expert, untouched: 1, ..Stats::default() };
//! let report = Report::new(&stats, 4);
//! assert_eq!((report.untouched_share, report.load.max, report.load.imbalance()), (0.25, 4, 2.0));
//! // Of two devices, the one with the first two experts has 6 of 8 slots, 1.5 times the mean.
//! assert_eq!(report.devices, [(2, 1.5), (4, 2.0)]);
//! ```
//!
//! What of EC-DLM's figures for eight GPUs one device can show, and what it cannot, is in
//! `docs/balance.md`.
use crate::plan::Stats;
use crate::{Error, Result};

/// Numbers of devices that [`Report::devices`] looks at.
pub const DEVICES: [u32; 4] = [2, 4, 8, 16];

/// Tokens of an expert, over all experts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Fewest.
    pub min: u32,
    /// Mean.
    pub mean: f64,
    /// Most.
    pub max: u32,
    /// Standard deviation (of all experts, not of a sample) over the mean; 0 where nothing was routed.
    pub variation: f64,
}

impl Load {
    /// From the tokens of each expert.
    pub fn new(tokens_per_expert: &[u32]) -> Self {
        let n = tokens_per_expert.len().max(1) as f64;
        let mean = tokens_per_expert.iter().map(|&c| f64::from(c)).sum::<f64>() / n;
        let variance =
            tokens_per_expert.iter().map(|&c| (f64::from(c) - mean).powi(2)).sum::<f64>() / n;
        Self {
            min: tokens_per_expert.iter().copied().min().unwrap_or(0),
            mean,
            max: tokens_per_expert.iter().copied().max().unwrap_or(0),
            variation: if mean > 0.0 { variance.sqrt() / mean } else { 0.0 },
        }
    }

    /// Most over the mean, at least 1; exactly 1 for expert choice. 1 where nothing was routed.
    pub fn imbalance(&self) -> f64 {
        if self.mean > 0.0 { f64::from(self.max) / self.mean } else { 1.0 }
    }
}

/// Figures of one routing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Tokens routed.
    pub tokens: u32,
    /// Tokens that no expert took.
    pub untouched: u32,
    /// Their share of all tokens; 0 of none.
    pub untouched_share: f64,
    /// (token, expert) pairs.
    pub slots: u32,
    /// Pairs dropped by the capacity factor.
    pub dropped: u32,
    /// Tokens of an expert.
    pub load: Load,
    /// For those of [`DEVICES`] that divide the experts: how many devices, and [`slowest_device`]'s slots over the mean.
    pub devices: Vec<(u32, f64)>,
}

impl Report {
    /// From the statistics of a plan of `tokens` tokens. They count padding as untouched; [`Report::with_padding`] takes it out.
    pub fn new(stats: &Stats, tokens: u32) -> Self {
        let loads = &stats.tokens_per_expert;
        Self {
            tokens,
            untouched: stats.untouched,
            untouched_share: share(stats.untouched, tokens),
            slots: stats.slots,
            dropped: stats.dropped,
            load: Load::new(loads),
            devices: DEVICES
                .iter()
                .filter_map(|&n| Some((n, slowest_device(loads, n).ok()?)))
                .collect(),
        }
    }

    /// The same of a batch of which `padding` tokens are padding, which is neither routed nor untouched.
    #[must_use]
    pub fn with_padding(mut self, padding: u32) -> Self {
        self.tokens = self.tokens.saturating_sub(padding);
        self.untouched = self.untouched.saturating_sub(padding);
        self.untouched_share = share(self.untouched, self.tokens);
        self
    }
}

fn share(part: u32, of: u32) -> f64 {
    if of == 0 { 0.0 } else { f64::from(part) / f64::from(of) }
}

/// Slots of the slowest of `devices` devices over the mean, each holding as many experts, in order: all others wait for it in
/// every layer. At least 1; 1 where nothing was routed.
///
/// # Errors
///
/// [`Error::Invalid`] where the devices are none, or do not divide the experts.
pub fn slowest_device(tokens_per_expert: &[u32], devices: u32) -> Result<f64> {
    let experts = tokens_per_expert.len();
    if devices == 0 || experts == 0 || !experts.is_multiple_of(devices as usize) {
        return Err(Error::invalid("devices", format!("{devices} devices for {experts} experts")));
    }
    let held = tokens_per_expert.chunks(experts / devices as usize);
    let slots: Vec<u64> = held.map(|of| of.iter().map(|&n| u64::from(n)).sum()).collect();
    let sum: u64 = slots.iter().sum();
    let most = slots.into_iter().max().unwrap_or(0);
    Ok(if sum == 0 { 1.0 } else { most as f64 * f64::from(devices) / sum as f64 })
}
