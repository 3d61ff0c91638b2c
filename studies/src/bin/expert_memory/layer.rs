//! One layer, beside itself with all its experts on the device.
use crate::{BLOCK, Options, budget_bytes, hidden_states, open, rules};
use plotters::prelude as plot;
use rand::{SeedableRng, rngs::StdRng};
use serde::Serialize;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Instant;
use testkit::layer::{router, upload};
use testkit::program::Progress;
use testkit::synthetic::{self, Pool, RHO};
use wgmoe::layer::cached::{BoundCached, CacheOptions, CachedLayer};
use wgmoe::layer::{Batch, BoundLayer, MoeLayer, Router};
use wgmoe::routing::Routing;
use wgmoe::{Context, Error, Gpu, LayerConfig, WeightType, models, wgpu};

/// What `--json` prints.
#[derive(Serialize)]
pub(crate) struct Report {
    adapter: String,
    driver: String,
    backend: String,
    /// Storage type of the experts.
    weights: &'static str,
    experts: u32,
    blocks: u32,
    steps: u32,
    agreement: f32,
    /// Of one expert on the device.
    expert_bytes: u64,
    /// Of all experts on the device.
    resident_bytes: u64,
    budget_bytes: u64,
    /// That the cache takes of the budget.
    cache_bytes: u64,
    pub(crate) rules: Vec<Row>,
}

#[derive(Serialize)]
pub(crate) struct Row {
    rule: &'static str,
    /// Routed experts that a step's tokens use; means over the steps.
    experts_per_step: f64,
    /// Routed experts that some step of a block uses; mean over the blocks.
    experts_per_block: f64,
    /// Share of a step's experts that the step before used, first steps of blocks left out.
    shared_with_step_before: f64,
    peak_device_bytes: u64,
    bytes_per_step: f64,
    hit_rate: f64,
    prefetched: u64,
    rounds_per_step: f64,
    ms_per_step: f64,
    resident_ms_per_step: f64,
    /// Bytes moved in each step of a block; means over the blocks.
    bytes_of_step: Vec<f64>,
    pub(crate) ok: bool,
}

/// Both layers, and the buffers they share.
struct Bench<'a> {
    gpu: &'a Gpu,
    ctx: &'a Context,
    config: LayerConfig,
    router: Router,
    source: Arc<Pool>,
    resident: MoeLayer,
    hidden: wgpu::Buffer,
    /// Of the layer with all experts, and of the one with some.
    outs: [wgpu::Buffer; 2],
}

impl<'a> Bench<'a> {
    fn new(
        gpu: &'a Gpu,
        ctx: &'a Context,
        config: LayerConfig,
        weight_type: WeightType,
        rng: &mut StdRng,
    ) -> Result<Self, Error> {
        let router = router(ctx, &synthetic::router(rng, &config), None)?;
        let source = Arc::new(Pool::new(rng, &config, weight_type));
        let shape = config.expert_shape(weight_type);
        let weights = upload(gpu, ctx, shape, &|e, p| source.matrix(e, p))?;
        let resident = MoeLayer::new(ctx, config, router.clone(), weights)?;
        let values = vec![f32::NAN; (BLOCK * config.hidden) as usize];
        let [hidden, all, some] = [0; 3].map(|_| gpu.upload(&values));
        Ok(Self { gpu, ctx, config, router, source, resident, hidden, outs: [all, some] })
    }

