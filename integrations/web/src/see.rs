//! One block of tokens, routed for a picture.
use crate::device::Device;
use crate::rules::Rule;
use serde::{Deserialize, Serialize};
use std::rc::Rc;
use testkit::cases::permutation;
use testkit::compare::{close, same};
use testkit::works::Work;
use wasm_bindgen::prelude::*;
use wgmoe::layer::{
    Batch, Blocks, HostBatch, HostBlocks, HostRouter, HostSequences, LayerConfig, Router,
    Sequences, Tensor,
};
use wgmoe::plan::{Stats, bits};
use wgmoe::routing::schedule::{self, Schedule, ScheduleKind};
use wgmoe::routing::{BlockRule, ExpertChoice, Routing, Score, SequenceTop, TokenChoice};
use wgmoe::{MoeRouting, WeightType, models, reference, wgpu};

/// Tokens of the block.
const TOKENS: u32 = 32;
/// Hidden size: only the router reads it.
const HIDDEN: u32 = 128;

/// What the visitor picked.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Settings {
    rule: Rule,
    experts: u32,
    /// Which block.
    block: u32,
    k: u32,
    p: f32,
    floor: u32,
    capacity: u32,
    /// Share of the tokens that are still to be written.
    mask: f32,
}

impl Settings {
    /// Experts a token that expert choice stands for: more as the block fills, from a quarter of K on, as EC-DLM's
    /// schedule that ends at 32 begins at 8.
    fn k_of_mask(&self) -> u32 {
        let k_min = self.k.div_ceil(4);
        Schedule::new(ScheduleKind::LinearReverse, k_min, self.k).k(self.mask)
    }

    fn routing(&self) -> Routing {
        let tokens = TokenChoice::new(self.k).with_score(Score::Sigmoid);
        let block = |rule| Routing::TokenChoice(tokens.with_coreset(rule));
        match self.rule {
            Rule::TokenChoice => tokens.into(),
            Rule::ExpertChoice => ExpertChoice::new(self.k_of_mask()).with_max(self.k).into(),
            Rule::SequenceTop => SequenceTop::new(self.k).with_score(Score::Sigmoid).into(),
            Rule::Mass => block(BlockRule::mass(self.p).with_floor(self.floor)),
            Rule::Capacity => block(BlockRule::capacity(self.capacity)),
            Rule::Vote => block(BlockRule::vote(self.capacity)),
            Rule::Union | Rule::MaskedUnion => block(BlockRule::union(self.k.min(2))),
        }
    }

    /// The tokens that are still to be written: 1 each.
    fn masked(&self) -> Vec<u32> {
        let count = (self.mask * TOKENS as f32).round() as usize;
        let mut masked = vec![0; TOKENS as usize];
        permutation(u64::from(self.block) + 1, TOKENS as usize)
            .into_iter()
            .take(count)
            .for_each(|t| masked[t] = 1);
        masked
    }
}

/// The block that was asked for last.
#[derive(Default)]
pub(crate) struct See {
    last: Option<((u32, u32), Rc<Block>)>,
}

/// A block: its scores' router and hidden states, on the device where there is one.
pub(crate) struct Block {
    work: Work,
    on_device: Option<(Tensor, wgpu::Buffer)>,
}

impl See {
    pub(crate) fn block(
        &mut self,
        settings: &Settings,
        device: Option<&Device>,
    ) -> wgmoe::Result<Rc<Block>> {
        let key = (settings.experts, settings.block);
        if let Some((_, block)) = self.last.as_ref().filter(|(of, _)| *of == key) {
            return Ok(block.clone());
        }
        settings.routing().check(settings.experts)?;
        let config = LayerConfig::new(HIDDEN, 16, settings.experts, TokenChoice::new(1));
        let work = Work::synthetic(config, TOKENS).with_input(TOKENS, settings.block);
        let on_device = match device {
            None => None,
            Some(Device { gpu, ctx, .. }) => {
                Some((Tensor::new(ctx, "router", work.router())?, gpu.upload(&work.x)))
            }
        };
        let block = Rc::new(Block { work, on_device });
        self.last = Some((key, block.clone()));
        Ok(block)
    }
}

/// What a rule made of a block.
struct Routed {
    logits: Vec<f32>,
    assigned: Vec<u32>,
    gates: Vec<f32>,
    coreset: Option<Vec<u32>>,
    /// By the device's own count.
    experts_read: u32,
    /// What differs from the twin's.
    differs: Option<String>,
}

