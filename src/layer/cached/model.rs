//! The layers of a model under one budget.
use super::super::config::{LayerConfig, Router};
use super::CachedLayer;
use super::cache::ExpertSource;
use super::options::{CacheOptions, CacheStats};
use crate::{Context, Error, Result};
use std::sync::Arc;

/// One layer of a [`CachedModel`]: what [`CachedLayer::new`] takes.
pub struct ModelLayer {
    config: LayerConfig,
    router: Router,
    source: Arc<dyn ExpertSource>,
    pinned: Vec<u32>,
}

impl ModelLayer {
    /// With nothing pinned.
    pub fn new(config: LayerConfig, router: Router, source: Arc<dyn ExpertSource>) -> Self {
        Self { config, router, source, pinned: vec![] }
    }

    /// The same with routed experts that never leave; [`CacheOptions::pinned`] is not for models.
    #[must_use]
    pub fn with_pinned(self, pinned: Vec<u32>) -> Self {
        Self { pinned, ..self }
    }
}

/// Layers whose experts share one budget, each with its own share of it.
///
/// Layers run in turn. A cache of all of them that let the least recently used expert leave would
/// throw out each layer's before its turn comes again. So each layer keeps experts of its own: as many of
/// its experts, as a share, as every other layer. What they do at run time stays apart, too:
/// [`CachedModel::layer_mut`] gives a [`CachedLayer`] as any other.
///
/// ```no_run
/// use wgmoe::layer::cached::{CacheOptions, CachePolicy, CachedModel, ModelLayer};
/// use wgmoe::layer::Batch;
/// use wgmoe::{Context, Result, Slice, wgpu};
///
/// fn run(
///     ctx: &Context,
///     queue: &wgpu::Queue,
///     layers: Vec<ModelLayer>,
///     (hidden, out, tokens): (Slice<'_>, Slice<'_>, u32),
/// ) -> Result<()> {
///     // 3 GB for all layers; what lies on the device changes every 8 steps.
///     let policy = CachePolicy::Interval { steps: 8, passing: 2 };
///     let options = CacheOptions { policy, ..CacheOptions::new(3 << 30) };
///     let mut model = CachedModel::new(ctx, queue, layers, options)?;
///     let batch = Batch::new(hidden, tokens).into_out(out);
///     let mut steps: Vec<_> =
///         model.layers().iter().map(|layer| layer.bind(&batch)).collect::<Result<_>>()?;
///     for (i, step) in steps.iter_mut().enumerate() {
///         // ... attention ...
///         model.layer_mut(i).run(queue, step)?;
///     }
///     println!("{:?}", model.stats());
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct CachedModel {
    layers: Vec<CachedLayer>,
}

impl CachedModel {
    /// Makes every layer, with its share of the budget; the other options are for each layer.
    ///
    /// # Errors
    ///
    /// As [`CachedLayer::new`]; [`Error::Invalid`] naming `layers` where there are none, `pinned` where
    /// the options pin some ([`ModelLayer::with_pinned`]), or `budget` where it holds less than what
    /// the layers can do with: their shared experts, the pinned ones, and one place or [`CachePolicy::Interval`](super::CachePolicy::Interval)'s
    /// passing ones.
    pub fn new(
        ctx: &Context,
        queue: &wgpu::Queue,
        layers: Vec<ModelLayer>,
        options: CacheOptions,
    ) -> Result<Self> {
        if layers.is_empty() {
            return Err(Error::invalid("layers", "none"));
        }
        if !options.pinned.is_empty() {
            return Err(Error::invalid("pinned", "for all layers: `ModelLayer::with_pinned`"));
        }
        let needs: Vec<Need> = layers
            .iter()
            .map(|layer| {
                let need = Need::of(&layer.config, &*layer.source, &options)?;
                // Pinned ones, and places for others.
                let open = options.policy.passing().max(1);
                let least = (layer.pinned.len() + open).min(need.experts as usize) as u32;
                Ok(Need { least, ..need })
            })
            .collect::<Result<_>>()?;
        let shares = shares(&needs, options.budget)?;
        let make = |(layer, budget)| {
            let ModelLayer { config, router, source, pinned } = layer;
            let options = CacheOptions { budget, pinned, ..options.clone() };
            CachedLayer::new(ctx, queue, config, router, source, options)
        };
        Ok(Self { layers: layers.into_iter().zip(shares).map(make).collect::<Result<_>>()? })
    }

