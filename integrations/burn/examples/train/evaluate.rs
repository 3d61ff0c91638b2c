//! What a trained model is worth: its loss, by the share of masked tokens too, its sums, and the experts that it uses.
use crate::Outcome;
use crate::diffusion::{Masked, Routing};
use crate::language;
use crate::model::{CLASSES, Model};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};
use wgmoe_burn::MoeFfn;
use wgmoe_burn::wgmoe::layer::{HostBatch, HostBlocks, HostRouter, LayerConfig, cpu_routing};
use wgmoe_burn::wgmoe::ops::{expert_union, scores};

/// Bins of the share of masked tokens.
pub const BINS: usize = 8;
/// Tokens that elect experts together, and that experts are counted of.
pub const BLOCK: usize = 32;

/// Of text that is not learned.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Validation {
    /// The training loss, without the router's.
    pub loss: f64,
    /// `-log p` of masked tokens, of sequences with up to an eighth of their tokens masked, up to two, and so on.
    pub by_ratio: Vec<f64>,
}

/// Sums over sequences.
#[derive(Default)]
pub struct Seen {
    loss: f64,
    sequences: u32,
    bins: [(f64, u32); BINS],
}

impl Seen {
    /// Sequences, and `-log p` of their tokens.
    pub fn add(&mut self, masked: &Masked, surprise: &[f32]) {
        let length = masked.length;
        for (tokens, mask) in surprise.chunks(length).zip(masked.mask.chunks(length)) {
            let own: f64 =
                tokens.iter().zip(mask).filter(|(_, m)| **m).map(|(s, _)| f64::from(*s)).sum();
            let count = mask.iter().filter(|m| **m).count();
            // Over the share that is masked, over all tokens: the mean of the masked ones.
            self.loss += own / count as f64;
            self.sequences += 1;
            let bin = &mut self.bins[(count * BINS).div_ceil(length) - 1];
            bin.0 += own;
            bin.1 += count as u32;
        }
    }

    pub fn result(&self) -> Validation {
        let by_ratio = self.bins.iter().map(|(sum, count)| sum / f64::from(*count)).collect();
        Validation { loss: self.loss / f64::from(self.sequences), by_ratio }
    }
}

/// The share of sums that no text has of which every digit is the model's first choice, all digits masked.
pub fn sums(
    model: &Model,
    routing: &Routing,
    device: &Device,
    batch: usize,
    length: usize,
) -> Outcome<f64> {
    let problems = language::problems(length);
    let mut right = 0;
    for some in problems.chunks(batch) {
        // As many as in training: other shapes are other kernels.
        let filled = || some.iter().cycle().take(batch);
        let mut mask = vec![false; batch * length];
        for (i, (_, answer)) in filled().enumerate() {
            mask[i * length..][answer.clone()].fill(true);
        }
        let tokens = filled().flat_map(|(text, _)| text.clone()).collect();
        let masked = Masked { tokens, mask, length };
        let logits = masked.logits(model, routing, device, &mut |_| {});
        let logits: Vec<f32> = logits.try_into_vec_as()?;
        let found = |place: usize| {
            let row = &logits[place * CLASSES..][..CLASSES];
            (0..CLASSES).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0)
        };
        for (i, (text, answer)) in some.iter().enumerate() {
            let all = answer.clone().all(|at| found(i * length + at) == usize::from(text[at]));
            right += u32::from(all);
        }
    }
    Ok(f64::from(right) / problems.len() as f64)
}

/// Router logits `[tokens, E]` of a layer, of what goes into it.
pub fn router_logits(layer: &MoeFfn, hidden: &Tensor<2>) -> Outcome<Vec<f32>> {
    let weights = layer.weights.as_ref().ok_or("a layer without weights")?;
    Ok(hidden.clone().matmul(weights.router.val().transpose()).try_into_vec_as()?)
}

/// What blocks of tokens use, on average.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Blocks {
    /// Distinct experts.
    pub experts: f64,
    /// Experts elected; all where none are.
    pub elected: f64,
}

