//! The layers of a model under one budget, policy by policy.
use crate::{BLOCK, Options, budget_bytes, hidden_states, open, rules};
use rand::{SeedableRng, rngs::StdRng};
use serde::Serialize;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Instant;
use testkit::layer::router;
use testkit::program::Progress;
use testkit::synthetic::{self, Pool};
use wgmoe::checkpoint::{Checkpoint, CheckpointExperts};
use wgmoe::layer::cached::{
    BoundCached, CacheOptions, CachePolicy, CachedModel, ExpertSource, HostExperts, ModelLayer,
};
use wgmoe::layer::{Batch, Router};
use wgmoe::{Context, Error, Gpu, LayerConfig, models, wgpu};

/// What `--json` prints.
#[derive(Serialize)]
pub(crate) struct Report {
    adapter: String,
    driver: String,
    layers: u32,
    weights: &'static str,
    experts: u32,
    rule: &'static str,
    /// Where the experts' weights come from.
    source: String,
    blocks: u32,
    steps: u32,
    agreement: f32,
    /// Of all experts of all layers on the device.
    all_bytes: u64,
    budget_bytes: u64,
    /// Routed experts that fit, of all layers.
    places: u64,
    pub(crate) rows: Vec<Row>,
}

/// A policy; means of a step of the whole model.
#[derive(Serialize)]
pub(crate) struct Row {
    policy: String,
    host: String,
    experts_per_step: f64,
    hit_rate: f64,
    on_host_per_step: f64,
    bytes_per_step: f64,
    ms_per_step: f64,
    peak_bytes: u64,
    /// Largest difference from the outputs under the first policy, as a share of the largest output; 0: the
    /// same bits.
    difference: f64,
    /// Whether that is 0, or with experts on the host at most 10^-4, and the peak is within the budget.
    pub(crate) ok: bool,
}

/// What every policy runs on.
struct Model<'a> {
    gpu: &'a Gpu,
    ctx: &'a Context,
    config: LayerConfig,
    routers: Vec<Router>,
    sources: Vec<Arc<dyn ExpertSource>>,
    /// Experts of each layer that never leave.
    pinned: Vec<Vec<u32>>,
    hidden: wgpu::Buffer,
    out: wgpu::Buffer,
}

/// How experts are kept.
struct Case {
    policy: CachePolicy,
    host: HostExperts,
    /// Share of each layer's places that is pinned: the experts that a first block used most.
    pinned: f64,
    name: String,
}

impl Model<'_> {
    fn layers(&self) -> Vec<ModelLayer> {
        let layer = |((router, source), pinned): ((&Router, &Arc<dyn ExpertSource>), &Vec<u32>)| {
            ModelLayer::new(self.config, router.clone(), source.clone()).with_pinned(pinned.clone())
        };
        self.routers.iter().zip(&self.sources).zip(&self.pinned).map(layer).collect()
    }

    fn bind(&self, model: &CachedModel) -> Result<Vec<BoundCached>, Error> {
        let batch = Batch::new(&self.hidden, BLOCK).into_out(&self.out);
        model.layers().iter().map(|layer| layer.bind(&batch)).collect()
    }

    /// Runs every step of every block; outputs of the last step of each block are compared with `want`.
    fn run(
        &self,
        case: &Case,
        budget: u64,
        blocks: &[Vec<Vec<f32>>],
        want: &mut Vec<Vec<f32>>,
        progress: &Progress,
    ) -> Result<Row, Error> {
        let Self { gpu, ctx, .. } = self;
        let options =
            CacheOptions { policy: case.policy, host: case.host, ..CacheOptions::new(budget) };
        let mut model = CachedModel::new(ctx, &gpu.queue, self.layers(), options)?;
        let mut steps = self.bind(&model)?;
        let (mut experts, mut seconds, mut got) = (0, 0.0, vec![]);
        for (b, block) in blocks.iter().enumerate() {
            for (i, x) in block.iter().enumerate() {
                progress.say(format!("{}: block {b}, step {i}", case.name));
                gpu.queue.write_buffer(&self.hidden, 0, bytemuck::cast_slice(x));
                for (l, step) in steps.iter_mut().enumerate() {
                    let start = Instant::now();
                    model.layer_mut(l).run(&gpu.queue, step)?;
                    gpu.wait()?;
                    seconds += start.elapsed().as_secs_f64();
                    experts += step.union().len();
                    if i + 1 == block.len() {
                        got.push(gpu.download::<f32>(&self.out)?);
                    }
                }
            }
        }
        let stats = model.stats();
        let all = (blocks.len() * blocks[0].len()) as f64;
        let mut difference = 0f64;
        if want.is_empty() {
            want.clone_from(&got);
        }
        for (want, got) in want.iter().zip(&got) {
            let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
            let off = want.iter().zip(got).fold(0f32, |m, (w, g)| m.max((w - g).abs()));
            difference = difference.max(f64::from(off / largest));
        }
        let most = if case.host == HostExperts::Never { 0.0 } else { 1e-4 };
        Ok(Row {
            policy: case.name.clone(),
            host: format!("{:?}", case.host).to_lowercase(),
            experts_per_step: experts as f64 / all,
            hit_rate: stats.hit_rate(),
            on_host_per_step: stats.on_host as f64 / all,
            bytes_per_step: stats.bytes() as f64 / all,
            ms_per_step: seconds * 1e3 / all,
            peak_bytes: stats.peak_bytes,
            difference,
            ok: difference <= most && stats.peak_bytes <= budget,
        })
    }
}

