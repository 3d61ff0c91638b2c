//! A mixture-of-experts layer on this machine's GPU: is it right, and how fast is it?
//!
//! First replays the recorded layers of the LLaDA2 reference (`group_limited_*` and `block_coreset_*` of `tests/golden`), then builds a layer of a
//! named model with synthetic weights and hidden states, or loads one from a checkpoint (`--checkpoint`; `make_checkpoint`
//! writes some to try), runs each routing rule, checks it against the CPU twins, and prints where the time goes:
//! `cargo run --release --example moe_layer -- --help`. Where there is no GPU driver, the CPU twins run alone. Exits with 1
//! where a check fails.
use clap::Parser;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Serialize;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use testkit::compare::{Checks, largest};
use testkit::golden_layer;
use testkit::layer::{host_router, outputs, router};
use testkit::program::{self, Found, Progress};
use testkit::statistics::{median, spread, threads};
use testkit::synthetic::{self, Pool};
use wgmoe::layer::{
    Batch, HostBatch, HostRouter, HostRouting, HostSequences, LayerConfig, MoeLayer, Sequences,
    cpu_routing, cpu_token,
};
use wgmoe::models::{self, MODELS};
use wgmoe::ops::{combine, expert_choice, expert_union, grouped_matmul, scores};
use wgmoe::plan::HostPlan;
use wgmoe::plan::Stats;
use wgmoe::plan::bits;
use wgmoe::routing::GateRule;
use wgmoe::routing::Groups;
use wgmoe::routing::{
    BlockRule, ExpertChoice, Normalise, Routing, Scope, Score, SequenceTop, TokenChoice,
};
use wgmoe::weights::{HostWeights, Projection};
use wgmoe::{Context, Error, Gpu, PlanShape, WeightType, wgpu};

mod stored_layer;
use stored_layer::StoredLayer;

#[global_allocator]
static ALLOCATED: peak_alloc::PeakAlloc = peak_alloc::PeakAlloc;

/// Runs an MoE layer under each routing rule, checks it against the CPU, and shows where the time goes.
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
    /// Type the experts are stored as on the device; bf16 by default, or a checkpoint's own
    #[arg(long, value_enum)]
    weights: Option<Weights>,
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

#[derive(Clone, Copy, clap::ValueEnum)]
enum Weights {
    Bf16,
    F16,
    F32,
}

impl Weights {
    fn weight_type(self) -> WeightType {
        match self {
            Self::Bf16 => WeightType::Bf16,
            Self::F16 => WeightType::F16,
            Self::F32 => WeightType::F32,
        }
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    adapter: String,
    driver: String,
    backend: String,
    golden: Vec<Golden>,
    rules: Vec<RuleReport>,
    /// What the table says of the layer and of the checks.
    #[serde(skip)]
    notes: Vec<String>,
}

#[derive(Serialize)]
struct Golden {
    case: String,
    max_error: f64,
    ok: bool,
}

#[derive(Serialize)]
struct RuleReport {
    rule: &'static str,
    tokens: u32,
    experts: u32,
    slots: u32,
    unique_experts_per_block: f64,
    wall_ms: f64,
    gflops: f64,
    max_error: f64,
    ok: bool,
    kernels: Vec<KernelTime>,
    #[serde(skip)]
    dropped: u32,
}

#[derive(Serialize)]
struct KernelTime {
    name: String,
    ms: f64,
}

/// Tokens decoded together, and tokens of a sequence.
const BLOCK: u32 = 32;
const SEQUENCE: u32 = 128;

/// A routing rule to run.
struct Rule {
    name: &'static str,
    routing: Routing,
}

/// The rules for a model: its own first. A line each.
fn rules(own: Routing, experts: u32) -> Vec<Rule> {
    let (token_choice, k, score) = match own {
        Routing::ExpertChoice(rule) => {
            let token_choice = TokenChoice {
                score: rule.score,
                gate: if rule.score == Score::Softmax {
                    GateRule::Softmax
                } else {
                    GateRule::Normalised
                },
                top: rule.experts_per_token,
                groups: None,
                scale: 1.0,
                capacity_factor: None,
                coreset: None,
            };
            (token_choice, rule.experts_per_token, rule.score)
        }
        Routing::TokenChoice(rule) => (rule, rule.top, rule.score),
        _ => return vec![Rule { name: "the model's own", routing: own }],
    };
    let expert_choice = match own {
        Routing::ExpertChoice(_) => own,
        _ => Routing::ExpertChoice(ExpertChoice {
            score,
            normalise: Normalise::AfterSelection,
            scope: Scope::Sequence,
            experts_per_token: k.min(experts),
            max_experts_per_token: k.min(experts),
        }),
    };
    let capacity = TokenChoice { capacity_factor: Some(1.25), ..token_choice };
    let mut rules = vec![
        Rule { name: "token choice", routing: Routing::TokenChoice(token_choice) },
        Rule { name: "token choice, capacity 1.25", routing: Routing::TokenChoice(capacity) },
        Rule { name: "expert choice", routing: expert_choice },
    ];
    if matches!(own, Routing::ExpertChoice(_)) {
        rules.rotate_right(1);
    }
    // Block-level rules, with the shares of 256 experts that their papers use.
    let share = |of_256: u32| (experts * of_256).div_ceil(256).max(1);
    for (name, rule) in [
        ("block mass(0.6, 8)", BlockRule::Mass { p: 0.6, floor: 8.min(experts) }),
        ("block capacity(48/256)", BlockRule::Capacity(share(48))),
        ("block vote(38/256)", BlockRule::Vote(share(38))),
        ("block union(3)", BlockRule::Union(3.min(experts))),
    ] {
        let routing = Routing::TokenChoice(TokenChoice { coreset: Some(rule), ..token_choice });
        rules.push(Rule { name, routing });
    }
    let pairs = SequenceTop {
        score: token_choice.score,
        gate: token_choice.gate,
        top: k.min(experts),
        scale: token_choice.scale,
    };
    rules.push(Rule { name: "sequence top", routing: Routing::SequenceTop(pairs) });
    rules
}

/// The data of a layer on the host.
///
/// Experts: each matrix is a window of one pool of random numbers, at a place of its own, so that a layer of any size takes
/// little memory and no time to make. Deviations of 1 / sqrt(D) and 1 / sqrt(F) keep activations near 1.
///
/// From a checkpoint, experts and router are what its files hold.
///
/// Router: logits are spread as `g = 2 (sqrt(0.6) Z_block[e] + sqrt(0.4) Z[t, e]) - 3`, Z standard normal, which for
/// LLaDA2.0-mini's 256 experts gives as many unique experts a block as were published for it. Hidden states are the same
/// mixture of a normal vector of the block and one of the token; the router's weights are normal with deviation
/// 2 / sqrt(D), and read the -3 from the first hidden value, which is 1. `make_checkpoint`'s routers do the same.
struct Data<'a> {
    settings: LayerConfig,
    x: Vec<f32>,
    router: Vec<f32>,
    bias: Option<Vec<f32>>,
    experts: Experts<'a>,
    /// Offsets and lengths of the sequences.
    offsets: Vec<u32>,
    lengths: Vec<u32>,
}