/// The choice of a token choice rule from logits `[tokens, E]`: the bit set `[E, ceil(T / 32)]`, and the coresets.
pub fn choose(config: &LayerConfig, logits: &[f32]) -> (Vec<u32>, Option<Vec<u32>>) {
    let experts = config.experts as usize;
    let offsets = block_offsets(logits.len() / experts);
    let rule = config.routing;
    let (s, r) = scores::cpu(logits, experts, rule.score(), rule.by_logits(), None);
    let router =
        HostRouter { weight: &[], bias: None, scale_by_count: None, scale_by_expert: None };
    let blocks = Some(HostBlocks::new(&offsets));
    let batch = HostBatch { blocks, ..HostBatch::default() };
    let routed = cpu_routing(config, &router, batch, [logits, &s, &r]);
    (routed.assigned, routed.coreset)
}

/// Blocks of tokens, the last one perhaps short.
fn block_offsets(tokens: usize) -> Vec<u32> {
    (0..tokens).step_by(BLOCK).chain([tokens]).map(|t| t as u32).collect()
}

/// Experts of the blocks of some logits `[tokens, E]`.
pub fn blocks(config: &LayerConfig, logits: &[f32]) -> Blocks {
    let experts = config.experts as usize;
    let tokens = logits.len() / experts;
    let (assigned, coreset) = choose(config, logits);
    let offsets = block_offsets(tokens);
    let count = offsets.len() as f64 - 1.0;
    let (_, counts, _) = expert_union::cpu(&assigned, tokens, experts, &offsets, 1);
    let elected = coreset.map_or(experts as f64, |words| {
        words.iter().map(|w| f64::from(w.count_ones())).sum::<f64>() / count
    });
    Blocks { experts: counts.iter().map(|&n| f64::from(n)).sum::<f64>() / count, elected }
}

/// The mean over layers of the experts of blocks, on masked text.
pub fn blocks_of_model(
    model: &Model,
    routing: &Routing,
    device: &Device,
    config: &LayerConfig,
    batches: &[Masked],
) -> Outcome<Blocks> {
    let mut all = vec![];
    for masked in batches {
        let mut seen = vec![];
        let _ = masked.logits(model, routing, device, &mut |x| seen.push(x));
        for (layer, hidden) in model.layers().zip(&seen) {
            all.push(blocks(config, &router_logits(layer, hidden)?));
        }
    }
    let mean = |of: fn(&Blocks) -> f64| all.iter().map(of).sum::<f64>() / all.len() as f64;
    Ok(Blocks { experts: mean(|b| b.experts), elected: mean(|b| b.elected) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use wgmoe_burn::wgmoe::routing::{BlockRule, TokenChoice};

    #[test]
    fn the_loss_is_the_mean_of_masked_tokens() {
        let mut seen = Seen::default();
        let mut mask = vec![false; 16];
        mask[..2].fill(true);
        mask[8..].fill(true);
        let masked = Masked { tokens: vec![0; 16], mask, length: 8 };
        let surprise: Vec<f32> = (0..16).map(|i| i as f32).collect();
        seen.add(&masked, &surprise);
        let Validation { loss, by_ratio } = seen.result();
        assert_eq!(loss, (0.5 + 11.5) / 2.0);
        assert_eq!([by_ratio[1], by_ratio[7]], [0.5, 11.5]);
        assert!(by_ratio[0].is_nan());
    }

    #[test]
    fn blocks_count_distinct_experts() {
        // Two blocks: tokens of the first all want expert 1, those of the second each another.
        let mut logits = vec![0f32; 64 * 32];
        for t in 0..64 {
            logits[t * 32 + if t < 32 { 1 } else { t - 32 }] = 9.0;
        }
        let config = LayerConfig::new(8, 8, 32, TokenChoice::new(1));
        let all = blocks(&config, &logits);
        assert_eq!([all.experts, all.elected], [(1.0 + 32.0) / 2.0, 32.0]);
        let rule = TokenChoice::new(1).with_coreset(BlockRule::vote(4));
        let few = blocks(&config.with_routing(rule), &logits);
        assert_eq!([few.experts, few.elected], [(1.0 + 4.0) / 2.0, 4.0]);
    }
}
