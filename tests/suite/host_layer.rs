//! A layer whose weights the host keeps, for tests that build it more than once.
use crate::common::random;
use wgmoe::layer::{LayerConfig, MoeLayer, Router, Tensor};
use wgmoe::weights::{HostWeights, Projection};
use wgmoe::{Context, ExpertWeights, Gpu, WeightType};

/// Seeded weights of every expert, shared ones included.
#[derive(Clone)]
pub(crate) struct HostLayer {
    pub(crate) settings: LayerConfig,
    router: Vec<f32>,
    experts: Vec<[Vec<f32>; 3]>,
}

impl HostLayer {
    pub(crate) fn new(settings: LayerConfig) -> Self {
        let LayerConfig { hidden, intermediate, experts, shared_experts, .. } = settings;
        let size = (hidden * intermediate) as usize;
        let scale = 3.0 / (hidden as f32).sqrt();
        let matrix = |e, p| random(1000 + 3 * e + p, size).iter().map(|v| v * scale).collect();
        Self {
            settings,
            router: random(7, (experts * hidden) as usize),
            experts: (0..u64::from(experts + shared_experts))
                .map(|e| [0, 1, 2].map(|p| matrix(e, p)))
                .collect(),
        }
    }

    /// The same with a router whose logit of expert e is value e of the hidden state.
    pub(crate) fn scripted(settings: LayerConfig) -> Self {
        let width = settings.hidden as usize;
        let router = (0..settings.experts as usize * width)
            .map(|i| f32::from(i / width == i % width))
            .collect();
        Self { router, ..Self::new(settings) }
    }

    pub(crate) fn matrix(&self, expert: u32, projection: Projection) -> HostWeights<'_> {
        let place = Projection::ALL.iter().position(|&p| p == projection).unwrap();
        HostWeights::F32(&self.experts[expert as usize][place])
    }

    pub(crate) fn router(&self, ctx: &Context) -> Router {
        Router {
            weight: Tensor::new(ctx, "router", &self.router).unwrap(),
            bias: None,
            by_count: None,
            by_expert: None,
        }
    }

    /// All experts on the device.
    pub(crate) fn resident(
        &self,
        gpu: &Gpu,
        ctx: &Context,
        weight_type: WeightType,
        page_limit: Option<u64>,
    ) -> MoeLayer {
        let shape = self.settings.expert_shape(weight_type);
        let weights = ExpertWeights::new(ctx, shape, page_limit).unwrap();
        for e in 0..shape.experts {
            for p in Projection::ALL {
                weights.write(&gpu.queue, e, p, self.matrix(e, p)).unwrap();
            }
        }
        MoeLayer::new(ctx, self.settings, self.router(ctx), weights).unwrap()
    }
}
