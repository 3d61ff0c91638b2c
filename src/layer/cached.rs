//! A layer whose experts do not fit the device: they live in host memory or a mapped file, and those that the tokens of a step
//! ask for are brought in, the least recently used leaving.
//!
//! A step of such a layer cannot be recorded in one go, since the host must learn which experts it needs:
//!
//! 1. the router and the plan are recorded and submitted ([`BoundCached::record_routing`]), and a copy of the step's
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
//!     (settings, router): (LayerConfig, Router),
//!     experts: Arc<dyn ExpertSource>,
//!     (hidden, out, tokens): (Slice<'_>, Slice<'_>, u32),
//! ) -> Result<()> {
//!     let options = CacheOptions::new(320 << 20);
//!     let mut layer = CachedLayer::new(ctx, queue, settings, router, experts, options)?;
//!     let mut step = layer.bind(&Batch::new(hidden, out, tokens))?;
//!     for _ in 0..32 {
//!         // With an encoder of one's own, what comes before the layer recorded into it too.
//!         let mut encoder = ctx.device().create_command_encoder(&Default::default());
//!         step.record_routing(&mut encoder);
//!         queue.submit([encoder.finish()]);
//!         layer.run_experts(queue, &mut step)?;
//!         // `out` is there for whatever is submitted from here on.
//!     }
//!     println!("{:?}", layer.cache().stats());
//!     Ok(())
//! }
//! ```
use crate::device::guard::{alive, scoped};
use crate::layer::{Batch, ExpertParts, Ffn, BoundLayer, MoeRouting, Router, Scratch, LayerConfig};
use crate::plan::Stats;
use crate::weights::{HostWeights, Projection};
use crate::{Context, Error, ExpertWeights, Result, Slice, BoundOp, WeightType};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

/// Where the matrices of a layer's experts come from. Asked again whenever an expert is brought in.
pub trait ExpertSource: Send + Sync {
    /// One matrix of one expert, `[out, in]`; shared experts follow the routed ones.
    ///
    /// # Errors
    ///
    /// Whatever kept the source from having it; the step that asked fails with it.
    fn matrix(&self, expert: u32, projection: Projection) -> Result<HostWeights<'_>>;
}

/// A layer's experts where they lie in a mapped checkpoint.
#[cfg(feature = "checkpoint")]
#[derive(Clone, Debug)]
pub struct CheckpointExperts {
    /// The checkpoint.
    pub checkpoint: Arc<crate::checkpoint::Checkpoint>,
    /// Number of the layer.
    pub layer: u32,
}

#[cfg(feature = "checkpoint")]
impl ExpertSource for CheckpointExperts {
    fn matrix(&self, expert: u32, projection: Projection) -> Result<HostWeights<'_>> {
        self.checkpoint.expert(self.layer, expert, projection)
    }
}

/// How much memory a [`CachedLayer`] takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    /// Most bytes of the cache on the device: the pages of experts, shared ones included, and a word for each expert.
    /// Router, scratch, and what wgpu holds of uploads under way are not in it.
    pub budget: u64,
    /// Most bytes of uploads under way at once, in whole experts, two at least. wgpu holds as many in memory that the
    /// host writes.
    pub staging: u64,
    /// What experts are stored as on the device.
    pub weight_type: WeightType,
    /// Bytes that a page may have at most; the device's limit where absent.
    pub page_limit: Option<u64>,
}

impl CacheOptions {
    /// bf16, and 64 MiB of uploads at once.
    pub const fn new(budget: u64) -> Self {
        Self { budget, staging: 64 << 20, weight_type: WeightType::Bf16, page_limit: None }
    }
}

/// What a cache did since it was made, or since [`CachedLayer::reset_stats`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Steps run.
    pub steps: u64,
    /// Routed experts that steps asked for and found, those prefetched included.
    pub hits: u64,
    /// Routed experts that steps asked for and waited for.
    pub misses: u64,
    /// Routed experts brought in ahead of a step.
    pub prefetched: u64,
    /// Bytes uploaded for misses.
    pub miss_bytes: u64,
    /// Bytes uploaded ahead of steps.
    pub prefetch_bytes: u64,
    /// Submissions that ran experts: one a step where nothing is missing.
    pub rounds: u64,
    /// Most bytes of the cache that held experts at once.
    pub peak_bytes: u64,
}