enum Experts<'a> {
    Synthetic(Pool),
    Stored(&'a StoredLayer),
}

/// Where a layer's weights come from.
#[derive(Clone, Copy)]
enum Source<'a> {
    Synthetic(Weights),
    Stored(&'a StoredLayer),
}

impl<'a> Data<'a> {
    fn new(settings: LayerConfig, tokens: u32, source: Source<'a>, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let x = synthetic::hidden_states(&mut rng, tokens, BLOCK, settings.hidden);
        let (router, bias, experts) = match source {
            Source::Stored(layer) => {
                let (router, bias) = layer.router();
                (router, bias, Experts::Stored(layer))
            }
            Source::Synthetic(weights) => made(&settings, weights, &mut rng),
        };
        let offsets: Vec<u32> =
            (0..tokens).step_by(SEQUENCE as usize).chain(std::iter::once(tokens)).collect();
        let lengths = offsets.windows(2).map(|w| w[1] - w[0]).collect();
        Self { settings, x, router, bias, experts, offsets, lengths }
    }

    fn expert(&self, e: u32, projection: Projection) -> HostWeights<'_> {
        match &self.experts {
            Experts::Stored(layer) => layer.expert(e, projection),
            Experts::Synthetic(pool) => pool.matrix(e, projection),
        }
    }

    fn row(&self, t: usize) -> &[f32] {
        let d = self.settings.hidden as usize;
        &self.x[t * d..][..d]
    }

    fn tokens(&self) -> usize {
        self.x.len() / self.settings.hidden as usize
    }

    fn host_router(&self) -> HostRouter<'_> {
        host_router(&self.router, self.bias.as_deref())
    }

    /// Tokens that each expert takes of each sequence, for rules that choose within sequences.
    fn capacity(&self, routing: Routing) -> Option<Vec<u32>> {
        match routing {
            Routing::ExpertChoice(rule) if rule.scope == Scope::Sequence => {
                let k = rule.experts_per_token;
                let share = |&n: &u32| ExpertChoice::capacity(k, n, self.settings.experts);
                Some(self.lengths.iter().map(share).collect())
            }
            _ => None,
        }
    }

    /// The twin of some tokens' output, on every core.
    fn twin(
        &self,
        settings: &LayerConfig,
        assigned: &[u32],
        gates: &[f32],
        sample: &[usize],
    ) -> Vec<Vec<f32>> {
        outputs(settings, &|e, p| self.expert(e, p), &self.x, (assigned, gates), sample)
    }
}

