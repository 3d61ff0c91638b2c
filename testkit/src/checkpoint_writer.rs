//! Writes checkpoints of synthetic weights: LLaDA2's names, layout and `config.json`, in any of the
//! ways in which experts are stored. Values are made as they are written, so that a layer of any
//! size takes little memory; they depend on the seed, the layer, the expert and the projection
//! alone, so that every layout has the same weights.
//!
//! Experts are uniform, with a deviation of 1 / sqrt(in), which keeps activations near 1. Routers
//! are normal with a deviation of 2 / sqrt(D), so that logits of standard normal hidden states have
//! a deviation of 2. No linear router gives logits of a mean other than 0 for states whose mean is
//! 0: for sigmoid scores every expert's first weight is -3, and logits have a mean of -3 where the
//! first value of the states is 1.
use half::bf16;
use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};
use rand_distr::StandardNormal;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;
use std::fs::File;
use std::io::{BufWriter, Error, Result, Write};
use std::ops::Range;
use std::path::Path;
use wgmoe::layer::{BLOCK, LayerConfig};
use wgmoe::routing::GateRule;
use wgmoe::routing::{Activation, BlockRule, Routing, Score, TokenChoice};
use wgmoe::weights::Projection;

/// How the routed experts are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A tensor for each matrix of each expert
    Each,
    /// One tensor of all experts for each projection
    Stacked,
    /// The same, gate and up in one
    Fused,
}

impl Layout {
    pub const ALL: [Self; 3] = [Self::Each, Self::Stacked, Self::Fused];

    /// As an option of a program says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Each => "each",
            Self::Stacked => "stacked",
            Self::Fused => "fused",
        }
    }
}

impl std::str::FromStr for Layout {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        let found = Self::ALL.into_iter().find(|layout| layout.name() == name);
        found.ok_or_else(|| "one of each, stacked, fused".into())
    }
}

/// What to write.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub config: LayerConfig,
    /// MoE layers, behind the dense ones, of which nothing is written.
    pub layers: u32,
    pub dense: u32,
    pub layout: Layout,
    pub shards: usize,
    pub seed: u64,
}

/// One matrix; a tensor is one or several in a row.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Matrix {
    Router,
    Bias,
    Expert(u32, Projection),
    Shared(Projection),
}

struct Tensor {
    name: String,
    layer: u32,
    shape: Vec<usize>,
    matrices: Vec<Matrix>,
}

impl Tensor {
    fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * 2
    }
}

pub(crate) fn token_choice(config: &LayerConfig) -> Result<TokenChoice> {
    match config.routing {
        Routing::TokenChoice(rule) => Ok(rule),
        _ => Err(Error::other(
            "its routing is not token choice, for which alone config.json has fields",
        )),
    }
}

impl Plan {
    /// The `config.json`. Only fields about MoE layers.
    pub fn config(&self) -> Result<serde_json::Value> {
        let LayerConfig { hidden, intermediate, experts, shared_experts, activation, .. } =
            self.config;
        let rule = token_choice(&self.config)?;
        let groups = rule.groups.map_or([1, 1], |groups| [groups.count, groups.per_token]);
        let mut config = json!({
            "model_type": "llada2_moe",
            "hidden_size": hidden,
            "moe_intermediate_size": intermediate,
            "num_experts": experts,
            "num_experts_per_tok": rule.experts_per_token,
            "num_shared_experts": shared_experts,
            "num_hidden_layers": self.dense + self.layers,
            "first_k_dense_replace": self.dense,
            "n_group": groups[0],
            "topk_group": groups[1],
            "routed_scaling_factor": rule.scale,
            "norm_topk_prob": rule.gate == GateRule::Normalised,
            "score_function": if rule.score == Score::Sigmoid { "sigmoid" } else { "softmax" },
            "moe_router_enable_expert_bias": rule.score == Score::Sigmoid,
            "hidden_act": if activation == Activation::Silu { "silu" } else { "gelu_pytorch_tanh" },
            "torch_dtype": "bfloat16",
        });
        match rule.coreset {
            None => {}
            Some(BlockRule::Capacity(capacity)) => {
                config["expert_capacity"] = capacity.into();
                config["block_size"] = BLOCK.into();
            }
            Some(_) => return Err(Error::other("config.json has no field for its block rule")),
        }
        Ok(config)
    }