    fn batch(&self, out: usize) -> Batch<'_> {
        Batch::new(&self.hidden, BLOCK).into_out(&self.outs[out])
    }

    /// Runs every step of every block under a rule, on both layers.
    fn run(
        &self,
        (name, routing): (&'static str, Routing),
        options: CacheOptions,
        blocks: &[Vec<Vec<f32>>],
        progress: &Progress,
    ) -> Result<(Row, u64), Error> {
        let Self { gpu, ctx, .. } = self;
        let resident = self.resident.with_routing(routing)?.bind(&self.batch(0))?;
        let config = self.config.with_routing(routing);
        let (router, source) = (self.router.clone(), self.source.clone());
        let mut layer = CachedLayer::new(ctx, &gpu.queue, config, router, source, options)?;
        let mut step = layer.bind(&self.batch(1))?;
        // Kernels are compiled, perhaps, at their first run.
        gpu.queue.write_buffer(&self.hidden, 0, bytemuck::cast_slice(&blocks[0][0]));
        self.time_resident(&resident)?;

        let steps = blocks[0].len();
        let mut row = Row {
            rule: name,
            experts_per_step: 0.0,
            experts_per_block: 0.0,
            shared_with_step_before: 0.0,
            peak_device_bytes: 0,
            bytes_per_step: 0.0,
            hit_rate: 0.0,
            prefetched: 0,
            rounds_per_step: 0.0,
            ms_per_step: 0.0,
            resident_ms_per_step: 0.0,
            bytes_of_step: vec![0.0; steps],
            ok: true,
        };
        let mut moved = 0;
        for (b, block) in blocks.iter().enumerate() {
            let mut touched = vec![false; self.config.experts as usize];
            let mut before: Vec<u32> = vec![];
            for (i, x) in block.iter().enumerate() {
                progress.say(format!(
                    "{name}: block {} of {}, step {} of {steps}",
                    b + 1,
                    blocks.len(),
                    i + 1
                ));
                gpu.queue.write_buffer(&self.hidden, 0, bytemuck::cast_slice(x));
                row.resident_ms_per_step += self.time_resident(&resident)?;
                row.ms_per_step += self.time_cached(&mut layer, &mut step)?;
                let [want, got] = [0, 1].map(|out| gpu.download::<u32>(&self.outs[out]));
                let (want, got) = (want?, got?);
                if let Some(at) = want.iter().zip(&got).position(|(w, g)| w != g) {
                    row.ok = false;
                    progress.note(&format!(
                        "{name}, block {b}, step {i}: output {at} differs: {} with all experts, {} with some",
                        f32::from_bits(want[at]),
                        f32::from_bits(got[at])
                    ));
                }
                let union = step.union();
                row.experts_per_step += union.len() as f64;
                union.iter().for_each(|&e| touched[e as usize] = true);
                if i > 0 {
                    let shared = union.iter().filter(|&e| before.contains(e)).count();
                    row.shared_with_step_before += shared as f64 / union.len() as f64;
                }
                before = union.to_vec();
                let bytes = layer.cache().stats().bytes();
                row.bytes_of_step[i] += (bytes - moved) as f64 / blocks.len() as f64;
                moved = bytes;
            }
            row.experts_per_block += touched.iter().filter(|t| **t).count() as f64;
        }
        let stats = layer.cache().stats();
        let all = (blocks.len() * steps) as f64;
        row.experts_per_step /= all;
        row.experts_per_block /= blocks.len() as f64;
        row.shared_with_step_before /= (all - blocks.len() as f64).max(1.0);
        row.peak_device_bytes = stats.peak_bytes;
        row.bytes_per_step = stats.bytes() as f64 / all;
        row.hit_rate = stats.hit_rate();
        row.prefetched = stats.prefetched;
        row.rounds_per_step = stats.rounds as f64 / all;
        row.ms_per_step /= all;
        row.resident_ms_per_step /= all;
        Ok((row, layer.cache().device_bytes()))
    }

    /// Milliseconds of recording, submitting and awaiting a step.
    fn time_resident(&self, step: &BoundLayer) -> Result<f64, Error> {
        let start = Instant::now();
        self.gpu.run_layer(step)?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }

    fn time_cached(&self, layer: &mut CachedLayer, step: &mut BoundCached) -> Result<f64, Error> {
        let start = Instant::now();
        layer.run(&self.gpu.queue, step)?;
        self.gpu.wait()?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }
}

pub(crate) fn run(options: &Options, progress: &Progress) -> Result<Report, String> {
    let rules = rules(options.experts)?;
    let mini = models::find("llada2-mini").ok_or("no llada2-mini")?.config;
    let config = {
        let mut config = mini.with_routing(rules[0].1);
        config.experts = options.experts;
        config
    };
    let shape = config.expert_shape(options.weights);
    let resident_bytes = u64::from(shape.experts) * shape.device_bytes();
    let budget_bytes = budget_bytes(options, resident_bytes);
    let gpu = open(options, progress)?;
    let say = |e: Error| e.to_string();
    let ctx = Context::new(&gpu.device).map_err(say)?;
    progress.say(format!("making and packing {} MB of expert weights", resident_bytes / 1_000_000));
    let mut rng = StdRng::seed_from_u64(options.seed);
    let bench = Bench::new(&gpu, &ctx, config, options.weights, &mut rng).map_err(say)?;
    let blocks = hidden_states(options, config.hidden, &mut rng);
    let mut rows = vec![];
    let mut cache_bytes = 0;
    for rule in rules {
        let (row, bytes) = bench
            .run(rule, CacheOptions::new(budget_bytes), &blocks, progress)
            .map_err(|e| format!("{}: {e}", rule.0))?;
        rows.push(row);
        cache_bytes = bytes;
    }
    Ok(Report {
        adapter: gpu.info.name.clone(),
        driver: format!("{} {}", gpu.info.driver, gpu.info.driver_info),
        backend: gpu.info.backend.to_string(),
        weights: options.weights.name(),
        experts: options.experts,
        blocks: options.blocks,
        steps: options.steps,
        agreement: options.agreement,
        expert_bytes: shape.device_bytes(),
        resident_bytes,
        budget_bytes,
        cache_bytes,
        rules: rows,
    })
}

