//! Claim e: the scores of a trained router, beside the synthetic ones that the other studies use.
use super::{base_folder, masked_batches};
use crate::Outcome;
use crate::diffusion::Sampling;
use crate::evaluate::{self, BLOCK};
use crate::model::Model;
use crate::options::Options;
use burn::module::Module;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};
use std::path::Path;
use testkit::synthetic::mixture;
use wgmoe_burn::MoeDevice;
use wgmoe_burn::wgmoe::layer::LayerConfig;
use wgmoe_burn::wgmoe::plan::bits;
use wgmoe_burn::wgmoe::routing::{BlockRule, TokenChoice};

/// What is measured of a seed's model; means over layers where nothing else is said.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Scores {
    /// By rule: its name, experts of a block of 32 by the trained router, and by the synthetic scores.
    pub(super) experts: Vec<(String, f64, f64)>,
    /// Of logits.
    pub(super) trained: Spread,
    pub(super) synthetic: Spread,
    /// From a step of sampling to the next.
    pub(super) steps: Agreement,
    /// Texts that were sampled.
    pub(super) texts: Vec<String>,
}

/// How logits differ.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Spread {
    pub(super) deviation: f64,
    /// Share of the variance that lies in the means of experts.
    pub(super) of_experts: f64,
    /// Share of the rest that a block's tokens have in common: METHODS' rho.
    pub(super) of_blocks: f64,
}

/// What stays from one step of sampling to the next.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Agreement {
    /// Of a token's experts.
    pub(super) experts: f64,
    /// Of the experts that a block uses: those that it used a step before.
    pub(super) of_block: f64,
    /// Correlation of a logit with itself, expert means taken off.
    pub(super) logits: f64,
}

pub(super) fn measure(options: &Options, out: &Path, device: &MoeDevice) -> Outcome<Scores> {
    eprintln!("scores, seed {}", options.seed);
    let (sizes, routing) = options.sizes()?;
    let [_, held_out] = options.texts()?;
    let folder = base_folder(out, options.seed);
    let model = Model::new(device, &sizes, None)?.try_load_file(folder.join("model.bpk"))?.valid();

    let on = device.device();
    let mut of_layers: Vec<Vec<f32>> = vec![vec![]; options.layers];
    for masked in masked_batches(options, &held_out) {
        let mut seen = vec![];
        let _ = masked.logits(&model, &routing, on, &mut |x| seen.push(x));
        for ((layer, hidden), logits) in model.layers().zip(&seen).zip(&mut of_layers) {
            logits.extend(evaluate::router_logits(layer, hidden)?);
        }
    }
    let mut rng = StdRng::seed_from_u64(options.seed);
    let tokens = (of_layers[0].len() / options.experts as usize) as u32;
    let mut drawn = mixture(&mut rng, tokens, BLOCK as u32, options.experts);
    drawn.iter_mut().for_each(|g| *g = 2.0 * *g - 3.0);

    let k = options.experts_per_token;
    let mut rules = vec![(format!("top {k}"), TokenChoice::new(k))];
    for p in [0.4, 0.5, 0.6, 0.7, 0.8] {
        let rule = TokenChoice::new(k).with_coreset(BlockRule::mass(p).with_floor(k));
        rules.push((format!("mass {p:.1}"), rule));
    }
    let experts = rules.into_iter().map(|(name, rule)| {
        let config = sizes.layer.with_routing(rule);
        let count = |logits: &[f32]| evaluate::blocks(&config, logits).experts;
        (name, mean(of_layers.iter().map(|logits| count(logits))), count(&drawn))
    });
    let experts = experts.collect();

    let width = options.experts as usize;
    let spreads: Vec<Spread> = of_layers.iter().map(|logits| Spread::of(logits, width)).collect();
    let trained = Spread {
        deviation: mean(spreads.iter().map(|s| s.deviation)),
        of_experts: mean(spreads.iter().map(|s| s.of_experts)),
        of_blocks: mean(spreads.iter().map(|s| s.of_blocks)),
    };
    let (steps, texts) = sample(options, &model, device, &sizes.layer)?;
    Ok(Scores { experts, trained, synthetic: Spread::of(&drawn, width), steps, texts })
}

