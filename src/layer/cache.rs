//! The experts of a layer that are on the device, and where the others come from.
use super::config::LayerConfig;
use crate::device::wait::Wait;
use crate::weights::upload::Uploader;
use crate::weights::{ExpertShape, ExpertTypes, HostWeights, Projection};
use crate::{Context, Error, ExpertWeights, Result, WeightType};
use std::sync::Arc;

/// Where the matrices of a layer's experts come from. Asked again whenever an expert is brought in.
pub trait ExpertSource: Send + Sync {
    /// One matrix of one expert, `[out, in]`; shared experts follow the routed ones.
    ///
    /// # Errors
    ///
    /// Whatever kept the source from having it; the step that asked fails with it.
    fn matrix(&self, expert: u32, projection: Projection) -> Result<HostWeights<'_>>;

    /// What the experts are best stored as on the device: the routed ones, and the shared ones. bf16
    /// where a source does not say.
    ///
    /// # Errors
    ///
    /// Whatever kept the source from knowing it.
    fn types(&self) -> Result<[ExpertTypes; 2]> {
        Ok([WeightType::Bf16.into(); 2])
    }
}

/// How much memory a [`CachedLayer`](super::cached::CachedLayer) takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheOptions {
    /// Most bytes of the cache on the device: the pages of experts, shared ones included, and a word for each expert.
    /// Router, scratch, and what wgpu holds of uploads under way are not in it.
    pub budget: u64,
    /// Most bytes of uploads under way at once, in whole experts, two at least. wgpu holds as many in memory that the
    /// host writes.
    pub staging: u64,
    /// What all experts are stored as on the device; what the [source](ExpertSource::types) says where
    /// absent.
    pub types: Option<ExpertTypes>,
    /// Bytes that a page may have at most; the device's limit where absent.
    pub page_limit: Option<u64>,
}

impl CacheOptions {
    /// The source's storage types, and 64 MiB of uploads at once.
    pub const fn new(budget: u64) -> Self {
        Self { budget, staging: 64 << 20, types: None, page_limit: None }
    }
}

/// What a cache did since it was made, or since [`CachedLayer::reset_stats`](super::cached::CachedLayer::reset_stats).
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
    source: Arc<dyn ExpertSource>,
    /// Places for routed experts, then the shared experts.
    pub(super) weights: ExpertWeights,
    /// Place of each expert in the round under way, shared ones included; `u32::MAX`: none.
    pub(super) places: wgpu::Buffer,
    pub(super) experts: u32,
    pub(super) shared_experts: u32,
    /// The expert that each place holds, and when it was last used.
    pub(super) held: Vec<(Option<u32>, u64)>,
    clock: u64,
    /// Experts whose uploads may be under way at once, halved: one half is packed while the other is on its way.
    pub(super) batch: usize,
    pub(super) uploader: Uploader,
    pub(super) stats: CacheStats,
}

impl ExpertCache {
    pub(super) fn new(
        ctx: &Context,
        queue: &wgpu::Queue,
        config: &LayerConfig,
        source: Arc<dyn ExpertSource>,
        options: CacheOptions,
    ) -> Result<Self> {
        let LayerConfig { experts, shared_experts, .. } = *config;
        let [routed, shared] = options.types.map_or_else(|| source.types(), |t| Ok([t; 2]))?;
        let shape = config.expert_shape(routed).with_last_types(shared_experts, shared);
        shape.check()?;
        let (each, map) = (shape.device_bytes(), 4 * u64::from(shape.experts));
        let shared = shape.last_device_bytes().saturating_mul(shared_experts.into());
        let fixed = shared.saturating_add(map);
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
        let held = ExpertShape { experts: places + shared_experts, ..shape };
        let limit = options.page_limit.unwrap_or(u64::MAX);
        let weights = ExpertWeights::with_page_limit(ctx, held, limit)?;
        let mut cache = Self {
            source,
            weights,
            places: ctx.scratch("places", map)?,
            experts,
            shared_experts,
            held: vec![(None, 0); places as usize],
            clock: 0,
            batch: usize::try_from(options.staging / 2 / each).unwrap_or(usize::MAX).max(1),
            uploader: Uploader::new(ctx.device()),
            stats: CacheStats::default(),
        };
        for i in 0..shared_experts {
            cache.upload(queue, experts + i, places + i)?;
            cache.uploader.flush(queue)?;
            // Browsers have no way to wait here.
            if !cfg!(target_family = "wasm") {
                pollster::block_on(cache.uploader.settle(1, Wait::Poll))?;
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

    /// Bytes of one routed expert on the device.
    pub fn expert_bytes(&self) -> u64 {
        self.weights.shape().device_bytes()
    }

    /// What it did.
    pub fn stats(&self) -> CacheStats {
        self.stats
    }

    pub(super) fn place_of(&self, expert: u32) -> Option<usize> {
        self.held.iter().position(|&(held, _)| held == Some(expert))
    }

    pub(super) fn touch(&mut self, place: usize) {
        self.clock += 1;
        self.held[place].1 = self.clock;
    }

    /// Packs and uploads one expert; it is on its way with the next submission.
    fn upload(&mut self, queue: &wgpu::Queue, expert: u32, place: u32) -> Result<()> {
        for projection in Projection::ALL {
            let matrix = self.source.matrix(expert, projection)?;
            self.uploader.matrix(queue, &self.weights, place, projection, matrix)?;
        }
        Ok(())
    }

    /// Brings in an expert, in the place of the least recently used one that `keep` does not list; whether there is one.
    pub(super) fn bring(&mut self, queue: &wgpu::Queue, expert: u32, keep: &[u32]) -> Result<bool> {
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
    pub(super) async fn prefetch(
        &mut self,
        queue: &wgpu::Queue,
        experts: &[u32],
        wait: Wait,
    ) -> Result<()> {
        let missing: Vec<u32> =
            experts.iter().copied().filter(|&e| self.place_of(e).is_none()).collect();
        for batch in missing.chunks(self.batch) {
            self.uploader.settle(1, wait).await?;
            for &expert in batch {
                if !self.bring(queue, expert, experts)? {
                    return self.uploader.flush(queue);
                }
                self.stats.prefetched += 1;
                self.stats.prefetch_bytes += self.expert_bytes();
            }
            self.uploader.flush(queue)?;
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
