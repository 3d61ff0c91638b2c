//! A layer whose experts do not fit the device: they live in host memory or a mapped file, and those that the tokens of a step
//! ask for are brought in, the least recently used leaving.
//!
//! A step of such a layer cannot be recorded in one go, since the host must learn which experts it needs:
//!
//! 1. the router and the plan are recorded and submitted ([`BoundCached::encode_routing`]), and a copy of the step's
//!    [`Stats`], `4 (8 + E)` bytes, to be read back;
//! 2. once they are there, the experts on the device run ([`CachedLayer::run_experts`]) while the missing ones are packed and
//!    uploaded, a few at a time; each few are a round of their own, so a budget smaller than the union of a step works too;
//! 3. the last round combines what all experts made.
//!
//! Every slot is computed once, by the kernels and in the order of a [`MoeLayer`](crate::MoeLayer) with all experts on the device: `out` has
//! the same bits.
//!
//! A [`CachedLayer`] owns its part of the device's memory. Layers run in turn, so one budget for all of them under this rule
//! would throw out each layer's experts before its turn comes again: give each its share.
//!
//! ```no_run
//! use std::sync::Arc;
//! use wgmoe::layer::cached::{CacheOptions, CachedLayer, ExpertSource};
//! use wgmoe::layer::{Batch, Router, LayerConfig};
//! use wgmoe::{Context, Result, Slice, wgpu};
//!
//! fn run(
//!     ctx: &Context,
//!     queue: &wgpu::Queue,
//!     (config, router): (LayerConfig, Router),
//!     experts: Arc<dyn ExpertSource>,
//!     (hidden, out, tokens): (Slice<'_>, Slice<'_>, u32),
//! ) -> Result<()> {
//!     let options = CacheOptions::new(320 << 20);
//!     let mut layer = CachedLayer::new(ctx, queue, config, router, experts, options)?;
//!     let mut step = layer.bind(&Batch::new(hidden, tokens).into_out(out))?;
//!     for _ in 0..32 {
//!         // With an encoder of one's own, what comes before the layer recorded into it too.
//!         let mut encoder = ctx.device().create_command_encoder(&Default::default());
//!         step.encode_routing(&mut encoder);
//!         queue.submit([encoder.finish()]);
//!         layer.run_experts(queue, &mut step)?;
//!         // `out` is there for whatever is submitted from here on.
//!     }
//!     println!("{:?}", layer.cache().stats());
//!     Ok(())
//! }
//! ```
pub use super::cache::{CacheOptions, CacheStats, ExpertCache, ExpertSource};

use super::batch::Batch;
use super::bound::BoundLayer;
use super::config::{LayerConfig, Router};
use super::experts::{ExpertSteps, Experts};
use super::route::MoeRouting;
use super::scratch::Scratch;
use crate::device::guard::{alive, scoped};
use crate::device::wait::{Wait, block_on, signal};
use crate::plan::Stats;
use crate::{BoundOp, Context, Error, Result, Slice};
use std::sync::Arc;

/// A layer with only some of its experts on the device.
#[derive(Debug)]
pub struct CachedLayer {
    ctx: Context,
    routing: MoeRouting,
    experts: Experts,
    cache: ExpertCache,
}

impl CachedLayer {
    /// A layer from config, router and experts. Compiles every kernel it can need (those for f16 and bf16 wait for a `bind` of such slices), makes the pages of the cache, and uploads
    /// the shared experts; submits, and waits where those are many.
    ///
    /// # Errors
    ///
    /// As [`MoeLayer::new`](crate::MoeLayer::new) and [`ExpertWeights::new`](crate::ExpertWeights::new); [`Error::Invalid`] naming `budget` where it holds no routed expert
    /// besides the shared ones; what the source fails with.
    pub fn new(
        ctx: &Context,
        queue: &wgpu::Queue,
        config: LayerConfig,
        router: Router,
        source: Arc<dyn ExpertSource>,
        options: CacheOptions,
    ) -> Result<Self> {
        let routing = MoeRouting::new(ctx, config, router)?;
        let cache = ExpertCache::new(ctx, queue, &config, source, options)?;
        let experts = Experts::new(ctx, config.activation, cache.weights.clone())?;
        Ok(Self { ctx: ctx.clone(), routing, experts, cache })
    }

    /// The config.
    pub fn config(&self) -> &LayerConfig {
        self.routing.config()
    }

    /// The cache.
    pub fn cache(&self) -> &ExpertCache {
        &self.cache
    }

