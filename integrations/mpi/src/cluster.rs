//! A model of a cluster: what the counts of a step would cost on devices that are not there.
//!
//! A step of one layer takes as long as its slowest device: rows there, the experts, rows back.
//!
//! ```
//! use wgmoe_mpi::cluster::{Cluster, Work};
//! use wgmoe_mpi::Split;
//!
//! // Half of all slots fall on the first of four devices, instead of a quarter.
//! let cluster = Cluster::h200();
//! let work = Work::new(512, 384).with_bytes(2);
//! let [even, skewed] = [[100, 100, 100, 100], [200, 100, 50, 50]]
//!     .map(|counts| cluster.step(&work, &Split::even(4, 4), &counts.map(|n| n as f64 * 1e4)));
//! assert!((skewed.seconds() / even.seconds() - 2.0).abs() < 0.05);
//! ```
use crate::Split;

/// A cluster of equal devices, each linked with each.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Cluster {
    /// Bytes a second that a device sends, and as many that it receives meanwhile.
    pub bandwidth: f64,
    /// Seconds until a message has started.
    pub latency: f64,
    /// Multiply and add operations a second of a device, at the experts' matmuls.
    pub rate: f64,
    /// Share of the shorter of transfers and matmuls that runs behind the longer.
    pub overlap: f64,
    /// Seconds of a step that depend on no balance: attention, router, optimizer.
    pub other: f64,
}

impl Cluster {
    /// Eight H200 as their maker's data sheet has them: 900 GB/s of NVLink, half of it each way, and
    /// 989 TFLOP/s of dense bf16, of which grouped matmuls are taken to reach 40 %. 5 us a message is an
    /// assumption too, and no overlap.
    pub const fn h200() -> Self {
        Self { bandwidth: 450e9, latency: 5e-6, rate: 400e12, overlap: 0.0, other: 0.0 }
    }

    /// Another bandwidth, in bytes a second each way.
    #[must_use]
    pub const fn with_bandwidth(self, bandwidth: f64) -> Self {
        Self { bandwidth, ..self }
    }

    /// Another latency, in seconds.
    #[must_use]
    pub const fn with_latency(self, latency: f64) -> Self {
        Self { latency, ..self }
    }

    /// Another rate, in operations a second.
    #[must_use]
    pub const fn with_rate(self, rate: f64) -> Self {
        Self { rate, ..self }
    }

    /// Another share of overlap.
    #[must_use]
    pub const fn with_overlap(self, overlap: f64) -> Self {
        Self { overlap, ..self }
    }

    /// Seconds of other work in each step.
    #[must_use]
    pub const fn with_other(self, other: f64) -> Self {
        Self { other, ..self }
    }
}

/// What one slot costs.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Work {
    /// D.
    pub hidden: f64,
    /// F.
    pub intermediate: f64,
    /// Bytes of a value that travels.
    pub bytes: f64,
}

impl Work {
    /// Experts `[F, D]`, rows of f32.
    pub fn new(hidden: u32, intermediate: u32) -> Self {
        Self { hidden: hidden.into(), intermediate: intermediate.into(), bytes: 4.0 }
    }

    /// Values of so many bytes.
    #[must_use]
    pub fn with_bytes(self, bytes: u32) -> Self {
        Self { bytes: bytes.into(), ..self }
    }

    /// Operations of a slot: three matrices, a multiplication and an addition each.
    pub fn operations(&self) -> f64 {
        6.0 * self.hidden * self.intermediate
    }
}

/// A step of one layer, of its slowest device.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelStep {
    /// Seconds of both transfers.
    pub transfer: f64,
    /// Seconds of the matmuls.
    pub compute: f64,
    /// Seconds of these two that run at once.
    pub hidden: f64,
    /// Seconds of other work.
    pub other: f64,
    /// Operations of all devices over devices and seconds: what a device reaches.
    pub rate: f64,
}

impl ModelStep {
    /// All of it.
    pub fn seconds(&self) -> f64 {
        self.transfer + self.compute - self.hidden + self.other
    }
}

impl Cluster {
    /// The step that computes so many slots of each expert, whose tokens lie evenly on the devices.
    ///
    /// # Panics
    ///
    /// If `slots` are not one an expert of `split`.
    pub fn step(&self, work: &Work, split: &Split, slots: &[f64]) -> ModelStep {
        assert_eq!(slots.len(), split.experts() as usize, "`slots`");
        let devices = split.ranks() as f64;
        let of = |r: usize| -> f64 {
            let experts = split.experts_of(r);
            slots[experts.start as usize..experts.end as usize].iter().sum()
        };
        let all: f64 = slots.iter().sum();
        let most = (0..split.ranks()).map(of).fold(0.0, f64::max);
        // Of each device's tokens, and so of each expert's rows, a share stays where it is.
        let elsewhere = (devices - 1.0) / devices;
        let row = work.hidden * work.bytes;
        let bytes = row * elsewhere * most.max(all / devices);
        let transfer = 2.0 * (self.latency * (devices - 1.0) + bytes / self.bandwidth);
        let compute = most * work.operations() / self.rate;
        let hidden = self.overlap * transfer.min(compute);
        let step = ModelStep { transfer, compute, hidden, other: self.other, rate: 0.0 };
        let rate = all * work.operations() / devices / step.seconds();
        ModelStep { rate, ..step }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: f64, b: f64) -> bool {
        (a / b - 1.0).abs() < 1e-9
    }

    #[test]
    fn a_step_by_hand() {
        // Two devices, 10 and 30 slots of rows of 8 bytes; half of each device's rows travel.
        let cluster =
            Cluster::h200().with_bandwidth(16.0).with_latency(1.0).with_rate(360.0).with_other(0.5);
        let step = cluster.step(&Work::new(2, 3), &Split::even(2, 2), &[10.0, 30.0]);
        // 2 * (1 + 30 * 8 / 2 / 16); 30 * 6 * 2 * 3 / 360.
        assert!(near(step.transfer, 17.0) && near(step.compute, 3.0), "{step:?}");
        assert!(near(step.seconds(), 20.5) && near(step.rate, 40.0 * 36.0 / 2.0 / 20.5));
        let overlapped = cluster.with_overlap(1.0);
        let step = overlapped.step(&Work::new(2, 3), &Split::even(2, 2), &[10.0, 30.0]);
        assert!(near(step.seconds(), 17.5));
    }

    #[test]
    fn one_device_sends_nothing() {
        let step = Cluster::h200().step(&Work::new(64, 32), &Split::even(4, 1), &[5.0; 4]);
        assert_eq!(step.transfer, 0.0);
        assert!(near(step.rate, 400e12));
    }
}
