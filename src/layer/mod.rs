//! Whole layers: from hidden states to output, recorded in one pass.
//!
//! | type | what it does |
//! |---|---|
//! | [`MoeLayer`] | routes, runs the experts, combines |
//! | [`MoeRouting`] | the first half: router, choice, plan |
//! | [`MoeExperts`] | the second half, after another router's choice |
//! | [`MoeLayer::bind_training`] | a forward pass that keeps what its backward pass reads, and that pass |
//! | [`CachedLayer`](cached::CachedLayer) | a layer with only some of its experts on the device |
//!
//! Each is made once from a [`LayerConfig`] and weights, and bound to a [`Batch`] of slices. Binding
//! checks every argument and makes what is needed; the [`BoundLayer`] is recorded as often as the work
//! is to run.
//!
//! ```
//! use wgmoe::layer::{Batch, LayerConfig, MoeLayer, Router, Tensor};
//! use wgmoe::plan::Stats;
//! use wgmoe::routing::TokenChoice;
//! use wgmoe::{Context, ExpertWeights, WeightType};
//! # fn main() -> wgmoe::Result<()> {
//! # let Ok(gpu) = wgmoe::Gpu::new() else { return Ok(()) };
//! let ctx = Context::new(&gpu.device)?;
//! // Hidden size 64, experts of size 32, 8 experts of which each token takes 2.
//! let config = LayerConfig::new(64, 32, 8, TokenChoice::new(2));
//! let weights = ExpertWeights::new(&ctx, config.expert_shape(WeightType::F32))?; // then `write`
//! let router = Router::new(Tensor::new(&ctx, "router", &[0.5f32; 8 * 64])?);
//! let layer = MoeLayer::new(&ctx, config, router, weights)?;
//!
//! // Once for a pair of buffers: 4 tokens.
//! let (hidden, out) = (gpu.upload(&[1f32; 4 * 64]), gpu.upload(&[0f32; 4 * 64]));
//! let bound = layer.bind(&Batch::new(&hidden, 4).into_out(&out))?;
//! // Every step.
//! let mut encoder = gpu.device.create_command_encoder(&Default::default());
//! bound.encode(&mut encoder);
//! gpu.queue.submit([encoder.finish()]);
//!
//! let stats = Stats::from_words(&gpu.download(bound.stats())?)?;
//! assert_eq!(stats.slots, 8);
//! # Ok(())
//! # }
//! ```
//!
//! [`cpu`] is the layer's CPU twin.
mod batch;
mod bound;
pub mod cached;
mod choice;
mod config;
mod cut;
mod experts;
mod foreign;
mod padding;
mod part;
mod planning;
mod route;
mod scratch;
mod training;
mod training_batch;
mod training_bytes;
mod twin;
mod twin_backward;

pub use crate::device::Tensor;
pub use batch::{Assignments, BLOCK, Batch, Blocks, KeptCoresets, Sequences};
pub use bound::BoundLayer;
pub use config::{LayerConfig, Router};
pub use foreign::MoeExperts;
pub use part::BoundPart;
pub use route::MoeRouting;
pub use scratch::Scratch;
pub use training::BoundBackward;
pub use training_batch::{Losses, TrainingBatch};
pub use training_bytes::{TrainingBytes, TrainingSizes};
pub use twin::{
    HostBatch, HostBlocks, HostExperts, HostRouter, HostRouting, HostSequences, cpu, cpu_routing,
    cpu_token,
};
pub use twin_backward::{HostForward, HostGradients, cpu_backward};

use crate::device::both;
use crate::error::not_zero;
use crate::routing::Routing;
use crate::{Context, Error, ExpertWeights, Result};
use experts::Experts;

/// A layer: its kernels, compiled, and its weights. Clones share both.
#[derive(Clone, Debug)]
pub struct MoeLayer {
    routing: MoeRouting,
    experts: Experts,
}

impl MoeLayer {
    /// A layer from its configuration and weights. Compiles every kernel it can need, those that the
    /// context has not made yet; those for f16 and bf16 wait for a `bind` of such slices.
    ///
    /// # Errors
    ///
    /// A rule that makes no sense ([`Routing::check`]), weights or router tensors of another shape,
    /// or what wgpu refuses.
    pub fn new(
        ctx: &Context,
        config: LayerConfig,
        router: Router,
        weights: ExpertWeights,
    ) -> Result<Self> {
        not_zero(&[("intermediate", config.intermediate)])?;
        MoeRouting::check(&config, &router)?;
        let shape = weights.shape();
        let expected =
            config.expert_shape(shape.types).with_last_types(shape.last, shape.last_types);
        if shape != expected {
            return Err(Error::invalid("weights", format!("{shape:?} do not fit {config:?}")));
        }
        let (routing, experts) = both(
            || MoeRouting::new(ctx, config, router),
            || Experts::new(ctx, config.activation, weights),
        );
        Ok(Self { routing: routing?, experts: experts? })
    }

    /// The same router and experts under another rule; the weights' pages are shared, not copied.
    ///
    /// # Errors
    ///
    /// As [`MoeLayer::new`].
    pub fn with_routing(&self, routing: impl Into<Routing>) -> Result<Self> {
        let config = self.config().with_routing(routing);
        let routing = MoeRouting::new(self.context(), config, self.router().clone())?;
        Ok(Self { routing, experts: self.experts.clone() })
    }

    /// The same router and experts with the kernels of another context of their device, so in another
    /// [`Variant`](crate::Variant); the weights' pages are shared, not copied.
    ///
    /// # Errors
    ///
    /// As [`MoeLayer::new`].
    pub fn with_context(&self, ctx: &Context) -> Result<Self> {
        Self::new(ctx, *self.config(), self.router().clone(), self.weights().clone())
    }

    /// The context that the layer was made from.
    pub fn context(&self) -> &Context {
        &self.experts.ctx
    }

    /// The configuration.
    pub fn config(&self) -> &LayerConfig {
        self.routing.config()
    }

    /// The weights.
    pub fn weights(&self) -> &ExpertWeights {
        &self.experts.weights
    }

    /// The router's own weights.
    pub fn router(&self) -> &Router {
        self.routing.router()
    }

    /// Makes what is needed to run the layer on these slices. Zero tokens make empty work.
    ///
    /// # Errors
    ///
    /// Slices that do not fit, an argument that the rule does not use, scratch over the device's limits, or
    /// a `scratch_limit` that is too small, with the least that would do ([`Error`]).
    pub fn bind(&self, batch: &Batch<'_>) -> Result<BoundLayer> {
        let in_out = self.experts.in_out(batch)?;
        let scratch = Scratch::of(batch.scratch, self.context())?.counting();
        let mut bound = self.routing.bind_of(&batch.with_scratch(&scratch))?;
        self.experts.extend(&mut bound, in_out, &scratch)?;
        Ok(bound)
    }
}
