//! Layers whose weights the host keeps, so that the CPU twins and the device compute on the same
//! numbers.
use crate::cases::random;
use crate::statistics::on_every_core;
use half::{bf16, f16};
use wgmoe::layer::cached::ExpertSource;
use wgmoe::layer::{
    self, HostBatch, HostRouter, HostRouting, LayerConfig, MoeLayer, Router, Tensor, cpu_routing,
    cpu_token,
};
use wgmoe::plan::bits;
use wgmoe::weights::{ExpertShape, HostWeights, Projection};
use wgmoe::{Context, ExpertWeights, Gpu, Result, WeightType, wgpu};

/// A matrix of each expert, on the host. The shared experts come last.
pub type Matrices<'a> = dyn Fn(u32, Projection) -> HostWeights<'a> + Sync + 'a;

/// A router without tables: weights `[E, D]`, perhaps a bias `[E]`.
pub fn router(ctx: &Context, weight: &[f32], bias: Option<&[f32]>) -> Result<Router> {
    Ok({
        let mut router = Router::new(Tensor::new(ctx, "router", weight)?);
        router.bias = bias.map(|bias| Tensor::new(ctx, "bias", bias)).transpose()?;
        router
    })
}

/// The same for the twins.
pub fn host_router<'a>(weight: &'a [f32], bias: Option<&'a [f32]>) -> HostRouter<'a> {
    HostRouter { weight, bias, scale_by_count: None, scale_by_expert: None }
}

/// Writes every matrix into new weights, sixteen experts at a time, so that little memory carries
/// them.
pub fn upload(
    gpu: &Gpu,
    ctx: &Context,
    shape: ExpertShape,
    matrices: &Matrices<'_>,
) -> Result<ExpertWeights> {
    let weights = ExpertWeights::new(ctx, shape)?;
    for e in 0..shape.experts {
        for p in Projection::ALL {
            weights.write(&gpu.queue, e, p, matrices(e, p))?;
        }
        gpu.queue.submit([]);
        if e % 16 == 15 {
            gpu.wait()?; // lets wgpu free the memory that carried them
        }
    }
    Ok(weights)
}

/// A token's experts and their gates, from a choice and the gates `[T, E]`.
pub fn chosen(
    assigned: &[u32],
    gates: &[f32],
    [tokens, experts]: [usize; 2],
    t: usize,
) -> Vec<(u32, f32)> {
    let ids = bits::experts_of(assigned, tokens, t);
    ids.into_iter().map(|e| (e as u32, gates[t * experts + e])).collect()
}

/// The twins' output of some tokens of `x [T, D]`, on every core.
pub fn outputs(
    config: &LayerConfig,
    matrices: &Matrices<'_>,
    x: &[f32],
    (assigned, gates): (&[u32], &[f32]),
    sample: &[usize],
) -> Vec<Vec<f32>> {
    let (d, e) = (config.hidden as usize, config.experts as usize);
    on_every_core(sample, |&t| {
        let experts = chosen(assigned, gates, [x.len() / d, e], t);
        cpu_token(config, &|e, p| matrices(e, p), &x[t * d..][..d], &experts)
    })
}

/// Rows of `depth` weights as they are stored. Types of blocks are the crate's own; recorded values of
/// reference implementations hold those down.
pub fn stored(values: &[f32], depth: u32, weight_type: WeightType) -> Vec<f32> {
    match weight_type {
        WeightType::F32 => values.to_vec(),
        WeightType::F16 => values.iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
        WeightType::Bf16 => values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect(),
        _ => weight_type.round(values, depth as usize),
    }
}

/// A small layer of seeded weights: router, perhaps a bias, and every expert, shared ones last.
#[derive(Clone)]
pub struct HostLayer {
    pub config: LayerConfig,
    /// `[E, D]`.
    pub router: Vec<f32>,
    /// `[E]`.
    pub bias: Option<Vec<f32>>,
    /// Gate, up `[F, D]`, down `[D, F]` of each expert.
    pub experts: Vec<[Vec<f32>; 3]>,
}

impl HostLayer {
    pub fn new(config: LayerConfig) -> Self {
        Self {
            config,
            router: random(7, (config.experts * config.hidden) as usize),
            bias: None,
            experts: Self::seeded(&config, 1000),
        }
    }

    /// Matrices of every expert from a seed.
    pub fn seeded(config: &LayerConfig, seed: u64) -> Vec<[Vec<f32>; 3]> {
        let LayerConfig { hidden, intermediate, experts, shared_experts, .. } = *config;
        let size = (hidden * intermediate) as usize;
        let scale = 3.0 / (hidden as f32).sqrt();
        let matrix = |e, p| random(seed + 3 * e + p, size).iter().map(|v| v * scale).collect();
        let all = u64::from(experts + shared_experts);
        (0..all).map(|e| [0, 1, 2].map(|p| matrix(e, p))).collect()
    }

