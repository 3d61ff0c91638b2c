//! Layers from checkpoints: safetensors and GGUF files (feature `checkpoint`).
//!
//! A checkpoint is a directory with `config.json` and safetensors files, as Hugging Face has them, or
//! a GGUF file, as llama.cpp has them; nothing but [`Checkpoint::open`] tells one from the other. Files are mapped, not read: an expert's
//! matrix is a view of the map, in any of the layouts of [`Names`], and is packed straight into
//! memory that the device copies from. Whatever a layer's size, the host allocates a few tens of
//! megabytes.
//!
//! | call | what it loads |
//! |---|---|
//! | [`Checkpoint::load_layer`] | a layer with all its experts |
//! | [`Checkpoint::load_cached`] | as many experts as a budget holds; the others stay in the files |
//! | [`Checkpoint::load_router`] | the router alone |
//!
//! ```no_run
//! # fn main() -> wgmoe::Result<()> {
//! use wgmoe::checkpoint::{Checkpoint, Load};
//! let gpu = wgmoe::Gpu::new()?;
//! let ctx = wgmoe::Context::new(&gpu.device)?;
//! let checkpoint = Checkpoint::open("LLaDA2.0-mini")?;
//! let layer = checkpoint.load_layer(&ctx, &gpu.queue, 1, Load::default())?;
//! # Ok(())
//! # }
//! ```
mod config;
mod files;
mod fp8;
mod gguf;
mod header;
mod load;
mod matrix;
mod names;

pub use config::Config;
pub use load::{Load, Progress, load_layer, load_layers};
pub use names::{ExpertNames, Names};

use crate::layer::cached::ExpertSource;
use crate::weights::{ExpertShape, ExpertTypes, HostWeights, Projection};
use crate::{Error, LayerConfig, Result, WeightType};
use files::Files;
use matrix::Size;
use names::fill;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A layer's experts where they lie in a mapped checkpoint.
#[derive(Clone, Debug)]
pub struct CheckpointExperts {
    /// The checkpoint.
    pub checkpoint: Arc<Checkpoint>,
    /// Number of the layer.
    pub layer: u32,
}

impl ExpertSource for CheckpointExperts {
    fn matrix(&self, expert: u32, projection: Projection) -> Result<HostWeights<'_>> {
        self.checkpoint.expert(self.layer, expert, projection)
    }

    /// Those of the files.
    fn types(&self) -> Result<[ExpertTypes; 2]> {
        let shape = self.checkpoint.expert_shape(self.layer)?;
        Ok([shape.types, shape.last_types])
    }
}

/// A checkpoint on disk, its files mapped.
#[derive(Debug)]
pub struct Checkpoint {
    config_path: PathBuf,
    config: Config,
    files: Files,
    names: Vec<Names>,
}

/// The error about a file, and a tensor or field in it.
fn failed(file: &Path, item: Option<&str>, reason: impl Into<String>) -> Error {
    Error::Checkpoint {
        file: file.display().to_string(),
        item: item.map(str::to_string),
        reason: reason.into(),
    }
}

