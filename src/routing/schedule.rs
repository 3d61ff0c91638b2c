//! Capacity schedules: how many experts a token gets on average, as a function of how much of its sequence is still masked
//! (EC-DLM, arXiv 2604.01622, "timestep-dependent expert capacity"), and what a schedule costs.
//!
//! A schedule is plain data, and [`Schedule::k`] is its meaning. `k` is a whole number, so over the mask ratio it is a
//! staircase: [`Schedule::staircase`] finds the first f32 of every step, and the device compares ratios with those
//! ([`ops::capacity`](crate::ops::capacity)). It needs no `cos` or `exp` for that, and gives `k` exactly, for every f32.
//!
//! ```
//! use wgmoe::routing::schedule::{CostShape, Ratios, Schedule, ScheduleKind};
//!
//! let schedule = Schedule::new(ScheduleKind::LinearReverse, 8, 32);
//! assert_eq!([0.0, 0.5, 1.0].map(|ratio| schedule.k(ratio)), [32, 20, 8]);
//!
//! // The same cost as 20 experts a token throughout.
//! let shape = CostShape { length: 512, experts: 512, hidden: 512, intermediate: 384 };
//! let cost = schedule.expected(Ratios::Uniform, &shape)?;
//! assert!((cost.k - 20.0).abs() < 1e-6);
//! assert_eq!(schedule.matched(Ratios::Uniform, &shape)?, Schedule::fixed(20));
//! # Ok::<(), wgmoe::Error>(())
//! ```
use super::exact::{cos_pi, exp};
use crate::error::not_zero;
use crate::routing::MAX_EXPERTS;
use crate::{Error, Result};

/// Least and greatest `sigma` of the Gaussian schedules. A narrower one is a spike that few f32 ratios meet; a wider one
/// differs from [`ScheduleKind::Bell`] by less than a thousandth, and loses digits.
pub const SIGMA: std::ops::RangeInclusive<f64> = 1e-3..=10.0;

/// Shape of a schedule: `f(r)` of the mask ratio `r`, between 0 (`k_min`) and 1 (`k_max`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScheduleKind {
    /// The same k throughout; `k_min` and `k_max` are equal.
    Static,
    /// `r`.
    Linear,
    /// `1 - r`.
    LinearReverse,
    /// `(1 - cos(pi r)) / 2`.
    Cosine,
    /// `(1 + cos(pi r)) / 2`.
    CosineReverse,
    /// `1 - 4 (r - 1/2)^2`.
    Bell,
    /// `(exp(-(r - 1/2)^2 / (2 sigma^2)) - edge) / (1 - edge)`, `edge = exp(-1/4 / (2 sigma^2))`.
    Gaussian,
    /// `1 - Gaussian`.
    GaussianReverse,
}

impl ScheduleKind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Static,
        Self::Linear,
        Self::LinearReverse,
        Self::Cosine,
        Self::CosineReverse,
        Self::Bell,
        Self::Gaussian,
        Self::GaussianReverse,
    ];

    /// Its name, as [`str::parse`] takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Static => "static",
            Self::Linear => "linear",
            Self::LinearReverse => "linear_reverse",
            Self::Cosine => "cosine",
            Self::CosineReverse => "cosine_reverse",
            Self::Bell => "bell",
            Self::Gaussian => "gaussian",
            Self::GaussianReverse => "gaussian_reverse",
        }
    }

    const fn is_gaussian(self) -> bool {
        matches!(self, Self::Gaussian | Self::GaussianReverse)
    }
}

impl std::str::FromStr for ScheduleKind {
    type Err = Error;

    /// Takes [`ScheduleKind::name`]s, and `bell_gaussian` and `bell_gaussian_reverse`, EC-DLM's names of the last two.
    fn from_str(name: &str) -> Result<Self> {
        let own = name.strip_prefix("bell_").unwrap_or(name);
        Self::ALL.into_iter().find(|kind| kind.name() == own).ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::invalid("schedule", format!("`{name}` is none of {names}"))
        })
    }
}

/// Average experts per token as a function of the mask ratio.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Schedule {
    /// Shape.
    pub kind: ScheduleKind,
    /// Fewest experts per token, on average; with 0, each expert still takes the one token that every capacity has.
    pub k_min: u32,
    /// Most experts per token, on average; at most [`MAX_EXPERTS`]. More than a layer's experts means all of them.
    pub k_max: u32,
    /// Width of the Gaussian shapes, within [`SIGMA`]; the others ignore it.
    pub sigma: f64,
}

