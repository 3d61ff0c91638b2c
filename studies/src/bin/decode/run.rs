//! The steps of a block, under all methods in turn.
use crate::Options;
use crate::methods::Method;
use std::time::Instant;
use testkit::layer::selection;
use testkit::program::Progress;
use testkit::works::Work;
use wgmoe::layer::{
    Batch, Blocks, BoundLayer, HostBatch, HostBlocks, LayerConfig, MoeLayer, cpu_routing,
};
use wgmoe::plan::Stats;
use wgmoe::{Gpu, Result, wgpu};

/// Runs of a step, of which the least counts.
const RUNS: usize = 3;

/// What the steps of one method add up to.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    pub(super) rows: f64,
    pub(super) slots: f64,
    pub(super) experts: f64,
    pub(super) asked: f64,
    pub(super) covered: f64,
    pub(super) ms: f64,
    pub(super) ok: bool,
}

impl Default for Sums {
    fn default() -> Self {
        Self { rows: 0.0, slots: 0.0, experts: 0.0, asked: 0.0, covered: 0.0, ms: 0.0, ok: true }
    }
}

/// What the steps are made of.
pub(super) struct Steps<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) work: &'a Work,
    pub(super) options: &'a Options,
}

/// What the engine writes between steps.
struct Inputs {
    hidden: wgpu::Buffer,
    /// Bits of the tokens that are not decided.
    active: wgpu::Buffer,
    /// Experts of each token.
    tops: wgpu::Buffer,
    refresh: wgpu::Buffer,
    offsets: wgpu::Buffer,
}

/// A method, bound.
struct Run {
    method: Method,
    config: LayerConfig,
    bound: BoundLayer,
    /// The same, without the count of what is covered.
    timed: BoundLayer,
    coresets: wgpu::Buffer,
    coverage: wgpu::Buffer,
    sums: Sums,
}

/// One step on the host.
struct Step {
    active: Vec<u32>,
    tops: Vec<u32>,
    refresh: Vec<u32>,
}