    /// Starts its statistics anew; the experts stay.
    pub fn reset_stats(&mut self) {
        let peak_bytes = self.cache.stats.peak_bytes;
        self.cache.stats = CacheStats { peak_bytes, ..CacheStats::default() };
    }

    /// Makes what is needed to run the layer on these slices, as [`MoeLayer::bind`](crate::MoeLayer::bind); `y [S, D]` takes memory as a whole here.
    /// Steps of one layer may share scratch.
    ///
    /// # Errors
    ///
    /// As [`MoeLayer::bind`](crate::MoeLayer::bind).
    pub fn bind(&self, batch: &Batch<'_>) -> Result<BoundCached> {
        let limited = batch.scratch_limit.is_some();
        Batch::unused("scratch_limit", limited, "a layer under a budget keeps every row of `y`")?;
        let in_out = self.experts.in_out(batch)?;
        let scratch = Scratch::of(batch.scratch, &self.ctx)?;
        let routing = self.routing.bind_of(&batch.with_scratch(&scratch))?;
        let mut round = vec![];
        let mut combine = vec![];
        if let Some((shape, plan)) = routing.plan() {
            let map = 4 * u64::from(shape.all_experts());
            let places = Some(Slice::new(&self.cache.places, 0, map));
            let ExpertSteps { gate_up, down } =
                self.experts.bind((&shape, plan), in_out, &scratch, places)?;
            round = gate_up;
            for (matmuls, combination) in down {
                round.extend(matmuls);
                combine.extend(combination);
            }
        }
        let readback = scoped(self.ctx.device(), || {
            self.ctx.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some("union"),
                size: routing.stats().size,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })?;
        let places = self.cache.places.clone();
        Ok(BoundCached { routing, round, combine, readback, places, union: vec![] })
    }

    /// Records and submits the routing, then runs the experts ([`CachedLayer::run_experts`]). Waits for the routing, and
    /// where uploads are more than [`CacheOptions::staging`], for those; not for the last round. Not for browsers, which
    /// must not block.
    ///
    /// # Errors
    ///
    /// As [`CachedLayer::run_experts`].
    pub fn run(&mut self, queue: &wgpu::Queue, step: &mut BoundCached) -> Result<()> {
        self.submit_routing(queue, step)?;
        self.run_experts(queue, step)
    }

    /// As [`CachedLayer::run`], and never blocks: the device must be polled elsewhere, as browsers do of themselves.
    ///
    /// # Errors
    ///
    /// As [`CachedLayer::run_experts`].
    pub async fn run_async(&mut self, queue: &wgpu::Queue, step: &mut BoundCached) -> Result<()> {
        self.submit_routing(queue, step)?;
        self.run_experts_async(queue, step).await
    }

    /// Runs the experts of a step whose routing, recorded by [`BoundCached::encode_routing`] once, has been submitted: brings
    /// in what the step's last run used and is missing by now, which overlaps with the routing; waits for the routing; and
    /// submits rounds of experts to `queue`, the last of which writes `out`.
    ///
    /// # Errors
    ///
    /// A step of another layer; what the source fails with; [`Error::Device`] where the device is lost or refuses the work.
    /// After an error `out` is not written whole, and the step can be run again from its routing on.
    pub fn run_experts(&mut self, queue: &wgpu::Queue, step: &mut BoundCached) -> Result<()> {
        block_on(self.experts(queue, step, Wait::Poll))
    }

    /// As [`CachedLayer::run_experts`], and never blocks: the device must be polled elsewhere, as browsers do of themselves.
    ///
    /// # Errors
    ///
    /// As [`CachedLayer::run_experts`].
    pub async fn run_experts_async(
        &mut self,
        queue: &wgpu::Queue,
        step: &mut BoundCached,
    ) -> Result<()> {
        self.experts(queue, step, Wait::Await).await
    }

    /// Brings in experts that later steps are expected to use, as far as the cache holds them together. What is there and
    /// not among them leaves, least recently used first. Waits where uploads are more than [`CacheOptions::staging`].
    ///
    /// # Errors
    ///
    /// An expert that is not there; what the source fails with; [`Error::Device`] as for [`CachedLayer::run_experts`].
    pub fn prefetch(&mut self, queue: &wgpu::Queue, experts: &[u32]) -> Result<()> {
        if let Some(expert) = experts.iter().find(|&&e| e >= self.cache.experts) {
            return Err(Error::invalid("experts", format!("{expert} of {}", self.cache.experts)));
        }
        block_on(self.cache.prefetch(queue, experts, Wait::Poll))
    }

