//! One layer of a checkpoint, for an example.
use std::path::Path;
use wgmoe::checkpoint::{Checkpoint, Load};
use wgmoe::layer::{LayerConfig, MoeLayer};
use wgmoe::weights::{HostWeights, Projection};
use wgmoe::{Context, Error, WeightType, wgpu};

/// A layer that is known to be all there.
pub(crate) struct StoredLayer {
    checkpoint: Checkpoint,
    number: u32,
}

impl StoredLayer {
    /// A layer of the checkpoint in this directory, by default its first with experts.
    pub(crate) fn open(dir: &Path, number: Option<u32>) -> Result<Self, String> {
        let checkpoint = Checkpoint::open(dir).map_err(|e| e.to_string())?;
        let config = checkpoint.config();
        let number = number.or_else(|| (0..config.layers).find(|&layer| !config.is_dense(layer)));
        let number = number.ok_or_else(|| format!("{}: every layer is dense", dir.display()))?;
        checkpoint.check_layer(number).map_err(|e| e.to_string())?;
        Ok(Self { checkpoint, number })
    }

    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    pub(crate) fn config(&self) -> &LayerConfig {
        self.checkpoint.layer_config()
    }

    /// The router's weights and bias, in f32.
    pub(crate) fn router(&self) -> (Vec<f32>, Option<Vec<f32>>) {
        let values = |v: HostWeights<'_>| (0..v.len()).map(|i| v.get(i)).collect();
        let router = self.checkpoint.router(self.number).expect(CHECKED);
        let bias = self.checkpoint.bias(self.number).expect(CHECKED);
        (values(router), bias.map(values))
    }

    pub(crate) fn expert(&self, expert: u32, projection: Projection) -> HostWeights<'_> {
        self.checkpoint.expert(self.number, expert, projection).expect(CHECKED)
    }

    /// Loads it; `progress` is told the bytes that are done, and all of them.
    pub(crate) fn load(
        &self,
        ctx: &Context,
        queue: &wgpu::Queue,
        weight_type: Option<WeightType>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<MoeLayer, Error> {
        let mut progress = |now: wgmoe::checkpoint::Progress| progress(now.done, now.total);
        let load = Load { weight_type, progress: Some(&mut progress), ..Load::default() };
        self.checkpoint.load_layer(ctx, queue, self.number, load)
    }
}

const CHECKED: &str = "checked when it was opened";
