//! How many experts a block of tokens uses together under each block-level rule: published beside
//! measured.
//!
//! Draws synthetic router logits, `g = 2 (sqrt(0.6) Z_block[e] + sqrt(0.4) Z[t, e]) - 3` with Z
//! standard normal, routes many blocks of them by every rule on the GPU, checks every choice
//! against the CPU twins exactly, and prints the experts of a block and the bytes of their weights.
//! Then runs one block of 32 tokens through a layer of LLaDA2.0-mini's shape under each rule and
//! prints the time: `cargo run --release -p studies --bin block_union -- --help`. Where there is no
//! GPU driver, the CPU twins count alone. Exits with 1 where a check fails.
mod count;
mod layer;
mod print;
mod rules;

use crate::count::{count_on_cpu, count_on_gpu};
use crate::layer::time_rules;
use crate::print::{picture, tables};
use crate::rules::{BLOCK, mini, rules};
use clap::Parser;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use testkit::program::{self, Found, Progress};
use testkit::synthetic::RHO;
use wgmoe::{Context, Error, Gpu};

/// Experts that a block of tokens uses under each block-level rule, and what that costs: published
/// beside measured.
#[derive(Parser)]
struct Options {
    /// Blocks drawn for each row
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=2048))]
    blocks: u32,
    /// Routed experts of the layer that is timed, at most 256; with fewer, counts of experts in
    /// rules shrink alike
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=256))]
    experts: u32,
    /// Adapter, by a part of its name or by index
    #[arg(long, value_name = "NAME|INDEX")]
    adapter: Option<String>,
    /// Seed of logits, weights and hidden states
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// Also draw the experts of a block, published and measured
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    rules: Vec<Row>,
    /// What the tables say besides.
    #[serde(skip)]
    head: Vec<String>,
    /// What the table of times says of the layer.
    #[serde(skip)]
    layer: Option<String>,
}

#[derive(Serialize)]
struct Row {
    rule: &'static str,
    /// Tokens of a block.
    block: u32,
    published: Option<f64>,
    /// Share of the accuracy that the paper says is kept, in percent.
    kept: Option<f64>,
    /// Mean over the blocks of the experts that a block's tokens use.
    measured: f64,
    /// Mean of the experts a block elects; all where its rule elects none.
    coreset: f64,
    /// Mean of the bytes of the weights of the experts that a block's tokens use.
    bytes: f64,
    layer_ms: Option<f64>,
    ok: bool,
    #[serde(skip)]
    times: Option<Times>,
}

/// One block through the layer; milliseconds.
struct Times {
    /// Experts that this block used.
    used: u32,
    /// From the logits to the plan, both apart.
    routing: f64,
    /// The experts and the sum of their outputs.
    ffn: f64,
    layer: f64,
}

fn run(options: &Options, progress: &Progress) -> Result<Report, String> {
    let (config, rules) = (mini()?, rules()?);
    for rule in rules.iter().filter(|r| r.block == BLOCK) {
        rule.routing
            .with_fewer_experts(config.experts, options.experts)
            .check(options.experts)
            .map_err(|e| format!("--experts {}: {}: {e}", options.experts, rule.name))?;
    }
    progress.say("opening the device");
    let gpu = match pollster::block_on(Gpu::open(options.adapter.as_deref())) {
        Ok(gpu) => Some(gpu),
        Err(e) if options.adapter.is_some() => return Err(format!("--adapter: {e}")),
        Err(e) => {
            progress.note(&format!("{e}\nthe CPU twins count alone, nothing is timed"));
            None
        }
    };
    let mut head = vec![
        format!(
            "Router scores are synthetic: sigmoid of g = 2 (sqrt({RHO}) Z_block[e] + \
             sqrt({:.1}) Z[t, e]) - 3,",
            1.0 - RHO
        ),
        format!("Z standard normal, seed {}; nothing but that {RHO} was fitted.", options.seed),
        format!("{} experts, means of {} blocks.", config.experts, options.blocks),
        "original: LLaDA2.0-mini's own rule, 8 experts a token, from 4 of 8 groups.".into(),
        "published: experts that a block uses with real scores, and the accuracy kept,".into(),
        "of dMoE v1 (floor 12) and v2 (floor 16), arXiv 2605.30876v1 and v2, and LLaDA2.2.".into(),
        "measured: the same with synthetic scores; coreset: experts that a block elects.".into(),
        "MB: weights of the experts used, bf16, of one layer; cut: against original.".into(),
    ];
    let Some(gpu) = gpu else {
        head.push("adapter: none (CPU twins)".into());
        let rows = count_on_cpu(options, &config, &rules, progress);
        return Ok(Report { rules: rows, head, layer: None });
    };
    let say = |e: Error| e.to_string();
    let ctx = Context::new(&gpu.device).map_err(say)?;
    head.push(format!(
        "adapter: {}, {} {}, {}",
        gpu.info.name, gpu.info.driver, gpu.info.driver_info, gpu.info.backend
    ));
    let mut rows = count_on_gpu(options, &config, &gpu, &ctx, &rules, progress).map_err(say)?;
    let layer = time_rules(options, &config, (&gpu, &ctx), &rules, &mut rows, progress);
    Ok(Report { rules: rows, head, layer: Some(layer.map_err(say)?) })
}

fn main() -> ExitCode {
    let options = Options::parse();
    program::run("block_union", |progress| {
        let report = run(&options, progress)?;
        program::save(options.svg.as_deref(), || Ok(picture(&report.rules).to_string()))?;
        let text = program::text_of(&report, options.json, tables)?;
        Ok(Found { text, ok: report.rules.iter().all(|r| r.ok) })
    })
}