impl Block {
    pub(crate) async fn route(
        &self,
        settings: &Settings,
        device: Option<&Device>,
    ) -> Result<Picture, String> {
        let routed = match (device, &self.on_device) {
            (Some(device), Some(on_device)) => {
                let work = async {
                    let routed = self.on_gpu(settings, device, on_device).await;
                    routed.map_err(|e| e.to_string())
                };
                device.watched(work).await?
            }
            _ => self.on_cpu(settings, None),
        };
        Ok(Picture::new(settings, device.is_some(), routed))
    }

    async fn on_gpu(
        &self,
        settings: &Settings,
        device: &Device,
        (router, hidden): &(Tensor, wgpu::Buffer),
    ) -> wgmoe::Result<Routed> {
        let Device { gpu, ctx, .. } = device;
        let config = self.work.config.with_routing(settings.routing());
        let routing = MoeRouting::new(ctx, config, Router::new(router.clone()))?;
        let offsets = gpu.upload(&[0, TOKENS]);
        let capacity = gpu.upload(&[settings.capacity_of_mask()]);
        let voters = gpu.upload(&settings.masked());
        let batch = Batch::new(hidden, TOKENS);
        let batch = match settings.rule {
            Rule::ExpertChoice => {
                batch.with_sequences(Sequences::new(1, &offsets).with_capacity(&capacity))
            }
            Rule::MaskedUnion => batch.with_blocks(Blocks::new(1, &offsets).with_voters(&voters)),
            _ => batch,
        };
        let bound = routing.bind(&batch)?;
        gpu.run_layer_async(&bound).await?;
        let missing = || wgmoe::Error::Device("routed nothing".into());
        let logits = gpu.download_async(bound.logits().ok_or_else(missing)?).await?;
        let assigned = gpu.download_async(bound.assigned().ok_or_else(missing)?).await?;
        let mut gates: Vec<f32> = gpu.download_async(bound.gates().ok_or_else(missing)?).await?;
        let stats = Stats::from_words(&gpu.download_async::<u32>(bound.stats()).await?)?;
        let coreset = match bound.coreset() {
            Some(coreset) => Some(gpu.download_async(coreset).await?),
            None => None,
        };
        // Only assigned pairs have a gate.
        let e = settings.experts as usize;
        for (i, gate) in gates.iter_mut().enumerate() {
            *gate *= f32::from(bits::get(&assigned, TOKENS as usize, i % e, i / e));
        }
        let experts_read = stats.unique_experts;
        let mut routed = Routed { logits, assigned, gates, coreset, experts_read, differs: None };
        routed.differs = self.beside_twin(settings, &routed).err();
        Ok(routed)
    }

    /// The device's logits beside the twin's; its choice, election and counts exactly, and its gates, beside what the twin
    /// makes of the device's logits.
    fn beside_twin(&self, settings: &Settings, routed: &Routed) -> Result<(), String> {
        let own = reference::logits(&self.work.x, self.work.router(), HIDDEN as usize);
        close(&routed.logits, &own, 2e-5 * (HIDDEN as f32).sqrt(), 2e-5, "logits")?;
        let twin = self.on_cpu(settings, Some(&routed.logits));
        same(&routed.assigned, &twin.assigned, "choice")?;
        let elected = |of: &Routed| of.coreset.clone().unwrap_or_default();
        same(&elected(routed), &elected(&twin), "election")?;
        same(&[routed.experts_read], &[twin.experts_read], "experts read")?;
        close(&routed.gates, &twin.gates, 1e-7, 1e-5, "gates")
    }

    /// The twin, of the device's logits where there are some.
    fn on_cpu(&self, settings: &Settings, logits: Option<&[f32]>) -> Routed {
        let config = self.work.config.with_routing(settings.routing());
        let (routing, e) = (config.routing, config.experts as usize);
        let own = || reference::logits(&self.work.x, self.work.router(), HIDDEN as usize);
        let logits = logits.map_or_else(own, <[f32]>::to_vec);
        let (s, r) = reference::scores(&logits, e, routing.score(), routing.by_logits(), None);
        let (offsets, capacity) = ([0, TOKENS], [settings.capacity_of_mask()]);
        let voters = settings.masked();
        let mut batch = HostBatch::default();
        match settings.rule {
            Rule::ExpertChoice => {
                let capacity = Some(&capacity[..]);
                batch.sequences =
                    Some(HostSequences { offsets: &offsets, lengths: None, capacity });
            }
            Rule::MaskedUnion => {
                batch.blocks =
                    Some(HostBlocks { voters: Some(&voters), ..HostBlocks::new(&offsets) });
            }
            _ => {}
        }
        let weight = self.work.router();
        let router = HostRouter { weight, bias: None, scale_by_count: None, scale_by_expert: None };
        let routed = reference::layer_routing(&config, &router, batch, [&logits, &s, &r]);
        let experts_read = routed.assigned.iter().filter(|&&word| word != 0).count() as u32;
        Routed {
            logits,
            assigned: routed.assigned,
            gates: routed.gates,
            coreset: routed.coreset,
            experts_read,
            differs: None,
        }
    }
}