impl Schedule {
    /// A schedule with EC-DLM's published `sigma`, 0.22.
    pub const fn new(kind: ScheduleKind, k_min: u32, k_max: u32) -> Self {
        Self { kind, k_min, k_max, sigma: 0.22 }
    }

    /// The same `k` throughout.
    pub const fn fixed(k: u32) -> Self {
        Self::new(ScheduleKind::Static, k, k)
    }

    /// Another width of a Gaussian shape.
    #[must_use]
    pub const fn with_sigma(mut self, sigma: f64) -> Self {
        self.sigma = sigma;
        self
    }

    /// Checks the values.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for `k_min > k_max` (or different ones of a static schedule), `k_max` over [`MAX_EXPERTS`], or a
    /// Gaussian's `sigma` outside [`SIGMA`].
    pub fn validate(&self) -> Result<()> {
        let Self { kind, k_min, k_max, sigma } = *self;
        if k_min > k_max {
            return Err(Error::invalid("k_min", format!("{k_min} is more than `k_max`, {k_max}")));
        }
        if kind == ScheduleKind::Static && k_min != k_max {
            return Err(Error::invalid(
                "k_min",
                format!("a static schedule has one k, got {k_min} and {k_max}"),
            ));
        }
        if k_max > MAX_EXPERTS {
            return Err(Error::invalid("k_max", format!("{k_max}, at most {MAX_EXPERTS}")));
        }
        if kind.is_gaussian() && !SIGMA.contains(&sigma) {
            return Err(Error::invalid("sigma", format!("{sigma}, must be within {SIGMA:?}")));
        }
        Ok(())
    }

    /// Experts per token at a mask ratio: `round(k_min + (k_max - k_min) f(ratio))`, half to even, in f64. A ratio is clamped
    /// to 0..=1; NaN means `k_min`.
    ///
    /// EC-DLM computes in f32; every row of its recorded schedules is the same in both. The result is the same on every
    /// platform.
    pub fn k(&self, ratio: f32) -> u32 {
        if ratio.is_nan() {
            return self.k_min;
        }
        let r = f64::from(ratio.clamp(0.0, 1.0));
        let gaussian = || {
            let term = |square: f64| exp(-square / (2.0 * self.sigma * self.sigma));
            let edge = term(0.25);
            ((term((r - 0.5) * (r - 0.5)) - edge) / (1.0 - edge)).clamp(0.0, 1.0)
        };
        let f = match self.kind {
            ScheduleKind::Static => 1.0,
            ScheduleKind::Linear => r,
            ScheduleKind::LinearReverse => 1.0 - r,
            ScheduleKind::Cosine => (1.0 - cos_pi(r)) / 2.0,
            ScheduleKind::CosineReverse => (1.0 + cos_pi(r)) / 2.0,
            ScheduleKind::Bell => (1.0 - 4.0 * (r - 0.5) * (r - 0.5)).clamp(0.0, 1.0),
            ScheduleKind::Gaussian => gaussian(),
            ScheduleKind::GaussianReverse => 1.0 - gaussian(),
        };
        let (low, high) = (f64::from(self.k_min), f64::from(self.k_max));
        // Not `clamp`, which panics where `low > high`.
        (low + (high - low) * f).round_ties_even().max(low).min(high) as u32
    }

    /// Experts per token of a sequence with `masked` masked tokens of `length`: [`Schedule::k`] of [`mask_ratio`].
    pub fn k_of_counts(&self, masked: u32, length: u32) -> u32 {
        self.k(mask_ratio(masked, length))
    }

    /// The staircase: for every f32 ratio the `k` of [`Schedule::k`], as a list of steps.
    ///
    /// # Errors
    ///
    /// As [`Schedule::validate`].
    pub fn staircase(&self) -> Result<Staircase> {
        self.validate()?;
        // f32 from 0 to 1 are in the order of their bits. Every shape is monotone on both sides of a half.
        let [zero, half, one] = [0.0f32, 0.5, 1.0].map(f32::to_bits);
        let mut list = vec![Stair { first: 0.0, k: self.k(0.0) }];
        self.push_steps(zero, half, &mut list);
        self.push_steps(half, one, &mut list);
        Ok(Staircase { k_of_nan: self.k_min, list })
    }

