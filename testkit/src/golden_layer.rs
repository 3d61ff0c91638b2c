//! Recorded layers of a reference implementation: golden files that hold a whole layer, from hidden states to output. Used
//! by the tests and by `examples/moe_layer.rs`, so it reports what it finds rather than panic.
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::path::PathBuf;
use wgmoe::layer::{HostBatch, HostBlocks, HostRouter, LayerConfig, cpu_routing, cpu_token};
use wgmoe::ops::{logits, scores};
use wgmoe::plan::bits;
use wgmoe::routing::GateRule;
use wgmoe::routing::Groups;
use wgmoe::routing::{BlockRule, Routing, Score, TokenChoice};
use wgmoe::weights::{HostWeights, Projection};
use wgmoe::{Context, ExpertWeights, Gpu, MoeLayer, WeightType, layer};

/// How far an output may be from the recorded one: `ATOL + RTOL |want|`.
pub const ATOL: f32 = 1e-5;
pub const RTOL: f32 = 1e-4;

/// The folder of golden files: the one that `WGMOE_GOLDEN` names, else `tests/golden`.
pub fn folder() -> PathBuf {
    std::env::var_os("WGMOE_GOLDEN").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden")),
        PathBuf::from,
    )
}

/// The header of a `group_limited` or `block_coreset` case.
#[derive(Deserialize)]
struct Header {
    kind: String,
    sequences: u32,
    tokens: u32,
    experts: u32,
    hidden: u32,
    intermediate: u32,
    experts_per_token: u32,
    groups: u32,
    groups_per_token: u32,
    score: String,
    routed_scaling_factor: f32,
    shared_experts: u32,
    /// Tokens of a block; each sequence begins a new one, its last may be short.
    block: Option<u32>,
    top_p: Option<f32>,
    min_coreset: Option<u32>,
}

impl Header {
    fn coreset(&self) -> Option<BlockRule> {
        Some(BlockRule::Mass { p: self.top_p?, floor: self.min_coreset? })
    }

    fn blocks(&self) -> Option<Vec<u32>> {
        let block = self.block.filter(|&n| n > 0)? as usize;
        let starts = (0..self.sequences)
            .flat_map(|b| (0..self.tokens).step_by(block).map(move |t| b * self.tokens + t));
        Some(starts.chain([self.sequences * self.tokens]).collect())
    }
}

/// A recorded layer of LLaDA2: what went in, its weights, what came out.
pub struct Layer {
    pub settings: LayerConfig,
    pub tokens: u32,
    /// `[tokens, D]`.
    pub x: Vec<f32>,
    /// `[E, D]`.
    router_weight: Vec<f32>,
    /// `[E]`.
    bias: Vec<f32>,
    /// Gate, up `[F, D]`, down `[D, F]` of each expert, the shared ones last.
    experts: Vec<[Vec<f32>; 3]>,
    /// Offsets of the blocks, of a block-level rule.
    pub blocks: Option<Vec<u32>>,
    /// `[tokens]`: whether the reference's output is one; not of tokens for which it picked experts arbitrarily.
    pub defined: Vec<bool>,
    /// `[tokens, D]`.
    pub y: Vec<f32>,
}

fn index(projection: Projection) -> usize {
    match projection {
        Projection::Gate => 0,
        Projection::Up => 1,
        Projection::Down => 2,
    }
}

impl Layer {
    /// The layer in a file; none where the file is of another kind or holds no whole layer.
    pub fn read(bytes: &[u8]) -> Result<Option<Self>, String> {
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
        let text = metadata.metadata().as_ref().and_then(|m| m.get("case"));
        let text = text.ok_or("no `case` in the header")?;
        let case: serde_json::Value = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
        let kinds = ["group_limited", "block_coreset"];
        if !kinds.iter().any(|kind| case["kind"] == *kind) || tensors.tensor("y").is_err() {
            return Ok(None);
        }
        let case: Header = serde_json::from_value(case).map_err(|e| e.to_string())?;
        let (coreset, blocks) = (case.coreset(), case.blocks());
        if case.kind == "block_coreset" && (coreset.is_none() || blocks.is_none()) {
            return Err("no rule or no blocks".into());
        }
        let read = |name: &str, shape: &[u32]| -> Result<Vec<f32>, String> {
            let tensor = tensors.tensor(name).map_err(|e| format!("`{name}`: {e}"))?;
            let want: usize = shape.iter().map(|&n| n as usize).product();
            if tensor.dtype() != Dtype::F32 || tensor.data().len() != 4 * want {
                return Err(format!("`{name}`: expected f32 {shape:?}"));
            }
            Ok(bytemuck::pod_collect_to_vec(tensor.data()))
        };
        let (d, f, e, shared) = (case.hidden, case.intermediate, case.experts, case.shared_experts);
        if [d, f, e, case.sequences, case.tokens].contains(&0) {
            return Err("a size of 0".into());
        }
        let tokens = case.sequences * case.tokens;
        let [gate, up, down] =
            [("gate_proj", [e, f, d]), ("up_proj", [e, f, d]), ("down_proj", [e, d, f])]
                .map(|(name, shape)| read(name, &shape));
        let matrices = [gate?, up?, down?];
        let size = (d * f) as usize;
        let mut experts: Vec<[Vec<f32>; 3]> = (0..e as usize)
            .map(|e| [0, 1, 2].map(|p: usize| matrices[p][e * size..][..size].to_vec()))
            .collect();
        if shared > 0 {
            // One FFN of m F is m shared experts of F: rows of gate and up, columns of down.
            let [gate, up, down] = [
                read("shared_gate_proj", &[shared * f, d])?,
                read("shared_up_proj", &[shared * f, d])?,
                read("shared_down_proj", &[d, shared * f])?,
            ];
            for m in 0..shared as usize {
                let rows = |w: &[f32]| w[m * size..][..size].to_vec();
                let columns = down
                    .chunks_exact((shared * f) as usize)
                    .flat_map(|row| row[m * f as usize..][..f as usize].to_vec())
                    .collect();
                experts.push([rows(&gate), rows(&up), columns]);
            }
        }
        let score = match case.score.as_str() {
            "sigmoid" => Score::Sigmoid,
            "softmax" => Score::Softmax,
            other => return Err(format!("score `{other}`")),
        };
        let settings = LayerConfig::new(
            d,
            f,
            e,
            Routing::TokenChoice(TokenChoice {
                score,
                gate: GateRule::Normalised,
                top: case.experts_per_token,
                groups: Some(Groups { count: case.groups, top: case.groups_per_token }),
                scale: case.routed_scaling_factor,
                capacity_factor: None,
                coreset,
            }),
        )
        .with_shared_experts(shared);
        settings.routing.check(e).map_err(|e| e.to_string())?;
        let defined = match tensors.tensor("token_is_defined") {
            Err(_) => vec![true; tokens as usize],
            Ok(t) if t.dtype() == Dtype::U8 && t.data().len() == tokens as usize => {
                t.data().iter().map(|&d| d != 0).collect()
            }
            Ok(_) => return Err(format!("`token_is_defined`: expected u8 [{tokens}]")),
        };
        Ok(Some(Self {
            settings,
            blocks,
            defined,
            tokens,
            x: read("x", &[tokens, d])?,
            router_weight: read("router_weight", &[e, d])?,
            bias: read("expert_bias", &[e])?,
            experts,
            y: read("y", &[tokens, d])?,
        }))
    }