/// Router, bias and experts.
fn made(
    settings: &LayerConfig,
    weights: Weights,
    rng: &mut StdRng,
) -> (Vec<f32>, Option<Vec<f32>>, Experts<'static>) {
    let router = synthetic::router(rng, settings);
    let sigmoid = match settings.routing {
        Routing::TokenChoice(rule) => rule.score == Score::Sigmoid,
        _ => false,
    };
    let bias = sigmoid.then(|| {
        (0..settings.experts).map(|_| rng.random_range(-0.01..0.01)).collect::<Vec<f32>>()
    });
    (router, bias, Experts::Synthetic(Pool::new(rng, settings, weights.weight_type())))
}

/// Tolerances of the checks; of the output, as a share of the token's largest value.
const OUTPUT: f32 = 2e-5;
const LOGITS: f32 = 1e-4;
const SCORES: f32 = 1e-5;

/// Milliseconds of one step as users record it: encode, submit, wait.
fn wall(gpu: &Gpu, step: &wgmoe::layer::BoundLayer) -> Result<f64, Error> {
    let start = Instant::now();
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    step.encode(&mut encoder);
    gpu.queue.submit([encoder.finish()]);
    let waited = gpu.device.poll(wgpu::PollType::wait_indefinitely());
    waited.map_err(|e| Error::Device(e.to_string()))?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// JSON has no infinities.
fn finite(value: f64) -> f64 {
    if value.is_finite() { value } else { f64::MAX }
}

/// Useful multiply-adds of the experts, times 2.
fn flops(settings: &LayerConfig, tokens: u32, slots: u32) -> f64 {
    let rows = f64::from(slots) + f64::from(tokens) * f64::from(settings.shared_experts);
    2.0 * 3.0 * rows * f64::from(settings.hidden) * f64::from(settings.intermediate)
}

/// Times of dispatches by name.
fn kernel_times(times: impl IntoIterator<Item = (String, f64)>) -> Vec<KernelTime> {
    program::sum_up(times).into_iter().map(|(name, ms)| KernelTime { name, ms }).collect()
}

/// One layer on the device, with what the checks need.
struct OnGpu<'a> {
    gpu: &'a Gpu,
    ctx: &'a Context,
    layer: MoeLayer,
    data: &'a Data<'a>,
    hidden: wgpu::Buffer,
    sample: Vec<usize>,
    progress: &'a Progress,
    /// Whether every rule's kernel times are from GPU timestamps.
    timestamps: bool,
}