    /// The steps that begin after `low` and up to `high`, by bisection.
    fn push_steps(&self, low: u32, high: u32, list: &mut Vec<Stair>) {
        let k = |bits| self.k(f32::from_bits(bits));
        if k(low) == k(high) {
            return;
        }
        if high - low == 1 {
            return list.push(Stair { first: f32::from_bits(high), k: k(high) });
        }
        let middle = low + (high - low) / 2;
        self.push_steps(low, middle, list);
        self.push_steps(middle, high, list);
    }

    /// What a sequence of `shape` costs on average, over a distribution of mask ratios.
    ///
    /// # Errors
    ///
    /// As [`Schedule::validate`]; [`Error::Invalid`] for zero experts, no samples, or weights that are negative, not finite,
    /// or all 0.
    pub fn expected(&self, over: Ratios<'_>, shape: &CostShape) -> Result<Cost> {
        not_zero(&[("experts", shape.experts)])?;
        let mut cost = Cost::default();
        for (weight, k) in self.weights(over)? {
            let slots =
                u64::from(shape.experts) * u64::from(capacity(shape.length, k, shape.experts));
            cost.k += weight * f64::from(k);
            cost.slots += weight * slots as f64;
        }
        cost.flops = cost.slots * 6.0 * f64::from(shape.hidden) * f64::from(shape.intermediate);
        Ok(cost)
    }

    /// The static schedule whose cost is nearest to this one's: what it has to be compared with.
    ///
    /// # Errors
    ///
    /// As [`Schedule::expected`].
    pub fn matched(&self, over: Ratios<'_>, shape: &CostShape) -> Result<Self> {
        let want = self.expected(over, shape)?;
        let distance = |k: u32| -> Result<[f64; 2]> {
            let cost = Self::fixed(k).expected(Ratios::Uniform, shape)?;
            // Several k of a short sequence give the same slots; among them, the nearest k.
            Ok([(cost.slots - want.slots).abs(), (cost.k - want.k).abs()])
        };
        let mut best = (distance(self.k_min)?, self.k_min);
        for k in self.k_min + 1..=self.k_max {
            let d = distance(k)?;
            if d < best.0 {
                best = (d, k);
            }
        }
        Ok(Self::fixed(best.1))
    }

    /// (share, k), the shares adding up to 1.
    fn weights(&self, over: Ratios<'_>) -> Result<Vec<(f64, u32)>> {
        let steps = self.staircase()?;
        let mut all: Vec<(f64, u32)> = match over {
            Ratios::Uniform => {
                let ends = steps.list.iter().skip(1).map(|s| f64::from(s.first)).chain([1.0]);
                steps
                    .list
                    .iter()
                    .zip(ends)
                    .map(|(s, end)| (end - f64::from(s.first), s.k))
                    .collect()
            }
            Ratios::Samples(samples) => samples.iter().map(|&r| (1.0, self.k(r))).collect(),
            Ratios::Weighted(samples) => {
                samples.iter().map(|&(r, weight)| (weight, self.k(r))).collect()
            }
        };
        let sum: f64 = all.iter().map(|a| a.0).sum();
        if !(sum > 0.0 && sum.is_finite()) || all.iter().any(|a| a.0 < 0.0) {
            return Err(Error::invalid(
                "over",
                "needs samples, with weights that are not negative and not all 0",
            ));
        }
        for a in &mut all {
            a.0 /= sum;
        }
        Ok(all)
    }
}

/// One step of a staircase.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stair {
    /// Its least ratio.
    pub first: f32,
    /// Experts per token, up to the next step.
    pub k: u32,
}

/// A schedule as a staircase over the mask ratio.
#[derive(Clone, Debug, PartialEq)]
pub struct Staircase {
    k_of_nan: u32,
    list: Vec<Stair>,
}

impl Staircase {
    /// The steps, by ascending ratio; the first begins at 0.
    pub fn list(&self) -> &[Stair] {
        &self.list
    }

    /// What the device reads, at most 16 KiB: `[steps + 1, 2]` u32: the key of a step's first ratio, and its k. The key of NaN is 0, that of
    /// any other ratio the bits of its value clamped to 0..=1, plus 1; so the list begins with NaN and is in ascending order.
    pub fn words(&self) -> Vec<[u32; 2]> {
        let steps = self.list.iter().map(|s| [s.first.to_bits() + 1, s.k]);
        [[0, self.k_of_nan]].into_iter().chain(steps).collect()
    }
}

