//! A layer whose experts do not fit the device: they live in host memory or a mapped file, and those that the tokens of a step
//! ask for are brought in. Which leave for them is a [`CachePolicy`].
//!
//! A step of such a layer cannot be recorded in one go, since the host must learn which experts it needs:
//!
//! 1. the router and the plan are recorded and submitted ([`BoundCached::encode_routing`]), and a copy of the step's
//!    [`Stats`](crate::plan::Stats), `4 (8 + E)` bytes, to be read back;
//! 2. once they are there, the experts on the device run ([`CachedLayer::run_experts`]) while the missing ones are packed and
//!    uploaded, a few at a time; each few are a round of their own, so a budget smaller than the union of a step works too;
//! 3. the last round combines what all experts made.
//!
//! Every slot is computed once, by the kernels and in the order of a [`MoeLayer`](crate::MoeLayer) with all experts on the device: `out` has
//! the same bits, but where the host computes experts ([`MissesOnHost`]).
//!
//! A [`CachedLayer`] owns its part of the device's memory; a [`CachedModel`] shares one budget out among layers.
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
mod cache;
mod model;
mod on_host;
mod options;
mod policy;
mod step;

pub use cache::{ExpertCache, ExpertSource};
pub use model::{CachedModel, ModelLayer};
pub use on_host::MissesOnHost;
pub use options::{CacheOptions, CacheStats};
pub use policy::CachePolicy;
pub use step::BoundCached;

use super::batch::Batch;
use super::config::{LayerConfig, Router};
use super::experts::{ExpertSteps, Experts};
use super::route::MoeRouting;
use super::scratch::Scratch;
use crate::device::guard::{alive, scoped};
use crate::device::wait::{Wait, block_on};
use crate::{Context, Error, Result, Slice};
use on_host::HostStep;
use std::sync::Arc;
use step::Run;

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
    /// besides the shared ones, or fewer than are pinned and must be free for others; `pinned` for experts that
    /// are not there or stand twice; `steps` or `passing` for 0 of a [`CachePolicy::Interval`]; `host` where this
    /// build cannot compute experts ([`MissesOnHost`]); what the source fails with.
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
    /// As [`MoeLayer::bind`](crate::MoeLayer::bind); [`Error::Invalid`] for a limit of scratch, for statistics
    /// that are added up, and, where the host may compute experts, for a buffer of `hidden` without
    /// `COPY_SRC`.
    pub fn bind(&self, batch: &Batch<'_>) -> Result<BoundCached> {
        let added = "its sums say no more which experts a step uses: `Batch::with_stats`";
        Batch::unused("stats", batch.add_stats, added)?;
        let limited = batch.scratch_limit.is_some();
        Batch::unused("scratch_limit", limited, "a layer under a budget keeps every row of `y`")?;
        let in_out = self.experts.in_out(batch)?;
        let scratch = Scratch::of(batch.scratch, &self.ctx)?;
        let routing = self.routing.bind_of(&batch.with_scratch(&scratch))?;
        let mut round = vec![];
        let (mut combine, mut host) = (vec![], None);
        if let Some((shape, plan)) = routing.plan() {
            let map = 4 * u64::from(shape.all_experts());
            let places = Some(Slice::new(&self.cache.places, 0, map));
            let ExpertSteps { gate_up, down, y } =
                self.experts.bind((&shape, plan), in_out, &scratch, places)?;
            if self.cache.may_be_on_host() {
                let plan = (plan, shape.sections()?, shape.all_experts());
                host = Some(HostStep::new(&self.ctx, batch, plan, y, self.config().hidden)?);
            }
            round = gate_up;
            for (matmuls, combination) in down {
                round.extend(matmuls);
                combine.extend(combination);
            }
        }
        let stats_back = scoped(self.ctx.device(), || {
            self.ctx.device().create_buffer(&wgpu::BufferDescriptor {
                label: Some("union"),
                size: routing.stats().size,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })?;
        let places = self.cache.places.clone();
        Ok(BoundCached {
            routing,
            round,
            combine,
            stats_back,
            places,
            union: vec![],
            expected: vec![],
            host,
        })
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
    /// The future may be dropped at any await: `out` is then not written whole, and the step can be run
    /// again from its routing on.
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
    /// not among them leaves, least recently used first. Under [`CachePolicy::Interval`] nothing is brought in
    /// ahead. Waits where uploads are more than [`CacheOptions::staging`].
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

    /// Brings in what the last run of a step used, as far as the cache holds it: to be called while the
    /// layer before computes. [`CachedLayer::run_experts`] does it too, so this is for an engine that is
    /// not ready to submit the step's routing yet. Nothing under [`CachePolicy::Interval`].
    ///
    /// # Errors
    ///
    /// As [`CachedLayer::prefetch`].
    pub fn prefetch_for(&mut self, queue: &wgpu::Queue, step: &BoundCached) -> Result<()> {
        self.prefetch(queue, &step.expected)
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
        let device = self.ctx.device().clone();
        alive(&device)?;
        let cache = &mut self.cache;
        let mut reading = step.start_reading();
        let prefetched = cache.prefetch(queue, &step.expected, wait).await;
        let tokens = reading.tokens(&device, wait).await;
        prefetched?;
        let tokens = tokens?;
        let union: Vec<u32> = (0..).zip(&tokens).filter(|&(_, &n)| n > 0).map(|(e, _)| e).collect();

        let (there, missing): (Vec<u32>, Vec<u32>) =
            union.iter().copied().partition(|&e| cache.place_of(e).is_some());
        cache.touch_all(&there);
        let changes = cache.changes(&tokens);
        let comes = |e: &u32| changes.iter().any(|(_, new)| new == e);
        let (coming, mut others): (Vec<u32>, Vec<u32>) = missing.iter().partition(|e| comes(e));
        let on_host = cache.take_for_host(&mut others, &tokens);
        let rows = if on_host.is_empty() { None } else { reading.rows()? };
        drop(reading);
        let (left, waits) = (coming.len() + others.len(), !on_host.is_empty());
        let mut run = Run { step, device: &device, queue, left, on_host: waits };
        if !there.is_empty() || cache.shared_experts > 0 || (left == 0 && !waits) {
            run.start(cache, &there)?;
        }
        // The places of those that leave were read by the round before.
        for batch in changes.chunks(cache.batch) {
            cache.uploader.settle(1, wait).await?;
            let asked = cache.change(queue, batch, &coming)?;
            if asked.is_empty() {
                cache.uploader.flush(queue)?;
            } else {
                run.round(cache, &asked)?;
            }
        }
        for batch in others.chunks(cache.round()) {
            cache.bring_all(queue, batch, wait).await?;
            run.round(cache, batch)?;
        }
        if let Some(rows) = rows {
            let began = cache.clock();
            run.host(cache, self.experts.activation, (&on_host, &rows))?;
            cache.note_computed(&on_host, &tokens, began);
        }
        cache.end_of_step(&tokens, there.len(), missing.len());
        step.expected = union.iter().copied().filter(|e| !on_host.contains(e)).collect();
        step.union = union;
        Ok(())
    }
}