impl Steps<'_> {
    /// Runs every step under every method.
    pub(super) fn run(
        &self,
        layer: &MoeLayer,
        methods: &[Method],
        progress: &Progress,
    ) -> Result<Vec<Sums>> {
        let Options { blocks, steps, stays, .. } = *self.options;
        let tokens = 32 * blocks;
        let ends: Vec<u32> = (0..=blocks).map(|b| 32 * b).collect();
        let words = |n: u32| self.gpu.upload(&vec![0u32; n as usize]);
        let inputs = Inputs {
            hidden: self.gpu.upload(&self.work.x),
            active: words(blocks),
            tops: words(tokens),
            refresh: words(blocks),
            offsets: self.gpu.upload(&ends),
        };
        let mut runs = vec![];
        for &method in methods {
            runs.push(self.bind(&layer.with_routing(method.routing)?, method, &inputs)?);
        }
        let mut x = self.work.x.clone();
        for step in 0..steps {
            progress.say(format!("step {} of {steps}", step + 1));
            if step > 0 {
                let width = self.work.config.hidden as usize;
                let fresh = self.work.with_input(tokens, step).x;
                for (i, (x, fresh)) in x.iter_mut().zip(fresh).enumerate() {
                    // The first value carries the scores' mean.
                    if i % width > 0 {
                        *x = stays.sqrt() * *x + (1.0 - stays).sqrt() * fresh;
                    }
                }
            }
            self.gpu.queue.write_buffer(&inputs.hidden, 0, bytemuck::cast_slice(&x));
            // All once to warm up and to be compared, then in turns.
            for run in &mut runs {
                self.compare(run, &inputs, step)?;
            }
            let mut least = vec![f64::MAX; runs.len()];
            for _ in 0..RUNS {
                for (run, least) in runs.iter().zip(&mut least) {
                    self.write(&run.method, &inputs, step);
                    let start = Instant::now();
                    self.gpu.run_layer(&run.timed)?;
                    *least = least.min(start.elapsed().as_secs_f64() * 1e3);
                }
            }
            for (run, least) in runs.iter_mut().zip(least) {
                run.sums.ms += least;
            }
        }
        Ok(runs.into_iter().map(|run| run.sums).collect())
    }

    fn bind(&self, layer: &MoeLayer, method: Method, inputs: &Inputs) -> Result<Run> {
        let (gpu, blocks) = (self.gpu, self.options.blocks);
        let config = *layer.config();
        let words = blocks * config.experts.div_ceil(32);
        let [coresets, coverage] = [words, 2 * blocks].map(|n| gpu.upload(&vec![0u32; n as usize]));
        let out = gpu.upload(&vec![0f32; self.work.x.len()]);
        let mut batch = Batch::new(&inputs.hidden, 32 * blocks).into_out(&out);
        if method.leaves_decided_out {
            batch = batch.with_active(&inputs.active);
        }
        if method.decided_take.is_some() {
            batch = batch.with_experts_per_token(&inputs.tops);
        }
        let mut counted = None;
        if method.elects() {
            let mut of = Blocks::new(blocks, &inputs.offsets);
            if method.keeps {
                of = of.with_kept(&coresets, &inputs.refresh);
                counted = Some(batch.with_blocks(of.with_coverage(&coverage)));
            }
            batch = batch.with_blocks(of);
        }
        let (bound, timed) = (layer.bind(&counted.unwrap_or(batch))?, layer.bind(&batch)?);
        Ok(Run { method, config, bound, timed, coresets, coverage, sums: Sums::default() })
    }

    /// What a step is under a method. The tokens of a block are decided in an order that jumps about, as many at each
    /// step.
    fn step(&self, method: &Method, step: u32) -> Step {
        let Options { blocks, steps, keep, .. } = *self.options;
        let decided = |t: u32| (t * 13 + 7) % 32 * steps / 32 < step;
        let bits = (0..32).filter(|&t| !decided(t)).fold(0u32, |bits, t| bits | 1 << t);
        let most = method.routing.experts_per_token();
        let few = method.decided_take.unwrap_or(most);
        let tops = (0..32 * blocks).map(|t| if decided(t % 32) { few } else { most }).collect();
        let active = if method.leaves_decided_out { bits } else { u32::MAX };
        Step {
            active: vec![active; blocks as usize],
            tops,
            refresh: vec![u32::from(step.is_multiple_of(keep)); blocks as usize],
        }
    }

    fn write(&self, method: &Method, inputs: &Inputs, step: u32) {
        let Step { active, tops, refresh } = self.step(method, step);
        for (buffer, words) in
            [(&inputs.active, &active), (&inputs.tops, &tops), (&inputs.refresh, &refresh)]
        {
            self.gpu.queue.write_buffer(buffer, 0, bytemuck::cast_slice(words));
        }
    }

    /// Runs a step once, and compares the choice with what the twin makes of the device's own scores.
    fn compare(&self, run: &mut Run, inputs: &Inputs, step: u32) -> Result<()> {
        let gpu = self.gpu;
        let Step { active, tops, refresh } = self.step(&run.method, step);
        let kept: Vec<u32> = gpu.download(&run.coresets)?;
        self.write(&run.method, inputs, step);
        gpu.run_layer(&run.bound)?;
        let words = |slice| gpu.download::<u32>(slice);
        let (Some(of), Some(assigned)) = (selection(&run.bound), run.bound.assigned()) else {
            return Ok(());
        };
        let [logits, s, r] = of.map(|slice| gpu.download::<f32>(slice));
        let (logits, s, r) = (logits?, s?, r?);
        let offsets: Vec<u32> = gpu.download(&inputs.offsets)?;
        let method = &run.method;
        let blocks = HostBlocks {
            kept: method.keeps.then_some([&kept[..], &refresh]),
            ..HostBlocks::new(&offsets)
        };
        let batch = HostBatch {
            blocks: method.elects().then_some(blocks),
            active: Some(&active),
            experts_per_token: Some(&tops),
            ..HostBatch::default()
        };
        let router = self.work.host_router();
        let want = cpu_routing(&run.config, &router, batch, [&logits, &s, &r]);
        run.sums.ok &= words(assigned)? == want.assigned;
        let stats = Stats::from_words(&words(run.bound.stats())?)?;
        run.sums.rows += f64::from(active.iter().map(|word| word.count_ones()).sum::<u32>());
        run.sums.slots += f64::from(stats.slots);
        run.sums.experts += f64::from(stats.unique_experts);
        if method.keeps {
            for pair in gpu.download::<u32>(&run.coverage)?.chunks_exact(2) {
                run.sums.asked += f64::from(pair[0]);
                run.sums.covered += f64::from(pair[1]);
            }
        }
        Ok(())
    }
}