/// Mask ratios to average over.
#[derive(Clone, Copy, Debug)]
pub enum Ratios<'a> {
    /// Every ratio from 0 to 1 alike: training with uniform times, or unmasking at a constant rate.
    Uniform,
    /// These, each once: the ratios that a denoising run went through.
    Samples(&'a [f32]),
    /// These, each with a weight.
    Weighted(&'a [(f32, f64)]),
}

/// Sizes that the cost of a layer depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CostShape {
    /// Tokens of a sequence.
    pub length: u32,
    /// Routed experts.
    pub experts: u32,
    /// D.
    pub hidden: u32,
    /// F: an expert's intermediate size.
    pub intermediate: u32,
}

/// Averages per sequence and layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Experts per token, as scheduled.
    pub k: f64,
    /// (token, expert) pairs computed, the rounding of capacities included.
    pub slots: f64,
    /// FLOPs of the routed experts: `6 hidden intermediate` a slot. Router and shared experts do not depend on the schedule.
    pub flops: f64,
}

/// `masked / length` as the nearest f32 (ties to even), for any two u32. More masked tokens than there are count as all of
/// them; NaN for a length of 0.
pub fn mask_ratio(masked: u32, length: u32) -> f32 {
    if length == 0 {
        return f32::NAN;
    }
    if masked == 0 {
        return 0.0;
    }
    if masked >= length {
        return 1.0;
    }
    let (m, n) = (u64::from(masked), u64::from(length));
    // At least 25 bits of the quotient, and one that says whether anything is left: a u64 with at most 33 + 25 bits.
    let shift = 26 + length.ilog2() - masked.ilog2();
    let scaled = m << shift;
    let quotient = ((scaled / n) << 1) | u64::from(!scaled.is_multiple_of(n));
    // The conversion rounds once; the scaling is exact.
    quotient as f32 * f32::from_bits((127 - (shift + 1)) << 23)
}

/// Tokens that each expert takes of a sequence: `clamp(floor(length k / experts), 1, length)`; 0 of an empty sequence.
///
/// # Panics
///
/// For zero experts.
pub fn capacity(length: u32, k: u32, experts: u32) -> u32 {
    let share = u64::from(length) * u64::from(k) / u64::from(experts);
    share.max(1).min(length.into()) as u32 // at most `length`
}

/// Most slots that expert choice makes of sequences of these lengths: `sum over b of experts * clamp(floor(N_b k_max /
/// experts), 1, N_b)`. What a plan's `routed_slots` must be for a schedule that ends at `k_max`.
///
/// # Errors
///
/// [`Error::Invalid`] for zero experts, or a bound that does not fit `u32`.
pub fn slot_bound(lengths: impl IntoIterator<Item = u32>, experts: u32, k_max: u32) -> Result<u32> {
    not_zero(&[("experts", experts)])?;
    lengths
        .into_iter()
        .map(|n| u64::from(experts) * u64::from(capacity(n, k_max, experts)))
        .try_fold(0u64, u64::checked_add)
        .and_then(|slots| u32::try_from(slots).ok())
        .ok_or_else(too_many_slots)
}

/// [`slot_bound`] where only the device knows the lengths: the most that any `sequences` sequences of `tokens` tokens together
/// can make. One token is enough for a sequence to count with a capacity of 1, and one more token of a sequence adds at most 1
/// to its capacity, so it is most where all sequences but one have a single token.
///
/// # Errors
///
/// As [`slot_bound`].
pub fn slot_bound_of_any(tokens: u32, sequences: u32, experts: u32, k_max: u32) -> Result<u32> {
    not_zero(&[("experts", experts)])?;
    u32::try_from(most_slots(tokens, sequences, experts, k_max)).map_err(|_| too_many_slots())
}

/// [`slot_bound_of_any`], whatever its size, for at least one expert.
pub(crate) fn most_slots(tokens: u32, sequences: u32, experts: u32, k_max: u32) -> u64 {
    let short = sequences.min(tokens).saturating_sub(1);
    let long = if sequences == 0 { 0 } else { capacity(tokens - short, k_max, experts) };
    u64::from(experts) * (u64::from(short) + u64::from(long))
}

fn too_many_slots() -> Error {
    Error::invalid("k_max", "too many slots: they do not fit u32")
}
