//! A small language model of masked diffusion that learns: its blocks' FFNs are wgmoe's layers, all else is Burn's.
//!
//! ```sh
//! cargo run --release --example train
//! cargo run --release --example train -- --text FILE --rule token-choice --balance 0.01 --svg curves.svg
//! ```
//!
//! Progress and losses go to stderr, a sampled text to stdout. Without `--text` it learns a synthetic language of sums,
//! nested brackets and verbs that agree with their subjects.
mod diffusion;
mod language;
mod model;
mod optimise;
mod picture;

use burn::module::Module;
use burn::tensor::Device;
use clap::{Parser, ValueEnum};
use diffusion::{Masked, Routing};
use indicatif::{ProgressBar, ProgressStyle};
use model::{Model, Sizes};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;
use wgmoe_burn::MoeDevice;
use wgmoe_burn::wgmoe::layer::LayerConfig;
use wgmoe_burn::wgmoe::ops::router_loss::Coefficients;
use wgmoe_burn::wgmoe::routing::schedule::{Schedule, ScheduleKind};
use wgmoe_burn::wgmoe::routing::{self, ExpertChoice, TokenChoice};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// How experts and tokens find each other.
#[derive(Clone, Copy, Debug, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Rule {
    /// Each expert takes its best tokens of each sequence.
    ExpertChoice,
    /// Each token takes its best experts.
    TokenChoice,
}

/// Trains a small language model of masked diffusion.
#[derive(Clone, Debug, Parser, Serialize)]
struct Options {
    /// Text to learn, any bytes; a synthetic language by default.
    #[arg(long)]
    text: Option<PathBuf>,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[arg(long, default_value_t = 300)]
    steps: usize,
    /// Sequences of a batch.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 64)]
    length: usize,
    #[arg(long, default_value_t = 4)]
    layers: usize,
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// D.
    #[arg(long, default_value_t = 128)]
    hidden: u32,
    /// F.
    #[arg(long, default_value_t = 96)]
    intermediate: u32,
    /// E.
    #[arg(long, default_value_t = 32)]
    experts: u32,
    #[arg(long, default_value_t = 2)]
    shared_experts: u32,
    #[arg(long, value_enum, default_value = "expert-choice")]
    rule: Rule,
    /// K: experts that a token takes, or has on average.
    #[arg(long, default_value_t = 3)]
    experts_per_token: u32,
    /// Capacity of expert choice by the share of masked tokens: static, linear, linear_reverse, cosine, cosine_reverse, ...
    #[arg(long, default_value = "static")]
    schedule: String,
    /// Fewest experts per token of a schedule that is not static.
    #[arg(long, default_value_t = 1)]
    k_min: u32,
    /// Most of them.
    #[arg(long, default_value_t = 5)]
    k_max: u32,
    /// Coefficient of the router z-loss.
    #[arg(long, default_value_t = 1e-3)]
    router_z: f32,
    /// Coefficient of the balance loss.
    #[arg(long, default_value_t = 0.0)]
    balance: f32,
    /// Highest learning rate.
    #[arg(long, default_value_t = 2e-3)]
    rate: f64,
    /// Steps until the learning rate is highest.
    #[arg(long, default_value_t = 30)]
    warm_up: usize,
    /// Most that the norm of all gradients together may be.
    #[arg(long, default_value_t = 1.0)]
    clip: f32,
    /// Steps from one validation to the next.
    #[arg(long, default_value_t = 50)]
    validate: usize,
    /// Steps of unmasking of the sampled text; 0 samples none.
    #[arg(long, default_value_t = 32)]
    sample: usize,
    #[arg(long, default_value_t = 0.7)]
    temperature: f64,
    /// Writes the weights here at the end.
    #[arg(long)]
    save: Option<PathBuf>,
    /// Begins with weights from here; the optimizer begins anew.
    #[arg(long)]
    load: Option<PathBuf>,
    /// Writes what was measured here.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Draws the curves here.
    #[arg(long)]
    svg: Option<PathBuf>,
}