    fn submit_routing(&self, queue: &wgpu::Queue, step: &BoundCached) -> Result<()> {
        alive(self.ctx.device())?;
        scoped(self.ctx.device(), || {
            let mut encoder = self.ctx.device().create_command_encoder(&Default::default());
            step.encode_routing(&mut encoder);
            queue.submit([encoder.finish()]);
        })
    }

    async fn experts(
        &mut self,
        queue: &wgpu::Queue,
        step: &mut BoundCached,
        wait: Wait,
    ) -> Result<()> {
        if step.places != self.cache.places {
            return Err(Error::invalid("step", "bound to another layer"));
        }
        if step.round.is_empty() {
            return Ok(());
        }
        let cache = &mut self.cache;
        let device = self.ctx.device().clone();
        alive(&device)?;
        let (done, mapped) = signal();
        step.readback.map_async(wgpu::MapMode::Read, .., done);
        let last = std::mem::take(&mut step.union);
        let prefetched = cache.prefetch(queue, &last, wait).await;
        let read = wait.until(&device, None, mapped).await.and_then(|mapped| {
            mapped.map_err(|e| Error::ReadBack(e.to_string()))?;
            let view = step.readback.get_mapped_range(..);
            let view = view.map_err(|e| Error::ReadBack(e.to_string()))?;
            Stats::from_words(&bytemuck::pod_collect_to_vec::<u8, u32>(&view))
        });
        step.readback.unmap();
        prefetched?;
        let tokens = read?.tokens_per_expert;
        step.union = (0..).zip(tokens).filter(|&(_, n)| n > 0).map(|(e, _)| e).collect();

        let (there, missing): (Vec<u32>, Vec<u32>) =
            step.union.iter().copied().partition(|&e| cache.place_of(e).is_some());
        cache.stats.steps += 1;
        cache.stats.hits += there.len() as u64;
        cache.stats.misses += missing.len() as u64;
        for &expert in &there {
            if let Some(place) = cache.place_of(expert) {
                cache.touch(place);
            }
        }
        let batches: Vec<&[u32]> = missing.chunks(cache.batch.min(cache.held.len())).collect();
        if !there.is_empty() || cache.shared_experts > 0 || batches.is_empty() {
            step.submit_round(&device, cache, queue, &there, true, batches.is_empty())?;
        }
        for (i, &batch) in batches.iter().enumerate() {
            cache.uploader.settle(1, wait).await?;
            for &expert in batch {
                cache.bring(queue, expert, &[])?;
                cache.stats.miss_bytes += cache.expert_bytes();
            }
            let last = i + 1 == batches.len();
            let submission = step.submit_round(&device, cache, queue, batch, false, last)?;
            cache.uploader.submitted(queue, submission);
        }
        Ok(())
    }
}

/// A [`CachedLayer`] bound to a batch. It remembers which experts its last run used: bind one step for each sequence or block
/// that is decoded, and let it run on all of its denoising steps.
#[derive(Debug)]
pub struct BoundCached {
    routing: BoundLayer,
    /// The matmuls over the pages, for the experts that the places name.
    round: Vec<BoundOp>,
    combine: Vec<BoundOp>,
    readback: wgpu::Buffer,
    places: wgpu::Buffer,
    union: Vec<u32>,
}

impl BoundCached {
    /// Records the routing, and the copy that [`CachedLayer::run_experts`] reads. To be recorded once and submitted before each
    /// call of that.
    pub fn encode_routing(&self, encoder: &mut wgpu::CommandEncoder) {
        self.routing.encode(encoder);
        if !self.round.is_empty() {
            let stats = self.routing.stats();
            let (from, to) = (stats.buffer, &self.readback);
            encoder.copy_buffer_to_buffer(from, stats.offset, to, 0, stats.size);
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

    /// Submits the matmuls of these experts, with the shared ones and the combination where asked.
    fn submit_round(
        &self,
        device: &wgpu::Device,
        cache: &mut ExpertCache,
        queue: &wgpu::Queue,
        experts: &[u32],
        shared: bool,
        last: bool,
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
        scoped(device, || {
            queue.write_buffer(&cache.places, 0, bytemuck::cast_slice(&places));
            let mut encoder = device.create_command_encoder(&Default::default());
            let descriptor =
                wgpu::ComputePassDescriptor { label: Some("experts"), ..Default::default() };
            let mut pass = encoder.begin_compute_pass(&descriptor);
            for part in self.round.iter().chain(self.combine.iter().filter(|_| last)) {
                part.record(&mut pass);
            }
            drop(pass);
            queue.submit([encoder.finish()])
        })
    }
}