impl OnGpu<'_> {
    fn run(&mut self, rule: &Rule) -> Result<RuleReport, Error> {
        let (gpu, data, progress) = (self.gpu, self.data, self.progress);
        progress.say(format!("{}: first run, which compiles the kernels", rule.name));
        let layer = self.layer.with_routing(rule.routing)?;
        let settings = *layer.config();
        let (tokens, d) = (data.tokens(), settings.hidden as usize);
        let out = gpu.upload(&vec![f32::NAN; tokens * d]);
        let mut batch = Batch::new(&self.hidden, tokens as u32).into_out(&out);
        let capacity = data.capacity(rule.routing);
        let buffers = capacity.as_ref().map(|c| (gpu.upload(&data.offsets), gpu.upload(c)));
        batch.sequences = buffers.as_ref().map(|(offsets, capacity)| {
            Sequences::new(data.lengths.len() as u32, offsets).with_capacity(capacity)
        });
        let step = layer.bind(&batch)?;
        gpu.run_layer(&step)?;
        let got: Vec<f32> = gpu.download(&out)?;

        progress.say(format!("{}: checking {} tokens", rule.name, self.sample.len()));
        let mut checks = Checks::new(rule.name, progress);
        let (assigned, stats) = self.check_routing(&mut checks, &settings, &step)?;
        let max_error = self.check_output(&mut checks, &settings, &step, &assigned, &got)?;
        let unique_experts_per_block = self.unions(&mut checks, &settings, &step, &assigned)?;

        progress.say(format!("{}: timing", rule.name));
        let first = wall(gpu, &step)?;
        let repeats = ((5000.0 / first) as usize).clamp(2, 20);
        let mut times = vec![first];
        for _ in 0..repeats {
            times.push(wall(gpu, &step)?);
        }
        let wall_ms = median(times);
        let again: Vec<u32> = gpu.download(&out)?;
        let bits: Vec<u32> = got.iter().map(|v| v.to_bits()).collect();
        checks.same("a repeated run's output", &again, &bits);
        let kernels = match gpu.profile(step.dispatches())? {
            Some(times) if self.timestamps => times,
            _ => {
                self.timestamps = false;
                gpu.profile_alone(step.dispatches())?
            }
        };
        let names = step.dispatches().map(|d| match d.stage() {
            Some(stage) => format!("{} {stage}", d.name()),
            None => d.name().to_string(),
        });
        Ok(RuleReport {
            rule: rule.name,
            tokens: tokens as u32,
            experts: settings.experts,
            slots: stats.slots,
            unique_experts_per_block,
            wall_ms,
            gflops: flops(&settings, tokens as u32, stats.slots) / (wall_ms * 1e6),
            max_error: finite(max_error.into()),
            ok: checks.ok,
            kernels: kernel_times(names.zip(kernels.into_iter().map(|(_, ms)| ms))),
            dropped: stats.dropped,
        })
    }

    /// The choice, exactly, from the device's own logits and scores; logits and scores of the sample.
    fn check_routing(
        &self,
        checks: &mut Checks<'_>,
        settings: &LayerConfig,
        step: &wgmoe::layer::BoundLayer,
    ) -> Result<(Vec<u32>, Stats), Error> {
        let (gpu, data) = (self.gpu, self.data);
        let (tokens, e, d) = (data.tokens(), settings.experts as usize, settings.hidden as usize);
        let none = || Error::Device("an empty step".into());
        let [logits, s, r] = testkit::layer::selection(&step).ok_or_else(none)?;
        let [logits, s, r]: [Vec<f32>; 3] =
            [gpu.download(logits)?, gpu.download(s)?, gpu.download(r)?];
        let gates: Vec<f32> = gpu.download(step.gates().ok_or_else(none)?)?;
        let assigned: Vec<u32> = gpu.download(step.assigned().ok_or_else(none)?)?;
        let stats = Stats::from_words(&gpu.download::<u32>(step.stats())?)?;

        let (score, from_logits) = (settings.routing.score(), settings.routing.by_logits());
        for &t in &self.sample {
            let row = |v: &[f32]| v[t * e..][..e].to_vec();
            let want = wgmoe::ops::logits::cpu(data.row(t), &data.router, d);
            checks.close(&format!("token {t}: logits"), &row(&logits), &want, LOGITS, 1e-5);
            if s == logits {
                continue; // a rule that needs no scores
            }
            let (want_s, want_r) =
                scores::cpu(&row(&logits), e, score, from_logits, data.bias.as_deref());
            checks.close(&format!("token {t}: scores"), &row(&s), &want_s, 1e-7, SCORES);
            checks.close(&format!("token {t}: selection"), &row(&r), &want_r, SCORES, SCORES);
        }

        // Before the capacity factor; the drop is checked with the device's own gates, as it chooses by them.
        let mut free = *settings;
        let mut most = None;
        if let Routing::TokenChoice(rule) = &mut free.routing {
            most = rule.capacity(tokens as u32, settings.experts);
            rule.capacity_factor = None;
        }
        let capacity = data.capacity(settings.routing);
        let sequences = capacity.as_ref().map(|capacity| HostSequences {
            offsets: &data.offsets,
            lengths: None,
            capacity,
        });
        let want = cpu_routing(
            &free,
            &data.host_router(),
            HostBatch { sequences, ..HostBatch::default() },
            [&logits, &s, &r],
        );
        let (want_assigned, dropped) = match most {
            Some(most) => expert_choice::cpu_drop(&gates, e, &want.assigned, most),
            None => (want.assigned, vec![]),
        };
        checks.same("assigned", &assigned, &want_assigned);
        let count: u32 = want_assigned.iter().map(|w| w.count_ones()).sum();
        let got = [stats.slots, stats.dropped, stats.ignored];
        checks.same("slots, dropped, ignored", &got, &[count, dropped.iter().sum(), 0]);
        // Only assigned pairs have a gate.
        let pairs: Vec<usize> =
            (0..tokens * e).filter(|i| bits::get(&want_assigned, tokens, i % e, i / e)).collect();
        let of = |gates: &[f32]| pairs.iter().map(|&i| gates[i]).collect::<Vec<_>>();
        checks.close("gates", &of(&gates), &of(&want.gates), 1e-7, SCORES);
        Ok((want_assigned, stats))
    }

    /// Output rows of the sample; all others must be finite.
    fn check_output(
        &self,
        checks: &mut Checks<'_>,
        settings: &LayerConfig,
        step: &wgmoe::layer::BoundLayer,
        assigned: &[u32],
        got: &[f32],
    ) -> Result<f32, Error> {
        let d = settings.hidden as usize;
        let none = || Error::Device("an empty step".into());
        let gates: Vec<f32> = self.gpu.download(step.gates().ok_or_else(none)?)?;
        let want = self.data.twin(settings, assigned, &gates, &self.sample);
        let mut max_error = 0f32;
        for (&t, want) in self.sample.iter().zip(&want) {
            let got = &got[t * d..][..d];
            let what = format!("token {t}: output");
            max_error =
                max_error.max(checks.close(&what, got, want, OUTPUT * largest(want), OUTPUT));
        }
        if !checks.finite("output", got) {
            max_error = f32::INFINITY;
        }
        Ok(max_error)
    }

    /// Experts that a block's tokens use together, on average over full blocks, counted on the device.
    fn unions(
        &self,
        checks: &mut Checks<'_>,
        settings: &LayerConfig,
        step: &wgmoe::layer::BoundLayer,
        want_assigned: &[u32],
    ) -> Result<f64, Error> {
        let gpu = self.gpu;
        let (tokens, experts) = (self.data.tokens() as u32, settings.experts);
        let offsets: Vec<u32> =
            (0..tokens).step_by(BLOCK as usize).chain(std::iter::once(tokens)).collect();
        let blocks = offsets.len() - 1;
        let members = gpu.upload(&vec![0u32; blocks * experts.div_ceil(32) as usize]);
        let counts = gpu.upload(&vec![0u32; blocks]);
        let bytes = gpu.upload(&vec![0u64; blocks]);
        let starts = gpu.upload(&offsets);
        let expert_bytes = self.layer.weights().shape().expert_bytes();
        let dims = expert_union::Dims { tokens, experts, blocks: blocks as u32, expert_bytes };
        let args = expert_union::Args {
            assigned: step.assigned().ok_or_else(|| Error::Device("an empty step".into()))?,
            offsets: (&starts).into(),
            members: (&members).into(),
            counts: (&counts).into(),
            bytes: (&bytes).into(),
            totals: None,
        };
        gpu.run(&expert_union::ExpertUnion::new(self.ctx)?.bind(&dims, args)?)?;
        let counts: Vec<u32> = gpu.download(&counts)?;
        let (_, want, _) = expert_union::cpu(
            want_assigned,
            tokens as usize,
            experts as usize,
            &offsets,
            expert_bytes,
        );
        checks.same("unique experts per block", &counts, &want);
        Ok(mean_of_blocks(&counts, tokens))
    }
}