    /// The layers, in the order they were given.
    pub fn layers(&self) -> &[CachedLayer] {
        &self.layers
    }

    /// A layer, to run.
    ///
    /// # Panics
    ///
    /// If there is no such layer.
    pub fn layer_mut(&mut self, layer: usize) -> &mut CachedLayer {
        &mut self.layers[layer]
    }

    /// Bytes of all caches on the device; never more than the budget.
    pub fn device_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.cache().device_bytes()).sum()
    }

    /// What all caches did together.
    pub fn stats(&self) -> CacheStats {
        let mut all = CacheStats::default();
        self.layers.iter().for_each(|layer| all += layer.cache().stats());
        all
    }

    /// Starts the statistics of every layer anew.
    pub fn reset_stats(&mut self) {
        self.layers.iter_mut().for_each(CachedLayer::reset_stats);
    }
}

/// What a layer's cache takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    pub(super) experts: u32,
    /// Fewest routed experts that must fit.
    pub(super) least: u32,
    /// Of a routed expert.
    pub(super) each: u64,
    /// Of what is there whatever the budget: shared experts, and a word an expert.
    pub(super) fixed: u64,
}

/// A budget for each layer: places for the same share of its experts, and what is left over to those with
/// the smallest share; the first of equals. The least that each needs at least.
fn shares(needs: &[Need], budget: u64) -> Result<Vec<u64>> {
    let least = |n: &Need| n.fixed.saturating_add(n.each.saturating_mul(n.least.into()));
    let least: u64 = needs.iter().fold(0, |sum, n| sum.saturating_add(least(n)));
    if budget < least {
        let reason = format!("{budget} bytes; the least that the layers can do with is {least}");
        return Err(Error::invalid("budget", reason));
    }
    let mut places: Vec<u32> = needs.iter().map(|n| n.least).collect();
    let mut left = budget - least;
    loop {
        let open =
            (0..needs.len()).filter(|&i| places[i] < needs[i].experts && needs[i].each <= left);
        // places[i] / experts[i], compared without division.
        let share = |i: &usize, j: &usize| {
            let of = |i: usize, j: usize| u64::from(places[i]) * u64::from(needs[j].experts);
            of(*i, *j).cmp(&of(*j, *i))
        };
        let Some(next) = open.min_by(share) else { break };
        places[next] += 1;
        left -= needs[next].each;
    }
    let bytes = |(need, places): (&Need, u32)| need.fixed + u64::from(places) * need.each;
    Ok(needs.iter().zip(places).map(bytes).collect())
}

#[cfg(test)]
mod tests {
    use super::{Need, shares};

    const SMALL: Need = Need { experts: 10, least: 1, each: 10, fixed: 5 };
    const LARGE: Need = Need { experts: 20, least: 1, each: 30, fixed: 0 };

    #[test]
    fn layers_keep_equal_shares_of_their_experts() {
        // Half of each: 5 of 10 and 10 of 20.
        let half = 55 + 300;
        assert_eq!(shares(&[SMALL, LARGE], half).unwrap(), [55, 300]);
        // More than all is not used.
        assert_eq!(shares(&[SMALL, LARGE], 10_000).unwrap(), [105, 600]);
        // What is left over goes where it fits.
        assert_eq!(shares(&[SMALL, SMALL], 15 + 15 + 19).unwrap(), [25, 15]);
        assert_eq!(shares(&[SMALL], 15).unwrap(), [15]);
    }

    #[test]
    fn a_budget_below_one_expert_of_each_is_refused() {
        let error = shares(&[SMALL, LARGE], 44).unwrap_err().to_string();
        assert!(error.contains("budget") && error.contains("45"), "{error}");
        assert!(shares(&[SMALL, LARGE], 45).is_ok());
        // One with pinned experts needs more.
        let pinned = Need { least: 4, ..SMALL };
        assert_eq!(shares(&[pinned, SMALL], 65).unwrap(), [45, 15]);
        assert_eq!(shares(&[pinned, SMALL], 60).unwrap(), [45, 15]);
        assert!(shares(&[pinned, SMALL], 59).is_err());
    }
}
