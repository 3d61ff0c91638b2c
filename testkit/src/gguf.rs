//! Writes GGUF files: the layout of the format, and checkpoints of synthetic weights in llama.cpp's
//! names. What is written is plain data, so that a test can get any of it wrong.
use crate::checkpoint_writer::{Matrix, PROJECTIONS, Plan, shares, token_choice};
use std::fs::File;
use std::io::{BufWriter, Error, Result, Write};
use std::path::{Path, PathBuf};
use wgmoe::WeightType;
use wgmoe::layer::LayerConfig;
use wgmoe::routing::{GateRule, Score};
use wgmoe::weights::Projection;

/// A value of metadata.
#[derive(Clone, Debug)]
pub enum Value {
    U16(u16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Text(String),
    /// A type and any bytes.
    Raw(u32, Vec<u8>),
}

impl Value {
    fn write(&self, to: &mut Vec<u8>) {
        let (kind, bytes) = match self {
            Self::U16(n) => (2u32, n.to_le_bytes().to_vec()),
            Self::U32(n) => (4, n.to_le_bytes().to_vec()),
            Self::I32(n) => (5, n.to_le_bytes().to_vec()),
            Self::F32(x) => (6, x.to_le_bytes().to_vec()),
            Self::Bool(flag) => (7, vec![u8::from(*flag)]),
            Self::Text(text) => (8, string(text.as_bytes())),
            Self::Raw(kind, bytes) => (*kind, bytes.clone()),
        };
        to.extend(kind.to_le_bytes());
        to.extend(bytes);
    }
}

/// A string as the format has it: its length and its bytes.
pub fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text].concat()
}

/// What a header says of a tensor.
#[derive(Clone, Debug)]
pub struct Info {
    pub name: String,
    /// Fastest first.
    pub shape: Vec<u64>,
    pub kind: u32,
    pub offset: u64,
}

/// A header.
#[derive(Clone, Debug)]
pub struct Header {
    pub magic: [u8; 4],
    pub version: u32,
    /// Tensors and keys that it says there are; those there are if absent.
    pub counts: Option<[u64; 2]>,
    pub values: Vec<(String, Value)>,
    pub tensors: Vec<Info>,
}

impl Default for Header {
    fn default() -> Self {
        Self { magic: *b"GGUF", version: 3, counts: None, values: vec![], tensors: vec![] }
    }
}

impl Header {
    /// Its bytes, without the padding that follows.
    pub fn bytes(&self) -> Vec<u8> {
        let counts = [self.tensors.len() as u64, self.values.len() as u64];
        let mut to = self.magic.to_vec();
        to.extend(self.version.to_le_bytes());
        to.extend(self.counts.unwrap_or(counts).iter().flat_map(|n| n.to_le_bytes()));
        for (key, value) in &self.values {
            to.extend(string(key.as_bytes()));
            value.write(&mut to);
        }
        for Info { name, shape, kind, offset } in &self.tensors {
            to.extend(string(name.as_bytes()));
            to.extend((shape.len() as u32).to_le_bytes());
            to.extend(shape.iter().flat_map(|n| n.to_le_bytes()));
            to.extend(kind.to_le_bytes());
            to.extend(offset.to_le_bytes());
        }
        to
    }
}

/// Where tensors begin: multiples of this.
pub const ALIGNMENT: u64 = 32;

/// A tensor and what it is made of.
struct Tensor {
    name: String,
    layer: u32,
    /// Outermost first.
    shape: Vec<u64>,
    weights: WeightType,
    matrices: Vec<Matrix>,
}

impl Tensor {
    fn row(&self) -> u64 {
        self.shape.last().copied().unwrap_or(1)
    }

    fn bytes(&self) -> u64 {
        let rows: u64 = self.shape.iter().rev().skip(1).product();
        self.weights.row_bytes(self.row() as u32) * rows
    }

    /// ggml's number of its type.
    fn kind(&self) -> Result<u32> {
        let weights = self.weights;
        let [row, block] = [self.row(), weights.block_values().into()];
        if !row.is_multiple_of(block) {
            return Err(Error::other(format!(
                "{}: rows of {row} values are no whole blocks of {block} of {}",
                self.name,
                weights.name()
            )));
        }
        let none = || Error::other(format!("GGUF files have no {}", weights.name()));
        weights.ggml_type().ok_or_else(none)
    }
}

impl Plan {
    /// The metadata. Only keys about MoE layers.
    fn gguf_values(&self) -> Result<Vec<(String, Value)>> {
        let LayerConfig { hidden, intermediate, experts, shared_experts, .. } = self.config;
        let rule = token_choice(&self.config)?;
        if rule.coreset.is_some() {
            return Err(Error::other("GGUF files have no key for its block rule"));
        }
        let arch = "bailingmoe2";
        let mut values = vec![("general.architecture".to_string(), Value::Text(arch.into()))];
        let mut add = |key: &str, value| values.push((format!("{arch}.{key}"), value));
        add("block_count", Value::U32(self.dense + self.layers));
        add("embedding_length", Value::U32(hidden));
        add("expert_count", Value::U32(experts));
        add("expert_used_count", Value::U32(rule.experts_per_token));
        if let Some(groups) = rule.groups {
            add("expert_group_count", Value::U32(groups.count));
            add("expert_group_used_count", Value::U32(groups.per_token));
        }
        add("leading_dense_block_count", Value::U32(self.dense));
        add("expert_feed_forward_length", Value::U32(intermediate));
        if shared_experts > 0 {
            let width = Value::U32(intermediate * shared_experts);
            add("expert_shared_feed_forward_length", width);
        }
        add("expert_shared_count", Value::U32(shared_experts));
        add("expert_weights_scale", Value::F32(rule.scale));
        add("expert_weights_norm", Value::Bool(rule.gate == GateRule::Normalised));
        let sigmoid = rule.score == Score::Sigmoid;
        add("expert_gating_func", Value::U32(if sigmoid { 2 } else { 1 }));
        Ok(values)
    }

