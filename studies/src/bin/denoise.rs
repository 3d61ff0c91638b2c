//! A masked-diffusion denoising run over one MoE layer: what does it cost to route it by token choice, by expert choice, and
//! by expert choice whose capacity follows the mask ratio (EC-DLM, arXiv 2604.01622)?
//!
//! A batch of sequences starts fully masked; every step unmasks some tokens, at a pace of each sequence's own. The counts of
//! masked tokens go to the device, become capacities there, and the layer runs with them: one recording a step, bound once,
//! nothing read back in between. All rules share one set of weights and see the same hidden states, and every schedule is
//! given the range of k with which it costs as much as `--k` experts per token throughout:
//! `cargo run --release -p studies --bin denoise -- --help`.
//!
//! Weights and hidden states are synthetic. Every routing is checked against the CPU twins; exits with 1 where one differs.
//! Where there is no GPU driver, the twins run alone, and times are those of their routing.
use clap::Parser;
use plotters::prelude as plot;
use rand::{Rng, SeedableRng, rngs::StdRng};
use rand_distr::StandardNormal;
use serde::Serialize;
use std::fmt::Write;
use std::process::ExitCode;
use std::time::Instant;
use testkit::compare::{Checks, largest};
use testkit::layer::{host_router, outputs, router, upload};
use testkit::program::{self, Found, Progress};
use testkit::statistics::{median, spread};
use testkit::synthetic::Pool;
use wgmoe::layer::{
    Batch, BoundLayer, HostBatch, HostRouting, HostSequences, LayerConfig, MoeLayer, Scratch,
    Sequences, cpu_routing,
};
use wgmoe::ops::capacity::{self, Capacity, HostSource, Source};
use wgmoe::ops::expert_choice;
use wgmoe::plan::Stats;
use wgmoe::plan::bits;
use wgmoe::report::Report;
use wgmoe::routing::GateRule;
use wgmoe::routing::schedule::{CostShape, Ratios, Schedule, ScheduleKind, mask_ratio, slot_bound};
use wgmoe::routing::{ExpertChoice, Normalise, Routing, Scope, Score, TokenChoice};
use wgmoe::{BoundOp, Context, Error, Gpu, Slice, WeightType, wgpu};

/// Denoises a batch of sequences under each routing rule at equal expected FLOPs, checks every routing against the CPU, and
/// shows what each rule costs.
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
    /// Experts per token of token choice and of the static schedule; what the other schedules cost on average
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1024))]
    k: u32,
    /// Difference between most and least experts per token of a schedule; up to 2 less where that meets the cost better
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
    /// Rows that a padded batched matmul computes in all steps: for every expert its capacity, or the largest load where
    /// there is none.
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
    /// Tokens that an expert takes at most: of a sequence (expert choice), or of the batch (token choice; the largest load
    /// where there is no capacity).
    capacity: f64,
    ms: f64,
}

/// Slots of the slowest of `devices` devices over the mean, experts dealt out in order.
#[derive(Serialize)]
struct Devices {
    devices: u32,
    slowest: f64,
}

/// A routing rule to run.
struct Rule {
    name: String,
    routing: Routing,
    /// Of expert choice.
    schedule: Option<Schedule>,
    /// What it costs, in words.
    cost: String,
}

/// Token choice without and with capacities, and expert choice under each schedule, all at the cost of k experts per token.
fn rules(options: &Options, run: &Run) -> Result<Vec<Rule>, Error> {
    let token_choice = |capacity_factor| {
        Routing::TokenChoice(TokenChoice {
            score: Score::Softmax,
            gate: GateRule::Softmax,
            top: options.k,
            groups: None,
            scale: 1.0,
            capacity_factor,
            coreset: None,
        })
    };
    let mut rules = vec![];
    for factor in [None, Some(1.0), Some(1.25), Some(1.5)] {
        let name = factor.map_or("dropless".into(), |f| format!("capacity {f:.2}"));
        rules.push(Rule {
            name: format!("token choice, {name}"),
            routing: token_choice(factor),
            schedule: None,
            cost: format!("{}", options.k),
        });
    }
    for kind in ScheduleKind::ALL {
        let schedule = run.equal_cost(kind, options)?;
        let Schedule { k_min, k_max, .. } = schedule;
        let share = run.expected(&schedule)? / run.expected(&Schedule::fixed(options.k))?;
        let cost = match kind {
            ScheduleKind::Static => format!("{k_max}"),
            _ => format!("{k_min}..{k_max} ({:+.1} %)", 100.0 * (share - 1.0)),
        };
        rules.push(Rule {
            name: format!("expert choice, {}", kind.name()),
            routing: Routing::ExpertChoice(ExpertChoice {
                score: Score::Softmax,
                normalise: Normalise::AfterSelection,
                scope: Scope::Sequence,
                experts_per_token: k_max,
                max_experts_per_token: k_max,
            }),
            schedule: Some(schedule),
            cost,
        });
    }
    for rule in &rules {
        rule.routing.check(options.experts)?;
    }
    Ok(rules)
}

