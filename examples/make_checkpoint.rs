//! A checkpoint to try things on with no download: LLaDA2's tensor names, layout and `config.json`, or
//! with `--gguf` llama.cpp's names and metadata, with synthetic weights (`testkit/src/checkpoint_writer.rs` says which): `cargo run --release
//! --example make_checkpoint -- --help`. Written as it is made, so a model of any size takes little
//! memory.
use clap::Parser;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use testkit::checkpoint_writer::{Layout, Plan};
use wgmoe::WeightType;
use wgmoe::models::{self, MODELS};

/// The layouts by name.
fn layouts() -> impl TypedValueParser<Value = Layout> {
    PossibleValuesParser::new(Layout::ALL.map(Layout::name)).try_map(|name| name.parse())
}

/// The types of GGUF files by name.
fn weights() -> impl TypedValueParser<Value = WeightType> {
    let types = WeightType::ALL.iter().filter(|t| t.ggml_type().is_some());
    PossibleValuesParser::new(types.map(|t| t.name())).try_map(|name| name.parse())
}

/// Writes a checkpoint of synthetic weights.
#[derive(Parser)]
struct Options {
    /// Directory to write to; made where it is not there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Model whose layers are written
    #[arg(long, default_value = "llada2-mini", value_parser = PossibleValuesParser::new(MODELS.iter().map(|m| m.name)))]
    model: String,
    /// MoE layers; they follow the model's dense layers, of which nothing is written. All of the
    /// model's by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    layers: Option<u32>,
    /// Routed experts, at most the model's; groups keep their size. All of the model's by default
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    experts: Option<u32>,
    /// How experts are stored
    #[arg(long, default_value = "each", value_parser = layouts())]
    layout: Layout,
    /// Write a GGUF file, whose experts are always stacked
    #[arg(long, conflicts_with = "layout")]
    gguf: bool,
    /// Storage type of the experts of a GGUF file
    #[arg(long, default_value = "BF16", ignore_case = true, requires = "gguf", value_parser = weights())]
    weights: WeightType,
    /// Files to spread the tensors over; with more than one, an index says what is where, or, of a
    /// GGUF file, each part's own number
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    shards: u16,
    /// Seed of the weights
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn run(options: &Options) -> Result<(), String> {
    let model = models::find(&options.model).ok_or("no such model")?; // clap has checked it
    let (layers, dense) = (model.layers, model.dense_layers);
    let most = model.config.experts;
    let experts = options.experts.unwrap_or(most);
    if experts > most {
        return Err(format!("--experts {experts}: {} has {most}", model.name));
    }
    let config = model.with_experts(experts);
    config.routing.check(experts).map_err(|e| format!("--experts {experts}: {e}"))?;
    let plan = Plan {
        config,
        layers: options.layers.unwrap_or(layers - dense),
        dense,
        layout: options.layout,
        shards: options.shards.into(),
        seed: options.seed,
    };
    let said = |e: std::io::Error| format!("{}: {e}", options.out.display());
    let total = if options.gguf { plan.gguf_bytes(options.weights) } else { plan.bytes() };
    let total = total.map_err(|e| format!("--model {}: {e}", model.name))?;
    let bar = ProgressBar::new(total);
    let style = "{wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    bar.set_style(ProgressStyle::with_template(style).map_err(|e| e.to_string())?);
    if bar.is_hidden() {
        eprintln!("writing {} MB ...", total / 1_000_000);
    }
    let start = Instant::now();
    let progress = &mut |bytes| bar.inc(bytes);
    let written = if options.gguf {
        let name = format!("{}-{}", model.name, options.weights.name());
        plan.write_gguf(&options.out, &name, options.weights, progress)
    } else {
        plan.write(&options.out, progress).map(|()| options.out.clone())
    };
    bar.finish_and_clear();
    let written = written.map_err(said)?;
    println!(
        "{}: layers {}..{} of {}, {experts} experts, {} MB in {:.1} s",
        written.display(),
        dense,
        dense + plan.layers,
        model.name,
        total / 1_000_000,
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("make_checkpoint: {e}");
            ExitCode::FAILURE
        }
    }
}
