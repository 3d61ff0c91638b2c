//! Uploads of any size through a bounded amount of memory.
use crate::error::bytes_of;
use crate::layer::Tensor;
use crate::weights::pack::UNIT;
use crate::weights::{ExpertWeights, HostWeights, Projection};
use crate::{Context, Error, Result};
use std::collections::VecDeque;

/// Most bytes written at a time: many panels, so that threads can share them.
const PIECE: u64 = 8 << 20;
/// Bytes after which what has been written is submitted; the device copies it while more is packed.
const BATCH: u64 = 16 << 20;
/// Submissions that may be under way. Memory in use: these, a batch that is being filled, and its last piece.
const UNDER_WAY: usize = 2;

/// Uploads to one queue. wgpu keeps what is written until the next submission has run, however much it is: this submits in
/// between, and waits where too much is under way.
pub(crate) struct Uploader<'a> {
    ctx: &'a Context,
    queue: &'a wgpu::Queue,
    /// Bytes written since the last submission.
    written: u64,
    under_way: VecDeque<wgpu::SubmissionIndex>,
}

impl<'a> Uploader<'a> {
    pub(crate) fn new(ctx: &'a Context, queue: &'a wgpu::Queue) -> Self {
        Self { ctx, queue, written: 0, under_way: VecDeque::new() }
    }

    /// One matrix of one expert, as [`ExpertWeights::write`].
    pub(crate) fn matrix(
        &mut self,
        to: &ExpertWeights,
        expert: u32,
        projection: Projection,
        weights: HostWeights<'_>,
    ) -> Result<()> {
        let step = PIECE as usize / UNIT;
        for part in to.parts(expert, projection, weights)? {
            for start in (0..part.units()).step_by(step) {
                let units = start..(start + step).min(part.units());
                let bytes = (units.len() * UNIT) as u64;
                part.write(self.queue, units)?;
                self.wrote(bytes)?;
            }
        }
        Ok(())
    }

    /// A tensor of f32.
    pub(crate) fn floats(&mut self, name: &'static str, values: HostWeights<'_>) -> Result<Tensor> {
        let size = bytes_of(name, &[values.len() as u64], 4)?;
        let buffer = self.ctx.scratch(name, size)?;
        let step = (PIECE / 4) as usize;
        for start in (0..values.len()).step_by(step) {
            let end = (start + step).min(values.len());
            let floats: Vec<f32> = (start..end).map(|i| values.get(i)).collect();
            self.queue.write_buffer(&buffer, start as u64 * 4, bytemuck::cast_slice(&floats));
            self.wrote((floats.len() * 4) as u64)?;
        }
        Ok(Tensor::of_buffer(buffer, size))
    }

    fn wrote(&mut self, bytes: u64) -> Result<()> {
        self.written += bytes;
        if self.written < BATCH {
            return Ok(());
        }
        self.written = 0;
        self.under_way.push_back(self.queue.submit([]));
        while self.under_way.len() > UNDER_WAY {
            let submission_index = self.under_way.pop_front();
            self.wait(wgpu::PollType::Wait { submission_index, timeout: None })?;
        }
        Ok(())
    }

    /// Submits what is left, and waits for all of it.
    pub(crate) fn finish(self) -> Result<()> {
        self.queue.submit([]);
        self.wait(wgpu::PollType::wait_indefinitely())?;
        crate::device::guard::alive(self.ctx.device())
    }

    fn wait(&self, poll: wgpu::PollType) -> Result<()> {
        self.ctx.device().poll(poll).map(|_| ()).map_err(|e| Error::Device(e.to_string()))
    }
}