/// What the model around the layer brings to one denoising step.
struct DenoisingStep {
    /// `[T, D]`.
    hidden: Vec<f32>,
    /// Masked tokens of each sequence.
    masked: Vec<u32>,
}

/// A batch being denoised: the same for every rule.
struct Run {
    offsets: Vec<u32>,
    lengths: Vec<u32>,
    steps: Vec<DenoisingStep>,
    shape: CostShape,
}

impl Run {
    /// Unmasks the batch step by step. A hidden state is a mixture of a vector of the sequence, one of the token that changes
    /// a little every step, and one that all masked tokens share or the token has to itself once it is unmasked.
    fn new(options: &Options, rng: &mut StdRng) -> Self {
        let d = options.hidden as usize;
        let normals =
            |rng: &mut StdRng| -> Vec<f32> { (0..d).map(|_| rng.sample(StandardNormal)).collect() };
        let shorter = |rng: &mut StdRng| rng.random_range(0..=options.length / 8);
        let lengths: Vec<u32> = (0..options.sequences)
            .map(|b| options.length - if b == 0 { 0 } else { shorter(rng) })
            .collect();
        let mut offsets = vec![0];
        offsets.extend(lengths.iter().scan(0, |sum, n| {
            *sum += n;
            Some(*sum)
        }));
        let mask = normals(rng);
        let mut tokens: Vec<Token> = vec![];
        let mut of_sequence = vec![];
        let mut pace = vec![];
        for (b, &n) in lengths.iter().enumerate() {
            of_sequence.push(normals(rng));
            pace.push(rng.random_range(0.7..1.4));
            tokens.extend((0..n).map(|_| Token { sequence: b, own: normals(rng), unmasked: None }));
        }
        let mut steps = vec![];
        for step in 0..options.steps {
            let done = f64::from(step) / f64::from(options.steps);
            let mut masked = vec![];
            for (b, &n) in lengths.iter().enumerate() {
                let share = options.unmask.masked(done).powf(pace[b]);
                let keep = ((f64::from(n) * share).ceil() as usize).clamp(1, n as usize);
                // The tokens that the model would be surest of.
                let mut open: Vec<(f32, usize)> = (offsets[b] as usize..offsets[b + 1] as usize)
                    .filter(|&t| tokens[t].unmasked.is_none())
                    .map(|t| (rng.random(), t))
                    .collect();
                open.sort_by(|a, b| a.0.total_cmp(&b.0));
                for (_, t) in open.drain(keep.min(open.len())..) {
                    tokens[t].unmasked = Some(normals(rng));
                }
                masked.push(open.len() as u32);
            }
            let mut hidden = Vec::with_capacity(tokens.len() * d);
            for token in &mut tokens {
                let row = hidden.len();
                let state = token.unmasked.as_ref().unwrap_or(&mask);
                for (i, own) in token.own.iter_mut().enumerate() {
                    let fresh: f32 = rng.sample(StandardNormal);
                    *own = 0.95f32.sqrt() * *own + 0.05f32.sqrt() * fresh;
                    let sequence = of_sequence[token.sequence][i];
                    hidden.push(
                        0.2f32.sqrt() * sequence + 0.6f32.sqrt() * *own + 0.2f32.sqrt() * state[i],
                    );
                }
                hidden[row] = 1.0; // what the router reads an expert's popularity with
            }
            steps.push(DenoisingStep { hidden, masked });
        }
        let shape = CostShape {
            length: options.length,
            experts: options.experts,
            hidden: options.hidden,
            intermediate: options.intermediate,
        };
        Self { offsets, lengths, steps, shape }
    }

    fn tokens(&self) -> u32 {
        self.lengths.iter().sum()
    }

