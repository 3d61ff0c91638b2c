//! Where a step's time goes: a profiling mode, in which every dispatch is a pass of its own between
//! two GPU timestamps. Each is named by its [label](Dispatch::label), which tells apart the pages
//! of a layer's weights.
//!
//! A pass for each kernel costs a little that one pass for all does not, so the sum is no measure
//! of the step: time the step as it is recorded for use beside it. Applications record a
//! [`Profile`] into an encoder of theirs; [`Gpu::profile`] does it all and waits:
//!
//! ```
//! # use wgmoe::{Context, Gpu, Slice, ops::gather};
//! # fn main() -> wgmoe::Result<()> {
//! # let Ok(gpu) = Gpu::new() else { return Ok(()) };
//! # let ctx = Context::new(&gpu.device)?;
//! # let (x, token_of, out) = (gpu.upload(&[1f32; 64]), gpu.upload(&[0u32; 4]), gpu.upload(&[0f32; 64]));
//! # let dims = gather::Dims { tokens: 4, hidden: 16, slots: 4 };
//! # let args = gather::Args { x: (&x).into(), token_of: (&token_of).into(), out: (&out).into() };
//! let step = gather::Gather::new(&ctx)?.bind(&dims, args)?;
//! match gpu.profile(step.dispatches())? {
//!     Some(times) => times.iter().for_each(|(kernel, ms)| println!("{kernel}: {ms:.3} ms")),
//!     None => println!("this device has no timestamps that can be used"),
//! }
//! # Ok(())
//! # }
//! ```
use crate::device::guard::scoped;
use crate::device::wait::may_block;
use crate::{Dispatch, Error, Gpu, Result};
use std::time::Instant;

/// Dispatches a query set has room for, two timestamps each.
const SET: usize = wgpu::QUERY_SET_MAX_QUERIES as usize / 2;

/// Dispatches recorded with timestamps around them.
#[derive(Debug)]
pub struct Profile {
    labels: Vec<String>,
    timestamps: wgpu::Buffer,
}

impl Profile {
    /// Records each dispatch into a pass of its own, in order, and the timestamps into
    /// [`Profile::timestamps`]. `None`, with nothing recorded, where `device` was made without
    /// [`wgpu::Features::TIMESTAMP_QUERY`].
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where wgpu refuses the queries or their buffer.
    pub fn record<'a>(
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
        dispatches: impl IntoIterator<Item = &'a Dispatch>,
    ) -> Result<Option<Self>> {
        if !device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            return Ok(None);
        }
        let dispatches: Vec<&Dispatch> = dispatches.into_iter().collect();
        let labels: Vec<String> = dispatches.iter().map(|d| d.label()).collect();
        scoped(device, || {
            let timestamps = device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("timestamps"),
                size: (16 * dispatches.len() as u64).max(16),
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            });
            for (i, part) in dispatches.chunks(SET).enumerate() {
                let labels = &labels[SET * i..];
                let count = 2 * part.len() as u32; // at most QUERY_SET_MAX_QUERIES
                let query_set = device.create_query_set(&wgpu::QuerySetDescriptor {
                    label: Some("timestamps"),
                    ty: wgpu::QueryType::Timestamp,
                    count,
                });
                for ((first, dispatch), label) in (0..count).step_by(2).zip(part).zip(labels) {
                    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                        label: Some(label),
                        timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                            query_set: &query_set,
                            beginning_of_pass_write_index: Some(first),
                            end_of_pass_write_index: Some(first + 1),
                        }),
                    });
                    dispatch.record(&mut pass);
                }
                // A set is 32 KiB: a multiple of what an offset must be.
                let offset = (16 * SET * i) as u64;
                encoder.resolve_query_set(&query_set, 0..count, &timestamps, offset);
            }
            Some(Self { labels, timestamps })
        })
    }

    /// `[dispatches, 2]` u64: begin and end of each in ticks, there after the work ran.
    pub fn timestamps(&self) -> &wgpu::Buffer {
        &self.timestamps
    }

    /// [Label](Dispatch::label) and milliseconds of each dispatch, in order, from the timestamps
    /// read back; `period` is [`wgpu::Queue::get_timestamp_period`]. `None` where the timestamps
    /// are fewer than the dispatches need, all zero (as some drivers leave them), or a dispatch
    /// ends before it begins.
    pub fn times(&self, timestamps: &[u64], period: f32) -> Option<Vec<(String, f64)>> {
        times(&self.labels, timestamps, period)
    }
}

fn times(labels: &[String], timestamps: &[u64], period: f32) -> Option<Vec<(String, f64)>> {
    let pairs = timestamps.get(..2 * labels.len())?;
    if labels.is_empty() {
        return Some(vec![]);
    }
    if pairs.iter().all(|&t| t == 0) || !period.is_finite() || period <= 0.0 {
        return None;
    }
    labels
        .iter()
        .zip(pairs.chunks_exact(2))
        .map(|(label, t)| {
            let ticks = t[1].checked_sub(t[0])?;
            Some((label.clone(), ticks as f64 * f64::from(period) / 1e6))
        })
        .collect()
}

impl Gpu {
    /// Runs each dispatch in a pass of its own between GPU timestamps, waits, and gives
    /// [label](Dispatch::label) and milliseconds of each, in order. `None` where the device has no
    /// timestamps or gives none that can be true ([`Profile::times`]; more time in all than passed
    /// on the host). The work has run unless the device has none.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] or [`Error::ReadBack`] where the device is lost or refuses the work.
    pub fn profile<'a>(
        &self,
        dispatches: impl IntoIterator<Item = &'a Dispatch>,
    ) -> Result<Option<Vec<(String, f64)>>> {
        may_block()?;
        let start = Instant::now();
        let mut encoder = self.device.create_command_encoder(&Default::default());
        let Some(profile) = Profile::record(&self.device, &mut encoder, dispatches)? else {
            return Ok(None);
        };
        scoped(&self.device, || {
            self.queue.submit([encoder.finish()]);
        })?;
        let timestamps: Vec<u64> = self.download(profile.timestamps())?;
        let most = start.elapsed().as_secs_f64() * 1e3;
        let times = profile.times(&timestamps, self.queue.get_timestamp_period());
        Ok(times.filter(|times| times.iter().map(|(_, ms)| ms).sum::<f64>() <= most))
    }

    /// Runs each dispatch in a submission of its own and waits for it: [label](Dispatch::label) and
    /// milliseconds on the host's clock, what a submission costs included. For devices without
    /// timestamps.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] where the device is lost or refuses the work.
    pub fn profile_alone<'a>(
        &self,
        dispatches: impl IntoIterator<Item = &'a Dispatch>,
    ) -> Result<Vec<(String, f64)>> {
        may_block()?;
        dispatches
            .into_iter()
            .map(|dispatch| {
                let start = Instant::now();
                self.run(&dispatch.clone().into())?;
                Ok::<_, Error>((dispatch.label(), start.elapsed().as_secs_f64() * 1e3))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_timestamps_are_none() {
        let names = ["a", "b"].map(String::from);
        let both = [("a".to_string(), 2.0), ("b".to_string(), 0.0)];
        assert_eq!(times(&names, &[5, 1_000_005, 7, 7], 2.0), Some(both.to_vec()));
        assert_eq!(times(&names, &[0; 4], 1.0), None);
        assert_eq!(times(&names, &[1, 2, 4, 3], 1.0), None);
        assert_eq!(times(&names, &[1, 2], 1.0), None);
        assert_eq!(times(&names, &[1, 2, 3, 4], 0.0), None);
        assert_eq!(times(&[], &[0, 0], 1.0), Some(vec![]));
    }
}
