//! A step of a cached layer: its routing, what is read of it, and rounds of experts.
use super::super::bound::BoundLayer;
use super::cache::ExpertCache;
use super::on_host::{self, Expert, HostStep, Rows};
use crate::device::guard::scoped;
use crate::device::wait::{Wait, signal};
use crate::plan::Stats;
use crate::routing::Activation;
use crate::{BoundOp, Error, Result};
use std::pin::Pin;

/// A [`CachedLayer`](super::CachedLayer) bound to a batch. It remembers which experts its last run used: bind one step for each sequence or block
/// that is decoded, and let it run on all of its denoising steps.
#[derive(Debug)]
pub struct BoundCached {
    pub(super) routing: BoundLayer,
    /// The matmuls over the pages, for the experts that the places name.
    pub(super) round: Vec<BoundOp>,
    pub(super) combine: Vec<BoundOp>,
    pub(super) stats_back: wgpu::Buffer,
    pub(super) places: wgpu::Buffer,
    pub(super) union: Vec<u32>,
    /// Where the host computes experts.
    pub(super) host: Option<HostStep>,
}

impl BoundCached {
    /// Records the routing, and the copies that [`CachedLayer::run_experts`](super::CachedLayer::run_experts) reads. To be recorded once and submitted before each
    /// call of that.
    pub fn encode_routing(&self, encoder: &mut wgpu::CommandEncoder) {
        self.routing.encode(encoder);
        if !self.round.is_empty() {
            let stats = self.routing.stats();
            let (from, to) = (stats.buffer, &self.stats_back);
            encoder.copy_buffer_to_buffer(from, stats.offset, to, 0, stats.size);
            if let Some(host) = &self.host {
                host.encode_copies(encoder);
            }
        }
    }

    /// The routing: plan, bit set, gates, statistics. Its own recording is the routing alone.
    pub fn routing(&self) -> &BoundLayer {
        &self.routing
    }

    /// Routed experts that the last run used, ascending.
    pub fn union(&self) -> &[u32] {
        &self.union
    }

    /// Asks for what the routing made.
    pub(super) fn start_reading(&self) -> Reading<'_> {
        let mut buffers = vec![&self.stats_back];
        if let Some(host) = &self.host {
            buffers.extend([&host.hidden_back, &host.plan_back]);
        }
        let mapped = buffers.iter().map(|buffer| {
            let (done, mapped) = signal();
            buffer.map_async(wgpu::MapMode::Read, .., done);
            Box::pin(mapped) as Mapped
        });
        let mapped = mapped.collect();
        Reading { step: self, buffers, mapped }
    }
}

type Mapped =
    Pin<Box<dyn Future<Output = std::result::Result<(), wgpu::BufferAsyncError>> + Send + Sync>>;

/// Buffers that are being read: free for the device again when this goes, also where the caller gives up
/// halfway.
pub(super) struct Reading<'a> {
    step: &'a BoundCached,
    buffers: Vec<&'a wgpu::Buffer>,
    mapped: Vec<Mapped>,
}

/// What the routing of a step made.
pub(super) struct Choice {
    /// Tokens of each routed expert.
    pub(super) tokens: Vec<u32>,
    /// For experts on the host.
    pub(super) rows: Option<Rows>,
}

impl Reading<'_> {
    /// Waits for it.
    pub(super) async fn finish(mut self, device: &wgpu::Device, wait: Wait) -> Result<Choice> {
        for mapped in std::mem::take(&mut self.mapped) {
            let mapped = wait.until(device, None, mapped).await?;
            mapped.map_err(|e| Error::ReadBack(e.to_string()))?;
        }
        let view = self.step.stats_back.get_mapped_range(..);
        let view = view.map_err(|e| Error::ReadBack(e.to_string()))?;
        let stats = Stats::from_words(&bytemuck::pod_collect_to_vec::<u8, u32>(&view))?;
        drop(view);
        let rows = self.step.host.as_ref().map(HostStep::read).transpose()?;
        Ok(Choice { tokens: stats.tokens_per_expert, rows })
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        self.buffers.iter().for_each(|buffer| buffer.unmap());
    }
}

/// The rounds of a run. The last one combines what all experts made.
pub(super) struct Run<'a> {
    pub(super) step: &'a BoundCached,
    pub(super) device: &'a wgpu::Device,
    pub(super) queue: &'a wgpu::Queue,
    /// Experts that are to come in rounds of their own.
    pub(super) left: usize,
    /// Whether the host has experts to compute.
    pub(super) on_host: bool,
}

impl Run<'_> {
    /// Submits the matmuls of experts that were there from the start, with the shared ones.
    pub(super) fn start(&mut self, cache: &mut ExpertCache, there: &[u32]) -> Result<()> {
        self.submit(cache, there, true).map(drop)
    }

    /// Submits the matmuls of experts that have been brought in.
    pub(super) fn round(&mut self, cache: &mut ExpertCache, experts: &[u32]) -> Result<()> {
        self.left -= experts.len();
        let submission = self.submit(cache, experts, false)?;
        cache.uploader.submitted(self.queue, submission);
        Ok(())
    }

    /// Computes experts here, and combines.
    pub(super) fn host(
        &mut self,
        cache: &mut ExpertCache,
        activation: Activation,
        (experts, rows): (&[u32], &Rows),
    ) -> Result<()> {
        let Some(host) = &self.step.host else { return Ok(()) };
        let work = experts.iter().map(|&e| cache.for_host(e, host.rows(rows, e)));
        let work: Vec<Expert<'_>> = work.collect::<Result<_>>()?;
        let y = on_host::compute(&work, activation);
        for (&expert, y) in experts.iter().zip(&y) {
            host.write(self.queue, rows, expert, y);
        }
        self.on_host = false;
        scoped(self.device, || self.record(&[&self.step.combine])).map(drop)
    }

    fn submit(
        &self,
        cache: &mut ExpertCache,
        experts: &[u32],
        shared: bool,
    ) -> Result<wgpu::SubmissionIndex> {
        let mut places = vec![u32::MAX; (cache.experts + cache.shared_experts) as usize];
        for &expert in experts {
            places[expert as usize] = cache.place_of(expert).map_or(u32::MAX, |p| p as u32);
        }
        if shared {
            for i in 0..cache.shared_experts {
                places[(cache.experts + i) as usize] = cache.held.len() as u32 + i;
            }
        }
        cache.stats.rounds += 1;
        let last = self.left == 0 && !self.on_host;
        let combine = if last { &self.step.combine[..] } else { &[] };
        scoped(self.device, || {
            self.queue.write_buffer(&cache.places, 0, bytemuck::cast_slice(&places));
            self.record(&[&self.step.round, combine])
        })
    }

    fn record(&self, parts: &[&[BoundOp]]) -> wgpu::SubmissionIndex {
        let mut encoder = self.device.create_command_encoder(&Default::default());
        let descriptor =
            wgpu::ComputePassDescriptor { label: Some("experts"), ..Default::default() };
        let mut pass = encoder.begin_compute_pass(&descriptor);
        for part in parts.iter().copied().flatten() {
            part.record(&mut pass);
        }
        drop(pass);
        self.queue.submit([encoder.finish()])
    }
}
