//! One block through a whole layer, timed.
use crate::count::checks;
use crate::rules::{BLOCK, Rule};
use crate::{Options, Row, Times};
use rand::{SeedableRng, rngs::StdRng};
use std::time::{Duration, Instant};
use testkit::compare::{Checks, largest};
use testkit::layer::{host_router, outputs, router, upload};
use testkit::program::Progress;
use testkit::statistics::median;
use testkit::synthetic::{self, Pool};
use wgmoe::layer::{
    Batch, Blocks, BoundLayer, HostBatch, HostBlocks, LayerConfig, MoeLayer, cpu_routing,
};
use wgmoe::ops::expert_union::{self};
use wgmoe::{Context, Dispatch, Error, Gpu, WeightType};

/// A layer of the model's shape with synthetic weights, and hidden states of one block, whose
/// logits are spread as those above: the router's weights are normal with deviation 2 / sqrt(D),
/// and read the -3 from the first hidden value, 1.
///
/// Each expert's matrix is a window of one pool of random numbers, at a place of its own, so that
/// the layer takes little memory on the host. Deviations of 1 / sqrt(D) and 1 / sqrt(F) keep
/// activations near 1.
pub(super) struct Data {
    pub(super) config: LayerConfig,
    pub(super) x: Vec<f32>,
    pub(super) router: Vec<f32>,
    pub(super) voters: Vec<u32>,
    pub(super) experts: Pool,
}

impl Data {
    pub(super) fn new(config: LayerConfig, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let x = synthetic::hidden_states(&mut rng, BLOCK, BLOCK, config.hidden);
        let router = synthetic::router(&mut rng, &config);
        let voters = (0..BLOCK).map(|t| t % 2).collect();
        let experts = Pool::new(&mut rng, &config, WeightType::Bf16);
        Self { config, x, router, voters, experts }
    }

    pub(super) fn upload(&self, gpu: &Gpu, ctx: &Context) -> Result<MoeLayer, Error> {
        let shape = self.config.expert_shape(WeightType::Bf16);
        let weights = upload(gpu, ctx, shape, &|e, p| self.experts.matrix(e, p))?;
        MoeLayer::new(ctx, self.config, router(ctx, &self.router, None)?, weights)
    }
}

