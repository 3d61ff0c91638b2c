//! Layers of a model's size without a model: weights that are cheap to make, routers whose scores
//! look like a model's.
use rand::{Rng, rngs::StdRng};
use rand_distr::StandardNormal;
use wgmoe::layer::cached::ExpertSource;
use wgmoe::weights::{ExpertTypes, HostWeights, MatrixView, Projection};
use wgmoe::{Error, LayerConfig, WeightType};

/// Share of a block's own part in the variance of its tokens' router logits: the one thing fitted, to 69.5 experts a block.
pub const RHO: f32 = 0.6;

/// Values `[tokens, width]` of blocks: a normal vector of the block and one of each token, mixed, of variance 1.
pub fn mixture(rng: &mut StdRng, tokens: u32, block: u32, width: u32) -> Vec<f32> {
    let (shared, own) = (RHO.sqrt(), (1.0 - RHO).sqrt());
    let mut values = Vec::with_capacity(tokens as usize * width as usize);
    let mut of_block = vec![0f32; width as usize];
    for t in 0..tokens {
        if t % block == 0 {
            of_block.fill_with(|| rng.sample(StandardNormal));
        }
        let own_part = |z: &f32| shared * z + own * rng.sample::<f32, _>(StandardNormal);
        values.extend(of_block.iter().map(own_part));
    }
    values
}

/// Hidden states `[tokens, D]` of such blocks. Value 0 is 1: it carries what the router adds to every logit.
pub fn hidden_states(rng: &mut StdRng, tokens: u32, block: u32, hidden: u32) -> Vec<f32> {
    let mut x = mixture(rng, tokens, block, hidden);
    x.iter_mut().step_by(hidden as usize).for_each(|x| *x = 1.0);
    x
}

/// A router `[E, D]` that makes of hidden states of which value 0 is 1 and the others are standard normal the logits
/// `2 z - 3`, z standard normal and correlated as the hidden states are.
pub fn router(rng: &mut StdRng, config: &LayerConfig) -> Vec<f32> {
    let (d, experts) = (config.hidden as usize, config.experts as usize);
    let deviation = 2.0 / (d as f32).sqrt();
    let mut router: Vec<f32> =
        (0..experts * d).map(|_| deviation * rng.sample::<f32, _>(StandardNormal)).collect();
    router.iter_mut().step_by(d).for_each(|w| *w = -3.0);
    router
}

/// Expert weights from two pools of uniform numbers: each matrix is a window at a place of its own, so that a layer of
/// gigabytes takes megabytes and no time to make. Deviations of 1 / sqrt(D) and 1 / sqrt(F) keep activations near 1.
pub struct Pool {
    weight_type: WeightType,
    /// `[F, D]` of gate and up, `[D, F]` of down.
    shapes: [[u32; 2]; 2],
    /// Values of gate and up, and of down, as they are stored.
    pools: [Vec<u8>; 2],
}

/// From one matrix's window to the next; prime, so that no row of one is a row of another nearby.
const STRIDE: usize = 1009;

impl Pool {
    pub fn new(rng: &mut StdRng, config: &LayerConfig, weight_type: WeightType) -> Self {
        let LayerConfig { hidden, intermediate, experts, shared_experts, .. } = *config;
        let block = weight_type.block_values();
        let padded = |rows: u32, row: u32| rows as usize * row.next_multiple_of(block) as usize;
        let count = padded(intermediate, hidden).max(padded(hidden, intermediate));
        let windows = 3 * (experts + shared_experts) as usize * STRIDE;
        let all = count + windows * block as usize;
        let mut pool = |width: u32| {
            let most = (3.0 / width as f32).sqrt();
            let values: Vec<f32> = (0..all).map(|_| rng.random_range(-most..most)).collect();
            let row = weight_type.block_values() as usize;
            weight_type.encode(&values[..all / row * row], row)
        };
        let pools = [pool(hidden), pool(intermediate)];
        let shapes = [[intermediate, hidden], [hidden, intermediate]];
        Self { weight_type, shapes, pools }
    }

    pub fn matrix(&self, expert: u32, projection: Projection) -> HostWeights<'_> {
        let (pool, place) = match projection {
            Projection::Gate => (0, 0),
            Projection::Up => (0, 1),
            Projection::Down => (1, 2),
        };
        let at = (3 * expert as usize + place) * STRIDE * self.weight_type.block_bytes() as usize;
        let shape = self.shapes[pool];
        let bytes = &self.pools[pool][at..];
        let row = shape[1].next_multiple_of(self.weight_type.block_values());
        let view = MatrixView::new(bytes, self.weight_type, shape, [row.into(), 1]);
        HostWeights::View(view.expect("a window inside the pool"))
    }
}

impl ExpertSource for Pool {
    fn matrix(&self, expert: u32, projection: Projection) -> Result<HostWeights<'_>, Error> {
        Ok(Self::matrix(self, expert, projection))
    }

    fn types(&self) -> Result<[ExpertTypes; 2], Error> {
        Ok([self.weight_type.into(); 2])
    }
}
