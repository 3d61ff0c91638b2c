//! A small language model of masked diffusion that learns: its blocks' FFNs are wgmoe's layers, all else is Burn's.
//!
//! ```sh
//! cargo run --release --example train
//! cargo run --release --example train -- --text FILE --rule token-choice --svg curves.svg --save FOLDER
//! cargo run --release --example train -- --steps 600 --load FOLDER
//! cargo run --release --example train -- claims --help
//! ```
//!
//! Progress and losses go to stderr, sampled texts to stdout. Without `--text` it learns a synthetic language of sums,
//! nested brackets and verbs that agree with their subjects. `claims` is the study of what papers say about learning.
mod checkpoint;
mod claims;
mod diffusion;
mod evaluate;
mod language;
mod model;
mod optimise;
mod options;
mod picture;
mod training;

use burn::module::Module;
use clap::{Args, Parser, Subcommand};
use diffusion::Sampling;
use model::Model;
use options::Options;
use picture::{Chart, Curve};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::Serialize;
use std::path::PathBuf;
use training::{Learner, Point, Run};
use wgmoe_burn::MoeDevice;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Trains a small language model of masked diffusion.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    files: Files,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Trains many models, and says what came out of the claims of papers about learning.
    Claims(Box<claims::Arguments>),
}

/// What is read and written.
#[derive(Debug, Args)]
struct Files {
    /// Writes weights, optimizer and layers into this folder at the end.
    #[arg(long)]
    save: Option<PathBuf>,
    /// Goes on from such a folder: weights, optimizer, and the steps done, which count among `--steps`.
    #[arg(long)]
    load: Option<PathBuf>,
    /// Writes what was measured here.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Draws the curves here.
    #[arg(long)]
    svg: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Report {
    options: Options,
    device: String,
    parameters: usize,
    points: Vec<Point>,
    sampled: Vec<String>,
}

fn main() -> Outcome<()> {
    let Arguments { command, options, files } = Arguments::parse();
    let device = MoeDevice::open()?;
    match command {
        Some(Command::Claims(arguments)) => claims::run(&arguments, &device),
        None => train(options, &files, &device),
    }
}

fn train(options: Options, files: &Files, device: &MoeDevice) -> Outcome<()> {
    let (sizes, routing) = options.sizes()?;
    let [training, held_out] = options.texts()?;
    device.device().seed(options.seed);
    let model = Model::new(device, &sizes, Some(options.losses()))?;
    let mut learner = Learner { model, optimizer: optimise::adam(), step: 0 };
    if let Some(folder) = &files.load {
        learner = checkpoint::resume(learner.model, learner.optimizer, folder)?;
        eprintln!("{} steps are done", learner.step);
    }
    let parameters = learner.model.num_params();
    let info = device.context().info();
    eprintln!("{parameters} parameters on {} ({:?})", info.name, info.backend);
    let entropy = language::entropy(&held_out);
    eprintln!("single bytes of the text have an entropy of {entropy:.3} nats");

    let (training, held_out) = (&training, &held_out);
    let on = device.device();
    let run = Run { options: &options, routing, device: on, training, held_out, batches_from: 0 };
    let (learner, points) = run.train(learner)?;
    let mut sampled = vec![];
    if options.sample > 0 {
        let mut rng = StdRng::seed_from_u64(options.seed ^ 0x5a3b);
        let Options { batch: count, length, sample: steps, temperature, .. } = options;
        let sampling = Sampling { count, length, steps, temperature };
        let model = learner.model.valid();
        let texts = sampling.run(&model, &routing, device.device(), &mut rng, &mut |_, _| {})?;
        sampled = texts.iter().map(|text| String::from_utf8_lossy(text).into_owned()).collect();
        println!("{}", sampled.join("\n----\n"));
    }
    if let Some(folder) = &files.save {
        checkpoint::save(&learner, &options, folder)?;
    }
    if let Some(path) = &files.svg {
        std::fs::write(path, chart(&points).draw()?)?;
    }
    if let Some(path) = &files.json {
        let device = format!("{} ({:?}) {}", info.name, info.backend, info.driver_info);
        let report = Report { options, device, parameters, points, sampled };
        std::fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}

/// Losses against steps, and `-log p` by the share of masked tokens.
fn chart(points: &[Point]) -> Chart {
    let curve = |name: String, value: &dyn Fn(&Point) -> f64| {
        Curve::thin(name, points.iter().map(|p| (p.step as f64, value(p))).collect())
    };
    let mut curves = vec![
        curve("training".into(), &|p| p.training),
        curve("validation".into(), &|p| p.validation.loss),
    ];
    for bin in (0..evaluate::BINS).step_by(2) {
        let percent = |bin: usize| 100.0 * bin as f64 / evaluate::BINS as f64;
        let name = format!("{:.0} to {:.0} % masked", percent(bin), percent(bin + 1));
        curves.push(curve(name, &move |p| p.validation.by_ratio[bin]));
    }
    Chart { x: "steps".into(), y: "nats a masked token".into(), curves, from_zero: true }
}
