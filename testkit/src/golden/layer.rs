//! Recorded layers of a reference implementation: golden files that hold a whole layer, from hidden
//! states to output.
use super::{ATOL, File, RTOL};
use crate::compare::{mismatch, worst};
use crate::layer::HostLayer;
use wgmoe::layer::{Batch, Blocks, HostBatch, HostBlocks, LayerConfig};
use wgmoe::ops::{logits, scores};
use wgmoe::routing::{BlockRule, Routing, TokenChoice};
use wgmoe::{Context, Gpu};

/// A recorded layer of LLaDA2: what went in, its weights, what came out.
pub struct Layer {
    /// LayerConfig, router and experts.
    pub host: HostLayer,
    pub tokens: u32,
    /// `[tokens, D]`.
    pub x: Vec<f32>,
    /// Offsets of the blocks, of a block-level rule.
    pub blocks: Option<Vec<u32>>,
    /// `[tokens]`: whether the reference's output is one; not of tokens for which it picked experts
    /// arbitrarily.
    pub defined: Vec<bool>,
    /// `[tokens, D]`.
    pub y: Vec<f32>,
}

/// Offsets of the blocks of `block` tokens: each sequence begins a new one, its last may be short.
pub fn blocks(sequences: usize, tokens: usize, block: usize) -> Vec<u32> {
    let starts =
        (0..sequences).flat_map(|b| (0..tokens).step_by(block).map(move |t| b * tokens + t));
    starts.chain([sequences * tokens]).map(|t| t as u32).collect()
}

/// Tensor `name` as matrices of `size` values.
fn matrices(file: &File, name: &str, count: usize, size: usize) -> Result<Vec<Vec<f32>>, String> {
    let values = sized(file, name, count * size)?;
    Ok(values.chunks_exact(size).map(<[f32]>::to_vec).collect())
}

pub(super) fn sized(file: &File, name: &str, want: usize) -> Result<Vec<f32>, String> {
    let values = file.f32s(name)?;
    if values.len() == want {
        Ok(values)
    } else {
        Err(format!("`{name}`: {} values, want {want}", values.len()))
    }
}

/// Gate, up and down of each expert, the shared ones last: of tensors whose names begin with `of`, "" for
/// the weights themselves.
pub(super) fn experts(
    file: &File,
    config: &LayerConfig,
    of: &str,
) -> Result<Vec<[Vec<f32>; 3]>, String> {
    let [d, f] = [config.hidden, config.intermediate].map(|n| n as usize);
    let [e, shared] = [config.experts, config.shared_experts].map(|n| n as usize);
    let [gate, up, down] = ["gate_proj", "up_proj", "down_proj"]
        .map(|name| matrices(file, &format!("{of}{name}"), e, d * f));
    let mut experts: Vec<[Vec<f32>; 3]> =
        gate?.into_iter().zip(up?).zip(down?).map(|((gate, up), down)| [gate, up, down]).collect();
    if shared > 0 {
        // One FFN of m F is m shared experts of F: rows of gate and up, columns of down.
        let [gate, up] = ["shared_gate_proj", "shared_up_proj"]
            .map(|name| matrices(file, &format!("{of}{name}"), shared, d * f));
        let down = sized(file, &format!("{of}shared_down_proj"), shared * d * f)?;
        for (m, (gate, up)) in gate?.into_iter().zip(up?).enumerate() {
            let part = |row: &[f32]| row[m * f..][..f].to_vec();
            experts.push([gate, up, down.chunks_exact(shared * f).flat_map(part).collect()]);
        }
    }
    Ok(experts)
}

