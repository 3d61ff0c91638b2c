//! Tables of the runs, and of the cluster.
use crate::{Rank, Report, Row, Run, picture};
use serde::Serialize;
use wgmoe_mpi::Split;
use wgmoe_mpi::cluster::{Cluster, Work};

/// EC-DLM (arXiv 2604.01622), eight H200: TFLOP/s a device, by rule of the study.
pub const PUBLISHED: [(&str, f64); 5] = [
    ("token choice, dropless", 24.9),
    ("token choice, capacity 1.5", 25.9),
    ("token choice, capacity 1.25", 27.0),
    ("token choice, capacity 1.0", 35.4),
    ("expert choice, batch", 52.1),
];

/// What the cluster makes of a rule.
#[derive(Serialize)]
pub struct Modelled {
    pub rule: String,
    pub slowest_over_mean: f64,
    pub transfer_ms: f64,
    pub compute_ms: f64,
    pub step_ms: f64,
    /// Useful operations a second of a device.
    pub tflops: f64,
    /// The rate over that of dropless token choice.
    pub ratio: f64,
    /// The same where every expert's rows are padded to the capacity, and dropped pairs count as done:
    /// as a batched matmul has it.
    pub padded: Option<f64>,
    /// The same as published.
    pub published: Option<f64>,
}

#[derive(Serialize)]
struct Whole<'a> {
    runs: &'a [Run],
    cluster: Vec<Modelled>,
}

pub fn run(options: &Report) -> Result<(), Box<dyn std::error::Error>> {
    let mut runs: Vec<Run> = vec![];
    for file in &options.files {
        runs.push(serde_json::from_str(&std::fs::read_to_string(file)?)?);
    }
    runs.sort_by_key(|run| run.ranks);
    let last = runs.last().ok_or("no files")?;
    table(&runs);
    let cluster = modelled(options, last)?;
    println!(
        "\n{} devices of {} TFLOP/s and {} GB/s each way, {} us a message, {} tokens each, D 512, F 384, bf16;",
        options.devices, options.tflops, options.bandwidth_gb, options.latency_us, options.tokens
    );
    println!("counts of {} ranks, scaled\n", last.ranks);
    println!(
        "| rule | slowest / mean | transfer ms | compute ms | TFLOP/s a device | over dropless | padded | published |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for m in &cluster {
        let [padded, published] =
            [m.padded, m.published].map(|p| p.map_or("-".into(), |p| format!("{p:.2}")));
        println!(
            "| {} | {:.2} | {:.2} | {:.2} | {:.0} | {:.2} | {padded} | {published} |",
            m.rule, m.slowest_over_mean, m.transfer_ms, m.compute_ms, m.tflops, m.ratio
        );
    }
    let published = PUBLISHED[4].1 / PUBLISHED[0].1;
    println!(
        "\nThe published {published:.2} is the model's where the slowest device of dropless token \
         choice has {:.2} times the mean.",
        imbalance_of(options, last, published)
    );
    let wrong: Vec<&str> = runs
        .iter()
        .flat_map(|run| &run.rules)
        .filter(|row| row.equal && row.slowest_over_mean != 1.0)
        .map(|row| row.rule.as_str())
        .collect();
    if let Some(svg) = &options.svg {
        std::fs::write(svg, picture::draw(&runs, &cluster)?)?;
    }
    if let Some(json) = &options.json {
        std::fs::write(json, serde_json::to_string(&Whole { runs: &runs, cluster })?)?;
    }
    if wrong.is_empty() {
        return Ok(());
    }
    Err(format!("equal capacities, and yet no equal ranks: {wrong:?}").into())
}

/// Mean and most of something of the ranks.
fn over(row: &Row, of: impl Fn(&Rank) -> f64) -> (f64, f64) {
    let all: Vec<f64> = row.ranks.iter().map(of).collect();
    let mean = all.iter().sum::<f64>() / all.len() as f64;
    (mean, all.iter().copied().fold(0.0, f64::max))
}