    fn tensors(&self) -> Result<Vec<Tensor>> {
        let LayerConfig { hidden, intermediate, experts, shared_experts, .. } = self.config;
        let [d, f, e] = [hidden, intermediate, experts].map(|n| n as usize);
        let sigmoid = token_choice(&self.config)?.score == Score::Sigmoid;
        let of =
            |p: Projection, f: usize| if p == Projection::Down { vec![d, f] } else { vec![f, d] };
        let mut tensors = vec![];
        for layer in self.dense..self.dense + self.layers {
            let mut add = |name: &str, shape: Vec<usize>, matrices: Vec<Matrix>| {
                let name = format!("model.layers.{layer}.mlp.{name}");
                tensors.push(Tensor { name, layer, shape, matrices });
            };
            add("gate.weight", vec![e, d], vec![Matrix::Router]);
            if sigmoid {
                add("gate.expert_bias", vec![e], vec![Matrix::Bias]);
            }
            let stack = |p: &[Projection]| -> Vec<Matrix> {
                (0..experts).flat_map(|e| p.iter().map(move |&p| Matrix::Expert(e, p))).collect()
            };
            let stacked = |p: Projection| [vec![e], of(p, f)].concat();
            match self.layout {
                Layout::Each => {
                    for e in 0..experts {
                        for (p, word) in PROJECTIONS {
                            let name = format!("experts.{e}.{word}_proj.weight");
                            add(&name, of(p, f), vec![Matrix::Expert(e, p)]);
                        }
                    }
                }
                Layout::Stacked => {
                    for (p, word) in PROJECTIONS {
                        add(&format!("experts.{word}_proj"), stacked(p), stack(&[p]));
                    }
                }
                Layout::Fused => {
                    let both = [Projection::Gate, Projection::Up];
                    add("experts.gate_up_proj", vec![e, 2 * f, d], stack(&both));
                    add("experts.down_proj", stacked(Projection::Down), stack(&[Projection::Down]));
                }
            }
            if shared_experts > 0 {
                for (p, word) in PROJECTIONS {
                    let name = format!("shared_experts.{word}_proj.weight");
                    add(&name, of(p, f * shared_experts as usize), vec![Matrix::Shared(p)]);
                }
            }
        }
        Ok(tensors)
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> Result<u64> {
        Ok(self.tensors()?.iter().map(Tensor::bytes).sum())
    }

    /// Writes `config.json` and the tensors into a directory, which is made. `progress` is told the
    /// bytes that have been written since it was last told.
    pub fn write(&self, dir: &Path, progress: &mut dyn FnMut(u64)) -> Result<()> {
        let tensors = self.tensors()?;
        std::fs::create_dir_all(dir)?;
        let config = serde_json::to_vec_pretty(&self.config()?)?;
        std::fs::write(dir.join("config.json"), config)?;
        if self.shards <= 1 {
            return self.write_file(&dir.join("model.safetensors"), &tensors, progress);
        }
        let mut weight_map = serde_json::Map::new();
        let sizes: Vec<u64> = tensors.iter().map(Tensor::bytes).collect();
        for (i, range) in shares(&sizes, self.shards).into_iter().enumerate() {
            let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, self.shards);
            let tensors = &tensors[range];
            self.write_file(&dir.join(&file), tensors, progress)?;
            weight_map.extend(tensors.iter().map(|t| (t.name.clone(), file.clone().into())));
        }
        let total: u64 = tensors.iter().map(Tensor::bytes).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        std::fs::write(dir.join("model.safetensors.index.json"), serde_json::to_vec_pretty(&index)?)
    }

    fn write_file(
        &self,
        path: &Path,
        tensors: &[Tensor],
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let mut end = 0;
        let infos = tensors
            .iter()
            .map(|tensor| {
                let start = end;
                end += tensor.bytes() as usize;
                let info = TensorInfo {
                    dtype: Dtype::BF16,
                    shape: tensor.shape.clone(),
                    data_offsets: (start, end),
                };
                (tensor.name.clone(), info)
            })
            .collect();
        let header = Metadata::new(Some([("format".into(), "pt".into())].into()), infos)
            .map_err(Error::other)?;
        let mut header = serde_json::to_vec(&header)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        for tensor in tensors {
            for &matrix in &tensor.matrices {
                self.values(tensor.layer, matrix, &mut |values| {
                    progress(values.len() as u64 * 2);
                    file.write_all(bytemuck::cast_slice(values))
                })?;
            }
        }
        file.flush()
    }

