//! Layers without a model: weights that are cheap to make, routers whose scores look like a model's, rules for fewer experts.
use half::bf16;
use rand::{Rng, rngs::StdRng};
use rand_distr::StandardNormal;
use wgmoe::LayerConfig;
use wgmoe::routing::Groups;
use wgmoe::routing::{BlockRule, Routing, SequenceTop, TokenChoice};
use wgmoe::weights::{HostWeights, Projection};

/// Share of a block's own part in the variance of its tokens' router logits: the one thing fitted, to 69.5 experts a block.
pub(crate) const RHO: f32 = 0.6;

/// A router `[E, D]` that makes of hidden states of which value 0 is 1 and the others are standard normal the logits
/// `2 z - 3`, z standard normal and correlated as the hidden states are.
pub(crate) fn router(rng: &mut StdRng, settings: &LayerConfig) -> Vec<f32> {
    let LayerConfig { hidden, experts, .. } = *settings;
    let deviation = 2.0 / (hidden as f32).sqrt();
    let mut router: Vec<f32> =
        (0..experts * hidden).map(|_| deviation * rng.sample::<f32, _>(StandardNormal)).collect();
    router.iter_mut().step_by(hidden as usize).for_each(|w| *w = -3.0);
    router
}

/// Expert weights in bf16: windows of two pools, so that a layer of gigabytes takes megabytes here.
pub(crate) struct Experts {
    settings: LayerConfig,
    inner: Vec<bf16>,
    outer: Vec<bf16>,
}

/// From one matrix's window to the next; prime, so that no row of one is a row of another nearby.
const STRIDE: usize = 1009;

impl Experts {
    pub(crate) fn new(rng: &mut StdRng, settings: LayerConfig) -> Self {
        let LayerConfig { hidden, intermediate, experts, shared_experts, .. } = settings;
        let count =
            (hidden * intermediate) as usize + 3 * (experts + shared_experts) as usize * STRIDE;
        let mut pool = |width: u32| -> Vec<bf16> {
            let most = (3.0 / width as f32).sqrt();
            (0..count).map(|_| bf16::from_f32(rng.random_range(-most..most))).collect()
        };
        let (inner, outer) = (pool(hidden), pool(intermediate));
        Self { settings, inner, outer }
    }

    pub(crate) fn matrix(&self, e: u32, projection: Projection) -> HostWeights<'_> {
        let count = (self.settings.hidden * self.settings.intermediate) as usize;
        let (pool, place) = match projection {
            Projection::Gate => (&self.inner, 0),
            Projection::Up => (&self.inner, 1),
            Projection::Down => (&self.outer, 2),
        };
        HostWeights::Bf16(&pool[(3 * e as usize + place) * STRIDE..][..count])
    }
}

/// A rule for fewer experts: counts of experts shrink in proportion, groups keep their size; where those no longer divide
/// the experts, there are none.
pub(crate) fn shrink(routing: Routing, from: u32, to: u32) -> Routing {
    let part = |n: u32| (n * to / from).max(1);
    match routing {
        Routing::TokenChoice(rule) => Routing::TokenChoice(TokenChoice {
            top: rule.top.min(to),
            groups: rule.groups.and_then(|Groups { count, top }| {
                let size = from / count;
                let groups = to / size;
                let top = (groups * top / count).max(rule.top.div_ceil(size)).max(1);
                (to.is_multiple_of(size) && top <= groups).then_some(Groups { count: groups, top })
            }),
            coreset: rule.coreset.map(|block| match block {
                BlockRule::Mass { p, floor } => BlockRule::Mass { p, floor: part(floor) },
                BlockRule::Capacity(n) => BlockRule::Capacity(part(n)),
                BlockRule::Vote(n) => BlockRule::Vote(part(n)),
                BlockRule::Union(n) => BlockRule::Union(n.min(to)),
            }),
            ..rule
        }),
        Routing::SequenceTop(rule) => {
            Routing::SequenceTop(SequenceTop { top: rule.top.min(to), ..rule })
        }
        other => other,
    }
}