    /// Expected FLOPs of a step under a schedule: those of each sequence over its own mask ratios.
    fn expected(&self, schedule: &Schedule) -> Result<f64, Error> {
        let mut flops = 0.0;
        for (b, &length) in self.lengths.iter().enumerate() {
            let ratios: Vec<f32> =
                self.steps.iter().map(|s| mask_ratio(s.masked[b], length)).collect();
            let shape = CostShape { length, ..self.shape };
            flops += schedule.expected(Ratios::Samples(&ratios), &shape)?.flops;
        }
        Ok(flops)
    }

    /// The range of k with which a shape's expected FLOPs are nearest to those of `--k` throughout.
    fn equal_cost(&self, kind: ScheduleKind, options: &Options) -> Result<Schedule, Error> {
        let fixed = Schedule::fixed(options.k);
        if kind == ScheduleKind::Static {
            return Ok(fixed);
        }
        let want = self.expected(&fixed)?;
        let mut best: Option<(f64, Schedule)> = None;
        for narrower in 0..3 {
            let range = options.k_range.saturating_sub(narrower).max(1).min(options.experts - 1);
            // A mean lies within its range.
            for k_min in options.k.saturating_sub(range).max(1)..=options.k {
                let k_max = k_min.saturating_add(range);
                if k_max > options.experts {
                    continue;
                }
                let schedule = Schedule::new(kind, k_min, k_max);
                let distance = (self.expected(&schedule)? - want).abs();
                if best.is_none_or(|(least, _)| distance < least) {
                    best = Some((distance, schedule));
                }
            }
        }
        Ok(best.map_or(fixed, |(_, schedule)| schedule))
    }

    /// The static schedule that the library holds for as expensive, for the longest sequence.
    fn matched(&self, schedule: &Schedule) -> Result<u32, Error> {
        let ratios: Vec<f32> =
            self.steps.iter().map(|s| mask_ratio(s.masked[0], self.lengths[0])).collect();
        Ok(schedule.matched(Ratios::Samples(&ratios), &self.shape)?.k_max)
    }

    /// Slots of one step under a schedule, counted here: `E clamp(floor(N k / E), 1, N)` a sequence.
    fn scheduled(&self, schedule: &Schedule, step: &DenoisingStep) -> u64 {
        let experts = u64::from(self.shape.experts);
        let of = self.lengths.iter().zip(&step.masked).map(|(&n, &masked)| {
            let k = schedule.k(masked as f32 / n as f32);
            experts * (u64::from(n) * u64::from(k) / experts).max(1).min(u64::from(n))
        });
        of.sum()
    }
}

struct Token {
    sequence: usize,
    own: Vec<f32>,
    /// Its own vector once it is unmasked.
    unmasked: Option<Vec<f32>>,
}

/// The layer on the host.
struct Weights {
    settings: LayerConfig,
    router: Vec<f32>,
    experts: Pool,
}

impl Weights {
    /// Logits have deviation 2; `--skew` apart, all experts are equally popular.
    fn new(options: &Options, routing: Routing, rng: &mut StdRng) -> Self {
        let Options { hidden, intermediate, experts, .. } = *options;
        let settings = LayerConfig::new(hidden, intermediate, experts, routing);
        let d = hidden as usize;
        let deviation = 2.0 / (d as f32).sqrt();
        let mut normal = |deviation: f32| deviation * rng.sample::<f32, _>(StandardNormal);
        let router = (0..experts as usize * d)
            .map(|i| normal(if i % d == 0 { options.skew } else { deviation }))
            .collect();
        Self { settings, router, experts: Pool::new(rng, &settings, WeightType::Bf16) }
    }
}

/// What a step did, as the device or the twin says.
struct Done {
    stats: Stats,
    /// Of each sequence, of expert choice.
    capacities: Option<(Vec<u32>, Vec<u32>)>,
    ms: f64,
}