/// A validation.
#[derive(Clone, Debug, Serialize)]
struct Point {
    step: usize,
    seconds: f64,
    /// Mean training loss since the last one.
    training: f64,
    validation: f64,
    /// `-log p` of masked tokens, of sequences with up to a quarter of their tokens masked, up to a half, and so on.
    by_ratio: [f64; 4],
}

#[derive(Debug, Serialize)]
struct Report {
    options: Options,
    device: String,
    parameters: usize,
    points: Vec<Point>,
    sampled: String,
}

fn main() -> Outcome<()> {
    let options = Options::parse();
    let device = MoeDevice::open()?;
    let (sizes, routing) = options.sizes()?;
    let (training, held_out) = options.texts()?;
    device.device().seed(options.seed);
    let losses = Coefficients { router_z: options.router_z, balance: options.balance };
    let mut model = Model::new(&device, &sizes, Some(losses))?;
    if let Some(path) = &options.load {
        model = model.try_load_file(path)?;
    }
    let parameters = model.num_params();
    let info = device.context().info();
    eprintln!("{parameters} parameters on {} ({:?})", info.name, info.backend);

    let run = Run { options: &options, routing, device: device.device(), training, held_out };
    let (model, points) = run.train(model)?;
    let mut sampled = String::new();
    if options.sample > 0 {
        let mut rng = StdRng::seed_from_u64(options.seed ^ 0x5a3b);
        let how = (options.length, options.sample, options.temperature);
        let bytes = diffusion::sample(&model.valid(), &routing, device.device(), &mut rng, how)?;
        sampled = String::from_utf8_lossy(&bytes).into_owned();
        println!("{sampled}");
    }
    if let Some(path) = &options.save {
        model.save_file(path)?;
    }
    if let Some(path) = &options.svg {
        std::fs::write(path, picture::draw(&points))?;
    }
    if let Some(path) = &options.json {
        let device = format!("{} ({:?}) {}", info.name, info.backend, info.driver_info);
        let report = Report { options: options.clone(), device, parameters, points, sampled };
        std::fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}

impl Options {
    fn sizes(&self) -> Outcome<(Sizes, Routing)> {
        let kind: ScheduleKind = self.schedule.parse()?;
        let dynamic = kind != ScheduleKind::Static;
        let schedule = Schedule::new(kind, self.k_min, self.k_max);
        if dynamic {
            schedule.validate()?;
        }
        let k = self.experts_per_token;
        let apart = matches!(self.rule, Rule::ExpertChoice);
        if dynamic && !apart {
            return Err("only expert choice has a schedule".into());
        }
        let rule: routing::Routing = match self.rule {
            Rule::ExpertChoice if dynamic => {
                ExpertChoice::new(k).with_max(k.max(self.k_max)).into()
            }
            Rule::ExpertChoice => ExpertChoice::new(k).into(),
            Rule::TokenChoice => TokenChoice::new(k).into(),
        };
        if self.heads == 0 || !(self.hidden as usize).is_multiple_of(2 * self.heads) {
            return Err("the hidden size must be twice the heads, or a multiple of that".into());
        }
        let layer = LayerConfig::new(self.hidden, self.intermediate, self.experts, rule)
            .with_shared_experts(self.shared_experts);
        let sizes = Sizes { layers: self.layers, heads: self.heads, length: self.length, layer };
        let routing =
            Routing { apart, schedule: dynamic.then_some(schedule), experts: self.experts };
        Ok((sizes, routing))
    }

    /// What is learned, and what is not seen: the last tenth of a file, or sentences of another seed.
    fn texts(&self) -> Outcome<(Vec<u8>, Vec<u8>)> {
        let Some(path) = &self.text else {
            let text = |seed| language::synthetic(seed, 1 << 18);
            return Ok((text(self.seed), text(!self.seed)));
        };
        let mut text = std::fs::read(path)?;
        let held_out = text.split_off(text.len() / 10 * 9);
        if held_out.len() < self.length {
            return Err(format!("{}: a tenth is shorter than a sequence", path.display()).into());
        }
        Ok((text, held_out))
    }

    /// Up to the highest rate in a straight line, then down to a tenth of it along a cosine.
    fn rate(&self, step: usize) -> f64 {
        if step < self.warm_up {
            return self.rate * (step + 1) as f64 / self.warm_up as f64;
        }
        let left = self.steps.saturating_sub(self.warm_up).max(1);
        let share = (step - self.warm_up) as f64 / left as f64;
        self.rate * (0.1 + 0.45 * (1.0 + (std::f64::consts::PI * share).cos()))
    }
}

struct Run<'a> {
    options: &'a Options,
    routing: Routing,
    device: &'a Device,
    training: Vec<u8>,
    held_out: Vec<u8>,
}

