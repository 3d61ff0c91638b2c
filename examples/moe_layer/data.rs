//! The layer and its input on the host.
use crate::stored_layer::StoredLayer;
use rand::{Rng, SeedableRng, rngs::StdRng};
use testkit::layer::{host_router, outputs};
use testkit::synthetic::{self, Pool};
use wgmoe::WeightType;
use wgmoe::layer::{HostRouter, LayerConfig};
use wgmoe::routing::{Routing, Score};
use wgmoe::weights::{HostWeights, Projection};

/// Tokens decoded together, and tokens of a sequence.
pub(super) const BLOCK: u32 = 32;

pub(super) const SEQUENCE: u32 = 128;

/// The data of a layer on the host.
///
/// Experts: each matrix is a window of one pool of random numbers, at a place of its own, so that a
/// layer of any size takes little memory and no time to make. Deviations of 1 / sqrt(D) and 1 /
/// sqrt(F) keep activations near 1.
///
/// From a checkpoint, experts and router are what its files hold.
///
/// Router: logits are spread as `g = 2 (sqrt(0.6) Z_block[e] + sqrt(0.4) Z[t, e]) - 3`, Z standard
/// normal, which for LLaDA2.0-mini's 256 experts gives as many unique experts a block as were
/// published for it. Hidden states are the same mixture of a normal vector of the block and one of
/// the token; the router's weights are normal with deviation 2 / sqrt(D), and read the -3 from the
/// first hidden value, which is 1. `make_checkpoint`'s routers do the same.
pub(super) struct Data<'a> {
    pub(super) config: LayerConfig,
    pub(super) x: Vec<f32>,
    pub(super) router: Vec<f32>,
    pub(super) bias: Option<Vec<f32>>,
    pub(super) experts: Experts<'a>,
    /// Offsets and lengths of the sequences.
    pub(super) offsets: Vec<u32>,
    pub(super) lengths: Vec<u32>,
}

pub(super) enum Experts<'a> {
    Synthetic(Pool),
    Stored(&'a StoredLayer),
}

/// Where a layer's weights come from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    Synthetic(WeightType),
    Stored(&'a StoredLayer),
}

impl<'a> Data<'a> {
    pub(super) fn new(config: LayerConfig, tokens: u32, source: Source<'a>, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let x = synthetic::hidden_states(&mut rng, tokens, BLOCK, config.hidden);
        let (router, bias, experts) = match source {
            Source::Stored(layer) => {
                let (router, bias) = layer.router();
                (router, bias, Experts::Stored(layer))
            }
            Source::Synthetic(weight_type) => made(&config, weight_type, &mut rng),
        };
        let offsets: Vec<u32> =
            (0..tokens).step_by(SEQUENCE as usize).chain(std::iter::once(tokens)).collect();
        let lengths = offsets.windows(2).map(|w| w[1] - w[0]).collect();
        Self { config, x, router, bias, experts, offsets, lengths }
    }

    pub(super) fn expert(&self, e: u32, projection: Projection) -> HostWeights<'_> {
        match &self.experts {
            Experts::Stored(layer) => layer.expert(e, projection),
            Experts::Synthetic(pool) => pool.matrix(e, projection),
        }
    }

    pub(super) fn row(&self, t: usize) -> &[f32] {
        let d = self.config.hidden as usize;
        &self.x[t * d..][..d]
    }

    pub(super) fn tokens(&self) -> usize {
        self.x.len() / self.config.hidden as usize
    }

    pub(super) fn host_router(&self) -> HostRouter<'_> {
        host_router(&self.router, self.bias.as_deref())
    }

    /// Tokens that each expert takes of each sequence, for rules that choose within sequences.
    pub(super) fn capacity(&self, routing: Routing) -> Option<Vec<u32>> {
        match routing {
            Routing::ExpertChoice(rule) => {
                let share = |&n: &u32| rule.capacity(n, self.config.experts);
                Some(self.lengths.iter().map(share).collect())
            }
            _ => None,
        }
    }

    /// The twin of some tokens' output, on every core.
    pub(super) fn twin(
        &self,
        config: &LayerConfig,
        assigned: &[u32],
        gates: &[f32],
        sample: &[usize],
    ) -> Vec<Vec<f32>> {
        outputs(config, &|e, p| self.expert(e, p), &self.x, (assigned, gates), sample)
    }
}

/// Router, bias and experts.
pub(super) fn made(
    config: &LayerConfig,
    weight_type: WeightType,
    rng: &mut StdRng,
) -> (Vec<f32>, Option<Vec<f32>>, Experts<'static>) {
    let router = synthetic::router(rng, config);
    let sigmoid = config.routing.score() == Score::Sigmoid;
    let bias = sigmoid
        .then(|| (0..config.experts).map(|_| rng.random_range(-0.01..0.01)).collect::<Vec<f32>>());
    (router, bias, Experts::Synthetic(Pool::new(rng, config, weight_type)))
}

/// Useful multiply-adds of the experts, times 2.
pub(super) fn flops(config: &LayerConfig, tokens: u32, slots: u32) -> f64 {
    let rows = f64::from(slots) + f64::from(tokens) * f64::from(config.shared_experts);
    2.0 * 3.0 * rows * f64::from(config.hidden) * f64::from(config.intermediate)
}

/// Mean over the full blocks, or the only one.
pub(super) fn mean_of_blocks(counts: &[u32], tokens: u32) -> f64 {
    let full = ((tokens / BLOCK) as usize).max(1);
    counts[..full].iter().map(|&n| f64::from(n)).sum::<f64>() / full as f64
}
