//! How much device memory a layer's experts need when blocks elect a few of them: the same
//! denoising steps with all experts on the device, and with a cache that holds a share of them.
//!
//! Draws blocks of hidden states whose router logits are `g = 2 (sqrt(0.6) Z_block[e] + sqrt(0.4)
//! Z[t, e]) - 3`, Z standard normal; from one denoising step to the next, a token's own part keeps
//! the correlation `--agreement` (a first-order autoregression), the block's part stays. Nothing
//! published says how far consecutive steps agree: the default is an assumption, and the share of
//! experts that they have in common is printed. Every step runs on both layers, and the outputs
//! must have the same bits: exits with 1 where they do not.
//!
//! With `--layers N` the experts of N layers share one budget under each of the policies of
//! `wgmoe::layer::cached`, without and with a host that computes what is missing; outputs are compared
//! with each other. `cargo run --release -p studies --bin
//! expert_memory -- --help`.
mod layer;
mod model;

use clap::Parser;
use rand::{Rng, rngs::StdRng};
use rand_distr::StandardNormal;
use std::path::PathBuf;
use std::process::ExitCode;
use testkit::program::{self, Found, Progress};
use testkit::synthetic::RHO;
use wgmoe::routing::{BlockRule, Routing};
use wgmoe::{Gpu, WeightType, models};

/// Denoising steps of a layer of LLaDA2.0-mini with a part of its experts on the device, beside all
/// of them there.
#[derive(Parser)]
struct Options {
    /// Device memory for experts: a share of what all of them take, or bytes
    #[arg(long, default_value = "20%", value_name = "SHARE%|BYTES", value_parser = budget)]
    budget: Budget,
    /// Layers that share the budget, each with a router of its own; 1: one layer, beside itself with all
    /// experts on the device
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    layers: u32,
    /// With layers: the rule, by a part of its name
    #[arg(long, default_value = "dMoE")]
    rule: String,
    /// With layers: steps from one change of places to the next
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    interval: u32,
    /// With layers: a checkpoint of at least as many, of the same shape, whose mapped files the experts come
    /// from
    #[arg(long, value_name = "FILE|FOLDER")]
    checkpoint: Option<PathBuf>,
    /// Blocks of 32 tokens, denoised one after the other
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
    blocks: u32,
    /// Denoising steps of each block
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    steps: u32,
    /// Routed experts, at most 256; with fewer, counts of experts in rules shrink alike
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=256))]
    experts: u32,
    /// Correlation of a token's own part of its router logits from one step to the next
    #[arg(long, default_value_t = 0.9)]
    agreement: f32,
    /// Storage type of the experts
    #[arg(long, default_value = "bf16")]
    weights: WeightType,
    /// Adapter, by a part of its name or by index
    #[arg(long, value_name = "NAME|INDEX")]
    adapter: Option<String>,
    /// Seed of router, weights and hidden states
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// Also draw the bytes moved over the steps of a block (of one layer)
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

#[derive(Clone, Copy)]
enum Budget {
    Share(f64),
    Bytes(u64),
}

fn budget(text: &str) -> Result<Budget, String> {
    match text.strip_suffix('%') {
        Some(share) => match share.trim().parse::<f64>() {
            Ok(share) if share > 0.0 && share.is_finite() => Ok(Budget::Share(share / 100.0)),
            _ => Err("a share above 0 %".into()),
        },
        None => text.parse().map(Budget::Bytes).map_err(|_| "a share (20%) or bytes".into()),
    }
}

/// Tokens that LLaDA2.x decodes together.
const BLOCK: u32 = 32;

/// The rules compared.
fn rules(experts: u32) -> Result<Vec<(&'static str, Routing)>, String> {
    let mini = models::find("llada2-mini").ok_or("no llada2-mini")?.config;
    let trained = models::find("llada2.2-mini").ok_or("no llada2.2-mini")?.config.routing;
    let Routing::TokenChoice(own) = mini.routing else {
        return Err("llada2-mini does not route by token choice".into());
    };
    let elect = |rule| Routing::TokenChoice(own.with_coreset(rule));
    let rules = [
        ("original", mini.routing),
        ("DES-V, vote(38)", elect(BlockRule::Vote(38))),
        ("dMoE, mass(0.6, 8)", elect(BlockRule::mass(0.6).with_floor(8))),
        ("LLaDA2.2, capacity(48)", trained),
    ];
    rules
        .into_iter()
        .map(|(name, routing)| {
            let routing = routing.with_fewer_experts(mini.experts, experts);
            routing.check(experts).map_err(|e| format!("--experts {experts}: {name}: {e}"))?;
            Ok((name, routing))
        })
        .collect()
}

/// Hidden states `[BLOCK, D]` of every step of every block.
fn hidden_states(options: &Options, hidden: u32, rng: &mut StdRng) -> Vec<Vec<Vec<f32>>> {
    let mut normal = |n: u32| -> Vec<f32> { (0..n).map(|_| rng.sample(StandardNormal)).collect() };
    let (keep, fresh) = (options.agreement, (1.0 - options.agreement.powi(2)).sqrt());
    (0..options.blocks)
        .map(|_| {
            let of_block = normal(hidden);
            let mut own = normal(BLOCK * hidden);
            (0..options.steps)
                .map(|step| {
                    if step > 0 {
                        let news = normal(BLOCK * hidden);
                        own.iter_mut().zip(news).for_each(|(z, new)| *z = keep * *z + fresh * new);
                    }
                    let width = hidden as usize;
                    let mixed = own
                        .iter()
                        .enumerate()
                        .map(|(i, z)| RHO.sqrt() * of_block[i % width] + (1.0 - RHO).sqrt() * z);
                    let mut x: Vec<f32> = mixed.collect();
                    x.iter_mut().step_by(width).for_each(|x| *x = 1.0);
                    x
                })
                .collect()
        })
        .collect()
}

/// The budget in bytes, where all experts take so many.
fn budget_bytes(options: &Options, all: u64) -> u64 {
    match options.budget {
        Budget::Share(share) => (share * all as f64) as u64,
        Budget::Bytes(bytes) => bytes,
    }
}

fn open(options: &Options, progress: &Progress) -> Result<Gpu, String> {
    progress.say("opening the device");
    let gpu = pollster::block_on(Gpu::open(options.adapter.as_deref())).map_err(|e| e.to_string());
    gpu.map_err(|e| match &options.adapter {
        Some(_) => format!("--adapter: {e}"),
        None => e,
    })
}

fn main() -> ExitCode {
    let options = Options::parse();
    program::run("expert_memory", |progress| {
        if !(0.0..=1.0).contains(&options.agreement) {
            return Err("--agreement must lie in 0..=1".into());
        }
        if options.layers > 1 {
            let report = model::run(&options, progress)?;
            let text = program::text_of(&report, options.json, model::table)?;
            return Ok(Found { text, ok: report.rows.iter().all(|r| r.ok) });
        }
        let report = layer::run(&options, progress)?;
        program::save(options.svg.as_deref(), || layer::draw(&report).map_err(|e| e.to_string()))?;
        let text = program::text_of(&report, options.json, layer::table)?;
        Ok(Found { text, ok: report.rules.iter().all(|r| r.ok) })
    })
}