    /// With a bias of at most a tenth.
    pub fn with_bias(self) -> Self {
        let bias = random(2, self.config.experts as usize).iter().map(|v| v * 0.1).collect();
        Self { bias: Some(bias), ..self }
    }

    /// The same with a router whose logit of expert e is value e of the hidden state.
    pub fn scripted(config: LayerConfig) -> Self {
        let width = config.hidden as usize;
        let router = (0..config.experts as usize * width)
            .map(|i| f32::from(i / width == i % width))
            .collect();
        Self { router, ..Self::new(config) }
    }

    /// The experts as a storage type holds them: what the twins must compute on.
    pub fn stored_as(&self, weight_type: WeightType) -> Self {
        let mut rounded = self.clone();
        let LayerConfig { hidden, intermediate, .. } = self.config;
        for matrices in &mut rounded.experts {
            for (matrix, depth) in matrices.iter_mut().zip([hidden, hidden, intermediate]) {
                *matrix = stored(matrix, depth, weight_type);
            }
        }
        rounded
    }

    pub fn matrix(&self, expert: u32, projection: Projection) -> HostWeights<'_> {
        let [gate, up, down] = &self.experts[expert as usize];
        HostWeights::F32(match projection {
            Projection::Gate => gate,
            Projection::Up => up,
            Projection::Down => down,
        })
    }

    pub fn router(&self, ctx: &Context) -> Result<Router> {
        router(ctx, &self.router, self.bias.as_deref())
    }

    pub fn host_router(&self) -> HostRouter<'_> {
        host_router(&self.router, self.bias.as_deref())
    }

    /// Writes the experts as they are now.
    pub fn write(&self, queue: &wgpu::Queue, weights: &ExpertWeights) -> Result<()> {
        for e in 0..self.experts.len() as u32 {
            for p in Projection::ALL {
                weights.write(queue, e, p, self.matrix(e, p))?;
            }
        }
        Ok(())
    }

    /// All experts on the device, in f32.
    pub fn weights(&self, ctx: &Context, queue: &wgpu::Queue) -> Result<ExpertWeights> {
        self.weights_as(ctx, queue, WeightType::F32, None)
    }

    /// The layer on the device, experts in f32.
    pub fn layer(&self, ctx: &Context, queue: &wgpu::Queue) -> Result<MoeLayer> {
        self.layer_as(ctx, queue, WeightType::F32, None)
    }

    /// All experts on the device.
    pub fn weights_as(
        &self,
        ctx: &Context,
        queue: &wgpu::Queue,
        weight_type: WeightType,
        page_limit: Option<u64>,
    ) -> Result<ExpertWeights> {
        let weights = ExpertWeights::with_page_limit(
            ctx,
            self.config.expert_shape(weight_type),
            page_limit.unwrap_or(u64::MAX),
        )?;
        self.write(queue, &weights)?;
        Ok(weights)
    }

    /// The layer on the device.
    pub fn layer_as(
        &self,
        ctx: &Context,
        queue: &wgpu::Queue,
        weight_type: WeightType,
        page_limit: Option<u64>,
    ) -> Result<MoeLayer> {
        let weights = self.weights_as(ctx, queue, weight_type, page_limit)?;
        MoeLayer::new(ctx, self.config, self.router(ctx)?, weights)
    }

    /// What the twins choose, by logits, scores and selection values.
    pub fn routing(&self, batch: HostBatch<'_>, selection: [&[f32]; 3]) -> HostRouting {
        cpu_routing(&self.config, &self.host_router(), batch, selection)
    }

    /// The twins' output of one token.
    pub fn token(&self, x: &[f32], chosen: &[(u32, f32)]) -> Vec<f32> {
        cpu_token(&self.config, &|e, p| self.matrix(e, p), x, chosen)
    }

    /// The twins' output of all tokens under this choice.
    pub fn outputs(&self, x: &[f32], assigned: &[u32], gates: &[f32]) -> Vec<f32> {
        let all: Vec<usize> = (0..x.len() / self.config.hidden as usize).collect();
        outputs(&self.config, &|e, p| self.matrix(e, p), x, (assigned, gates), &all).concat()
    }

    /// The twin of the whole layer.
    pub fn twin(&self, x: &[f32]) -> Vec<f32> {
        let matrix = |e, p| self.matrix(e, p);
        layer::cpu(&self.config, &self.host_router(), HostBatch::default(), &matrix, x)
    }
}

impl ExpertSource for HostLayer {
    fn matrix(&self, expert: u32, projection: Projection) -> Result<HostWeights<'_>> {
        Ok(self.matrix(expert, projection))
    }
}

/// Logits, scores and selection values of a bound layer: the logits where a rule needs no scores.
pub fn selection(bound: &wgmoe::layer::BoundLayer) -> Option<[wgmoe::Slice<'_>; 3]> {
    let logits = bound.logits()?;
    let scores = bound.scores().unwrap_or(logits);
    Some([logits, scores, bound.selection_values().unwrap_or(logits)])
}
