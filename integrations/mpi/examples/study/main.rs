//! What each rule costs on several ranks: slots of each, bytes between them, time by part; and what a
//! cluster would make of the counts. `scripts/study` runs all of it.
//!
//! ```sh
//! scripts/mpirun -n 4 cargo run --release --example study -- measure -o study-4.json
//! cargo run --release --example study -- report study-*.json --json study.json --svg study.svg
//! ```
mod measure;
mod picture;
mod report;

use clap::{Args, Parser, Subcommand};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// On every rank of `mpirun`: rank 0 writes what all of them did.
    Measure(Measure),
    /// Of the files of several runs: a table, JSON and a picture.
    Report(Report),
}

#[derive(Args, Clone, Serialize, Deserialize)]
pub(crate) struct Measure {
    /// Tokens of all ranks, in sequences of 128.
    #[arg(long, default_value_t = 2048)]
    tokens: u32,
    /// Experts.
    #[arg(long, default_value_t = 64)]
    experts: u32,
    /// Experts of a token.
    #[arg(long, default_value_t = 4)]
    top: u32,
    /// Hidden size.
    #[arg(long, default_value_t = 128)]
    hidden: u32,
    /// Intermediate size of an expert.
    #[arg(long, default_value_t = 96)]
    intermediate: u32,
    /// Standard deviation of what makes some experts' logits higher for all tokens: an assumption.
    #[arg(long, default_value_t = 1.0)]
    skew: f32,
    /// Steps that are timed, after one that is not.
    #[arg(long, default_value_t = 3)]
    steps: u32,
    /// Where to write.
    #[arg(short)]
    o: PathBuf,
}

#[derive(Args)]
pub(crate) struct Report {
    /// What `measure` wrote.
    files: Vec<PathBuf>,
    /// Bandwidth of a device of the cluster, each way.
    #[arg(long, default_value_t = 450.0)]
    bandwidth_gb: f64,
    /// Latency of a message.
    #[arg(long, default_value_t = 5.0)]
    latency_us: f64,
    /// Rate of a device at the experts' matmuls.
    #[arg(long, default_value_t = 400.0)]
    tflops: f64,
    /// Share of the shorter of transfers and matmuls that runs behind the longer.
    #[arg(long, default_value_t = 0.0)]
    overlap: f64,
    /// Time of a step that depends on no balance.
    #[arg(long, default_value_t = 0.0)]
    other_us: f64,
    /// Devices of the cluster.
    #[arg(long, default_value_t = 8)]
    devices: usize,
    /// Tokens of a device of the cluster: EC-DLM trains on batches of 256 sequences of 512.
    #[arg(long, default_value_t = 16384)]
    tokens: u32,
    /// Where the table goes as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Where the picture goes.
    #[arg(long)]
    svg: Option<PathBuf>,
}

/// One rule on some ranks.
#[derive(Serialize, Deserialize, Clone)]
pub(crate) struct Row {
    pub(crate) rule: String,
    pub(crate) ranks: Vec<Rank>,
    /// Slots of each expert.
    pub(crate) tokens_per_expert: Vec<u32>,
    /// Pairs dropped by the capacity factor.
    pub(crate) dropped: u32,
    /// Slots of the slowest rank over the mean.
    pub(crate) slowest_over_mean: f64,
    /// Whether the rule gives every expert as many slots.
    pub(crate) equal: bool,
}

/// What one rank did; times are the least of the steps: of the parts where each is waited for, of a
/// step where none is.
#[derive(Serialize, Deserialize, Clone)]
pub(crate) struct Rank {
    pub(crate) slots: u32,
    pub(crate) sent_bytes: u64,
    pub(crate) returned_bytes: u64,
    pub(crate) messages: u32,
    pub(crate) rounds: u32,
    pub(crate) route_ms: f64,
    pub(crate) send_ms: f64,
    pub(crate) compute_ms: f64,
    pub(crate) return_ms: f64,
    pub(crate) step_ms: f64,
}

/// A run.
#[derive(Serialize, Deserialize, Clone)]
pub(crate) struct Run {
    pub(crate) adapter: String,
    pub(crate) ranks: usize,
    pub(crate) options: Measure,
    pub(crate) rules: Vec<Row>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    match Options::parse().command {
        Command::Measure(options) => measure::run(&options),
        Command::Report(options) => report::run(&options),
    }
}