/// Samples texts, and compares what each step routes with the one before.
fn sample(
    options: &Options,
    model: &Model,
    device: &MoeDevice,
    config: &LayerConfig,
) -> Outcome<(Agreement, Vec<String>)> {
    let (_, routing) = options.sizes()?;
    let Options { batch: count, length, sample: steps, temperature, .. } = *options;
    let sampling = Sampling { count, length, steps, temperature };
    let mut rng = StdRng::seed_from_u64(options.seed ^ 0x5a3b);
    let mut seen = vec![vec![]; steps];
    let texts = sampling.run(model, &routing, device.device(), &mut rng, &mut |step, x| {
        seen[step].push(x);
    })?;
    let texts = texts.iter().map(|text| String::from_utf8_lossy(text).into_owned()).collect();
    let mut all = vec![];
    for (number, layer) in model.layers().enumerate() {
        let logits = seen.iter().map(|layers| evaluate::router_logits(layer, &layers[number]));
        let logits = logits.collect::<Outcome<Vec<_>>>()?;
        all.extend(logits.windows(2).map(|pair| Agreement::of(config, &pair[0], &pair[1])));
    }
    let agreement = Agreement {
        experts: mean(all.iter().map(|a| a.experts)),
        of_block: mean(all.iter().map(|a| a.of_block)),
        logits: mean(all.iter().map(|a| a.logits)),
    };
    Ok((agreement, texts))
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

/// The mean of each expert's logits, of `[tokens, width]`.
fn means(logits: &[f32], width: usize) -> Vec<f64> {
    let mut sums = vec![0.0; width];
    for row in logits.chunks_exact(width) {
        sums.iter_mut().zip(row).for_each(|(sum, &g)| *sum += f64::from(g));
    }
    let tokens = (logits.len() / width) as f64;
    sums.iter().map(|sum| sum / tokens).collect()
}

impl Spread {
    /// Of logits `[tokens, width]`, whole blocks of tokens. By analysis of variance: blocks are groups.
    fn of(logits: &[f32], width: usize) -> Self {
        let experts = means(logits, width);
        let overall = mean(experts.iter().copied());
        let n = BLOCK as f64;
        let (mut total, mut between, mut within) = (0.0, 0.0, 0.0);
        for block in logits.chunks_exact(BLOCK * width) {
            let own = means(block, width);
            for e in 0..width {
                between += n * (own[e] - experts[e]).powi(2);
                for row in block.chunks_exact(width) {
                    total += (f64::from(row[e]) - overall).powi(2);
                    within += (f64::from(row[e]) - own[e]).powi(2);
                }
            }
        }
        let blocks = (logits.len() / width / BLOCK) as f64;
        let values = logits.len() as f64;
        let of_experts = values / width as f64
            * experts.iter().map(|m| (m - overall).powi(2)).sum::<f64>()
            / total;
        let between = between / ((blocks - 1.0) * width as f64);
        let within = within / (blocks * (n - 1.0) * width as f64);
        let of_blocks = (between - within) / (between + (n - 1.0) * within);
        Self { deviation: (total / values).sqrt(), of_experts, of_blocks }
    }
}

impl Agreement {
    /// From one step's logits `[tokens, E]` to the next one's.
    fn of(config: &LayerConfig, before: &[f32], after: &[f32]) -> Self {
        let width = config.experts as usize;
        let tokens = before.len() / width;
        let [old, new] = [before, after].map(|logits| evaluate::choose(config, logits).0);
        let (mut same, mut all, mut known, mut used) = (0u32, 0u32, 0u32, 0u32);
        for expert in 0..width {
            let has = |set: &[u32], token| bits::get(set, tokens, expert, token);
            for block in 0..tokens / BLOCK {
                let range = || block * BLOCK..(block + 1) * BLOCK;
                let [was, is] = [&old, &new].map(|set| range().any(|t| has(set, t)));
                used += u32::from(is);
                known += u32::from(is && was);
                for token in range().filter(|&t| has(&new, t)) {
                    all += 1;
                    same += u32::from(has(&old, token));
                }
            }
        }
        let [m, n] = [before, after].map(|logits| means(logits, width));
        let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
        for (i, (&x, &y)) in before.iter().zip(after).enumerate() {
            let (x, y) = (f64::from(x) - m[i % width], f64::from(y) - n[i % width]);
            xy += x * y;
            xx += x * x;
            yy += y * y;
        }
        let share = |a: u32, b: u32| f64::from(a) / f64::from(b.max(1));
        Self {
            experts: share(same, all),
            of_block: share(known, used),
            logits: xy / (xx * yy).sqrt().max(1e-30),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use testkit::synthetic::RHO;

    #[test]
    fn the_synthetic_scores_have_their_own_rho() {
        let mut rng = StdRng::seed_from_u64(1);
        let logits: Vec<f32> =
            mixture(&mut rng, 32 * 400, 32, 16).iter().map(|g| 2.0 * g).collect();
        let spread = Spread::of(&logits, 16);
        assert!((spread.of_blocks - f64::from(RHO)).abs() < 0.02, "{spread:?}");
        assert!((spread.deviation - 2.0).abs() < 0.05 && spread.of_experts < 0.01, "{spread:?}");
        // Experts that differ, whoever asks.
        let shifted: Vec<f32> =
            logits.iter().enumerate().map(|(i, g)| g + 4.0 * (i % 2) as f32).collect();
        let shifted = Spread::of(&shifted, 16);
        assert!((shifted.of_experts - 0.5).abs() < 0.02, "{shifted:?}");
        assert!((shifted.of_blocks - spread.of_blocks).abs() < 1e-6);
    }

    #[test]
    fn agreement_is_what_stays() {
        let config = LayerConfig::new(8, 8, 32, TokenChoice::new(2));
        let mut rng = StdRng::seed_from_u64(1);
        let logits = mixture(&mut rng, 64, 32, 32);
        let same = Agreement::of(&config, &logits, &logits);
        assert_eq!([same.experts, same.of_block], [1.0, 1.0]);
        assert!((same.logits - 1.0).abs() < 1e-9);
        // Each token's experts are others, the block's the same.
        let turned: Vec<f32> = logits
            .chunks(32 * 32)
            .flat_map(|block| block[32..].iter().chain(&block[..32]).copied())
            .collect();
        let turned = Agreement::of(&config, &logits, &turned);
        assert_eq!(turned.of_block, 1.0);
        assert!(turned.experts < 0.9 && turned.logits < 0.9, "{turned:?}");
    }
}
