//! Uploads of any size through a bounded amount of memory.
use super::{ExpertWeights, HostWeights, Projection};
use crate::Result;
use crate::device::guard::scoped;
use crate::device::wait::{Submitted, Wait, block_on};
#[cfg(feature = "checkpoint")]
use crate::error::bytes_of;
#[cfg(feature = "checkpoint")]
use crate::{Context, device::Tensor};
use std::collections::VecDeque;

/// Most bytes written at a time: many panels, so that threads can share them.
const PIECE: u64 = 8 << 20;

/// Bytes after which what has been written is submitted; the device copies it while more is packed.
#[cfg(feature = "checkpoint")]
const BATCH: u64 = 16 << 20;
/// Submissions of whole files that may be under way.
const UNDER_WAY: usize = 2;

/// Uploads to one queue: the path by which many weights reach the device.
///
/// wgpu keeps what is written until the next submission has run, however much it is. So what is
/// written is submitted in batches, and a new one waits while too many are under way. Memory in use:
/// those, the batch that is being filled, and its last piece.
pub(crate) struct Uploader {
    device: wgpu::Device,
    /// Bytes after which it submits and waits of itself; `u64::MAX`: its owner flushes and settles.
    batch: u64,
    /// Bytes written since the last submission.
    written: u64,
    under_way: VecDeque<Submitted>,
}

impl Uploader {
    /// Whose owner calls [`Uploader::flush`] and [`Uploader::settle`] after each few matrices.
    pub(crate) fn new(device: &wgpu::Device) -> Self {
        Self { device: device.clone(), batch: u64::MAX, written: 0, under_way: VecDeque::new() }
    }

    /// For whole files: submits and waits of itself.
    #[cfg(feature = "checkpoint")]
    pub(crate) fn of_files(device: &wgpu::Device) -> Self {
        Self { batch: BATCH, ..Self::new(device) }
    }

    /// One matrix of one expert, as [`ExpertWeights::write`].
    pub(crate) fn matrix(
        &mut self,
        queue: &wgpu::Queue,
        to: &ExpertWeights,
        expert: u32,
        projection: Projection,
        weights: HostWeights<'_>,
    ) -> Result<()> {
        for part in to.parts(expert, projection, weights)? {
            let step = (PIECE as usize / part.unit_bytes()).max(1);
            for start in (0..part.units()).step_by(step) {
                let units = start..(start + step).min(part.units());
                let bytes = (units.len() * part.unit_bytes()) as u64;
                scoped(&self.device, || part.write(queue, units))??;
                self.wrote(queue, bytes)?;
            }
        }
        Ok(())
    }

    /// A tensor of f32.
    #[cfg(feature = "checkpoint")]
    pub(crate) fn floats(
        &mut self,
        ctx: &Context,
        queue: &wgpu::Queue,
        name: &'static str,
        values: HostWeights<'_>,
    ) -> Result<Tensor> {
        let size = bytes_of(name, &[values.len() as u64], 4)?;
        let buffer = ctx.scratch(name, size)?;
        let step = (PIECE / 4) as usize;
        for start in (0..values.len()).step_by(step) {
            let end = (start + step).min(values.len());
            let floats: Vec<f32> = (start..end).map(|i| values.get(i)).collect();
            queue.write_buffer(&buffer, start as u64 * 4, bytemuck::cast_slice(&floats));
            self.wrote(queue, (floats.len() * 4) as u64)?;
        }
        Ok(Tensor { buffer, offset: 0, size })
    }

    fn wrote(&mut self, queue: &wgpu::Queue, bytes: u64) -> Result<()> {
        self.written += bytes;
        if self.written < self.batch {
            return Ok(());
        }
        self.flush(queue)?;
        block_on(self.settle(UNDER_WAY, Wait::Poll))
    }

    /// Sends what has been written on its way.
    pub(crate) fn flush(&mut self, queue: &wgpu::Queue) -> Result<()> {
        let submission = scoped(&self.device, || queue.submit([]))?;
        self.submitted(queue, submission);
        Ok(())
    }

    /// Counts a submission of somebody else's as one with uploads.
    pub(crate) fn submitted(&mut self, queue: &wgpu::Queue, submission: wgpu::SubmissionIndex) {
        self.written = 0;
        self.under_way.push_back(Submitted::new(queue, submission));
    }

    /// Waits until no more than `most` submissions are under way.
    pub(crate) async fn settle(&mut self, most: usize, wait: Wait) -> Result<()> {
        while self.under_way.len() > most {
            if let Some(submitted) = self.under_way.front_mut() {
                submitted.finish(&self.device, wait).await?;
            }
            self.under_way.pop_front();
        }
        Ok(())
    }

    /// Submits what is left, and waits for all of it.
    #[cfg(feature = "checkpoint")]
    pub(crate) fn finish(mut self, queue: &wgpu::Queue) -> Result<()> {
        self.flush(queue)?;
        block_on(self.settle(0, Wait::Poll))
    }
}
