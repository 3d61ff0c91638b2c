//! Recorded gradients of a layer: golden files that hold a forward and a backward pass.
use super::File;
use super::layer::{blocks, experts, sized};
use crate::layer::HostLayer;
use wgmoe::layer::{
    Batch, Blocks, HostBatch, HostBlocks, HostForward, HostGradients, HostRouter, HostRouting,
    HostSequences, LayerConfig, MoeLayer, Sequences, TrainingBatch, cpu_backward,
};
use wgmoe::ops::{logits, scores};
use wgmoe::routing::{
    Activation, BlockRule, ExpertChoice, GateRule, Normalise, Routing, TokenChoice, schedule,
};
use wgmoe::weights::ExpertGradients;
use wgmoe::{Context, Gpu, Score, WeightType};

/// A recorded layer: its weights, and what went in.
pub struct Gradient {
    /// LayerConfig, router and experts.
    pub host: HostLayer,
    /// `[E + 1]`: factors of gates by the number of a token's experts.
    pub scale_by_count: Option<Vec<f32>>,
    pub tokens: u32,
    /// `[tokens, D]`: hidden states, and the gradient of the output.
    pub hidden: Vec<f32>,
    pub dout: Vec<f32>,
    /// Offsets of sequences under expert choice, and their own k where they have one.
    pub sequences: Option<(Vec<u32>, Option<Vec<u32>>)>,
    /// Offsets of blocks under a block-level rule.
    pub blocks: Option<Vec<u32>>,
}

/// Both passes on the device.
pub struct OnGpu {
    /// `[tokens, D]`.
    pub out: Vec<f32>,
    /// Gates' are none: they stay in scratch.
    pub gradients: HostGradients,
    /// Of gates, and of experts: pages.
    pub pages: [usize; 2],
}

/// How the device is to train.
#[derive(Clone, Copy, Default)]
pub struct How {
    /// Bytes of a page of weights and of gradients.
    pub page_limit: Option<u64>,
    pub recompute_z: bool,
}

/// A forward pass on the twins.
pub struct Forward {
    pub logits: Vec<f32>,
    pub scores: Vec<f32>,
    pub routing: HostRouting,
    /// `[tokens, D]`.
    pub out: Vec<f32>,
}

impl Gradient {
    /// The layer in a file; none where the file is of another kind.
    pub fn read(file: &File) -> Result<Option<Self>, String> {
        let Some(kind) = file.kind().strip_prefix("gradient_") else { return Ok(None) };
        let of_batch = file.size("sequences").ok();
        let length = file.size("tokens")?;
        let tokens = of_batch.unwrap_or(1) * length;
        let e = file.number("experts")?;
        let own_k = match file.has("experts_per_token") {
            true => Some(file.u32s("experts_per_token")?),
            false => None,
        };
        let mut sequences = None;
        let mut in_blocks = None;
        let routing: Routing = match kind {
            "expert_choice" => {
                if file.text("scope")? == "sequence" {
                    let offsets = match (file.has("sequence_offsets"), of_batch) {
                        (true, _) => ragged(file, tokens)?,
                        (false, Some(count)) => (0..=count).map(|b| (b * length) as u32).collect(),
                        (false, None) => return Err("no sequences".into()),
                    };
                    sequences = Some((offsets, own_k.clone()));
                }
                let most = own_k.iter().flatten().copied().max();
                let k = most.map_or_else(|| file.number("average_experts_per_token"), Ok)?;
                ExpertChoice::new(k)
                    .with_score(file.score()?)
                    .with_normalise(match file.text("normalise")? {
                        "after_selection" => Normalise::AfterSelection,
                        "before_selection" => Normalise::BeforeSelection,
                        other => return Err(format!("normalise `{other}`")),
                    })
                    .into()
            }
            "token_choice" => token_choice(file)?.into(),
            "group_limited" | "block_coreset" => {
                let scale =
                    file.real("routed_scaling_factor").ok_or("no `routed_scaling_factor`")?;
                let mut rule = TokenChoice::new(file.number("experts_per_token")?)
                    .with_score(file.score()?)
                    .with_scale(scale as f32);
                if file.number("groups")? > 1 {
                    rule =
                        rule.with_groups(file.number("groups")?, file.number("groups_per_token")?);
                }
                if kind == "block_coreset" {
                    let p = file.real("top_p").ok_or("no `top_p`")? as f32;
                    rule.coreset = Some(BlockRule::Mass { p, floor: file.number("min_coreset")? });
                    let count = of_batch.ok_or("no `sequences`")?;
                    in_blocks = Some(blocks(count, length, file.size("block")?));
                }
                rule.into()
            }
            other => return Err(format!("gradients of `{other}`")),
        };
        let activation = match file.text("activation")? {
            "silu" => Activation::Silu,
            "gelu_tanh" => Activation::Gelu,
            other => return Err(format!("activation `{other}`")),
        };
        let config =
            LayerConfig::new(file.number("hidden")?, file.number("intermediate")?, e, routing)
                .with_shared_experts(file.number("shared_experts")?)
                .with_activation(activation);
        config.routing.check(e).map_err(|e| e.to_string())?;
        let (d, e) = (config.hidden as usize, e as usize);
        let optional = |name: &str, len: usize| match file.has(name) {
            true => sized(file, name, len).map(Some),
            false => Ok(None),
        };
        Ok(Some(Self {
            host: HostLayer {
                config,
                router: sized(file, "router_weight", e * d)?,
                bias: optional("expert_bias", e)?,
                experts: experts(file, &config, "")?,
            },
            scale_by_count: optional("scaling_factors", e + 1)?,
            tokens: tokens as u32,
            hidden: sized(file, "x", tokens * d)?,
            dout: sized(file, "dy", tokens * d)?,
            sequences,
            blocks: in_blocks,
        }))
    }