impl CacheStats {
    /// Share of the experts asked for that were there; 1 where none was.
    pub fn hit_rate(&self) -> f64 {
        let all = self.hits + self.misses;
        if all == 0 { 1.0 } else { self.hits as f64 / all as f64 }
    }

    /// Bytes uploaded for steps and ahead of them.
    pub fn bytes(&self) -> u64 {
        self.miss_bytes + self.prefetch_bytes
    }
}

/// The experts of a layer that are on the device, and where the others come from.
pub struct ExpertCache {
    device: wgpu::Device,
    source: Arc<dyn ExpertSource>,
    /// Places for routed experts, then the shared experts.
    weights: ExpertWeights,
    /// Place of each expert in the round under way, shared ones included; `u32::MAX`: none.
    places: wgpu::Buffer,
    experts: u32,
    shared_experts: u32,
    /// The expert that each place holds, and when it was last used.
    held: Vec<(Option<u32>, u64)>,
    clock: u64,
    /// Experts whose uploads may be under way at once, halved: one half is packed while the other is on its way.
    batch: usize,
    under_way: VecDeque<Done>,
    stats: CacheStats,
}

impl ExpertCache {
    fn new(
        ctx: &Context,
        queue: &wgpu::Queue,
        settings: &LayerConfig,
        source: Arc<dyn ExpertSource>,
        options: CacheOptions,
    ) -> Result<Self> {
        let LayerConfig { experts, shared_experts, .. } = *settings;
        let shape = settings.expert_shape(options.weight_type);
        shape.check()?;
        let (each, map) = (shape.device_bytes(), 4 * u64::from(shape.experts));
        let fixed = each.saturating_mul(shared_experts.into()).saturating_add(map);
        let places = options.budget.saturating_sub(fixed) / each.max(1);
        let places = u32::try_from(places).unwrap_or(u32::MAX).min(experts);
        if places == 0 {
            let need = fixed.saturating_add(each);
            let reason = format!(
                "{} bytes; one expert and {shared_experts} shared ones take {need}",
                options.budget
            );
            return Err(Error::invalid("budget", reason));
        }
        let held = crate::weights::ExpertShape { experts: places + shared_experts, ..shape };
        let weights = ExpertWeights::new(ctx, held, options.page_limit)?;
        let mut cache = Self {
            device: ctx.device().clone(),
            source,
            weights,
            places: ctx.scratch("places", map)?,
            experts,
            shared_experts,
            held: vec![(None, 0); places as usize],
            clock: 0,
            batch: usize::try_from(options.staging / 2 / each).unwrap_or(usize::MAX).max(1),
            under_way: VecDeque::new(),
            stats: CacheStats::default(),
        };
        for i in 0..shared_experts {
            cache.upload(queue, experts + i, places + i)?;
            cache.flush(queue)?;
            // Browsers have no way to wait here.
            if !cfg!(target_family = "wasm") {
                pollster::block_on(cache.settle(1, Wait::Poll))?;
            }
        }
        cache.stats.peak_bytes = fixed;
        Ok(cache)
    }

    /// Routed experts that fit at once.
    pub fn capacity(&self) -> usize {
        self.held.len()
    }

    /// Routed experts on the device, the least recently used first.
    pub fn resident(&self) -> Vec<u32> {
        let mut held: Vec<(u64, u32)> =
            self.held.iter().filter_map(|&(e, used)| e.map(|e| (used, e))).collect();
        held.sort_unstable();
        held.into_iter().map(|(_, e)| e).collect()
    }

    /// Bytes of the cache on the device, those of empty places included; never more than the budget.
    pub fn device_bytes(&self) -> u64 {
        self.weights.bytes() + 4 * u64::from(self.experts + self.shared_experts)
    }

    /// Bytes of one expert on the device.
    pub fn expert_bytes(&self) -> u64 {
        self.weights.shape().device_bytes()
    }

    /// What it did.
    pub fn stats(&self) -> CacheStats {
        self.stats
    }

    fn place_of(&self, expert: u32) -> Option<usize> {
        self.held.iter().position(|&(held, _)| held == Some(expert))
    }

    fn touch(&mut self, place: usize) {
        self.clock += 1;
        self.held[place].1 = self.clock;
    }

    /// Packs and uploads one expert; it is on its way with the next submission.
    fn upload(&self, queue: &wgpu::Queue, expert: u32, place: u32) -> Result<()> {
        for projection in Projection::ALL {
            let matrix = self.source.matrix(expert, projection)?;
            scoped(&self.device, || self.weights.write(queue, place, projection, matrix))??;
        }
        Ok(())
    }