fn table(runs: &[Run]) {
    println!(
        "| ranks | rule | slots a rank, most | slowest / mean | dropped | MB sent | MB returned | route | send | compute | return ms | step ms |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for run in runs {
        for row in &run.rules {
            let mb = |of: &dyn Fn(&Rank) -> u64| row.ranks.iter().map(of).sum::<u64>() as f64 / 1e6;
            let ms = |of: &dyn Fn(&Rank) -> f64| over(row, of).0;
            println!(
                "| {} | {} | {} | {:.3} | {} | {:.2} | {:.2} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} |",
                run.ranks,
                row.rule,
                over(row, |r| r.slots.into()).1,
                row.slowest_over_mean,
                row.dropped,
                mb(&|r| r.sent_bytes),
                mb(&|r| r.returned_bytes),
                ms(&|r| r.route_ms),
                ms(&|r| r.send_ms),
                ms(&|r| r.compute_ms),
                ms(&|r| r.return_ms),
                over(row, |r| r.step_ms).1,
            );
        }
    }
}

fn cluster(options: &Report) -> Cluster {
    Cluster::h200()
        .with_bandwidth(options.bandwidth_gb * 1e9)
        .with_latency(options.latency_us * 1e-6)
        .with_rate(options.tflops * 1e12)
        .with_overlap(options.overlap)
        .with_other(options.other_us * 1e-6)
}

/// A layer of EC-DLM, and the slots of an expert: 20 experts a token.
fn layer(options: &Report, run: &Run) -> (Work, f64) {
    let tokens = f64::from(options.tokens) * options.devices as f64;
    (Work::new(512, 384).with_bytes(2), tokens * 20.0 / f64::from(run.options.experts))
}

/// The load of one device over the mean, all others being equal, at which an even step is so many times
/// as fast.
fn imbalance_of(options: &Report, run: &Run, ratio: f64) -> f64 {
    let (cluster, devices) = (cluster(options), options.devices);
    let (work, each) = layer(options, run);
    let slots = each * f64::from(run.options.experts) / devices as f64;
    let split = Split::even(devices as u32, devices);
    let seconds = |most: f64| {
        let rest = (devices as f64 - most) / (devices as f64 - 1.0).max(1.0);
        let mut all = vec![slots * rest; devices];
        all[0] = slots * most;
        cluster.step(&work, &split, &all).seconds()
    };
    let (mut low, mut high) = (1.0, devices as f64);
    for _ in 0..60 {
        let middle = f64::midpoint(low, high);
        if seconds(middle) < ratio * seconds(1.0) { low = middle } else { high = middle }
    }
    low
}

/// The counts of a run on the cluster.
fn modelled(options: &Report, run: &Run) -> Result<Vec<Modelled>, Box<dyn std::error::Error>> {
    let cluster = cluster(options);
    let (work, nominal) = layer(options, run);
    let split = Split::even(run.options.experts, options.devices);
    let measured = f64::from(run.options.tokens * run.options.top);
    let scale = nominal * f64::from(run.options.experts) / measured;
    let mut all: Vec<Modelled> = vec![];
    for row in &run.rules {
        let slots: Vec<f64> = row.tokens_per_expert.iter().map(|&n| f64::from(n) * scale).collect();
        let step = cluster.step(&work, &split, &slots);
        let first = all.first().map_or(step.rate, |m| m.tflops * 1e12);
        let factor = row.rule.strip_prefix("token choice, capacity ").and_then(|f| f.parse().ok());
        let padded = factor.map(|factor: f64| {
            let experts = run.options.experts as usize;
            let step = cluster.step(&work, &split, &vec![nominal * factor; experts]);
            step.rate / factor / first
        });
        let published = PUBLISHED.iter().find(|(rule, _)| *rule == row.rule);
        all.push(Modelled {
            rule: row.rule.clone(),
            slowest_over_mean: split.slowest_over_mean(&row.tokens_per_expert),
            transfer_ms: step.transfer * 1e3,
            compute_ms: step.compute * 1e3,
            step_ms: step.seconds() * 1e3,
            tflops: step.rate / 1e12,
            ratio: step.rate / first,
            padded,
            published: published.map(|(_, p)| p / PUBLISHED[0].1),
        });
    }
    Ok(all)
}
