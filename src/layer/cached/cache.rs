//! The experts of a layer that are on the device, and where the others come from.
use super::super::config::LayerConfig;
use super::model::Need;
use super::on_host::{Expert, HostExperts, Pace, Stored};
use super::options::{CacheOptions, CacheStats};
use super::policy::{CachePolicy, exchange};
use crate::device::wait::Wait;
use crate::weights::upload::Uploader;
use crate::weights::{ExpertShape, ExpertTypes, HostWeights, Projection};
use crate::{Context, Error, ExpertWeights, Result, WeightType};
use std::sync::Arc;
use std::time::Instant;

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

/// The experts of a layer that are on the device, and where the others come from.
pub struct ExpertCache {
    source: Arc<dyn ExpertSource>,
    /// Places for routed experts, then the shared experts.
    pub(super) weights: ExpertWeights,
    /// Place of each expert in the round under way, shared ones included; `u32::MAX`: none.
    pub(super) places: wgpu::Buffer,
    pub(super) experts: u32,
    pub(super) shared_experts: u32,
    /// The expert that each place holds. The last [`CachePolicy::passing`] are for those that pass through.
    pub(super) held: Vec<Option<u32>>,
    /// When each place was last used.
    used: Vec<u64>,
    clock: u64,
    policy: CachePolicy,
    pinned: Vec<u32>,
    /// Slots that each routed expert took since the last exchange, and the steps until the next.
    slots: Vec<u64>,
    steps_left: u32,
    host: HostExperts,
    pace: Pace,
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
        let shape = shape_of(config, &*source, &options)?;
        let Need { each, fixed, .. } = Need::of(config, &*source, &options)?;
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
        options.check(places, experts)?;
        let held = ExpertShape { experts: places + shared_experts, ..shape };
        let limit = options.page_limit.unwrap_or(u64::MAX);
        let weights = ExpertWeights::with_page_limit(ctx, held, limit)?;
        let mut cache = Self {
            source,
            weights,
            places: ctx.scratch("places", map_bytes(&shape))?,
            experts,
            shared_experts,
            held: vec![None; places as usize],
            used: vec![0; places as usize],
            clock: 0,
            policy: options.policy,
            slots: vec![0; experts as usize],
            steps_left: 0,
            host: options.host,
            pace: Pace::default(),
            pinned: options.pinned,
            batch: usize::try_from(options.staging / 2 / each).unwrap_or(usize::MAX).max(1),
            uploader: Uploader::new(ctx.device()),
            stats: CacheStats::default(),
        };
        let shared = (0..shared_experts).map(|i| (experts + i, places + i));
        let pinned: Vec<(u32, u32)> = cache.pinned.iter().copied().zip(0..).collect();
        for (expert, place) in shared.chain(pinned) {
            cache.upload(queue, expert, place)?;
            if let Some(held) = cache.held.get_mut(place as usize) {
                *held = Some(expert);
            }
            cache.uploader.flush(queue)?;
            // Browsers have no way to wait here.
            if !cfg!(target_family = "wasm") {
                pollster::block_on(cache.uploader.settle(1, Wait::Poll))?;
            }
        }
        cache.note_peak();
        Ok(cache)
    }

    /// Routed experts that fit at once.
    pub fn capacity(&self) -> usize {
        self.held.len()
    }

    /// Routed experts on the device, the least recently used first.
    pub fn resident(&self) -> Vec<u32> {
        let held = self.used.iter().zip(&self.held);
        let mut held: Vec<(u64, u32)> = held.filter_map(|(&used, &e)| Some((used, e?))).collect();
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
        self.held.iter().position(|&held| held == Some(expert))
    }

    pub(super) fn touch(&mut self, place: usize) {
        self.clock += 1;
        self.used[place] = self.clock;
    }

    /// Packs and uploads one expert; it is on its way with the next submission.
    fn upload(&mut self, queue: &wgpu::Queue, expert: u32, place: u32) -> Result<()> {
        for projection in Projection::ALL {
            let matrix = self.source.matrix(expert, projection)?;
            self.uploader.matrix(queue, &self.weights, place, projection, matrix)?;
        }
        Ok(())
    }

    /// Places that a missing expert may come into: those set aside where there are some, else all that hold
    /// no pinned one.
    fn open_places(&self) -> impl Iterator<Item = usize> + '_ {
        let passing = self.policy.passing();
        let first = if passing > 0 { self.held.len() - passing } else { self.pinned.len() };
        first..self.held.len()
    }

    /// Experts that may be missing in one round: they come into places of their own.
    pub(super) fn round(&self) -> usize {
        self.batch.min(self.open_places().count()).max(1)
    }

    /// Brings in an expert, in the place of the least recently used one that `keep` does not list; whether there is one.
    pub(super) fn bring(&mut self, queue: &wgpu::Queue, expert: u32, keep: &[u32]) -> Result<bool> {
        let kept = |place: usize| self.held[place].is_some_and(|e| keep.contains(&e));
        let places = self.open_places().filter(|&place| !kept(place));
        let Some(place) = places.min_by_key(|&place| self.used[place]) else {
            return Ok(false);
        };
        self.put(queue, expert, place).map(|()| true)
    }

    /// Brings an expert into a place.
    pub(super) fn put(&mut self, queue: &wgpu::Queue, expert: u32, place: usize) -> Result<()> {
        self.held[place] = None; // and so it stays where the source fails halfway
        self.used[place] = 0;
        self.upload(queue, expert, place as u32)?;
        self.held[place] = Some(expert);
        self.touch(place);
        self.note_peak();
        Ok(())
    }

    fn note_peak(&mut self) {
        let empty = self.held.iter().filter(|held| held.is_none()).count() as u64;
        let now = self.device_bytes() - empty * self.expert_bytes();
        self.stats.peak_bytes = self.stats.peak_bytes.max(now);
    }

    /// Counts a step whose experts took so many slots each, and says which experts come into which places
    /// now that it ends an interval, if it does.
    pub(super) fn end_of_step(&mut self, tokens_per_expert: &[u32]) -> Vec<(usize, u32)> {
        let CachePolicy::Interval { steps, passing } = self.policy else { return vec![] };
        for (sum, &n) in self.slots.iter_mut().zip(tokens_per_expert) {
            *sum += u64::from(n);
        }
        if self.steps_left > 0 {
            self.steps_left -= 1;
            return vec![];
        }
        self.steps_left = steps - 1;
        let kept = &self.held[..self.held.len() - passing as usize];
        let changes = exchange(kept, &self.slots, |e| self.pinned.contains(&e));
        self.slots.fill(0);
        changes
    }

    /// Counts a step.
    pub(super) fn note_step(&mut self, there: &[u32], missing: &[u32]) {
        self.stats.steps += 1;
        self.stats.hits += there.len() as u64;
        self.stats.misses += missing.len() as u64;
        for &expert in there {
            if let Some(place) = self.place_of(expert) {
                self.touch(place);
            }
        }
    }

    /// Brings in what misses, each into a place of its own.
    pub(super) fn bring_all(&mut self, queue: &wgpu::Queue, missing: &[u32]) -> Result<()> {
        for &expert in missing {
            self.bring(queue, expert, &[])?;
            self.stats.miss_bytes += self.expert_bytes();
        }
        Ok(())
    }

    /// Experts change places; those among `missing` that come.
    pub(super) fn change(
        &mut self,
        queue: &wgpu::Queue,
        changes: &[(usize, u32)],
        missing: &[u32],
    ) -> Result<Vec<u32>> {
        let mut asked = vec![];
        for &(place, expert) in changes {
            self.put(queue, expert, place)?;
            self.stats.exchanged += 1;
            if missing.contains(&expert) {
                self.stats.miss_bytes += self.expert_bytes();
                asked.push(expert);
            } else {
                self.stats.prefetched += 1;
                self.stats.prefetch_bytes += self.expert_bytes();
            }
        }
        Ok(asked)
    }

    /// A clock for what is measured; none where nothing is decided by it.
    pub(super) fn clock(&self) -> Option<Instant> {
        (self.host == HostExperts::Measured).then(Instant::now)
    }

    pub(super) fn note_uploaded(&mut self, experts: usize, began: Option<Instant>) {
        if let Some(began) = began {
            let bytes = experts as u64 * self.expert_bytes();
            self.pace.uploaded(bytes, began.elapsed().as_secs_f64());
        }
    }

    pub(super) fn note_computed(&mut self, experts: &[u32], rows: &[u32], began: Option<Instant>) {
        self.stats.on_host += experts.len() as u64;
        if let Some(began) = began {
            let each = experts.iter().map(|&e| (self.expert_bytes(), rows[e as usize]));
            let each: Vec<(u64, u32)> = each.collect();
            self.pace.computed(each.into_iter(), began.elapsed().as_secs_f64());
        }
    }

    pub(super) fn may_be_on_host(&self) -> bool {
        self.host != HostExperts::Never
    }

    /// Takes out of `missing` the experts that the host computes, of so many rows each. Empty places are
    /// filled first.
    pub(super) fn take_for_host(&mut self, missing: &mut Vec<u32>, rows: &[u32]) -> Vec<u32> {
        if !self.may_be_on_host() {
            return vec![];
        }
        let empty = self.open_places().filter(|&place| self.held[place].is_none()).count();
        let passing = self.policy.passing() > 0;
        let mut left = if passing { 0 } else { empty };
        let (always, bytes) = (self.host == HostExperts::Always, self.expert_bytes());
        let pace = &mut self.pace;
        missing
            .extract_if(.., |&mut expert| {
                let fills = left > 0;
                left -= usize::from(fills);
                !fills && (always || pace.is_host_faster(bytes, rows[expert as usize]))
            })
            .collect()
    }

    /// An expert for the host to compute on these rows.
    pub(super) fn for_host(&self, expert: u32, x: Vec<f32>) -> Result<Expert<'_>> {
        let shape = self.weights.shape();
        let types = shape.types_of(0); // of the routed ones
        let of = |projection| {
            let matrix = self.source.matrix(expert, projection)?;
            let matrix = matrix.matrix(shape.matrix(projection))?;
            Ok::<_, Error>(Stored { matrix, stored: types.of(projection) })
        };
        let [gate, up, down] = Projection::ALL;
        Ok(Expert { x, matrices: [of(gate)?, of(up)?, of(down)?] })
    }

    /// Brings in those of `experts` that are missing, in order, as far as there are places that hold none of them.
    /// Nothing where places change at intervals.
    pub(super) async fn prefetch(
        &mut self,
        queue: &wgpu::Queue,
        experts: &[u32],
        wait: Wait,
    ) -> Result<()> {
        if self.policy != CachePolicy::LeastRecentlyUsed {
            return Ok(());
        }
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

/// All experts of a layer, as the device keeps them.
fn shape_of(
    config: &LayerConfig,
    source: &dyn ExpertSource,
    options: &CacheOptions,
) -> Result<ExpertShape> {
    let [routed, shared] = options.types.map_or_else(|| source.types(), |t| Ok([t; 2]))?;
    let shape = config.expert_shape(routed).with_last_types(config.shared_experts, shared);
    shape.check().map(|()| shape)
}

/// A word for each expert.
fn map_bytes(shape: &ExpertShape) -> u64 {
    4 * u64::from(shape.experts)
}

impl Need {
    pub(super) fn of(
        config: &LayerConfig,
        source: &dyn ExpertSource,
        options: &CacheOptions,
    ) -> Result<Self> {
        let shape = shape_of(config, source, options)?;
        let shared = shape.last_device_bytes().saturating_mul(config.shared_experts.into());
        let fixed = shared.saturating_add(map_bytes(&shape));
        Ok(Self { experts: config.experts, each: shape.device_bytes(), fixed })
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
