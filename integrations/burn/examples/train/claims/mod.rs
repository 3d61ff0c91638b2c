//! What papers claim about how such models learn, lived in small.
//!
//! ```sh
//! cargo run --release --example train -- claims --out FOLDER
//! ```
//!
//! | claim | runs |
//! |---|---|
//! | a | expert choice, token choice with Switch's loss, without a loss, and with a capacity that drops |
//! | b | expert choice whose capacity follows the share of masked tokens |
//! | c | the token-choice model goes on under expert choice |
//! | d | the token-choice model under coresets of dMoE, as it is and after some steps with them |
//! | e | the trained router's scores beside synthetic ones |
//!
//! Each run writes a file into the folder, and a run whose file is there is not run again: the study can be stopped, and
//! done in pieces. At the end, and with `--report-only` at once, the folder gets tables and curves of all that is there.
mod jobs;
mod report;
mod scores;
mod tables;

use crate::Outcome;
use crate::checkpoint;
use crate::diffusion::Masked;
use crate::evaluate::{self, Blocks, Validation};
use crate::language;
use crate::model::Model;
use crate::optimise;
use crate::options::{Options, Rule};
use crate::training::{Learner, Point, Run};
use burn::module::Module;
use clap::Args;
use jobs::Job;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Instant;
use wgmoe_burn::MoeDevice;

/// Which runs, and where their files are.
#[derive(Clone, Debug, Args)]
pub struct Arguments {
    /// Folder of the runs' files, tables and curves
    #[arg(long, default_value = "claims")]
    out: PathBuf,
    /// Seeds, from 1 on, of text, weights and batches
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Claims to run, of a, b, c, d, e; c, d and e need a's token-choice model
    #[arg(long, value_delimiter = ',', default_values_t = ['a', 'b', 'c', 'd', 'e'])]
    only: Vec<char>,
    /// Steps of models that go on (c, d)
    #[arg(long, default_value_t = 100)]
    more_steps: usize,
    /// Their highest learning rate
    #[arg(long, default_value_t = 1e-3)]
    more_rate: f64,
    /// Runs nothing; tables and curves of what is there
    #[arg(long)]
    report_only: bool,
    #[command(flatten)]
    options: Options,
}

/// A run, as its file has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    name: String,
    seed: u64,
    options: Options,
    /// Nats of single bytes of the text that is validated on.
    entropy: f64,
    points: Vec<Point>,
    /// Of more sequences than the points'.
    last: Validation,
    /// Share of sums that no text has that are right.
    sums: f64,
    /// Under token choice.
    blocks: Option<Blocks>,
    seconds: f64,
}

/// Sequences of a run's last validation.
const AT_THE_END: usize = 128;

pub fn run(arguments: &Arguments, device: &MoeDevice) -> Outcome<()> {
    std::fs::create_dir_all(&arguments.out)?;
    if !arguments.report_only {
        let wanted = |claim| arguments.only.contains(&claim);
        for seed in 1..=arguments.seeds {
            for job in jobs::all(arguments, seed)?.into_iter().filter(|job| wanted(job.claim)) {
                job_once(&job, arguments, device)?;
            }
            let path = arguments.out.join(format!("scores-{seed}.json"));
            if wanted('e') && !path.exists() {
                write(&path, &scores::measure(&base(arguments, seed), &arguments.out, device)?)?;
            }
        }
        let path = arguments.out.join("times.json");
        if wanted('a') && !path.exists() {
            write(&path, &times(arguments, device)?)?;
        }
    }
    report::write(&arguments.out)
}

/// The token-choice model that others begin with: its options and its folder.
fn base(arguments: &Arguments, seed: u64) -> Options {
    Options { rule: Rule::TokenChoice, seed, ..arguments.options.clone() }
}

fn base_folder(out: &Path, seed: u64) -> PathBuf {
    out.join(format!("token-choice-{seed}"))
}

fn write(path: &Path, what: &impl Serialize) -> Outcome<()> {
    // Whole or not at all.
    let beside = path.with_extension("part");
    std::fs::write(&beside, serde_json::to_string_pretty(what)?)?;
    Ok(std::fs::rename(beside, path)?)
}

/// A file of the folder; none where it is not there.
fn read<T: DeserializeOwned>(path: &Path) -> Outcome<Option<T>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = std::fs::read_to_string(path)?;
    let read = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(Some(read))
}