impl Checkpoint {
    /// Opens a directory: reads its `config.json`, maps `model.safetensors` or all files that
    /// `model.safetensors.index.json` names, and checks their headers. Tensors are found by
    /// [`Names::known`].
    ///
    /// Or opens a GGUF file, or a directory with one and no safetensors files: its metadata says what
    /// `config.json` says elsewhere. Of a split one (`NAME-00001-of-00003.gguf`) the first part is
    /// the one to open, and the others lie beside it. Little-endian, versions 2 and 3, of the
    /// architectures `bailingmoe2` (LLaDA2.x), `llada-moe`, `qwen3moe` (SDAR too) and `qwen3vlmoe`.
    /// Tensors are found by [`Names::gguf`].
    ///
    /// The files must not be cut short while they are open: reading what is no longer there ends
    /// the process.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`], naming the file, for what is missing or malformed.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::opened(path.as_ref(), None)
    }

    /// As [`Checkpoint::open`], tensors called by the first of `names` whose tensors are there.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::open`].
    pub fn with_names(path: impl AsRef<Path>, names: Vec<Names>) -> Result<Self> {
        Self::opened(path.as_ref(), Some(names))
    }

    fn opened(path: &Path, names: Option<Vec<Names>>) -> Result<Self> {
        if let Some(file) = gguf::find(path)? {
            let (files, config) = gguf::open(file)?;
            let names = names.unwrap_or_else(Names::gguf);
            return Ok(Self { config_path: files.list.clone(), config, files, names });
        }
        let config_path = path.join("config.json");
        let config = Config::from_json(&config_path, &files::read_json_file(&config_path)?)?;
        let names = names.unwrap_or_else(Names::known);
        Ok(Self { config_path, config, files: Files::open(path)?, names })
    }

    /// What `config.json` or a GGUF file's metadata says.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Shape and routing of an MoE layer.
    pub fn layer_config(&self) -> &LayerConfig {
        &self.config.layer
    }

    /// Shape of a layer's experts, in the storage types of the file, those of the shared experts
    /// apart. Where a file has the gate and the up projection in two types, or the same projection of
    /// two routed experts, they are f32 here, which holds any of them exactly.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::expert`].
    pub fn expert_shape(&self, layer: u32) -> Result<ExpertShape> {
        // One type, or f32 where there are several.
        let one = |all: Range<u32>, projections: &[Projection]| -> Result<WeightType> {
            let mut found = None;
            for expert in all {
                for &projection in projections {
                    let this = self.expert(layer, expert, projection)?.weight_type();
                    if found.replace(this).is_some_and(|other| other != this) {
                        return Ok(WeightType::F32);
                    }
                }
            }
            Ok(found.unwrap_or(WeightType::F32))
        };
        let types = |all: Range<u32>| -> Result<ExpertTypes> {
            let gate_up = one(all.clone(), &[Projection::Gate, Projection::Up])?;
            Ok(ExpertTypes { gate_up, down: one(all, &[Projection::Down])? })
        };
        let LayerConfig { experts, shared_experts, .. } = self.config.layer;
        let shape = self.config.layer.expert_shape(types(0..experts)?);
        if shared_experts == 0 {
            return Ok(shape);
        }
        let shared = types(experts..experts + shared_experts)?;
        Ok(shape.with_last_types(shared_experts, shared))
    }

    /// A layer's router `[E, D]`.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`], naming file and tensor.
    pub fn router(&self, layer: u32) -> Result<HostWeights<'_>> {
        let LayerConfig { experts, hidden, .. } = self.config.layer;
        let name = fill(&self.names(layer)?.router, layer, 0);
        self.plain(&name, [experts, hidden], &[experts, hidden])
    }

    /// A layer's router bias `[E]`, if it has one.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`], naming file and tensor.
    pub fn bias(&self, layer: u32) -> Result<Option<HostWeights<'_>>> {
        let experts = self.config.layer.experts;
        let name = fill(&self.names(layer)?.bias, layer, 0);
        let wanted = self.config.bias.unwrap_or_else(|| self.files.has(&name));
        wanted.then(|| self.plain(&name, [1, experts], &[experts])).transpose()
    }

    /// A matrix of an expert, `[out, in]`, where it lies in the file; shared experts follow the
    /// routed ones.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`], naming file and tensor: a layer that is dense or not there; a tensor
    /// that is missing, of another shape or of a type that is no [`WeightType`]; 8-bit floats
    /// without scales.
    /// [`Error::Invalid`] for an expert that is not there.
    pub fn expert(
        &self,
        layer: u32,
        expert: u32,
        projection: Projection,
    ) -> Result<HostWeights<'_>> {
        let LayerConfig { hidden, intermediate, experts, shared_experts, .. } = self.config.layer;
        let all = experts + shared_experts;
        if expert >= all {
            return Err(Error::invalid("expert", format!("{expert} of {all}")));
        }
        let names = self.names(layer)?;
        let size = Size { hidden, intermediate, part: intermediate, at: 0 };
        match expert.checked_sub(experts) {
            None => self.matrix(&names.experts, layer, Some([expert, experts]), projection, size),
            // One FFN of m F: some rows of gate and up, some columns of down.
            Some(m) => {
                let whole = intermediate * shared_experts; // `Config` bounds both
                let size = Size { intermediate: whole, at: m * intermediate, ..size };
                self.matrix(&names.shared, layer, None, projection, size)
            }
        }
    }

    /// Checks that all that a layer needs is there, in the shapes it should have.
    ///
    /// # Errors
    ///
    /// [`Error::Checkpoint`], naming file and tensor.
    pub fn check_layer(&self, layer: u32) -> Result<()> {
        self.router(layer)?;
        self.bias(layer)?;
        let LayerConfig { experts, shared_experts, .. } = self.config.layer;
        for expert in 0..experts + shared_experts {
            for projection in Projection::ALL {
                self.expert(layer, expert, projection)?;
            }
        }
        Ok(())
    }

    /// The names by which a layer is there; where it is not, those that most of it has.
    fn names(&self, layer: u32) -> Result<&Names> {
        let Config { layers, .. } = self.config;
        let fail = |reason| Err(failed(&self.config_path, Some("layer"), reason));
        if layer >= layers {
            return fail(format!("{layer} of {layers}"));
        }
        if self.config.is_dense(layer) {
            return fail(format!("{layer} is dense: it has no experts"));
        }
        let there = |names: &&Names| {
            let all = names.experts.all().into_iter().chain([&*names.router]);
            all.filter(|name| self.files.has(&fill(name, layer, 0))).count()
        };
        // The first of the best, so backwards: `max_by_key` takes the last.
        let best = self.names.iter().rev().max_by_key(there);
        best.ok_or_else(|| Error::invalid("names", "none are given"))
    }
}