/// Mean over the full blocks, or the only one.
fn mean_of_blocks(counts: &[u32], tokens: u32) -> f64 {
    let full = ((tokens / BLOCK) as usize).max(1);
    counts[..full].iter().map(|&n| f64::from(n)).sum::<f64>() / full as f64
}

/// The layer that is run.
struct Subject {
    name: String,
    settings: LayerConfig,
    /// Experts of the model it is of.
    of: u32,
    stored: Option<StoredLayer>,
}

impl Subject {
    fn source(&self, weights: Option<Weights>) -> Source<'_> {
        match &self.stored {
            Some(layer) => Source::Stored(layer),
            None => Source::Synthetic(weights.unwrap_or(Weights::Bf16)),
        }
    }
}

/// What a layer is, in a line.
fn describe(subject: &Subject, settings: &LayerConfig, weights: WeightType) -> String {
    let mut line = format!(
        "{}: {} of {} experts, D {}, F {}, {} shared",
        subject.name,
        settings.experts,
        subject.of,
        settings.hidden,
        settings.intermediate,
        settings.shared_experts
    );
    if let Routing::TokenChoice(rule) = settings.routing {
        let _ = write!(line, ", K {}", rule.top);
        if let Some(Groups { count, top }) = rule.groups {
            let _ = write!(line, " from {top} of {count} groups");
        }
    }
    let weights = weights.dtype().to_lowercase();
    let from = if subject.stored.is_some() { "from the checkpoint" } else { "synthetic" };
    line + &format!("; {weights} weights, {from}")
}