impl Settings {
    /// Tokens that each expert takes under expert choice.
    fn capacity_of_mask(&self) -> u32 {
        schedule::capacity(TOKENS, self.k_of_mask(), self.experts)
    }
}

/// What is said beside the picture.
#[derive(Serialize)]
struct Numbers {
    on_device: bool,
    /// What differs from the CPU twin's, where something does.
    differs: Option<String>,
    tokens: u32,
    experts: u32,
    slots: u32,
    experts_read: u32,
    /// Experts that the block elected, where it did.
    elected: Option<u32>,
    /// Tokens that no expert took.
    untouched: u32,
    /// Tokens of the expert that has most.
    largest_load: u32,
    /// Weights of the experts that are read, and of all, were they LLaDA2.0-mini's, in bf16.
    bytes_read: u64,
    bytes_of_all: u64,
    /// Under expert choice: K at this mask ratio, and the tokens that each expert takes.
    k_now: Option<u32>,
    capacity: Option<u32>,
}

/// A routed block, as arrays for a picture.
#[wasm_bindgen]
pub struct Picture {
    scores: Vec<f32>,
    gates: Vec<f32>,
    chosen: Vec<u8>,
    elected: Vec<u8>,
    masked: Vec<u8>,
    numbers: String,
}

#[wasm_bindgen]
impl Picture {
    /// `[tokens, experts]`: sigmoid of the router's logits.
    #[wasm_bindgen(getter)]
    pub fn scores(&self) -> Vec<f32> {
        self.scores.clone()
    }

    /// `[tokens, experts]`: 0 where a pair is not chosen.
    #[wasm_bindgen(getter)]
    pub fn gates(&self) -> Vec<f32> {
        self.gates.clone()
    }

    /// `[tokens, experts]`: 1 for a chosen pair.
    #[wasm_bindgen(getter)]
    pub fn chosen(&self) -> Vec<u8> {
        self.chosen.clone()
    }

    /// `[experts]`: 1 for an expert that the block elected; empty where no block elects.
    #[wasm_bindgen(getter)]
    pub fn elected(&self) -> Vec<u8> {
        self.elected.clone()
    }

    /// `[tokens]`: 1 for a token that is still to be written.
    #[wasm_bindgen(getter)]
    pub fn masked(&self) -> Vec<u8> {
        self.masked.clone()
    }

    /// Sums, in JSON.
    #[wasm_bindgen(getter)]
    pub fn numbers(&self) -> String {
        self.numbers.clone()
    }
}

impl Picture {
    fn new(settings: &Settings, on_device: bool, routed: Routed) -> Self {
        let (t, e) = (TOKENS as usize, settings.experts as usize);
        let get = |i: usize| bits::get(&routed.assigned, t, i % e, i / e);
        let chosen: Vec<u8> = (0..t * e).map(|i| get(i).into()).collect();
        let elected: Vec<u8> = match &routed.coreset {
            Some(words) => (0..e).map(|e| (words[e / 32] >> (e % 32) & 1) as u8).collect(),
            None => vec![],
        };
        let load = |e| bits::tokens_of(&routed.assigned, t, e).len() as u32;
        let loads: Vec<u32> = (0..e).map(load).collect();
        let rows = chosen.chunks_exact(e);
        let model = models::find("llada2-mini").expect("a model of this name").config;
        let expert_bytes = model.expert_shape(WeightType::Bf16).expert_bytes();
        let of_experts = settings.rule == Rule::ExpertChoice;
        let numbers = Numbers {
            on_device,
            differs: routed.differs,
            tokens: TOKENS,
            experts: settings.experts,
            slots: loads.iter().sum(),
            experts_read: routed.experts_read,
            elected: routed.coreset.map(|words| words.iter().map(|w| w.count_ones()).sum()),
            untouched: rows.filter(|row| row.iter().all(|&c| c == 0)).count() as u32,
            largest_load: loads.iter().copied().max().unwrap_or(0),
            bytes_read: expert_bytes * u64::from(routed.experts_read),
            bytes_of_all: expert_bytes * u64::from(settings.experts),
            k_now: of_experts.then(|| settings.k_of_mask()),
            capacity: of_experts.then(|| settings.capacity_of_mask()),
        };
        Self {
            scores: routed.logits.iter().map(|g| 1.0 / (1.0 + (-g).exp())).collect(),
            gates: routed.gates,
            chosen,
            elected,
            masked: settings.masked().into_iter().map(|m| m as u8).collect(),
            numbers: serde_json::to_string(&numbers).expect("numbers"),
        }
    }
}