    /// The output on the CPU twins.
    pub fn on_cpu(&self) -> Vec<f32> {
        let LayerConfig { hidden, experts, .. } = self.settings;
        let Routing::TokenChoice(rule) = self.settings.routing else { unreachable!("as read") };
        let (d, e, tokens) = (hidden as usize, experts as usize, self.tokens as usize);
        let logits = logits::cpu(&self.x, &self.router_weight, d);
        let (s, r) = scores::cpu(&logits, e, rule.score, false, Some(&self.bias));
        let router = HostRouter {
            weight: &self.router_weight,
            bias: Some(&self.bias),
            scale_by_count: None,
            scale_by_expert: None,
        };
        let blocks = self.blocks.as_ref().map(|offsets| HostBlocks { offsets, voters: None });
        let batch = HostBatch { sequences: None, blocks };
        let routed = cpu_routing(&self.settings, &router, batch, [&logits, &s, &r]);
        let host = |e: u32, p: Projection| HostWeights::F32(&self.experts[e as usize][index(p)]);
        (0..tokens)
            .flat_map(|t| {
                let chosen: Vec<(u32, f32)> = bits::experts_of(&routed.assigned, tokens, t)
                    .into_iter()
                    .map(|i| (i as u32, routed.gates[t * e + i]))
                    .collect();
                cpu_token(&self.settings, &host, &self.x[t * d..][..d], &chosen)
            })
            .collect()
    }

    /// The output on the GPU, weights in f32.
    pub fn on_gpu(&self, gpu: &Gpu, ctx: &Context) -> wgmoe::Result<Vec<f32>> {
        let weights = ExpertWeights::new(ctx, self.settings.expert_shape(WeightType::F32))?;
        for (e, matrices) in (0..).zip(&self.experts) {
            for p in Projection::ALL {
                weights.write(&gpu.queue, e, p, HostWeights::F32(&matrices[index(p)]))?;
            }
        }
        let router = layer::Router::new(layer::Tensor::new(ctx, "router", &self.router_weight)?)
            .with_bias(layer::Tensor::new(ctx, "bias", &self.bias)?);
        let layer = MoeLayer::new(ctx, self.settings, router, weights)?;
        let hidden = gpu.upload(&self.x);
        let out = gpu.upload(&vec![f32::NAN; self.y.len()]);
        let mut batch = layer::Batch::new(&hidden, self.tokens).into_out(&out);
        let offsets = self.blocks.as_ref().map(|blocks| gpu.upload(blocks));
        batch.blocks = offsets
            .as_ref()
            .map(|offsets| layer::Blocks::new((offsets.size() / 4 - 1) as u32, offsets));
        gpu.run_layer(&layer.bind(&batch)?)?;
        gpu.download(&out)
    }

    /// The largest difference from the recorded output, and whether every value is within tolerance; over the tokens whose
    /// output is defined.
    pub fn compare(&self, got: &[f32]) -> (f32, bool) {
        let mut worst = 0f32;
        let mut ok = got.len() == self.y.len();
        let d = self.settings.hidden as usize;
        let pairs = got.iter().zip(&self.y).enumerate();
        for (_, (got, want)) in pairs.filter(|(i, _)| self.defined[i / d]) {
            let error = (got - want).abs();
            ok &= error <= ATOL + RTOL * want.abs(); // false for NaN
            worst = if error.is_nan() { f32::INFINITY } else { worst.max(error) };
        }
        (worst, ok)
    }
}