    /// What the reference sent back.
    pub fn recorded(&self, file: &File) -> Result<HostGradients, String> {
        let config = &self.host.config;
        let (d, e, t) = (config.hidden as usize, config.experts as usize, self.tokens as usize);
        Ok(HostGradients {
            hidden: sized(file, "dx", t * d)?,
            router: sized(file, "d_router_weight", e * d)?,
            experts: experts(file, config, "d_")?,
            gates: sized(file, "d_gates", t * e)?,
            logits: sized(file, "d_logits", t * e)?,
        })
    }

    pub fn router(&self) -> HostRouter<'_> {
        HostRouter { scale_by_count: self.scale_by_count.as_deref(), ..self.host.host_router() }
    }

    /// Capacities of the sequences that have a k of their own.
    pub fn capacity(&self) -> Option<Vec<u32>> {
        let (offsets, ks) = self.sequences.as_ref()?;
        let lengths = offsets.windows(2).map(|ends| ends[1] - ends[0]);
        let each = |(n, &k)| schedule::capacity(n, k, self.host.config.experts);
        ks.as_ref().map(|ks| lengths.zip(ks).map(each).collect())
    }

    /// The forward pass on the twins.
    pub fn forward(&self) -> Forward {
        let config = &self.host.config;
        let (d, e, routing) = (config.hidden as usize, config.experts as usize, config.routing);
        let logits = logits::cpu(&self.hidden, &self.host.router, d);
        let bias = self.host.bias.as_deref();
        let (scores, values) = scores::cpu(&logits, e, routing.score(), routing.by_logits(), bias);
        let capacity = self.capacity();
        let batch = HostBatch {
            sequences: self.sequences.as_ref().map(|(offsets, _)| HostSequences {
                offsets,
                lengths: None,
                capacity: capacity.as_deref(),
            }),
            blocks: self.blocks.as_deref().map(HostBlocks::new),
            experts_per_token: None,
            active: None,
        };
        let selection = [&logits[..], &scores, &values];
        let routing = wgmoe::layer::cpu_routing(config, &self.router(), batch, selection);
        let out = self.host.outputs(&self.hidden, &routing.assigned, &routing.gates);
        Forward { logits, scores, routing, out }
    }

    /// Both passes on the device, weights in f32, twice.
    pub fn on_gpu(&self, gpu: &Gpu, ctx: &Context, how: How) -> wgmoe::Result<[OnGpu; 2]> {
        let config = &self.host.config;
        let layer = self.host.layer_as(ctx, &gpu.queue, WeightType::F32, how.page_limit)?;
        let mut router = layer.router().clone();
        if let Some(scale) = &self.scale_by_count {
            router = router.with_scale_by_count(gpu.upload(scale));
        }
        let layer = MoeLayer::new(ctx, *config, router, layer.weights().clone())?;
        let shape = layer.weights().shape();
        let limit = how.page_limit.unwrap_or(u64::MAX);
        let experts = ExpertGradients::with_page_limit(ctx, &shape, limit)?;
        let (hidden, dout) = (gpu.upload(&self.hidden), gpu.upload(&self.dout));
        let poison = |len: usize| gpu.upload(&vec![f32::NAN; len]);
        let [out, dhidden] = [(); 2].map(|()| poison(self.hidden.len()));
        let drouter = poison(self.host.router.len());
        let mut batch = Batch::new(&hidden, self.tokens).into_out(&out);
        let offsets = self.sequences.as_ref().map(|(offsets, _)| gpu.upload(offsets));
        let capacity = self.capacity().map(|capacity| gpu.upload(&capacity));
        if let Some(offsets) = &offsets {
            let mut sequences = Sequences::new((offsets.size() / 4 - 1) as u32, offsets);
            sequences.capacity = capacity.as_ref().map(Into::into);
            batch = batch.with_sequences(sequences);
        }
        let blocks = self.blocks.as_ref().map(|blocks| gpu.upload(blocks));
        batch.blocks = blocks.as_ref().map(|b| Blocks::new((b.size() / 4 - 1) as u32, b));
        let mut of = TrainingBatch::new(batch, &dout, &dhidden)
            .with_router_gradient(&drouter)
            .with_expert_gradients(&experts);
        of.recompute_z = how.recompute_z;
        let (forward, backward) = layer.bind_training(&of)?;
        let run = || -> wgmoe::Result<OnGpu> {
            let mut encoder = gpu.device.create_command_encoder(&Default::default());
            forward.encode(&mut encoder);
            backward.encode(&mut encoder)?;
            gpu.queue.submit([encoder.finish()]);
            Ok(OnGpu {
                out: gpu.download(&out)?,
                gradients: HostGradients {
                    hidden: gpu.download(&dhidden)?,
                    router: gpu.download(&drouter)?,
                    experts: expert_gradients(gpu, &experts)?,
                    gates: vec![],
                    logits: gpu.download(backward.dlogits())?,
                },
                pages: [layer.weights().page_counts()[0], experts.page_counts()[0]],
            })
        };
        Ok([run()?, run()?])
    }

    /// The backward pass on the twin.
    pub fn backward(&self, forward: &Forward) -> HostGradients {
        let Forward { logits, scores, routing, .. } = forward;
        let hidden = &self.hidden;
        let forward = HostForward { hidden, routing, logits, scores };
        let matrix = |e, p| self.host.matrix(e, p);
        cpu_backward(&self.host.config, &self.router(), &matrix, forward, &self.dout, None, false)
    }
}

