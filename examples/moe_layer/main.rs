//! A mixture-of-experts layer on this machine's GPU: is it right, and how fast is it?
//!
//! First replays the recorded layers of the LLaDA2 reference (`group_limited_*` and
//! `block_coreset_*` of `tests/golden`), then builds a layer of a named model with synthetic
//! weights and hidden states, or loads one from a checkpoint (`--checkpoint`; `make_checkpoint`
//! writes some to try), runs each routing rule, checks it against the CPU twins, and prints where
//! the time goes: `cargo run --release --example moe_layer -- --help`. Where there is no GPU
//! driver, the CPU twins run alone. Exits with 1 where a check fails.
mod data;
mod on_cpu;
mod on_gpu;
mod report;
mod stored_layer;

use clap::Parser;
use data::Source;
use report::{Golden, Report, finite, tables};
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use stored_layer::StoredLayer;
use testkit::golden;
use testkit::program::{self, Found, Progress};
use testkit::rules::every_rule;
use wgmoe::layer::LayerConfig;
use wgmoe::models::{self, MODELS};
use wgmoe::routing::{Groups, Routing};
use wgmoe::weights::ExpertTypes;
use wgmoe::{Context, Gpu, WeightType};

#[global_allocator]
static ALLOCATED: peak_alloc::PeakAlloc = peak_alloc::PeakAlloc;

/// Runs an MoE layer under each routing rule, checks it against the CPU, and shows where the time
/// goes.
#[derive(Parser)]
struct Options {
    /// Model whose layer is built
    #[arg(long, default_value = "llada2-mini", value_parser = clap::builder::PossibleValuesParser::new(MODELS.iter().map(|m| m.name)))]
    model: String,
    /// Directory of a checkpoint, a layer of which is loaded instead
    #[arg(long, value_name = "DIR", conflicts_with_all = ["model", "experts"])]
    checkpoint: Option<PathBuf>,
    /// Layer of the checkpoint; its first MoE layer by default
    #[arg(long, requires = "checkpoint")]
    layer: Option<u32>,
    /// Routed experts, at most the model's; groups keep their size
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    experts: u32,
    /// Tokens, in sequences of 128
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Type the experts are stored as on the device, such as f32, q8_0, q4_k or f8_e4m3; bf16 by default, or a
    /// checkpoint's own
    #[arg(long)]
    weights: Option<WeightType>,
    /// Adapter, by a part of its name or by index
    #[arg(long, value_name = "NAME|INDEX")]
    adapter: Option<String>,
    /// Seed of weights and hidden states
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
}

/// The layer that is run.
struct Subject {
    name: String,
    config: LayerConfig,
    /// Experts of the model it is of.
    of: u32,
    stored: Option<StoredLayer>,
}

impl Subject {
    fn source(&self, weights: Option<WeightType>) -> Source<'_> {
        match &self.stored {
            Some(layer) => Source::Stored(layer),
            None => Source::Synthetic(weights.unwrap_or(WeightType::Bf16)),
        }
    }
}

/// What a layer is, in a line.
fn describe(subject: &Subject, config: &LayerConfig, weights: ExpertTypes) -> String {
    let mut line = format!(
        "{}: {} of {} experts, D {}, F {}, {} shared",
        subject.name,
        config.experts,
        subject.of,
        config.hidden,
        config.intermediate,
        config.shared_experts
    );
    if let Routing::TokenChoice(rule) = config.routing {
        let _ = write!(line, ", K {}", rule.experts_per_token);
        if let Some(Groups { count, per_token, .. }) = rule.groups {
            let _ = write!(line, " from {per_token} of {count} groups");
        }
    }
    let ExpertTypes { gate_up, down } = weights;
    let mut weights = gate_up.name().to_lowercase();
    if down != gate_up {
        weights += &format!(" and {}", down.name().to_lowercase());
    }
    let from = if subject.stored.is_some() { "from the checkpoint" } else { "synthetic" };
    line + &format!("; {weights} weights, {from}")
}

/// Replays the recorded layers; none where the folder is not there.
fn replay(
    progress: &Progress,
    gpu: Option<(&Gpu, &Context)>,
    notes: &mut Vec<String>,
) -> Result<Vec<Golden>, String> {
    if !golden::folder().is_dir() {
        notes.push(format!("no recorded layers: {} is not there", golden::folder().display()));
        return Ok(vec![]);
    }
    let mut golden = vec![];
    for file in golden::files()? {
        let case = file.name.clone();
        let Some(layer) = golden::Layer::read(&file).map_err(|e| format!("{case}: {e}"))? else {
            continue;
        };
        progress.say(format!("recorded layer {case}"));
        let got = match gpu {
            Some((gpu, ctx)) => {
                testkit::block_on(layer.on_gpu(gpu, ctx)).map_err(|e| format!("{case}: {e}"))?
            }
            None => layer.on_cpu(),
        };
        let (max_error, ok) = layer.compare(&got);
        golden.push(Golden { case, max_error: finite(max_error.into()), ok });
    }
    if golden.is_empty() {
        notes.push("no recorded layers in the folder of golden files".into());
    }
    Ok(golden)
}

/// The layer that the options name.
fn subject(options: &Options) -> Result<Subject, String> {
    if let Some(dir) = &options.checkpoint {
        let stored = StoredLayer::open(dir, options.layer)?;
        let config = *stored.config();
        let name = format!("{}, layer {}", dir.display(), stored.number());
        return Ok(Subject { name, config, of: config.experts, stored: Some(stored) });
    }
    let model = models::find(&options.model).ok_or("no such model")?; // clap has checked it
    let of = model.config.experts;
    if options.experts > of {
        return Err(format!("--experts {}: {} has {of}", options.experts, model.name));
    }
    let config = model.with_experts(options.experts);
    Ok(Subject { name: model.name.into(), config, of, stored: None })
}

fn run(options: &Options, progress: &Progress) -> Result<Report, String> {
    let subject = subject(options)?;
    let config = &subject.config;
    for (name, rule) in every_rule(config.routing, config.experts) {
        rule.check(config.experts)
            .map_err(|e| format!("{} experts: {name}: {e}", config.experts))?;
    }
    progress.say("opening the device");
    match pollster::block_on(Gpu::open(options.adapter.as_deref())) {
        Ok(gpu) => on_gpu::on_gpu(options, &subject, &gpu, progress),
        Err(e) if options.adapter.is_some() => Err(format!("--adapter: {e}")),
        Err(e) => {
            progress.note(&format!("{e}\nthe CPU twins run alone, on less work"));
            on_cpu::on_cpu(options, &subject, progress)
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    program::run("moe_layer", |progress| {
        let report = run(&options, progress)?;
        let text = program::text_of(&report, options.json, tables)?;
        let ok = report.golden.iter().all(|g| g.ok) && report.rules.iter().all(|r| r.ok);
        Ok(Found { text, ok })
    })
}