    /// Brings in an expert, in the place of the least recently used one that `keep` does not list; whether there is one.
    fn bring(&mut self, queue: &wgpu::Queue, expert: u32, keep: &[u32]) -> Result<bool> {
        let kept = |held: Option<u32>| held.is_some_and(|e| keep.contains(&e));
        let places = self.held.iter().enumerate().filter(|(_, (held, _))| !kept(*held));
        let Some(place) = places.min_by_key(|(_, (_, used))| *used).map(|(place, _)| place) else {
            return Ok(false);
        };
        self.held[place] = (None, 0); // and so it stays where the source fails halfway
        self.upload(queue, expert, place as u32)?;
        self.held[place].0 = Some(expert);
        self.touch(place);
        let used = self.held.iter().filter(|(held, _)| held.is_some()).count() as u64;
        let fixed = self.device_bytes() - self.held.len() as u64 * self.expert_bytes();
        self.stats.peak_bytes = self.stats.peak_bytes.max(fixed + used * self.expert_bytes());
        Ok(true)
    }

    /// Brings in those of `experts` that are missing, in order, as far as there are places that hold none of them.
    async fn prefetch(&mut self, queue: &wgpu::Queue, experts: &[u32], wait: Wait) -> Result<()> {
        let missing: Vec<u32> =
            experts.iter().copied().filter(|&e| self.place_of(e).is_none()).collect();
        for batch in missing.chunks(self.batch) {
            self.settle(1, wait).await?;
            for &expert in batch {
                if !self.bring(queue, expert, experts)? {
                    return self.flush(queue);
                }
                self.stats.prefetched += 1;
                self.stats.prefetch_bytes += self.expert_bytes();
            }
            self.flush(queue)?;
        }
        Ok(())
    }

    /// Sends uploads on their way.
    fn flush(&mut self, queue: &wgpu::Queue) -> Result<()> {
        let submission = scoped(&self.device, || queue.submit([]))?;
        self.under_way.push_back(Done::of(queue, submission));
        Ok(())
    }