/// The experts of each layer that a block uses most, as many as `share` of a layer's places.
fn most_used(
    model: &Model<'_>,
    budget: u64,
    share: f64,
    block: &[Vec<f32>],
) -> Result<Vec<Vec<u32>>, Error> {
    let Model { gpu, ctx, hidden, .. } = model;
    let mut cached = CachedModel::new(ctx, &gpu.queue, model.layers(), CacheOptions::new(budget))?;
    let mut steps = model.bind(&cached)?;
    let experts = model.config.experts as usize;
    let mut uses = vec![vec![0u32; experts]; steps.len()];
    for x in block {
        gpu.queue.write_buffer(hidden, 0, bytemuck::cast_slice(x));
        for (l, step) in steps.iter_mut().enumerate() {
            cached.layer_mut(l).run(&gpu.queue, step)?;
            step.union().iter().for_each(|&e| uses[l][e as usize] += 1);
        }
    }
    let most = |(uses, layer): (Vec<u32>, &wgmoe::layer::cached::CachedLayer)| {
        let mut order: Vec<u32> = (0..experts as u32).collect();
        order.sort_by_key(|&e| std::cmp::Reverse(uses[e as usize]));
        order.truncate((share * layer.cache().capacity() as f64) as usize);
        order
    };
    Ok(uses.into_iter().zip(cached.layers()).map(most).collect())
}

/// Where the experts of each layer come from.
fn sources(
    options: &Options,
    config: &LayerConfig,
    rng: &mut StdRng,
) -> Result<(Vec<Arc<dyn ExpertSource>>, String), String> {
    let Some(path) = &options.checkpoint else {
        let pool = Arc::new(Pool::new(rng, config, options.weights));
        let all = (0..options.layers).map(|_| pool.clone() as Arc<dyn ExpertSource>);
        return Ok((all.collect(), "one pool in memory for all layers".into()));
    };
    let say = |e: Error| format!("--checkpoint: {e}");
    let checkpoint = Arc::new(Checkpoint::open(path).map_err(say)?);
    let own = checkpoint.layer_config();
    let shape = |c: &LayerConfig| [c.hidden, c.intermediate, c.experts, c.shared_experts];
    if shape(own) != shape(config) {
        return Err(format!("--checkpoint: layers of {:?}, not {:?}", shape(own), shape(config)));
    }
    let layers = (0..checkpoint.config().layers).filter(|&l| !checkpoint.config().is_dense(l));
    let of =
        |layer| Arc::new(CheckpointExperts { checkpoint: checkpoint.clone(), layer }) as Arc<_>;
    let sources: Vec<Arc<dyn ExpertSource>> =
        layers.take(options.layers as usize).map(of).collect();
    if sources.len() < options.layers as usize {
        let all = sources.len();
        return Err(format!("--checkpoint: {all} layers of experts, --layers {}", options.layers));
    }
    Ok((sources, "mapped files".into()))
}