/// Runs a job whose file is not there.
fn job_once(job: &Job, arguments: &Arguments, device: &MoeDevice) -> Outcome<()> {
    let path = arguments.out.join(format!("{}-{}.json", job.name, job.options.seed));
    if path.exists() {
        return Ok(());
    }
    eprintln!("{}, seed {}", job.name, job.options.seed);
    let start = Instant::now();
    let options = &job.options;
    let (sizes, routing) = options.sizes()?;
    let [training, held_out] = options.texts()?;
    let learner = begin(job, &arguments.out, device)?;
    let on = device.device();
    let first = if job.goes_on { arguments.options.steps } else { 0 };
    let (training, held_out) = (&training, &held_out);
    let run = Run { options, routing, device: on, training, held_out, batches_from: first };
    let (learner, points) = run.train(learner)?;
    if job.keep {
        checkpoint::save(&learner, options, &base_folder(&arguments.out, options.seed))?;
    }
    let model = learner.model.valid();
    let blocks = if options.rule == Rule::TokenChoice {
        let masked = masked_batches(options, held_out);
        Some(evaluate::blocks_of_model(&model, &routing, on, &sizes.layer, &masked)?)
    } else {
        None
    };
    let record = Record {
        name: job.name.clone(),
        seed: options.seed,
        options: options.clone(),
        entropy: language::entropy(held_out),
        points,
        last: run.validate(&model, AT_THE_END)?,
        sums: evaluate::sums(&model, &routing, on, options.batch, options.length)?,
        blocks,
        seconds: start.elapsed().as_secs_f64(),
    };
    eprintln!(
        "{}, seed {}: loss {:.4}, sums {:.2}, {:.0} s",
        record.name, record.seed, record.last.loss, record.sums, record.seconds
    );
    write(&path, &record)
}

/// The model of a job before its first step.
fn begin(job: &Job, out: &Path, device: &MoeDevice) -> Outcome<Learner> {
    let options = &job.options;
    let (sizes, _) = options.sizes()?;
    device.device().seed(options.seed);
    let mut model = Model::new(device, &sizes, Some(options.losses()))?;
    if job.goes_on {
        let file = base_folder(out, options.seed).join("model.bpk");
        let needed = |e| format!("{}: {e}: run claim a first", file.display());
        model = model.try_load_file(&file).map_err(needed)?;
    }
    if job.routers_alone {
        model = model.with_routers_alone();
    }
    Ok(Learner { model, optimizer: optimise::adam(), step: 0 })
}

/// Some of the text that is not learned, with times evenly from 0 to 1.
fn masked_batches(options: &Options, held_out: &[u8]) -> Vec<Masked> {
    let mut rng = StdRng::seed_from_u64(!options.seed ^ 0xb10c);
    let Options { batch, length, .. } = *options;
    let of = |_| {
        let text = language::windows(held_out, &mut rng, batch, length);
        let mut i = 0.0;
        Masked::at(text, length, &mut rng, |_| {
            i += 1.0;
            (i - 0.5) / batch as f64
        })
    };
    (0..4).map(of).collect()
}

/// Milliseconds of a step of each rule: all of them in turns, the medians.
fn times(arguments: &Arguments, device: &MoeDevice) -> Outcome<Vec<(String, f64)>> {
    eprintln!("times of a step");
    let mut all = vec![];
    for job in jobs::all(arguments, 1)?.into_iter().filter(|job| !job.goes_on) {
        let learner = begin(&job, &arguments.out, device)?;
        all.push((job, Some(learner), vec![]));
    }
    for round in 0..14 {
        for (job, learner, times) in &mut all {
            let [training, held_out] = &job.options.texts()?;
            let (_, routing) = job.options.sizes()?;
            let on = device.device();
            let options = &job.options;
            let run = Run { options, routing, device: on, training, held_out, batches_from: 0 };
            let Some(before) = learner.take() else { continue };
            let start = Instant::now();
            let (mut after, _) = run.step(before)?;
            after.model.balance(options.bias_rate)?;
            // The first ones make kernels.
            if round >= 3 {
                times.push(1e3 * start.elapsed().as_secs_f64());
            }
            *learner = Some(after);
        }
    }
    let median = |(job, _, mut times): (Job, _, Vec<f64>)| {
        times.sort_by(f64::total_cmp);
        (job.name, times[times.len() / 2])
    };
    Ok(all.into_iter().map(median).collect())
}