/// Replays the recorded layers; none where the folder is not there.
fn replay(
    progress: &Progress,
    gpu: Option<(&Gpu, &Context)>,
    notes: &mut Vec<String>,
) -> Result<Vec<Golden>, String> {
    let folder = golden_layer::folder();
    let Ok(entries) = std::fs::read_dir(&folder) else {
        notes.push("no recorded layers here: the published package leaves tests/golden out".into());
        return Ok(vec![]);
    };
    let mut paths: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    paths.sort();
    let mut golden = vec![];
    for path in paths {
        let case = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let bytes = std::fs::read(&path).map_err(|e| format!("{case}: {e}"))?;
        let Some(layer) = golden_layer::Layer::read(&bytes).map_err(|e| format!("{case}: {e}"))?
        else {
            continue;
        };
        progress.say(format!("recorded layer {case}"));
        let got = match gpu {
            Some((gpu, ctx)) => layer.on_gpu(gpu, ctx).map_err(|e| format!("{case}: {e}"))?,
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

/// A layer of synthetic weights.
fn upload(
    data: &Data<'_>,
    gpu: &Gpu,
    ctx: &Context,
    progress: &Progress,
) -> Result<MoeLayer, Error> {
    let settings = data.settings;
    let shape = settings.expert_shape(data.expert(0, Projection::Gate).weight_type());
    let bytes = u64::from(shape.experts) * shape.device_bytes();
    progress.say(format!("making and packing {} MB of expert weights", bytes / 1_000_000));
    let weights = testkit::layer::upload(gpu, ctx, shape, &|e, p| data.expert(e, p))?;
    MoeLayer::new(ctx, settings, router(ctx, &data.router, data.bias.as_deref())?, weights)
}

/// All of it on a GPU.
fn on_gpu(
    options: &Options,
    subject: &Subject,
    gpu: &Gpu,
    progress: &Progress,
) -> Result<Report, String> {
    let settings = subject.settings;
    let say = |e: Error| e.to_string();
    let ctx = Context::new(&gpu.device).map_err(say)?;
    let mut notes = vec![];
    let golden = replay(progress, Some((gpu, &ctx)), &mut notes)?;

    // Before anything as large is made on the host.
    let need = u64::from(options.tokens) * u64::from(settings.hidden) * 4;
    let limits = gpu.device.limits();
    let most = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
    if need > most {
        return Err(format!(
            "--tokens {}: hidden states of {need} bytes, a buffer of this device holds {most}",
            options.tokens
        ));
    }
    let source = subject.source(options.weights);
    let layer = match source {
        Source::Stored(stored) => {
            ALLOCATED.reset_peak_usage();
            let start = Instant::now();
            let weight_type = options.weights.map(Weights::weight_type);
            let mut bytes = 0;
            let mut told = |done: u64, total: u64| {
                let [done, all] = [done, total].map(|n| n / 1_000_000);
                // Not a line for each matrix where there is no terminal.
                if bytes == 0 || !progress.0.is_hidden() {
                    progress.say(format!("loading layer {}: {done} of {all} MB", stored.number()));
                }
                bytes = total;
            };
            let layer = stored.load(&ctx, &gpu.queue, weight_type, &mut told).map_err(say)?;
            let seconds = start.elapsed().as_secs_f64();
            notes.push(format!(
                "loaded {} MB in {seconds:.2} s, {:.0} MB/s, kernels compiled; peak of host allocations {:.1} MB",
                bytes / 1_000_000,
                bytes as f64 / 1e6 / seconds,
                ALLOCATED.peak_usage_as_mb()
            ));
            Some(layer)
        }
        Source::Synthetic(_) => None,
    };
    let data = Data::new(settings, options.tokens, source, options.seed);
    let layer = match layer {
        Some(layer) => layer,
        None => upload(&data, gpu, &ctx, progress).map_err(say)?,
    };
    let hidden = gpu.upload(&data.x);

    // As many tokens as take the twin some three seconds, by the time of the first.
    let tokens = data.tokens();
    let all = |n: u32| (0..n).map(|e| (e, 1.0)).collect::<Vec<_>>();
    let k = match settings.routing {
        Routing::TokenChoice(rule) => rule.top,
        Routing::ExpertChoice(rule) => rule.experts_per_token,
        _ => 8,
    };
    let start = Instant::now();
    cpu_token(&settings, &|e, p| data.expert(e, p), data.row(0), &all(k));
    let count = 3.0 / start.elapsed().as_secs_f64() * threads() as f64;
    let sample = spread(tokens, (count as usize).clamp(4, 64));

    notes.push(describe(subject, &settings, layer.weights().shape().weight_type));
    notes.push(format!(
        "checked on the CPU: choices of all {tokens} tokens exactly; logits (within {LOGITS:e}), scores, gates and outputs of {} of them (within {OUTPUT:e} of a token's largest value)",
        sample.len()
    ));
    let mut on_gpu =
        OnGpu { gpu, ctx: &ctx, layer, data: &data, hidden, sample, progress, timestamps: true };
    let mut reports = vec![];
    for rule in rules(settings.routing, settings.experts) {
        reports.push(on_gpu.run(&rule).map_err(|e| format!("{}: {e}", rule.name))?);
    }
    notes.push(if on_gpu.timestamps {
        "kernel times: GPU timestamps, a pass for each kernel; kernels of one name are summed".into()
    } else {
        "kernel times: this device gives no usable timestamps, so each kernel is submitted alone and timed on the host, submission included; kernels of one name are summed".into()
    });
    Ok(Report {
        adapter: gpu.info.name.clone(),
        driver: format!("{} {}", gpu.info.driver, gpu.info.driver_info).trim().to_string(),
        backend: gpu.info.backend.to_string(),
        golden,
        rules: reports,
        notes,
    })
}

/// The CPU twins alone: recorded layers, and each rule on a narrow layer, whose experts run token by token and, through the
/// plan, expert by expert.
fn on_cpu(options: &Options, subject: &Subject, progress: &Progress) -> Result<Report, String> {
    let settings = subject.settings;
    let mut notes = vec![];
    let golden = replay(progress, None, &mut notes)?;
    // A stored layer is as wide as it is.
    let narrow = match subject.stored {
        Some(_) => settings,
        None => {
            let mut config = settings;
            config.hidden = settings.hidden.min(128);
            config.intermediate = settings.intermediate.min(32);
            config
        }
    };
    let tokens = options.tokens.min(if subject.stored.is_some() { 8 } else { 128 });
    let data = Data::new(narrow, tokens, subject.source(options.weights), options.seed);
    let weight_type = data.expert(0, Projection::Gate).weight_type();
    notes.push(format!("{}; {tokens} tokens", describe(subject, &narrow, weight_type)));
    notes.push(format!(
        "checked: tokens of each expert and experts of each token by the rule; experts token by token against expert by expert, within {OUTPUT:e} of a token's largest value"
    ));
    notes.push(
        "kernel times: of the CPU twins, which are written to be read, not to be fast".into(),
    );
    let reports = rules(settings.routing, settings.experts)
        .iter()
        .map(|rule| {
            progress.say(format!("{} on the CPU twins", rule.name));
            rule_on_cpu(&data, rule, progress).map_err(|e| e.to_string())
        })
        .collect::<Result<_, _>>()?;
    Ok(Report {
        adapter: "none (CPU twins)".into(),
        driver: "none".into(),
        backend: "none".into(),
        golden,
        rules: reports,
        notes,
    })
}

fn rule_on_cpu(data: &Data<'_>, rule: &Rule, progress: &Progress) -> Result<RuleReport, Error> {
    let settings = data.settings.with_routing(rule.routing);
    let (tokens, e, d) = (data.tokens(), settings.experts as usize, settings.hidden as usize);
    let mut checks = Checks::new(rule.name, progress);
    let mut kernels = vec![];
    let mut last = Instant::now();
    let mut lap = |name: &str| {
        let now = Instant::now();
        kernels.push((name.to_string(), now.duration_since(last).as_secs_f64() * 1e3));
        last = now;
    };
    let (score, from_logits) = (rule.routing.score(), rule.routing.by_logits());
    let logits = wgmoe::ops::logits::cpu(&data.x, &data.router, d);
    lap("logits");
    let (s, r) = scores::cpu(&logits, e, score, from_logits, data.bias.as_deref());
    lap("scores");
    let capacity = data.capacity(rule.routing);
    let sequences = capacity.as_ref().map(|capacity| HostSequences {
        offsets: &data.offsets,
        lengths: None,
        capacity,
    });
    let routed = cpu_routing(
        &settings,
        &data.host_router(),
        HostBatch { sequences, ..HostBatch::default() },
        [&logits, &s, &r],
    );
    lap("choice");
    let slots: u32 = routed.assigned.iter().map(|w| w.count_ones()).sum();
    check_counts(&mut checks, data, &settings, &routed, slots);
    let shape = PlanShape {
        tokens: tokens as u32,
        experts: settings.experts,
        shared_experts: settings.shared_experts,
        routed_slots: slots,
        tile_rows: 16,
        skinny_rows: 8,
    };
    shape.sections()?;
    let plan = HostPlan::cpu(&shape, &routed.assigned, &routed.gates);
    lap("plan");
    let mut y = vec![];
    for (e, span) in (0..).zip(plan.expert_offsets.windows(2)) {
        let [gate, up, down] = Projection::ALL.map(|p| data.expert(e, p));
        for &t in &plan.token_of[span[0] as usize..span[1] as usize] {
            y.extend(grouped_matmul::cpu_expert(
                data.row(t as usize),
                settings.intermediate as usize,
                settings.activation,
                [&|i| gate.get(i), &|i| up.get(i), &|i| down.get(i)],
            ));
        }
    }
    lap("experts");
    let got = combine::cpu(&plan, &y, d, None);
    lap("combine");
    let wall_ms: f64 = kernels.iter().map(|(_, ms)| ms).sum();

    let all: Vec<usize> = (0..tokens).collect();
    let mut max_error = 0f32;
    for (t, want) in data.twin(&settings, &routed.assigned, &routed.gates, &all).iter().enumerate()
    {
        let what = format!("token {t}: output");
        max_error = max_error.max(checks.close(
            &what,
            &got[t * d..][..d],
            want,
            OUTPUT * largest(want),
            OUTPUT,
        ));
    }
    let offsets: Vec<u32> =
        (0..tokens as u32).step_by(BLOCK as usize).chain(std::iter::once(tokens as u32)).collect();
    let (_, counts, _) = expert_union::cpu(&routed.assigned, tokens, e, &offsets, 0);
    Ok(RuleReport {
        rule: rule.name,
        tokens: tokens as u32,
        experts: settings.experts,
        slots,
        unique_experts_per_block: mean_of_blocks(&counts, tokens as u32),
        wall_ms,
        gflops: flops(&settings, tokens as u32, slots) / (wall_ms * 1e6),
        max_error: finite(max_error.into()),
        ok: checks.ok,
        kernels: kernel_times(kernels),
        dropped: routed.dropped.iter().sum(),
    })
}

/// How many tokens and experts a choice must join, by the rule alone.
fn check_counts(
    checks: &mut Checks<'_>,
    data: &Data<'_>,
    settings: &LayerConfig,
    routed: &HostRouting,
    slots: u32,
) {
    let tokens = data.tokens();
    let mut of_expert = (0..settings.experts as usize)
        .map(|e| bits::tokens_of(&routed.assigned, tokens, e).len() as u32);
    match settings.routing {
        Routing::TokenChoice(rule) => {
            let dropped: u32 = routed.dropped.iter().sum();
            let all = tokens as u32 * rule.top;
            // A token may find fewer than K experts in its block's coreset.
            let fits = if rule.coreset.is_some() {
                slots + dropped <= all
            } else {
                slots + dropped == all
            };
            checks.same("slots and dropped", &[fits], &[true]);
            let most = rule.capacity(tokens as u32, settings.experts).unwrap_or(u32::MAX);
            checks.same("experts over capacity", &[of_expert.any(|n| n > most)], &[false]);
        }
        Routing::ExpertChoice(_) => {
            let each: u32 = data.capacity(settings.routing).unwrap_or_default().iter().sum();
            checks.same("tokens of an expert", &[of_expert.all(|n| n == each)], &[true]);
        }
        Routing::SequenceTop(rule) => checks.same("slots", &[slots], &[tokens as u32 * rule.top]),
        _ => unreachable!("every rule is listed"),
    }
}

/// The report as text.
fn tables(report: &Report) -> String {
    let mut text = String::new();
    let ok = |ok: bool| if ok { "ok" } else { "WRONG" };
    let _ = writeln!(
        text,
        "adapter  {}\ndriver   {}\nbackend  {}\n",
        report.adapter, report.driver, report.backend
    );
    if !report.golden.is_empty() {
        let (atol, rtol) = (golden_layer::ATOL, golden_layer::RTOL);
        let _ = writeln!(
            text,
            "recorded layers of LLaDA2, f32 weights (tolerance {atol:e} + {rtol:e} |y|)"
        );
        for case in &report.golden {
            let _ = writeln!(
                text,
                "  {:<24} max error {:<9.1e} {}",
                case.case,
                case.max_error,
                ok(case.ok)
            );
        }
        text.push('\n');
    }
    for note in &report.notes {
        let _ = writeln!(text, "{note}");
    }
    let width = report.rules.iter().map(|r| r.rule.len()).max().unwrap_or(0);
    let _ = writeln!(
        text,
        "\n{:<width$} {:>8} {:>8} {:>13} {:>10} {:>10} {:>9} {:>10}  check",
        "rule", "slots", "dropped", "experts/block", "step ms", "tokens/s", "GFLOP/s", "max error"
    );
    for r in &report.rules {
        let _ = writeln!(
            text,
            "{:<width$} {:>8} {:>8} {:>13.1} {:>10.2} {:>10.0} {:>9.2} {:>10.1e}  {}",
            r.rule,
            r.slots,
            r.dropped,
            r.unique_experts_per_block,
            r.wall_ms,
            f64::from(r.tokens) / (r.wall_ms / 1e3),
            r.gflops,
            r.max_error,
            ok(r.ok)
        );
    }
    // Kernels down, rules across.
    let mut names: Vec<&str> = vec![];
    for kernel in report.rules.iter().flat_map(|r| &r.kernels) {
        if !names.contains(&kernel.name.as_str()) {
            names.push(&kernel.name);
        }
    }
    let first = names.iter().map(|n| n.len()).max().unwrap_or(0).max("kernel, ms".len());
    let _ = write!(text, "\n{:<first$}", "kernel, ms");
    for r in &report.rules {
        let _ = write!(text, "  {:>12}", r.rule);
    }
    text.push('\n');
    for name in names {
        let _ = write!(text, "{name:<first$}");
        for r in &report.rules {
            let width = r.rule.len().max(12);
            match r.kernels.iter().find(|k| k.name == name) {
                Some(kernel) => write!(text, "  {:>width$.3}", kernel.ms),
                None => write!(text, "  {:>width$}", "-"),
            }
            .unwrap_or_default();
        }
        text.push('\n');
    }
    text
}

/// The layer that the options name.
fn subject(options: &Options) -> Result<Subject, String> {
    if let Some(dir) = &options.checkpoint {
        let stored = StoredLayer::open(dir, options.layer)?;
        let settings = *stored.config();
        let name = format!("{}, layer {}", dir.display(), stored.number());
        return Ok(Subject { name, settings, of: settings.experts, stored: Some(stored) });
    }
    let model = models::find(&options.model).ok_or("no such model")?; // clap has checked it
    let of = model.settings.experts;
    if options.experts > of {
        return Err(format!("--experts {}: {} has {of}", options.experts, model.name));
    }
    let settings = model.with_experts(options.experts);
    Ok(Subject { name: model.name.into(), settings, of, stored: None })
}

fn run(options: &Options, progress: &Progress) -> Result<Report, String> {
    let subject = subject(options)?;
    let settings = &subject.settings;
    for rule in rules(settings.routing, settings.experts) {
        rule.routing
            .check(settings.experts)
            .map_err(|e| format!("{} experts: {}: {e}", settings.experts, rule.name))?;
    }
    progress.say("opening the device");
    match pollster::block_on(Gpu::open(options.adapter.as_deref())) {
        Ok(gpu) => on_gpu(options, &subject, &gpu, progress),
        Err(e) if options.adapter.is_some() => Err(format!("--adapter: {e}")),
        Err(e) => {
            progress.note(&format!("{e}\nthe CPU twins run alone, on less work"));
            on_cpu(options, &subject, progress)
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