/// Milliseconds of recording, submitting and awaiting this work.
pub(super) fn wall<'a>(
    gpu: &Gpu,
    dispatches: impl IntoIterator<Item = &'a Dispatch>,
) -> Result<f64, Error> {
    let start = Instant::now();
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    {
        let mut pass = encoder.begin_compute_pass(&Default::default());
        for dispatch in dispatches {
            dispatch.record(&mut pass);
        }
    }
    gpu.queue.submit([encoder.finish()]);
    gpu.wait()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// How far an output may be off, as a share of its token's largest value.
pub(super) const OUTPUT: f32 = 1e-4;

/// One block through the layer under a rule, checked: the choice exactly, the output of two tokens
/// within [`OUTPUT`]. Returns what to time, and how many experts the block used.
pub(super) fn check_layer(
    gpu: &Gpu,
    layer: &MoeLayer,
    data: &Data,
    rule: &Rule,
    checks: &mut Checks<'_>,
) -> Result<(BoundLayer, u32), Error> {
    let [hidden, out] = [gpu.upload(&data.x), gpu.upload(&vec![f32::NAN; data.x.len()])];
    let offsets = [0, BLOCK];
    let [ends, voters] = [gpu.upload(&offsets), gpu.upload(&data.voters)];
    let mut batch = Batch::new(&hidden, BLOCK).into_out(&out);
    let marked = rule.marked.then(|| (&voters).into());
    batch.blocks = rule.elects().then(|| {
        let mut blocks = Blocks::new(1, &ends);
        blocks.voters = marked;
        blocks
    });
    let step = layer.bind(&batch)?;
    wall(gpu, step.dispatches())?;
    let got: Vec<f32> = gpu.download(&out)?;

    let config = layer.config();
    let (tokens, e, d) = (BLOCK as usize, config.experts as usize, config.hidden as usize);
    let none = || Error::Device("an empty step".into());
    let [logits, s, r] = testkit::layer::selection(&step).ok_or_else(none)?;
    let [logits, s, r]: [Vec<f32>; 3] = [gpu.download(logits)?, gpu.download(s)?, gpu.download(r)?];
    let router = host_router(&data.router, None);
    let voters = rule.marked.then_some(&data.voters[..]);
    let batch = HostBatch {
        blocks: Some(HostBlocks { kept: None, offsets: &offsets, voters }),
        ..HostBatch::default()
    };
    let want = cpu_routing(config, &router, batch, [&logits, &s, &r]);
    if let (Some(want), Some(got)) = (&want.coreset, step.coreset()) {
        checks.same("the layer's coreset", &gpu.download::<u32>(got)?, want);
    }
    let assigned: Vec<u32> = gpu.download(step.assigned().ok_or_else(none)?)?;
    checks.same("the layer's choice", &assigned, &want.assigned);
    let sample = [0, tokens - 1];
    let choice = (&want.assigned[..], &want.gates[..]);
    let want = outputs(config, &|e, p| data.experts.matrix(e, p), &data.x, choice, &sample);
    for (t, want) in sample.into_iter().zip(want) {
        let what = format!("the layer's output of token {t}");
        checks.close(&what, &got[t * d..][..d], &want, OUTPUT * largest(&want), OUTPUT);
    }
    checks.finite("the layer's output", &got);

    let used = expert_union::cpu(&assigned, tokens, e, &offsets, 0).1[0];
    Ok((step, used))
}

/// Times of one rule: of the layer, of its routing from the logits to the plan, both apart, and of
/// its experts.
#[derive(Default)]
pub(super) struct Laps {
    pub(super) layer: Vec<f64>,
    pub(super) routing: Vec<f64>,
    pub(super) ffn: Vec<f64>,
}

impl Laps {
    pub(super) fn lap(&mut self, gpu: &Gpu, step: &BoundLayer) -> Result<(), Error> {
        let all: Vec<&Dispatch> = step.dispatches().collect();
        let is_ffn = |d: &&Dispatch| d.name().starts_with("matmul") || d.name() == "combine";
        // The first is the logits.
        let (ffn, routing): (Vec<&Dispatch>, Vec<&Dispatch>) =
            all[1..].iter().copied().partition(is_ffn);
        self.layer.push(wall(gpu, all)?);
        for _ in 0..5 {
            self.routing.push(wall(gpu, routing.iter().copied())?);
        }
        self.ffn.push(wall(gpu, ffn)?);
        Ok(())
    }
}

/// Rounds of timing go on for as long, and are at least as many.
pub(super) const TIMING: Duration = Duration::from_secs(20);

pub(super) const ROUNDS: u32 = 3;

/// Times every rule of blocks of [`BLOCK`] tokens.
pub(super) fn time_rules(
    options: &Options,
    config: &LayerConfig,
    (gpu, ctx): (&Gpu, &Context),
    rules: &[Rule],
    rows: &mut [Row],
    progress: &Progress,
) -> Result<String, Error> {
    let from = config.experts;
    let routing = |rule: &Rule| rule.routing.with_fewer_experts(from, options.experts);
    let config = {
        let mut config = config.with_routing(routing(&rules[0]));
        config.experts = options.experts;
        config
    };
    let shape = config.expert_shape(WeightType::Bf16);
    let bytes = u64::from(shape.experts) * shape.expert_bytes();
    progress.say(format!("making and packing {} MB of expert weights", bytes / 1_000_000));
    let data = Data::new(config, options.seed);
    let layer = data.upload(gpu, ctx)?;
    let mut timed = vec![];
    for (rule, row) in rules.iter().zip(rows).filter(|(rule, _)| rule.block == BLOCK) {
        progress.say(format!("{}: checking the layer", rule.name));
        let mut checks = checks(rule, progress);
        let layer = layer.with_routing(routing(rule))?;
        let (step, used) = check_layer(gpu, &layer, &data, rule, &mut checks)?;
        row.ok &= checks.ok;
        timed.push((row, step, used, Laps::default()));
    }
    // All rules in turn, so that what else the machine does falls on all alike.
    progress.say("timing the layer");
    let (start, mut rounds) = (Instant::now(), 0);
    while rounds < ROUNDS || start.elapsed() < TIMING {
        for (_, step, _, laps) in &mut timed {
            laps.lap(gpu, step)?;
        }
        rounds += 1;
    }
    for (row, _, used, laps) in timed {
        let layer = median(laps.layer);
        row.layer_ms = Some(layer);
        let (routing, ffn) = (median(laps.routing), median(laps.ffn));
        row.times = Some(Times { used, routing, ffn, layer });
    }
    let LayerConfig { hidden, intermediate, experts, shared_experts, .. } = config;
    let fewer = if experts < from { ", counts of experts in rules in proportion" } else { "" };
    Ok(format!(
        "One block of {BLOCK} tokens through a layer of D {hidden}, F {intermediate}, {experts} experts in bf16{fewer} and {shared_experts} shared, synthetic weights; medians of {rounds} wall times, submission included"
    ))
}