/// Sums up the steps of a rule, and checks what can be known of them beforehand.
fn sum_up(rule: &Rule, run: &Run, checks: &mut Checks<'_>, done: &[Done]) -> RuleReport {
    let (tokens, experts) = (run.tokens(), run.shape.experts);
    let mean = |v: &[u32]| v.iter().map(|&n| f64::from(n)).sum::<f64>() / v.len() as f64;
    let mut report = RuleReport {
        rule: rule.name.clone(),
        ok: true,
        ms: done.iter().map(|d| d.ms).sum(),
        tokens_per_s: 0.0,
        slots: 0,
        padded: 0,
        dropped: 0,
        imbalance: 0.0,
        untouched: 0,
        steps: vec![],
        devices: vec![],
        cost: rule.cost.clone(),
    };
    for (i, (step, Done { stats, capacities, ms })) in run.steps.iter().zip(done).enumerate() {
        let figures = Report::new(stats, tokens);
        let slots = u64::from(stats.slots);
        let (k, capacity, padded) = match (rule.routing, capacities, rule.schedule) {
            (Routing::TokenChoice(choice), ..) => {
                let most = choice.capacity(tokens, experts);
                let within = most.is_none_or(|most| figures.load.max <= most);
                checks.same(&format!("step {i}: loads within the capacity"), &[within], &[true]);
                let wanted = u64::from(tokens) * u64::from(choice.top);
                let what = format!("step {i}: slots and drops");
                checks.same(&what, &[slots + u64::from(stats.dropped)], &[wanted]);
                let rows = most.unwrap_or(figures.load.max);
                (f64::from(choice.top), f64::from(rows), u64::from(rows) * u64::from(experts))
            }
            (_, Some((capacities, k)), Some(schedule)) => {
                let scheduled = run.scheduled(&schedule, step);
                checks.same(&format!("step {i}: slots as scheduled"), &[slots], &[scheduled]);
                let balance = figures.load.imbalance();
                checks.same(&format!("step {i}: load imbalance"), &[balance], &[1.0]);
                checks.same(&format!("step {i}: drops"), &[stats.dropped], &[0]);
                let rows = capacities.iter().map(|&c| u64::from(c)).sum::<u64>();
                (mean(k), mean(capacities), rows * u64::from(experts))
            }
            _ => unreachable!("expert choice has a schedule"),
        };
        report.slots += slots;
        report.padded += padded;
        report.dropped += u64::from(stats.dropped);
        report.untouched += u64::from(stats.untouched);
        report.imbalance += figures.load.imbalance() * slots as f64;
        for (at, (devices, slowest)) in figures.devices.into_iter().enumerate() {
            if report.devices.len() == at {
                report.devices.push(Devices { devices, slowest: 0.0 });
            }
            report.devices[at].slowest += slowest * slots as f64;
        }
        report.steps.push(StepReport { k, capacity, ms: *ms });
    }
    let all = report.slots as f64;
    report.imbalance /= all;
    report.devices.iter_mut().for_each(|d| d.slowest /= all);
    let processed = f64::from(tokens) * run.steps.len() as f64;
    report.tokens_per_s = processed / (report.ms.max(1e-6) / 1e3);
    report.ok = checks.ok;
    report
}

/// The twin's routing of a step.
fn twin(
    weights: &Weights,
    run: &Run,
    routing: Routing,
    capacity: Option<&[u32]>,
    selection: [&[f32]; 3],
) -> HostRouting {
    let settings = weights.settings.with_routing(routing);
    let router = host_router(&weights.router, None);
    let sequences =
        capacity.map(|capacity| HostSequences { offsets: &run.offsets, lengths: None, capacity });
    cpu_routing(&settings, &router, HostBatch { sequences, ..HostBatch::default() }, selection)
}

/// Statistics of a routing, counted on the host.
fn stats_of(assigned: &[u32], dropped: &[u32], tokens: usize, experts: usize) -> Stats {
    let loads: Vec<u32> =
        (0..experts).map(|e| bits::tokens_of(assigned, tokens, e).len() as u32).collect();
    let without = |&t: &usize| bits::experts_of(assigned, tokens, t).is_empty();
    Stats {
        slots: loads.iter().sum(),
        unique_experts: loads.iter().filter(|&&n| n > 0).count() as u32,
        dropped: dropped.iter().sum(),
        untouched: (0..tokens).filter(without).count() as u32,
        tokens_per_expert: loads,
        ..Stats::default()
    }
}

/// A run on the device.
struct OnGpu<'a> {
    gpu: &'a Gpu,
    ctx: &'a Context,
    layer: MoeLayer,
    weights: &'a Weights,
    run: &'a Run,
    progress: &'a Progress,
    /// Scratch of all rules, which run one after the other.
    scratch: Scratch,
    offsets: wgpu::Buffer,
    /// What the model around the layer writes before each step, and what it reads.
    hidden: wgpu::Buffer,
    masked: wgpu::Buffer,
    out: wgpu::Buffer,
    capacity: wgpu::Buffer,
    k: wgpu::Buffer,
}

