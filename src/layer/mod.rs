//! Whole layers: from hidden states to output, recorded in one pass.
//!
//! | type | what it does |
//! |---|---|
//! | [`MoeLayer`] | routes, runs the experts, combines |
//! | [`MoeRouting`] | the first half: router, choice, plan |
//! | [`MoeExperts`] | the second half, after another router's choice |
//! | [`CachedLayer`](cached::CachedLayer) | a layer with only some of its experts on the device |
//!
//! Each is made once from a [`LayerConfig`] and weights, and bound to a [`Batch`] of slices. Binding
//! checks every argument and makes what is needed; the [`BoundLayer`] is recorded as often as the work
//! is to run.
mod batch;
mod bound;
mod cache;
pub mod cached;
mod choice;
mod config;
mod experts;
mod foreign;
mod padding;
mod planning;
mod route;
mod scratch;
mod twin;

pub use crate::device::Tensor;
pub use batch::{Assignments, BLOCK, Batch, Blocks, Sequences};
pub use bound::BoundLayer;
pub use config::{LayerConfig, Router};
pub use foreign::MoeExperts;
pub use route::MoeRouting;
pub use scratch::Scratch;
pub use twin::{
    HostBatch, HostBlocks, HostExperts, HostRouter, HostRouting, HostSequences, cpu, cpu_routing,
    cpu_token,
};

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
    /// context has not made yet.
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
        let routing = MoeRouting::new(ctx, config, router)?;
        let shape = weights.shape();
        let expected =
            config.expert_shape(shape.types).with_last_types(shape.last, shape.last_types);
        if shape != expected {
            return Err(Error::invalid("weights", format!("{shape:?} do not fit {config:?}")));
        }
        Ok(Self { routing, experts: Experts::new(ctx, config.activation, weights)? })
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
    /// Slices that do not fit, an argument that the rule does not use, or scratch over the device's
    /// limits ([`Error`]).
    pub fn bind(&self, batch: &Batch<'_>) -> Result<BoundLayer> {
        let in_out = self.experts.in_out(batch)?;
        let scratch = Scratch::of(batch.scratch, self.context())?;
        let mut bound = self.routing.bind_of(&batch.with_scratch(&scratch))?;
        self.experts.extend(&mut bound, in_out, &scratch)?;
        Ok(bound)
    }
}
