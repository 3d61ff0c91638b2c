//! A block decoded step by step under the ways that decoders have of computing less: what each reads and how long a
//! step of one layer takes.
//!
//! Hidden states are synthetic: a block of LLaDA2.0-mini's shape, most of which stays from step to step, while its
//! tokens are decided a few at a time. Every choice is compared with the CPU twin. `cargo run --release -p studies
//! --bin decode -- --help`. Exits with 1 where a check fails.
mod methods;
mod run;

use crate::methods::{Method, methods};
use crate::run::{Steps, Sums};
use clap::Parser;
use serde::Serialize;
use std::fmt::Write;
use std::process::ExitCode;
use testkit::program::{self, Found, Progress};
use testkit::works::Work;
use wgmoe::{Context, Gpu, WeightType};

/// What decoding a block reads, step by step, under coresets, fewer rows and fewer experts a token.
#[derive(Parser)]
struct Options {
    /// Blocks of 32 tokens that are decoded at once
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    blocks: u32,
    /// Routed experts of the layer; with fewer than 256, counts of experts in rules shrink alike
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(16..=256))]
    experts: u32,
    /// Steps in which a block is decoded
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=32))]
    steps: u32,
    /// Steps for which a kept coreset serves
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=32))]
    keep: u32,
    /// Share of a hidden state that stays from one step to the next
    #[arg(long, default_value_t = 0.9)]
    stays: f32,
    /// Adapter, by a part of its name or by index
    #[arg(long, value_name = "NAME|INDEX")]
    adapter: Option<String>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    adapter: String,
    blocks: u32,
    experts: u32,
    steps: u32,
    keep: u32,
    stays: f32,
    methods: Vec<Row>,
}

/// Means of a step.
#[derive(Serialize)]
struct Row {
    method: &'static str,
    /// Tokens that take part.
    rows: f64,
    /// (token, expert) pairs.
    slots: f64,
    /// Routed experts whose weights are read.
    experts: f64,
    /// Bytes of the weights that are read, the shared expert's included.
    bytes: f64,
    /// Share of what the tokens would take of all experts that their coreset holds; none without coresets.
    covered: Option<f64>,
    /// Milliseconds of a step, the least of three runs each.
    ms: f64,
    ok: bool,
}

fn run(options: &Options, progress: &Progress) -> Result<Report, String> {
    let llada = wgmoe::models::find("llada2-mini").ok_or("no llada2-mini")?;
    let config = llada.with_experts(options.experts);
    if !(0.0..=1.0).contains(&options.stays) {
        return Err(format!("--stays: {} is no share", options.stays));
    }
    let say = |e: wgmoe::Error| e.to_string();
    let gpu = pollster::block_on(Gpu::open(options.adapter.as_deref())).map_err(say)?;
    let ctx = Context::new(&gpu.device).map_err(say)?;
    progress.say("weights");
    let work = Work::synthetic(config, 32 * options.blocks);
    let weights = pollster::block_on(work.weights(&gpu, &ctx, WeightType::Bf16)).map_err(say)?;
    let layer = work.layer(&ctx, weights).map_err(say)?;
    let all: Vec<Method> = methods(options.experts)?;
    let steps = Steps { gpu: &gpu, work: &work, options };
    let sums = steps.run(&layer, &all, progress).map_err(say)?;
    let expert_bytes = layer.weights().shape().device_bytes() as f64;
    let row = |(method, sums): (&Method, Sums)| {
        let mean = |n: f64| n / f64::from(options.steps);
        let read = mean(sums.experts) + f64::from(config.shared_experts);
        Row {
            method: method.name,
            rows: mean(sums.rows),
            slots: mean(sums.slots),
            experts: mean(sums.experts),
            bytes: read * expert_bytes,
            covered: (sums.asked > 0.0).then(|| sums.covered / sums.asked),
            ms: mean(sums.ms),
            ok: sums.ok,
        }
    };
    let adapter = format!("{}, {} {}", gpu.info.name, gpu.info.driver, gpu.info.driver_info);
    let Options { blocks, experts, steps, keep, stays, .. } = *options;
    let methods = all.iter().zip(sums).map(row).collect();
    Ok(Report { adapter, blocks, experts, steps, keep, stays, methods })
}

fn table(report: &Report) -> String {
    let mut text = String::new();
    let Report { adapter, blocks, experts, steps, keep, stays, methods } = report;
    let _ = writeln!(text, "adapter: {adapter}");
    let _ = writeln!(
        text,
        "{blocks} block(s) of 32 tokens, decided in {steps} steps; {experts} experts of LLaDA2.0-mini's shape, bf16;\n\
         {stays} of a hidden state stays from step to step; kept coresets serve {keep} steps. Means of a step.\n"
    );
    let _ = writeln!(
        text,
        "{:34} {:>6} {:>7} {:>8} {:>8} {:>8} {:>8}",
        "method", "rows", "slots", "experts", "MB read", "covered", "ms"
    );
    for row in methods {
        let covered = row.covered.map_or("-".into(), |share| format!("{:.0} %", 100.0 * share));
        let _ = writeln!(
            text,
            "{:34} {:6.1} {:7.1} {:8.1} {:8.1} {:>8} {:8.1}{}",
            row.method,
            row.rows,
            row.slots,
            row.experts,
            row.bytes / 1e6,
            covered,
            row.ms,
            if row.ok { "" } else { "  WRONG" }
        );
    }
    text
}

fn main() -> ExitCode {
    let options = Options::parse();
    program::run("decode", |progress| {
        let report = run(&options, progress)?;
        let text = program::text_of(&report, options.json, table)?;
        Ok(Found { text, ok: report.methods.iter().all(|row| row.ok) })
    })
}