/// A rule, bound once for all steps.
struct Bound<'a> {
    rule: &'a Rule,
    /// Capacities of the step, under expert choice.
    capacities: BoundOp,
    step: BoundLayer,
    log: Vec<Log>,
    times: Vec<Vec<f64>>,
}

/// What the checks look at, of one step: logits, s, r, gates, the choice, statistics, capacities, k, and the output.
type Log = [wgpu::Buffer; 9];

impl OnGpu<'_> {
    fn bind<'r>(&self, rule: &'r Rule) -> Result<Bound<'r>, Error> {
        let Self { gpu, run, .. } = *self;
        let (tokens, experts) = (run.tokens(), run.shape.experts);
        let sequences = run.lengths.len() as u32;
        // The router and the experts are the same; so are the pages that they lie in.
        let layer = self.layer.with_routing(rule.routing)?;
        let mut batch = Batch::new(&self.hidden, tokens).into_out(&self.out);
        batch.scratch = Some(&self.scratch);
        let mut capacities = BoundOp::default();
        if let Some(schedule) = &rule.schedule {
            let stairs = gpu.upload(&schedule.staircase()?.words());
            let args = capacity::Args {
                source: Source::Masked { masked: (&self.masked).into(), steps: (&stairs).into() },
                offsets: (&self.offsets).into(),
                lengths: None,
                capacity_of: (&self.capacity).into(),
                k_of: (&self.k).into(),
            };
            let dims = capacity::Dims { tokens, experts, sequences };
            capacities = Capacity::new(self.ctx)?.bind(&dims, args)?;
            batch.sequences =
                Some(Sequences::new(sequences, &self.offsets).with_capacity(&self.capacity));
            let lengths = run.lengths.iter().copied();
            batch.routed_slots = Some(slot_bound(lengths, experts, schedule.k_max)?);
        }
        let step = layer.bind(&batch)?;
        let watched = self.watched(&step)?;
        let room = |w: Slice<'_>| gpu.upload(&vec![0u32; w.size as usize / 4]);
        let log = run.steps.iter().map(|_| watched.map(room)).collect();
        Ok(Bound { rule, capacities, step, log, times: vec![vec![]; run.steps.len()] })
    }

    fn watched<'s>(&'s self, step: &'s BoundLayer) -> Result<[Slice<'s>; 9], Error> {
        let none = || Error::Device("an empty step".into());
        let [logits, s, r] = testkit::layer::selection(&step).ok_or_else(none)?;
        let gates = step.gates().ok_or_else(none)?;
        let assigned = step.assigned().ok_or_else(none)?;
        let [capacity, k, out] = [&self.capacity, &self.k, &self.out].map(Slice::from);
        Ok([logits, s, r, gates, assigned, step.stats(), capacity, k, out])
    }

    /// The whole run under a rule: one recording a step, nothing read back.
    fn denoise(&self, bound: &mut Bound<'_>) -> Result<(), Error> {
        let gpu = self.gpu;
        let watched = self.watched(&bound.step)?;
        for ((step, log), times) in self.run.steps.iter().zip(&bound.log).zip(&mut bound.times) {
            gpu.queue.write_buffer(&self.hidden, 0, bytemuck::cast_slice(&step.hidden));
            gpu.queue.write_buffer(&self.masked, 0, bytemuck::cast_slice(&step.masked));
            gpu.queue.submit([]);
            gpu.wait()?;
            let start = Instant::now();
            let mut encoder = gpu.device.create_command_encoder(&Default::default());
            let mut pass = encoder.begin_compute_pass(&Default::default());
            bound.capacities.record(&mut pass);
            bound.step.record(&mut pass);
            drop(pass);
            gpu.queue.submit([encoder.finish()]);
            gpu.wait()?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
            // Kept on the device for the checks, which come after all runs.
            let mut encoder = gpu.device.create_command_encoder(&Default::default());
            for (from, to) in watched.iter().zip(log) {
                encoder.copy_buffer_to_buffer(from.buffer, from.offset, to, 0, from.size);
            }
            gpu.queue.submit([encoder.finish()]);
        }
        Ok(())
    }

    fn report(&self, bound: Bound<'_>) -> Result<RuleReport, Error> {
        let Bound { rule, log, times, .. } = bound;
        let mut checks = Checks::new(&rule.name, self.progress);
        let mut done = vec![];
        for (i, (log, times)) in log.iter().zip(times).enumerate() {
            done.push(self.check_step(&mut checks, rule, i, log, median(times[1..].to_vec()))?);
        }
        Ok(sum_up(rule, self.run, &mut checks, &done))
    }

    /// Capacities and choice exactly, each from what the device computed before; logits of some tokens, and gates.
    fn check_step(
        &self,
        checks: &mut Checks<'_>,
        rule: &Rule,
        i: usize,
        [logits, s, r, gates, assigned, stats, capacity, k, out]: &Log,
        ms: f64,
    ) -> Result<Done, Error> {
        let Self { gpu, run, weights, .. } = *self;
        let (tokens, experts) = (run.tokens() as usize, run.shape.experts as usize);
        let [logits, s, r, gates] = [logits, s, r, gates].map(|b| gpu.download::<f32>(b));
        let [assigned, stats, capacity, k] =
            [assigned, stats, capacity, k].map(|b| gpu.download::<u32>(b));
        let (logits, s, r, gates) = (logits?, s?, r?, gates?);
        let (assigned, stats, capacity, k) = (assigned?, stats?, capacity?, k?);
        let step = &run.steps[i];
        let d = run.shape.hidden as usize;
        for t in spread(tokens, 4) {
            let x = &step.hidden[t * d..][..d];
            let want = wgmoe::ops::logits::cpu(x, &weights.router, d);
            let got = &logits[t * experts..][..experts];
            near(checks, &format!("step {i}: logits of token {t}"), got, &want, 1e-5);
        }
        if let Some(schedule) = &rule.schedule {
            let source = HostSource::Masked(schedule, &step.masked);
            let (want, want_k) = capacity::cpu(source, tokens, experts as u32, &run.offsets, None);
            checks.same(&format!("step {i}: capacities"), &capacity, &want);
            checks.same(&format!("step {i}: k"), &k, &want_k);
        }
        // A capacity factor drops by gates: the device's own, so that the choice is exact.
        let (mut free, mut most) = (rule.routing, None);
        if let Routing::TokenChoice(choice) = &mut free {
            most = choice.capacity(tokens as u32, experts as u32);
            choice.capacity_factor = None;
        }
        let capacities = rule.schedule.map(|_| (capacity, k));
        let of_sequences = capacities.as_ref().map(|(capacity, _)| &capacity[..]);
        let want = twin(weights, run, free, of_sequences, [&logits, &s, &r]);
        let pairs = |gates: &[f32]| -> Vec<f32> {
            let all = (0..tokens).flat_map(|t| {
                bits::experts_of(&want.assigned, tokens, t).into_iter().map(move |e| (t, e))
            });
            all.map(|(t, e)| gates[t * experts + e]).collect()
        };
        near(checks, &format!("step {i}: gates"), &pairs(&gates), &pairs(&want.gates), 1e-5);
        let (want, dropped) = match most {
            Some(most) => expert_choice::cpu_drop(&gates, experts, &want.assigned, most),
            None => (want.assigned, vec![]),
        };
        checks.same(&format!("step {i}: assigned"), &assigned, &want);
        let stats = Stats::from_words(&stats)?;
        let want = stats_of(&want, &dropped, tokens, experts);
        checks.same(&format!("step {i}: statistics"), &[&stats], &[&want]);
        // Some rows of the output; all others must be finite.
        let sample = spread(tokens, 4);
        let matrices = |e, p| weights.experts.matrix(e, p);
        let choice = (&assigned[..], &gates[..]);
        let want = outputs(&weights.settings, &matrices, &step.hidden, choice, &sample);
        let out: Vec<f32> = gpu.download(out)?;
        for (t, want) in sample.into_iter().zip(want) {
            let what = format!("step {i}: output of token {t}");
            near(checks, &what, &out[t * d..][..d], &want, 1e-4);
        }
        checks.finite(&format!("step {i}: output"), &out);
        Ok(Done { stats, capacities, ms })
    }
}