pub(crate) fn run(options: &Options, progress: &Progress) -> Result<Report, String> {
    let say = |e: Error| e.to_string();
    let known = rules(options.experts)?;
    let rule = known.iter().find(|(name, _)| name.contains(&options.rule));
    let (rule, routing) = *rule.ok_or_else(|| {
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        format!("--rule {}: none of {}", options.rule, names.join("; "))
    })?;
    let mini = models::find("llada2-mini").ok_or("no llada2-mini")?.config;
    let mut config = mini.with_routing(routing);
    config.experts = options.experts;
    let gpu = open(options, progress)?;
    let ctx = Context::new(&gpu.device).map_err(say)?;
    let mut rng = StdRng::seed_from_u64(options.seed);
    let routers =
        (0..options.layers).map(|_| router(&ctx, &synthetic::router(&mut rng, &config), None));
    let routers = routers.collect::<Result<_, Error>>().map_err(say)?;
    let (sources, source) = sources(options, &config, &mut rng)?;
    let blocks = hidden_states(options, config.hidden, &mut rng);
    let values = vec![0f32; (BLOCK * config.hidden) as usize];
    let [hidden, out] = [0; 2].map(|_| gpu.upload(&values));
    let nothing = vec![vec![]; options.layers as usize];
    let mut model = Model {
        gpu: &gpu,
        ctx: &ctx,
        config,
        routers,
        sources,
        pinned: nothing.clone(),
        hidden,
        out,
    };

    let types = model.sources[0].types().map_err(say)?;
    let shape = config.expert_shape(types[0]).with_last_types(config.shared_experts, types[1]);
    let all_bytes = u64::from(options.layers) * u64::from(shape.experts) * shape.device_bytes();
    let budget = budget_bytes(options, all_bytes);
    let probe = CachedModel::new(&ctx, &gpu.queue, model.layers(), CacheOptions::new(budget));
    let places = probe.map_err(say)?.layers().iter().map(|l| l.cache().capacity() as u64).sum();

    let interval = CachePolicy::Interval { steps: options.interval, passing: 2 };
    let lru = CachePolicy::LeastRecentlyUsed;
    let mut cases = vec![];
    for (name, policy, pinned) in [
        ("least recently used".to_string(), lru, 0.0),
        (format!("interval of {} (TIDE)", options.interval), interval, 0.0),
        ("half of it pinned".to_string(), lru, 0.5),
    ] {
        for host in [HostExperts::Never, HostExperts::Measured, HostExperts::Always] {
            cases.push(Case { policy, host, pinned, name: name.clone() });
        }
    }
    let (mut rows, mut want) = (vec![], vec![]);
    for case in &cases {
        model.pinned = nothing.clone();
        if case.pinned > 0.0 {
            model.pinned = most_used(&model, budget, case.pinned, &blocks[0]).map_err(say)?;
        }
        rows.push(model.run(case, budget, &blocks, &mut want, progress).map_err(say)?);
    }
    Ok(Report {
        adapter: gpu.info.name.clone(),
        driver: format!("{} {}", gpu.info.driver, gpu.info.driver_info),
        layers: options.layers,
        weights: types[0].gate_up.name(),
        experts: options.experts,
        rule,
        source,
        blocks: options.blocks,
        steps: options.steps,
        agreement: options.agreement,
        all_bytes,
        budget_bytes: budget,
        places,
        rows,
    })
}

/// The report as text.
pub(crate) fn table(report: &Report) -> String {
    let mb = |bytes: f64| bytes / 1e6;
    let mut text = format!(
        "{} layers of LLaDA2.0-mini's shape, {} experts each in {} ({}), {}\n\
         {} blocks of {BLOCK} tokens, {} steps each; {} of a token's own part of its router scores from step to step\n\
         all experts: {:.0} MB; budget {:.0} MB, which holds {} experts\n\
         adapter: {}, {}\n\n",
        report.layers,
        report.experts,
        report.weights,
        report.source,
        report.rule,
        report.blocks,
        report.steps,
        report.agreement,
        mb(report.all_bytes as f64),
        mb(report.budget_bytes as f64),
        report.places,
        report.adapter,
        report.driver,
    );
    let _ = writeln!(
        text,
        "{:<24} {:<9} {:>12} {:>6} {:>12} {:>9} {:>9} {:>9}  outputs",
        "policy",
        "on host",
        "experts/step",
        "hits",
        "on host/step",
        "MB/step",
        "ms/step",
        "peak MB"
    );
    for r in &report.rows {
        let outputs = match (r.ok, r.difference) {
            (true, 0.0) => "same bits".into(),
            (true, off) => format!("within {off:.0e}"),
            (false, off) => format!("WRONG: off by {off:.0e}"),
        };
        let _ = writeln!(
            text,
            "{:<24} {:<9} {:>12.1} {:>4.0} % {:>12.1} {:>9.1} {:>9.1} {:>9.1}  {outputs}",
            r.policy,
            r.host,
            r.experts_per_step,
            100.0 * r.hit_rate,
            r.on_host_per_step,
            mb(r.bytes_per_step),
            r.ms_per_step,
            mb(r.peak_bytes as f64),
        );
    }
    text += "\nA step is one of the whole model: sums over its layers. outputs: those of each block's last step, against the first policy's.\n";
    text
}
