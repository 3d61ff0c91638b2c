//! Loading what a checkpoint holds onto a device.
use super::{Checkpoint, CheckpointExperts};
use crate::layer::cached::{CacheOptions, CachedLayer, CachedModel, ModelLayer};
use crate::layer::{MoeLayer, Router};
use crate::weights::upload::Uploader;
use crate::weights::{ExpertWeights, Projection};
use crate::{Context, Result, WeightType};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// How to load layers. The default keeps the files' type, pages as large as the device allows, and
/// says nothing.
#[derive(Default)]
pub struct Load<'a> {
    /// Storage type on the device; those of the files ([`Checkpoint::expert_shape`]) if absent.
    pub weight_type: Option<WeightType>,
    /// As [`ExpertWeights::new`] takes it.
    pub page_limit: Option<u64>,
    /// Called after each matrix.
    pub progress: Option<&'a mut dyn FnMut(Progress)>,
}

impl std::fmt::Debug for Load<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { weight_type, page_limit, .. } = self;
        f.debug_struct("Load")
            .field("weight_type", weight_type)
            .field("page_limit", page_limit)
            .finish_non_exhaustive()
    }
}

/// How far loading a layer has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The layer.
    pub layer: u32,
    /// Bytes of its experts, as the file has them, that are done.
    pub done: u64,
    /// All of them.
    pub total: u64,
}

/// Opens a checkpoint and loads one layer: [`Checkpoint::open`], [`Checkpoint::load_layer`].
///
/// # Errors
///
/// As these two.
pub fn load_layer(
    ctx: &Context,
    queue: &wgpu::Queue,
    path: impl AsRef<Path>,
    layer: u32,
    load: Load<'_>,
) -> Result<MoeLayer> {
    Checkpoint::open(path)?.load_layer(ctx, queue, layer, load)
}

/// Opens a checkpoint and loads some layers: [`Checkpoint::open`], [`Checkpoint::load_layers`].
///
/// # Errors
///
/// As these two.
pub fn load_layers(
    ctx: &Context,
    queue: &wgpu::Queue,
    path: impl AsRef<Path>,
    layers: Range<u32>,
    load: Load<'_>,
) -> Result<Vec<MoeLayer>> {
    Checkpoint::open(path)?.load_layers(ctx, queue, layers, load)
}

impl Checkpoint {
    /// Loads a layer: its router, in f32, and all its experts. Unlike what is recorded, this
    /// submits to `queue` and waits, so that the memory which carries the weights stays under 64
    /// MiB.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::check_layer`], which comes first; as [`ExpertWeights::new`] and
    /// [`MoeLayer::new`].
    pub fn load_layer(
        &self,
        ctx: &Context,
        queue: &wgpu::Queue,
        layer: u32,
        mut load: Load<'_>,
    ) -> Result<MoeLayer> {
        self.load(ctx, queue, layer, &mut load)
    }

    /// As [`Checkpoint::load_layer`], several layers in order.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::load_layer`].
    pub fn load_layers(
        &self,
        ctx: &Context,
        queue: &wgpu::Queue,
        layers: Range<u32>,
        mut load: Load<'_>,
    ) -> Result<Vec<MoeLayer>> {
        // Before the first is on the device.
        for layer in layers.clone() {
            self.check_layer(layer)?;
        }
        layers.map(|layer| self.load(ctx, queue, layer, &mut load)).collect()
    }

    fn load(
        &self,
        ctx: &Context,
        queue: &wgpu::Queue,
        layer: u32,
        load: &mut Load<'_>,
    ) -> Result<MoeLayer> {
        // Sizes are known to be those of tensors in the files before anything is made of these
        // sizes.
        self.check_layer(layer)?;
        let config = self.config.layer;
        let shape = match load.weight_type {
            Some(weight_type) => config.expert_shape(weight_type),
            None => self.expert_shape(layer)?,
        };
        let mut uploader = Uploader::of_files(ctx.device());
        let router = self.upload_router(ctx, queue, layer, &mut uploader)?;
        let limit = load.page_limit.unwrap_or(u64::MAX);
        let weights = ExpertWeights::with_page_limit(ctx, shape, limit)?;
        let all = config.experts + config.shared_experts;
        let mut done = 0;
        let mut total = 0;
        for expert in 0..all {
            for projection in Projection::ALL {
                total += self.expert(layer, expert, projection)?.size();
            }
        }
        for expert in 0..all {
            for projection in Projection::ALL {
                let matrix = self.expert(layer, expert, projection)?;
                done += matrix.size();
                uploader.matrix(queue, &weights, expert, projection, matrix)?;
                if let Some(progress) = &mut load.progress {
                    progress(Progress { layer, done, total });
                }
            }
        }
        uploader.finish(queue)?;
        MoeLayer::new(ctx, config, router, weights)
    }

    /// Loads a layer's router alone, in f32, for engines that run the experts themselves
    /// ([`MoeRouting`](crate::MoeRouting)). Submits to `queue` and waits.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`](crate::Error::Checkpoint), naming file and tensor;
    /// [`Error::Device`](crate::Error::Device) where memory runs out or the device is lost.
    pub fn load_router(&self, ctx: &Context, queue: &wgpu::Queue, layer: u32) -> Result<Router> {
        let mut uploader = Uploader::of_files(ctx.device());
        let router = self.upload_router(ctx, queue, layer, &mut uploader)?;
        uploader.finish(queue)?;
        Ok(router)
    }

    /// Loads a layer whose experts stay in the mapped files until a step needs them. Submits to
    /// `queue` and waits, for the router and the shared experts.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::check_layer`], which comes first, and [`CachedLayer::new`].
    pub fn load_cached(
        self: &Arc<Self>,
        ctx: &Context,
        queue: &wgpu::Queue,
        layer: u32,
        options: CacheOptions,
    ) -> Result<CachedLayer> {
        self.check_layer(layer)?;
        let router = self.load_router(ctx, queue, layer)?;
        let experts = Arc::new(CheckpointExperts { checkpoint: self.clone(), layer });
        CachedLayer::new(ctx, queue, *self.layer_config(), router, experts, options)
    }

    /// Loads those of `layers` that have experts, under one budget; the experts stay in the mapped files until
    /// a step needs them.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::load_cached`] and [`CachedModel::new`].
    pub fn load_cached_model(
        self: &Arc<Self>,
        ctx: &Context,
        queue: &wgpu::Queue,
        layers: Range<u32>,
        options: CacheOptions,
    ) -> Result<CachedModel> {
        let mut all = vec![];
        for layer in layers.filter(|&layer| !self.config.is_dense(layer)) {
            self.check_layer(layer)?;
            let router = self.load_router(ctx, queue, layer)?;
            let experts = Arc::new(CheckpointExperts { checkpoint: self.clone(), layer });
            all.push(ModelLayer::new(*self.layer_config(), router, experts));
        }
        CachedModel::new(ctx, queue, all, options)
    }

    fn upload_router(
        &self,
        ctx: &Context,
        queue: &wgpu::Queue,
        layer: u32,
        uploader: &mut Uploader,
    ) -> Result<Router> {
        let router = Router::new(uploader.floats(ctx, queue, "router", self.router(layer)?)?);
        Ok(match self.bias(layer)? {
            Some(bias) => router.with_bias(uploader.floats(ctx, queue, "bias", bias)?),
            None => router,
        })
    }
}