/// Equal but for `tolerance` of the largest value that is wanted.
fn near(checks: &mut Checks<'_>, what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    checks.close(what, got, want, tolerance * largest(want).max(1e-30), 0.0);
}

/// All rules on a GPU.
fn on_gpu(
    options: &Options,
    weights: &Weights,
    run: &Run,
    rules: &[Rule],
    gpu: &Gpu,
    progress: &Progress,
) -> Result<Vec<RuleReport>, Error> {
    let ctx = Context::new(&gpu.device)?;
    let shape = weights.settings.expert_shape(WeightType::Bf16);
    let experts = upload(gpu, &ctx, shape, &|e, p| weights.experts.matrix(e, p))?;
    let router = router(&ctx, &weights.router, None)?;
    progress.say("compiling the kernels");
    let layer = MoeLayer::new(&ctx, weights.settings, router, experts)?;
    let count = run.lengths.len();
    let [masked, capacity, k] = [0; 3].map(|_| gpu.upload(&vec![0u32; count]));
    let on = OnGpu {
        gpu,
        ctx: &ctx,
        layer,
        weights,
        run,
        progress,
        scratch: Scratch::new(&ctx),
        offsets: gpu.upload(&run.offsets),
        hidden: gpu.upload(&run.steps[0].hidden),
        masked,
        out: gpu.upload(&vec![f32::NAN; run.steps[0].hidden.len()]),
        capacity,
        k,
    };
    let mut bound = rules.iter().map(|rule| on.bind(rule)).collect::<Result<Vec<_>, _>>()?;
    // Rules in turn, so that what else the machine does meets all alike. The first round is not counted.
    for round in 0..=options.repeats {
        progress.say(format!("denoising, round {round} of {}", options.repeats));
        bound.iter_mut().try_for_each(|bound| on.denoise(bound))?;
    }
    progress.say("checking every routing");
    bound.into_iter().map(|bound| on.report(bound)).collect()
}