impl Run<'_> {
    fn train(&self, mut model: Model) -> Outcome<(Model, Vec<Point>)> {
        let Options { steps, batch, length, validate, clip, seed, .. } = *self.options;
        let mut rng = StdRng::seed_from_u64(seed);
        let mut optimizer = optimise::adam();
        let bar = ProgressBar::new(steps as u64);
        let style = "{bar:30} {pos}/{len} {elapsed} of about {duration}, {msg}";
        bar.set_style(ProgressStyle::with_template(style)?);
        let start = Instant::now();
        let (mut points, mut recent) = (vec![], vec![]);
        for step in 0..steps {
            let text = language::windows(&self.training, &mut rng, batch, length);
            let masked = Masked::new(text, length, &mut rng);
            let loss = masked.loss(&model, &self.routing, self.device);
            let value = optimise::number(&loss)?;
            model = optimise::step(&mut optimizer, model, &loss, self.options.rate(step), clip);
            recent.push(value);
            bar.set_message(format!("loss {value:.3}"));
            bar.inc(1);
            if (step + 1) % validate.max(1) == 0 || step + 1 == steps {
                let (validation, by_ratio) = self.validate(&model.valid())?;
                let training = recent.iter().sum::<f64>() / recent.len() as f64;
                recent.clear();
                let seconds = start.elapsed().as_secs_f64();
                let [z, balance] = model.router_losses()?;
                bar.suspend(|| {
                    eprintln!(
                        "step {}: training {training:.3}, validation {validation:.3}, by masked share {by_ratio:.2?}, router z {z:.2e}, balance {balance:.2e}",
                        step + 1
                    );
                });
                points.push(Point { step: step + 1, seconds, training, validation, by_ratio });
            }
        }
        bar.finish_and_clear();
        Ok((model, points))
    }

    /// The loss on text that is not learned, the same each time, and `-log p` of its masked tokens by their share.
    fn validate(&self, model: &Model) -> Outcome<(f64, [f64; 4])> {
        let Options { batch, length, seed, .. } = *self.options;
        let mut rng = StdRng::seed_from_u64(!seed);
        let mut by_ratio = [0.0; 4];
        let mut all = 0.0;
        for (quarter, mean) in (0..).zip(&mut by_ratio) {
            let text = language::windows(&self.held_out, &mut rng, batch, length);
            // Times evenly over the quarter.
            let mut i = 0;
            let masked = Masked::at(text, length, &mut rng, |_| {
                i += 1;
                (f64::from(quarter) + (i as f64 - 0.5) / batch as f64) / 4.0
            });
            let surprise = masked.surprise(model, &self.routing, self.device);
            let surprise: Vec<f32> = surprise.try_into_vec_as()?;
            let (mut sum, mut count) = (0.0, 0);
            for (tokens, mask) in surprise.chunks(length).zip(masked.mask.chunks(length)) {
                let own: f64 =
                    tokens.iter().zip(mask).filter(|(_, m)| **m).map(|(s, _)| f64::from(*s)).sum();
                let masked = mask.iter().filter(|m| **m).count();
                // Over the share that is masked, over all tokens: the mean of the masked ones.
                all += own / masked as f64 / (4 * batch) as f64;
                sum += own;
                count += masked;
            }
            *mean = sum / f64::from(count as u32);
        }
        Ok((all, by_ratio))
    }
}
