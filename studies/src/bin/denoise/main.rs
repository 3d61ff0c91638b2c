//! A masked-diffusion denoising run over one MoE layer: what does it cost to route it by token
//! choice, by expert choice, and by expert choice whose capacity follows the mask ratio (EC-DLM,
//! arXiv 2604.01622)?
//!
//! A batch of sequences starts fully masked; every step unmasks some tokens, at a pace of each
//! sequence's own. The counts of masked tokens go to the device, become capacities there, and the
//! layer runs with them: one recording a step, bound once, nothing read back in between. All rules
//! share one set of weights and see the same hidden states, and every schedule is given the range
//! of k with which it costs as much as `--k` experts per token throughout: `cargo run --release -p
//! studies --bin denoise -- --help`.
//!
//! Weights and hidden states are synthetic. Every routing is checked against the CPU twins; exits
//! with 1 where one differs. Where there is no GPU driver, the twins run alone, and times are those
//! of their routing.
mod on_gpu;
mod print;
mod report;
mod run;

use crate::on_gpu::on_gpu;
use crate::print::{describe, draw, tables};
use crate::report::on_cpu;
use crate::run::{Run, rules};
use clap::Parser;
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::StandardNormal;
use serde::Serialize;
use std::process::ExitCode;
use testkit::program::{self, Found, Progress};
use testkit::synthetic::Pool;
use wgmoe::layer::LayerConfig;
use wgmoe::routing::Routing;
use wgmoe::{Error, Gpu, WeightType};

/// Denoises a batch of sequences under each routing rule at equal expected FLOPs, checks every
/// routing against the CPU, and shows what each rule costs.
#[derive(Parser)]
struct Options {
    /// Sequences of the batch
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=4096))]
    sequences: u32,
    /// Tokens of the longest sequence; the others are up to an eighth shorter
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65536))]
    length: u32,
    /// Denoising steps
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=1000))]
    steps: u32,
    /// How the masked share falls over the steps
    #[arg(long, value_enum, default_value = "cosine")]
    unmask: Unmask,
    /// D: hidden size
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(2..=16384))]
    hidden: u32,
    /// F: intermediate size of an expert
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=16384))]
    intermediate: u32,
    /// E: experts
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    experts: u32,
    /// Experts per token of token choice and of the static schedule; what the other schedules cost
    /// on average
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1024))]
    k: u32,
    /// Difference between most and least experts per token of a schedule; up to 2 less where that
    /// meets the cost better
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=1023))]
    k_range: u32,
    /// Deviation of the logits that make some experts popular with all tokens
    #[arg(long, default_value_t = 0.5)]
    skew: f32,
    /// Timed runs of each rule; a step's time is their median
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    repeats: u32,
    /// Adapter, by a part of its name or by index
    #[arg(long, value_name = "NAME|INDEX")]
    adapter: Option<String>,
    /// Seed of weights and hidden states
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// Draw k and the time of each step into this file
    #[arg(long, value_name = "FILE")]
    svg: Option<std::path::PathBuf>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Unmask {
    /// As many tokens each step
    Linear,
    /// Few tokens at first, many at the end: the masked share is a quarter of a cosine
    Cosine,
}