/// All rules by the twins alone.
fn on_cpu(weights: &Weights, run: &Run, rules: &[Rule], progress: &Progress) -> Vec<RuleReport> {
    let (tokens, experts) = (run.tokens() as usize, run.shape.experts as usize);
    let d = run.shape.hidden as usize;
    progress.say("logits on the CPU");
    let logits: Vec<Vec<f32>> =
        run.steps.iter().map(|s| wgmoe::ops::logits::cpu(&s.hidden, &weights.router, d)).collect();
    let mut reports = vec![];
    for rule in rules {
        progress.say(&rule.name);
        let mut checks = Checks::new(&rule.name, progress);
        let done: Vec<Done> = run
            .steps
            .iter()
            .zip(&logits)
            .map(|(step, logits)| {
                let start = Instant::now();
                let capacities = rule.schedule.as_ref().map(|schedule| {
                    let source = HostSource::Masked(schedule, &step.masked);
                    capacity::cpu(source, tokens, experts as u32, &run.offsets, None)
                });
                let of_sequences = capacities.as_ref().map(|(capacity, _)| &capacity[..]);
                let routing = twin(weights, run, rule.routing, of_sequences, [&logits[..]; 3]);
                let ms = start.elapsed().as_secs_f64() * 1e3;
                let stats = stats_of(&routing.assigned, &routing.dropped, tokens, experts);
                Done { stats, capacities, ms }
            })
            .collect();
        reports.push(sum_up(rule, run, &mut checks, &done));
    }
    reports
}

/// What the run is, in lines.
fn describe(options: &Options, run: &Run, rules: &[Rule], on: &str) -> Result<String, Error> {
    let mut text = format!(
        "{on}\n{} sequences of {} to {} tokens, {} in all, {} steps, {} unmasking; E {}, D {}, F {}, bf16 weights, synthetic\n",
        run.lengths.len(),
        run.lengths.iter().min().unwrap_or(&0),
        options.length,
        run.tokens(),
        options.steps,
        match options.unmask {
            Unmask::Linear => "linear",
            Unmask::Cosine => "cosine",
        },
        options.experts,
        options.hidden,
        options.intermediate
    );
    let ratios = run.steps.iter().map(|s| {
        let masked: u32 = s.masked.iter().sum();
        format!("{:.2}", f64::from(masked) / f64::from(run.tokens()))
    });
    let _ = writeln!(text, "mask ratio by step: {}", ratios.collect::<Vec<_>>().join(" "));
    for rule in rules {
        if let Some(schedule) = &rule.schedule {
            let k = run.matched(schedule)?;
            if k != options.k {
                let _ =
                    writeln!(text, "{}: costs nearer to k {k} than to k {}", rule.name, options.k);
            }
        }
    }
    Ok(text)
}