impl Layer {
    /// The layer in a file; none where the file is of another kind or holds no whole layer.
    pub fn read(file: &File) -> Result<Option<Self>, String> {
        let in_blocks = file.kind() == "block_coreset";
        if !(in_blocks || file.kind() == "group_limited") || !file.has("y") {
            return Ok(None);
        }
        let (sequences, length) = (file.size("sequences")?, file.size("tokens")?);
        let tokens = sequences * length;
        let coreset = match (file.real("top_p"), in_blocks) {
            (Some(p), true) => {
                Some(BlockRule::Mass { p: p as f32, floor: file.number("min_coreset")? })
            }
            (None, false) => None,
            _ => return Err("`top_p` is of block_coreset, and only there".into()),
        };
        let config = LayerConfig::new(
            file.number("hidden")?,
            file.number("intermediate")?,
            file.number("experts")?,
            Routing::TokenChoice({
                let mut rule = TokenChoice::new(file.number("experts_per_token")?)
                    .with_score(file.score()?)
                    .with_groups(file.number("groups")?, file.number("groups_per_token")?)
                    .with_scale(
                        file.real("routed_scaling_factor").ok_or("no `routed_scaling_factor`")?
                            as f32,
                    );
                rule.coreset = coreset;
                rule
            }),
        )
        .with_shared_experts(file.number("shared_experts")?);
        let [d, e] = [config.hidden, config.experts].map(|n| n as usize);
        if [d, e, config.intermediate as usize, tokens].contains(&0) {
            return Err("a size of 0".into());
        }
        config.routing.check(config.experts).map_err(|e| e.to_string())?;
        let host = HostLayer {
            config,
            router: sized(file, "router_weight", e * d)?,
            bias: Some(sized(file, "expert_bias", e)?),
            experts: experts(file, &config, "")?,
        };
        let defined = if in_blocks { file.flags("token_is_defined")? } else { vec![true; tokens] };
        if defined.len() != tokens {
            return Err(format!("`token_is_defined`: {} of {tokens} tokens", defined.len()));
        }
        Ok(Some(Self {
            host,
            tokens: tokens as u32,
            x: sized(file, "x", tokens * d)?,
            blocks: if in_blocks {
                Some(blocks(sequences, length, file.size("block")?))
            } else {
                None
            },
            defined,
            y: sized(file, "y", tokens * d)?,
        }))
    }

    /// The router's logits on the CPU twin.
    pub fn logits(&self) -> Vec<f32> {
        logits::cpu(&self.x, &self.host.router, self.host.config.hidden as usize)
    }

    /// The output on the CPU twins.
    pub fn on_cpu(&self) -> Vec<f32> {
        let (logits, config) = (self.logits(), self.host.config);
        let (e, bias) = (config.experts as usize, self.host.bias.as_deref());
        let (s, r) = scores::cpu(&logits, e, config.routing.score(), false, bias);
        let blocks =
            self.blocks.as_ref().map(|offsets| HostBlocks { kept: None, offsets, voters: None });
        let routed =
            self.host.routing(HostBatch { blocks, ..HostBatch::default() }, [&logits, &s, &r]);
        self.host.outputs(&self.x, &routed.assigned, &routed.gates)
    }

    /// The output on the GPU, weights in f32.
    pub async fn on_gpu(&self, gpu: &Gpu, ctx: &Context) -> wgmoe::Result<Vec<f32>> {
        let layer = self.host.layer(ctx, &gpu.queue)?;
        let hidden = gpu.upload(&self.x);
        let out = gpu.upload(&vec![f32::NAN; self.y.len()]);
        let mut batch = Batch::new(&hidden, self.tokens).into_out(&out);
        let offsets = self.blocks.as_ref().map(|blocks| gpu.upload(blocks));
        batch.blocks =
            offsets.as_ref().map(|offsets| Blocks::new((offsets.size() / 4 - 1) as u32, offsets));
        gpu.run_layer_async(&layer.bind(&batch)?).await?;
        gpu.download_async(&out).await
    }

    /// The largest difference from the recorded output, and whether every value is within
    /// tolerance; over the tokens whose output is defined.
    pub fn compare(&self, got: &[f32]) -> (f32, bool) {
        if got.len() != self.y.len() {
            return (f32::INFINITY, false);
        }
        let d = self.host.config.hidden as usize;
        let rows = got.chunks(d).zip(self.y.chunks(d)).zip(&self.defined).filter(|(_, d)| **d);
        rows.fold((0.0, true), |(most, ok), ((got, want), _)| {
            (worst(got, want).max(most), ok && mismatch(got, want, ATOL, RTOL).is_none())
        })
    }
}