impl Unmask {
    /// The masked share after a share of the steps.
    fn masked(self, done: f64) -> f64 {
        match self {
            Self::Linear => 1.0 - done,
            Self::Cosine => (std::f64::consts::FRAC_PI_2 * done).cos(),
        }
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output {
    rules: Vec<RuleReport>,
}

#[derive(Serialize)]
struct RuleReport {
    rule: String,
    /// Every routing is the twin's, and expert choice's slots and loads are as scheduled.
    ok: bool,
    /// Of all steps.
    ms: f64,
    /// Tokens of all steps over that time.
    tokens_per_s: f64,
    /// (token, expert) pairs computed in all steps.
    slots: u64,
    /// Rows that a padded batched matmul computes in all steps: for every expert its capacity, or
    /// the largest load where there is none.
    padded: u64,
    /// Pairs over an expert's capacity.
    dropped: u64,
    /// Largest load over the mean, averaged over steps by their slots.
    imbalance: f64,
    /// Tokens without an expert, over all steps.
    untouched: u64,
    steps: Vec<StepReport>,
    devices: Vec<Devices>,
    /// For the table.
    #[serde(skip)]
    cost: String,
}

/// Means over the sequences where each has its own.
#[derive(Serialize)]
struct StepReport {
    k: f64,
    /// Tokens that an expert takes at most: of a sequence (expert choice), or of the batch (token
    /// choice; the largest load where there is no capacity).
    capacity: f64,
    ms: f64,
}

/// Slots of the slowest of `devices` devices over the mean, experts dealt out in order.
#[derive(Serialize)]
struct Devices {
    devices: u32,
    slowest: f64,
}

/// The layer on the host.
struct Weights {
    config: LayerConfig,
    router: Vec<f32>,
    experts: Pool,
}

impl Weights {
    /// Logits have deviation 2; `--skew` apart, all experts are equally popular.
    fn new(options: &Options, routing: Routing, rng: &mut StdRng) -> Self {
        let Options { hidden, intermediate, experts, .. } = *options;
        let config = LayerConfig::new(hidden, intermediate, experts, routing);
        let d = hidden as usize;
        let deviation = 2.0 / (d as f32).sqrt();
        let mut normal = |deviation: f32| deviation * rng.sample::<f32, _>(StandardNormal);
        let router = (0..experts as usize * d)
            .map(|i| normal(if i % d == 0 { options.skew } else { deviation }))
            .collect();
        Self { config, router, experts: Pool::new(rng, &config, WeightType::Bf16) }
    }
}

fn run(options: &Options, progress: &Progress) -> Result<(String, Vec<RuleReport>), String> {
    let values = u64::from(options.sequences)
        * u64::from(options.length)
        * u64::from(options.steps)
        * u64::from(options.hidden.max(4 * options.experts));
    if values > 1 << 31 {
        return Err(
            "more than 8 GiB of hidden states or logits: fewer or shorter sequences, or steps"
                .into(),
        );
    }
    if !options.skew.is_finite() {
        return Err("--skew must be finite".into());
    }
    if options.k > options.experts {
        return Err(format!("--k {}: more than {} experts", options.k, options.experts));
    }
    let say = |e: Error| e.to_string();
    let mut rng = StdRng::seed_from_u64(options.seed);
    let batch = Run::new(options, &mut rng);
    let rules = rules(options, &batch).map_err(say)?;
    let weights = Weights::new(options, rules[0].routing, &mut rng);
    progress.say("opening the device");
    let (on, reports) = match pollster::block_on(Gpu::open(options.adapter.as_deref())) {
        Ok(gpu) => {
            let on = format!("{} ({}, {})", gpu.info.name, gpu.info.driver, gpu.info.backend);
            (on, on_gpu(options, &weights, &batch, &rules, &gpu, progress).map_err(say)?)
        }
        Err(e) if options.adapter.is_some() => return Err(format!("--adapter: {e}")),
        Err(e) => {
            progress
                .note(&format!("{e}\nthe CPU twins run alone: times are those of their routing"));
            let on = "CPU twins: times are those of their routing, experts apart".into();
            (on, on_cpu(&weights, &batch, &rules, progress))
        }
    };
    Ok((describe(options, &batch, &rules, &on).map_err(say)?, reports))
}

fn main() -> ExitCode {
    let options = Options::parse();
    program::run("denoise", |progress| {
        let (head, rules) = run(&options, progress)?;
        let ok = rules.iter().all(|r| r.ok);
        program::save(options.svg.as_deref(), || draw(&rules).map_err(|e| e.to_string()))?;
        let output = Output { rules };
        let text = program::text_of(&output, options.json, |o| head + &tables(&o.rules))?;
        Ok(Found { text, ok })
    })
}