fn tables(rules: &[RuleReport]) -> String {
    let mut text = String::new();
    let width = rules.iter().map(|r| r.rule.len()).max().unwrap_or(0);
    let devices: Vec<u32> =
        rules.first().map_or(vec![], |r| r.devices.iter().map(|d| d.devices).collect());
    let _ = writeln!(
        text,
        "\nslots: pairs computed; padded: rows of a padded batched matmul; imbalance: largest load over the mean;\n\
         untouched: tokens without an expert; slowest of R: slots of the slowest of R devices over the mean\n"
    );
    let _ = write!(
        text,
        "{:<width$} {:>15} {:>8} {:>8} {:>8} {:>9} {:>9} {:>9} {:>9}",
        "rule",
        "k (cost)",
        "slots",
        "padded",
        "dropped",
        "imbalance",
        "untouched",
        "ms",
        "tokens/s"
    );
    for n in &devices {
        let _ = write!(text, " {:>12}", format!("slowest of {n}"));
    }
    text += "  check\n";
    for r in rules {
        let _ = write!(
            text,
            "{:<width$} {:>15} {:>8} {:>8} {:>8} {:>9.3} {:>9} {:>9.2} {:>9.0}",
            r.rule,
            r.cost,
            r.slots,
            r.padded,
            r.dropped,
            r.imbalance,
            r.untouched,
            r.ms,
            r.tokens_per_s
        );
        for d in &r.devices {
            let _ = write!(text, " {:>12.3}", d.slowest);
        }
        let _ = writeln!(text, "  {}", if r.ok { "ok" } else { "WRONG" });
    }
    let _ = write!(text, "\n{:<width$}", "k / capacity / ms by step");
    for i in 0..rules.first().map_or(0, |r| r.steps.len()) {
        let _ = write!(text, " {:>19}", i + 1);
    }
    text.push('\n');
    for r in rules {
        let _ = write!(text, "{:<width$}", r.rule);
        for s in &r.steps {
            let _ = write!(text, " {:>5.2} {:>6.1} {:>6.2}", s.k, s.capacity, s.ms);
        }
        text.push('\n');
    }
    text
}

/// A quantity of a step, to draw.
type Series = fn(&StepReport) -> f64;

/// k over the steps, and under it the time of each step.
fn draw(rules: &[RuleReport]) -> Result<String, Box<dyn std::error::Error>> {
    use plot::{ChartBuilder, Color, IntoDrawingArea, LineSeries, PathElement, SVGBackend};
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (960, 900)).into_drawing_area();
        root.fill(&plot::WHITE)?;
        let charts: [(&str, Series); 2] =
            [("experts per token (k)", |s| s.k), ("time of the step, ms", |s| s.ms)];
        let last = rules.first().map_or(0, |r| r.steps.len()) as f64;
        for (area, (title, value)) in root.split_evenly((2, 1)).iter().zip(charts) {
            let values = rules.iter().flat_map(|r| r.steps.iter().map(value));
            let most = values.fold(0.0, f64::max);
            let mut chart = ChartBuilder::on(area)
                .caption(title, ("sans-serif", 18))
                .margin(10)
                .margin_right(240)
                .x_label_area_size(40)
                .y_label_area_size(50)
                .build_cartesian_2d(0.5..last + 0.5, 0.0..1.1 * most.max(1e-9))?;
            chart
                .configure_mesh()
                .x_desc("step")
                .x_label_formatter(&|x| format!("{x:.0}"))
                .light_line_style(plot::WHITE)
                .draw()?;
            for (i, rule) in rules.iter().enumerate() {
                // Token choice in greys.
                let place = i as f64 / rules.len() as f64;
                let colour = if rule.rule.starts_with("token") {
                    plot::HSLColor(0.0, 0.0, 2.0 * place)
                } else {
                    plot::HSLColor((1.4 * place).fract(), 0.9, 0.4)
                };
                let points = rule.steps.iter().enumerate().map(|(x, s)| (x as f64 + 1.0, value(s)));
                chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
                let y = 30 + 20 * i as i32;
                area.draw(&PathElement::new([(735, y + 5), (755, y + 5)], colour.stroke_width(2)))?;
                area.draw(&plot::Text::new(rule.rule.clone(), (760, y), ("sans-serif", 13)))?;
            }
        }
        root.present()?;
    }
    Ok(svg)
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