/// The report as text.
pub(crate) fn table(report: &Report) -> String {
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let mut text = format!(
        "{} of a layer of LLaDA2.0-mini in {}, {} experts of {:.1} MB and a shared one, synthetic weights; {} blocks of {BLOCK} tokens, {} steps each\n\
         router scores are synthetic: correlation {RHO} within a block, {} of a token's own part from step to step\n\
         all experts: {:.1} MB on the device; budget {:.1} MB ({:.1} %), of which the cache takes {:.1}\n\
         adapter: {}, {}, {}\n\n",
        "Denoising steps",
        report.weights,
        report.experts,
        mb(report.expert_bytes),
        report.blocks,
        report.steps,
        report.agreement,
        mb(report.resident_bytes),
        mb(report.budget_bytes),
        100.0 * report.budget_bytes as f64 / report.resident_bytes as f64,
        mb(report.cache_bytes),
        report.adapter,
        report.driver,
        report.backend,
    );
    let _ = writeln!(
        text,
        "{:<22} {:>12} {:>13} {:>12} {:>8} {:>8} {:>6} {:>7} {:>8} {:>8} {:>8}  bits",
        "rule",
        "experts/step",
        "experts/block",
        "step before",
        "peak MB",
        "MB/step",
        "hits",
        "rounds",
        "ms/step",
        "all: ms",
        "ratio"
    );
    for r in &report.rules {
        let _ = writeln!(
            text,
            "{:<22} {:>12.1} {:>13.1} {:>10.1} % {:>8.1} {:>8.1} {:>4.0} % {:>7.1} {:>8.1} {:>8.1} {:>8.2}  {}",
            r.rule,
            r.experts_per_step,
            r.experts_per_block,
            100.0 * r.shared_with_step_before,
            mb(r.peak_device_bytes),
            r.bytes_per_step / 1e6,
            100.0 * r.hit_rate,
            r.rounds_per_step,
            r.ms_per_step,
            r.resident_ms_per_step,
            r.ms_per_step / r.resident_ms_per_step,
            if r.ok { "same" } else { "DIFFER" }
        );
    }
    text += "\nstep before: share of a step's experts that the step before used. all: ms: a step with all experts on the device.\n\
             bits: whether the outputs of all steps equal those with all experts on the device.\n";
    text
}

/// Bytes moved over the steps of a block, a line a rule.
pub(crate) fn draw(report: &Report) -> Result<String, Box<dyn std::error::Error>> {
    use plot::{ChartBuilder, Color, IntoDrawingArea, LineSeries, PathElement, SVGBackend};
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (960, 460)).into_drawing_area();
        root.fill(&plot::WHITE)?;
        let values = report.rules.iter().flat_map(|r| &r.bytes_of_step);
        let most = values.fold(1.0, |most: f64, bytes| most.max(bytes / 1e6));
        let title = format!(
            "MB moved in each step of a block, budget {:.0} of {:.0} MB",
            report.budget_bytes as f64 / 1e6,
            report.resident_bytes as f64 / 1e6
        );
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 18))
            .margin(10)
            .margin_right(240)
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d(0.5..f64::from(report.steps) + 0.5, 0.0..1.1 * most)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .x_label_formatter(&|x| format!("{x:.0}"))
            .light_line_style(plot::WHITE)
            .draw()?;
        for (i, rule) in report.rules.iter().enumerate() {
            let place = i as f64 / report.rules.len() as f64;
            let colour = plot::HSLColor(place, 0.9, 0.4);
            let bytes = rule.bytes_of_step.iter().enumerate();
            let points = bytes.map(|(x, bytes)| (x as f64 + 1.0, bytes / 1e6));
            chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
            let y = 40 + 20 * i as i32;
            root.draw(&PathElement::new([(735, y + 5), (755, y + 5)], colour.stroke_width(2)))?;
            root.draw(&plot::Text::new(rule.rule, (760, y), ("sans-serif", 13)))?;
        }
        root.present()?;
    }
    Ok(svg)
}