    /// Makes the values of a matrix, some whole rows or 2^18 values at a time.
    pub(crate) fn values(
        &self,
        layer: u32,
        matrix: Matrix,
        take: &mut dyn FnMut(&[bf16]) -> Result<()>,
    ) -> Result<()> {
        let LayerConfig { hidden, intermediate, experts, shared_experts, .. } = self.config;
        let [d, f] = [hidden, intermediate].map(|n| n as usize);
        // A stream of numbers for each matrix: whatever layer, expert and projection, no other has
        // its key.
        let (index, projection) = match matrix {
            Matrix::Router => (experts + 1, Projection::Gate),
            Matrix::Bias => (experts + 1, Projection::Up),
            Matrix::Expert(e, p) => (e, p),
            Matrix::Shared(p) => (experts, p),
        };
        let mut key = [0; 32];
        let numbers = [self.seed, layer.into(), index.into(), projection as u64];
        for (bytes, number) in key.chunks_exact_mut(8).zip(numbers) {
            bytes.copy_from_slice(&number.to_le_bytes());
        }
        let mut rng = StdRng::from_seed(key);
        let width = |p| if p == Projection::Down { f } else { d };
        match matrix {
            Matrix::Router => {
                let sigmoid = token_choice(&self.config)?.score == Score::Sigmoid;
                let deviation = 2.0 / (d as f32).sqrt();
                for _ in 0..experts {
                    let mut row: Vec<f32> =
                        (0..d).map(|_| deviation * rng.sample::<f32, _>(StandardNormal)).collect();
                    if sigmoid {
                        row[0] = -3.0;
                    }
                    let row: Vec<bf16> = row.into_iter().map(bf16::from_f32).collect();
                    take(&row)?;
                }
                Ok(())
            }
            Matrix::Bias => {
                let values: Vec<bf16> =
                    (0..experts).map(|_| bf16::from_f32(rng.random_range(-0.01..0.01))).collect();
                take(&values)
            }
            Matrix::Expert(_, p) => uniform(&mut rng, d * f, width(p), take),
            Matrix::Shared(p) => {
                let count = d * f * shared_experts as usize;
                uniform(&mut rng, count, width(p), take)
            }
        }
    }
}

pub(crate) const PROJECTIONS: [(Projection, &str); 3] =
    [(Projection::Gate, "gate"), (Projection::Up, "up"), (Projection::Down, "down")];

/// Uniform values with a deviation of 1 / sqrt(width), from 65,536 levels, a bounded number at a
/// time.
fn uniform(
    rng: &mut StdRng,
    count: usize,
    width: usize,
    take: &mut dyn FnMut(&[bf16]) -> Result<()>,
) -> Result<()> {
    let step = (3.0 / width as f32).sqrt() / 32768.0;
    let mut values = vec![0u16; count.min(1 << 18)];
    let mut left = count;
    while left > 0 {
        let values = &mut values[..left.min(1 << 18)];
        rng.fill_bytes(bytemuck::cast_slice_mut(values));
        for value in values.iter_mut() {
            *value = bf16::from_f32((f32::from(*value) - 32767.5) * step).to_bits();
        }
        take(bytemuck::cast_slice(values))?;
        left -= values.len();
    }
    Ok(())
}

/// Splits tensors of these sizes into stretches of about as many bytes; some are empty where there
/// are fewer tensors.
pub(crate) fn shares(sizes: &[u64], count: usize) -> Vec<Range<usize>> {
    let total: u64 = sizes.iter().sum();
    let mut ends = vec![];
    let mut before = 0;
    for (i, size) in sizes.iter().enumerate() {
        // As many shares end here as lie before the middle of this tensor.
        let middle = before + size / 2;
        while ends.len() + 1 < count
            && middle as u128 * count as u128 >= total as u128 * (ends.len() as u128 + 1)
        {
            ends.push(i);
        }
        before += size;
    }
    ends.resize(count, sizes.len());
    let mut start = 0;
    ends.into_iter().map(|end| std::mem::replace(&mut start, end)..end).collect()
}