    /// Waits until no more than `most` submissions with uploads are under way.
    async fn settle(&mut self, most: usize, wait: Wait) -> Result<()> {
        while self.under_way.len() > most {
            if let Some(done) = self.under_way.pop_front() {
                wait.until(&self.device, Some(done.submission), done.future).await?;
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for ExpertCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExpertCache")
            .field("capacity", &self.capacity())
            .field("resident", &self.resident())
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}

/// A layer with only some of its experts on the device.
#[derive(Debug)]
pub struct CachedLayer {
    ctx: Context,
    routing: MoeRouting,
    ffn: Ffn,
    cache: ExpertCache,
}

impl CachedLayer {
    /// A layer from settings, router and experts. Compiles every kernel it can need, makes the pages of the cache, and uploads
    /// the shared experts; submits, and waits where those are many.
    ///
    /// # Errors
    ///
    /// As [`MoeLayer::new`](crate::MoeLayer::new) and [`ExpertWeights::new`]; [`Error::Invalid`] naming `budget` where it holds no routed expert
    /// besides the shared ones; what the source fails with.
    pub fn new(
        ctx: &Context,
        queue: &wgpu::Queue,
        settings: LayerConfig,
        router: Router,
        source: Arc<dyn ExpertSource>,
        options: CacheOptions,
    ) -> Result<Self> {
        let routing = MoeRouting::new(ctx, settings, router)?;
        let cache = ExpertCache::new(ctx, queue, &settings, source, options)?;
        let ffn = Ffn::new(ctx, settings.activation, cache.weights.clone())?;
        Ok(Self { ctx: ctx.clone(), routing, ffn, cache })
    }

    /// The settings.
    pub fn settings(&self) -> &LayerConfig {
        self.routing.settings()
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
        let Batch { hidden, out, tokens, add, .. } = *batch;
        self.ffn.check(hidden, out, tokens)?;
        let own = Scratch::new();
        let scratch = batch.scratch.unwrap_or(&own);
        let routing = self.routing.bind(&batch.routing(scratch))?;
        let mut round = vec![];
        let mut combine = vec![];
        if let Some((shape, plan)) = routing.plan() {
            let map = 4 * u64::from(shape.all_experts());
            let places = Some(Slice::new(&self.cache.places, 0, map));
            let ExpertParts { gate_up, down } =
                self.ffn.parts((&shape, plan), (hidden, out, add), scratch, places)?;
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

    /// Runs the experts of a step whose routing, recorded by [`BoundCached::record_routing`] once, has been submitted: brings
    /// in what the step's last run used and is missing by now, which overlaps with the routing; waits for the routing; and
    /// submits rounds of experts to `queue`, the last of which writes `out`.
    ///
    /// # Errors
    ///
    /// A step of another layer; what the source fails with; [`Error::Device`] where the device is lost or refuses the work.
    /// After an error `out` is not written whole, and the step can be run again from its routing on.
    pub fn run_experts(&mut self, queue: &wgpu::Queue, step: &mut BoundCached) -> Result<()> {
        pollster::block_on(self.experts(queue, step, Wait::Poll))
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
        pollster::block_on(self.cache.prefetch(queue, experts, Wait::Poll))
    }

    fn submit_routing(&self, queue: &wgpu::Queue, step: &BoundCached) -> Result<()> {
        alive(self.ctx.device())?;
        scoped(self.ctx.device(), || {
            let mut encoder = self.ctx.device().create_command_encoder(&Default::default());
            step.record_routing(&mut encoder);
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
        alive(&cache.device)?;
        let (done, mapped) = signal();
        step.readback.map_async(wgpu::MapMode::Read, .., done);
        let last = std::mem::take(&mut step.union);
        let prefetched = cache.prefetch(queue, &last, wait).await;
        let read = wait.until(&cache.device, None, mapped).await.and_then(|mapped| {
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
            step.submit_round(cache, queue, &there, true, batches.is_empty())?;
        }
        for (i, &batch) in batches.iter().enumerate() {
            cache.settle(1, wait).await?;
            for &expert in batch {
                cache.bring(queue, expert, &[])?;
                cache.stats.miss_bytes += cache.expert_bytes();
            }
            let last = i + 1 == batches.len();
            let submission = step.submit_round(cache, queue, batch, false, last)?;
            cache.under_way.push_back(Done::of(queue, submission));
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
    pub fn record_routing(&self, encoder: &mut wgpu::CommandEncoder) {
        self.routing.record(encoder);
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
        scoped(&cache.device, || {
            queue.write_buffer(&cache.places, 0, bytemuck::cast_slice(&places));
            let mut encoder = cache.device.create_command_encoder(&Default::default());
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

/// How to wait for the device.
#[derive(Clone, Copy)]
enum Wait {
    /// By polling it.
    Poll,
    /// Somebody else polls it.
    Await,
}

impl Wait {
    /// The value of a callback of wgpu's that comes when a submission has run; all that was submitted where none is named.
    async fn until<T>(
        self,
        device: &wgpu::Device,
        submission_index: Option<wgpu::SubmissionIndex>,
        callback: impl Future<Output = T>,
    ) -> Result<T> {
        if let Self::Poll = self {
            let poll = device.poll(wgpu::PollType::Wait { submission_index, timeout: None });
            poll.map_err(|e| Error::Device(e.to_string()))?;
            alive(device)?; // a lost device's callbacks may never come
        }
        Ok(callback.await)
    }
}

/// A submission, and what comes when it has run.
struct Done {
    submission: wgpu::SubmissionIndex,
    future: std::pin::Pin<Box<dyn Future<Output = ()> + Send + Sync>>,
}

impl Done {
    /// Of the last submission to a queue.
    fn of(queue: &wgpu::Queue, submission: wgpu::SubmissionIndex) -> Self {
        let (done, future) = signal();
        queue.on_submitted_work_done(move || done(()));
        Self { submission, future: Box::pin(future) }
    }
}

/// A callback, and the future of what it is called with.
fn signal<T: Send + 'static>()
-> (impl FnOnce(T) + Send + 'static, impl Future<Output = T> + Send + Sync + 'static) {
    let state = Arc::new(Mutex::new((None, None::<Waker>)));
    let shared = state.clone();
    let callback = move |value| {
        let mut state = shared.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = Some(value);
        if let Some(waker) = state.1.take() {
            waker.wake();
        }
    };
    let future = std::future::poll_fn(move |context| {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.0.take() {
            Some(value) => Poll::Ready(value),
            None => {
                state.1 = Some(context.waker().clone());
                Poll::Pending
            }
        }
    });
    (callback, future)
}