/// Gate, up and down of each expert, from the device.
pub fn expert_gradients(gpu: &Gpu, of: &ExpertGradients) -> wgmoe::Result<Vec<[Vec<f32>; 3]>> {
    // The pages of each projection, one after the other.
    let mut all: Vec<f32> = vec![];
    for buffer in of.buffers() {
        all.extend(gpu.download::<f32>(buffer)?);
    }
    let shape = of.shape();
    let size = (shape.hidden * shape.intermediate) as usize;
    let experts = shape.experts as usize;
    let matrix = |i: usize| all[i * size..][..size].to_vec();
    Ok((0..experts).map(|e| [0, 1, 2].map(|p| matrix(p * experts + e))).collect())
}

/// EC-DLM's token choice.
fn token_choice(file: &File) -> Result<TokenChoice, String> {
    let mut rule = TokenChoice::new(file.number("experts_per_token")?)
        .with_score(file.score()?)
        .with_choice_by_logits()
        .with_gate(match (file.text("normalise")?, file.score()?) {
            ("after_selection", Score::Softmax) => GateRule::Softmax,
            ("none", Score::Softmax) => GateRule::Unnormalised,
            (other, score) => return Err(format!("normalise `{other}` of {score:?}")),
        });
    if file.text("drop")? != "lowest_probability" {
        return Err(format!("drop `{}`", file.text("drop")?));
    }
    rule.capacity_factor = file.real("capacity_factor").map(|factor| factor as f32);
    Ok(rule)
}

/// Offsets from 0, never back, to the last token.
fn ragged(file: &File, tokens: usize) -> Result<Vec<u32>, String> {
    let offsets = file.u32s("sequence_offsets")?;
    let ends = (offsets.first(), offsets.last()) == (Some(&0), Some(&(tokens as u32)));
    if ends && offsets.is_sorted() {
        Ok(offsets)
    } else {
        Err(format!("`sequence_offsets`: {offsets:?} of {tokens} tokens"))
    }
}