    fn gguf_tensors(&self, weights: WeightType) -> Result<Vec<Tensor>> {
        let LayerConfig { hidden, intermediate, experts, shared_experts, .. } = self.config;
        let [d, f, e, m] = [hidden, intermediate, experts, shared_experts].map(u64::from);
        let sigmoid = token_choice(&self.config)?.score == Score::Sigmoid;
        let of =
            |p: Projection, f: u64| if p == Projection::Down { vec![d, f] } else { vec![f, d] };
        let mut tensors = vec![];
        for layer in self.dense..self.dense + self.layers {
            let mut add = |name: &str, shape: Vec<u64>, weights, matrices: Vec<Matrix>| {
                let name = format!("blk.{layer}.{name}");
                tensors.push(Tensor { name, layer, shape, weights, matrices });
            };
            let floats = WeightType::F32;
            add("ffn_gate_inp.weight", vec![e, d], floats, vec![Matrix::Router]);
            if sigmoid {
                add("exp_probs_b.bias", vec![e], floats, vec![Matrix::Bias]);
            }
            for (p, word) in PROJECTIONS {
                let shape = [vec![e], of(p, f)].concat();
                let experts = (0..experts).map(|e| Matrix::Expert(e, p)).collect();
                add(&format!("ffn_{word}_exps.weight"), shape, weights, experts);
            }
            for (p, word) in PROJECTIONS.into_iter().filter(|_| m > 0) {
                let shared = vec![Matrix::Shared(p)];
                add(&format!("ffn_{word}_shexp.weight"), of(p, f * m), weights, shared);
            }
        }
        Ok(tensors)
    }

    /// Bytes of all tensors of a GGUF file.
    pub fn gguf_bytes(&self, weights: WeightType) -> Result<u64> {
        Ok(self.gguf_tensors(weights)?.iter().map(Tensor::bytes).sum())
    }

    /// Writes a GGUF file into a directory, which is made, or the parts of a split one: the same
    /// weights as [`Plan::write`], experts in this type, routers and biases in f32. `progress` is
    /// told the bytes that have been written since it was last told. Returns the file to open.
    pub fn write_gguf(
        &self,
        dir: &Path,
        name: &str,
        weights: WeightType,
        progress: &mut dyn FnMut(u64),
    ) -> Result<PathBuf> {
        let tensors = self.gguf_tensors(weights)?;
        let values = self.gguf_values()?;
        std::fs::create_dir_all(dir)?;
        if self.shards <= 1 {
            let path = dir.join(format!("{name}.gguf"));
            self.write_part(&path, values, &tensors, progress)?;
            return Ok(path);
        }
        let count = self.shards;
        let file = |i: usize| dir.join(format!("{name}-{:05}-of-{count:05}.gguf", i + 1));
        let sizes: Vec<u64> = tensors.iter().map(Tensor::bytes).collect();
        for (i, range) in shares(&sizes, count).into_iter().enumerate() {
            // The model's metadata is in the first part alone, as llama-gguf-split has it.
            let mut values = if i == 0 { values.clone() } else { vec![] };
            values.push(("split.no".into(), Value::U16(i as u16)));
            values.push(("split.count".into(), Value::U16(count as u16)));
            values.push(("split.tensors.count".into(), Value::I32(tensors.len() as i32)));
            self.write_part(&file(i), values, &tensors[range], progress)?;
        }
        Ok(file(0))
    }

    fn write_part(
        &self,
        path: &Path,
        values: Vec<(String, Value)>,
        tensors: &[Tensor],
        progress: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let mut header = Header { values, ..Header::default() };
        let mut offset = 0;
        for tensor in tensors {
            header.tensors.push(Info {
                name: tensor.name.clone(),
                shape: tensor.shape.iter().rev().copied().collect(),
                kind: tensor.kind()?,
                offset,
            });
            offset = (offset + tensor.bytes()).next_multiple_of(ALIGNMENT);
        }
        let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
        let padding = |bytes: u64| vec![0; (bytes.next_multiple_of(ALIGNMENT) - bytes) as usize];
        let header = header.bytes();
        file.write_all(&header)?;
        file.write_all(&padding(header.len() as u64))?;
        for tensor in tensors {
            for &matrix in &tensor.matrices {
                self.values(tensor.layer, matrix, &mut |values| {
                    let values: Vec<f32> = values.iter().map(|v| v.to_f32()).collect();
                    // Whole blocks, if not whole rows.
                    let block = tensor.weights.block_values() as usize;
                    let bytes = tensor.weights.encode(&values, block);
                    progress(bytes.len() as u64);
                    file.write_all(&bytes)
                })?;
            }
            file.write_all(&padding(tensor.bytes()))?;
        }
        file.flush()
    }
}
