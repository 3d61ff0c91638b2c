//! All rules on a GPU.
use crate::report::{Done, stats_of, sum_up, twin};
use crate::run::{Rule, Run};
use crate::{Options, RuleReport, Weights};
use std::time::Instant;
use testkit::compare::{Checks, largest};
use testkit::layer::{outputs, router, upload};
use testkit::program::Progress;
use testkit::statistics::{median, spread};
use wgmoe::layer::{Batch, BoundLayer, MoeLayer, Scratch, Sequences};
use wgmoe::ops::capacity::{self, Capacity, HostSource, Source};
use wgmoe::ops::{expert_choice, logits};
use wgmoe::plan::Stats;
use wgmoe::plan::bits;
use wgmoe::routing::Routing;
use wgmoe::routing::schedule::slot_bound;
use wgmoe::{BoundOp, Context, Error, Gpu, Slice, WeightType, wgpu};

/// A run on the device.
pub(super) struct OnGpu<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) ctx: &'a Context,
    pub(super) layer: MoeLayer,
    pub(super) weights: &'a Weights,
    pub(super) run: &'a Run,
    pub(super) progress: &'a Progress,
    /// Scratch of all rules, which run one after the other.
    pub(super) scratch: Scratch,
    pub(super) offsets: wgpu::Buffer,
    /// What the model around the layer writes before each step, and what it reads.
    pub(super) hidden: wgpu::Buffer,
    pub(super) masked: wgpu::Buffer,
    pub(super) out: wgpu::Buffer,
    pub(super) capacity: wgpu::Buffer,
    pub(super) k: wgpu::Buffer,
}

/// A rule, bound once for all steps.
pub(super) struct Bound<'a> {
    pub(super) rule: &'a Rule,
    /// Capacities of the step, under expert choice.
    pub(super) capacities: BoundOp,
    pub(super) step: BoundLayer,
    pub(super) log: Vec<Log>,
    pub(super) times: Vec<Vec<f64>>,
}

/// What the checks look at, of one step: logits, s, r, gates, the choice, statistics, capacities,
/// k, and the output.
pub(super) type Log = [wgpu::Buffer; 9];

impl OnGpu<'_> {
    pub(super) fn bind<'r>(&self, rule: &'r Rule) -> Result<Bound<'r>, Error> {
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

    pub(super) fn watched<'s>(&'s self, step: &'s BoundLayer) -> Result<[Slice<'s>; 9], Error> {
        let none = || Error::Device("an empty step".into());
        let [logits, s, r] = testkit::layer::selection(step).ok_or_else(none)?;
        let gates = step.gates().ok_or_else(none)?;
        let assigned = step.assigned().ok_or_else(none)?;
        let [capacity, k, out] = [&self.capacity, &self.k, &self.out].map(Slice::from);
        Ok([logits, s, r, gates, assigned, step.stats(), capacity, k, out])
    }

    /// The whole run under a rule: one recording a step, nothing read back.
    pub(super) fn denoise(&self, bound: &mut Bound<'_>) -> Result<(), Error> {
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

    pub(super) fn report(&self, bound: Bound<'_>) -> Result<RuleReport, Error> {
        let Bound { rule, log, times, .. } = bound;
        let mut checks = Checks::new(&rule.name, self.progress);
        let mut done = vec![];
        for (i, (log, times)) in log.iter().zip(times).enumerate() {
            done.push(self.check_step(&mut checks, rule, i, log, median(times[1..].to_vec()))?);
        }
        Ok(sum_up(rule, self.run, &mut checks, &done))
    }

    /// Capacities and choice exactly, each from what the device computed before; logits of some
    /// tokens, and gates.
    pub(super) fn check_step(
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
            let want = logits::cpu(x, &weights.router, d);
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
        let want = outputs(&weights.config, &matrices, &step.hidden, choice, &sample);
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
pub(super) fn near(checks: &mut Checks<'_>, what: &str, got: &[f32], want: &[f32], tolerance: f32) {
    checks.close(what, got, want, tolerance * largest(want).max(1e-30), 0.0);
}

/// All rules on a GPU.
pub(super) fn on_gpu(
    options: &Options,
    weights: &Weights,
    run: &Run,
    rules: &[Rule],
    gpu: &Gpu,
    progress: &Progress,
) -> Result<Vec<RuleReport>, Error> {
    let ctx = Context::new(&gpu.device)?;
    let shape = weights.config.expert_shape(WeightType::Bf16);
    let experts = upload(gpu, &ctx, shape, &|e, p| weights.experts.matrix(e, p))?;
    let router = router(&ctx, &weights.router, None)?;
    progress.say("compiling the kernels");
    let layer = MoeLayer::new(&ctx, weights.config, router, experts)?;
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
    // Rules in turn, so that what else the machine does meets all alike. The first round is not
    // counted.
    for round in 0..=options.repeats {
        progress.say(format!("denoising, round {round} of {}", options.repeats));
        bound.iter_mut().try_for_each(|bound| on.denoise(bound))?;
    }
    progress.say("checking every routing");
    bound.into_iter().map(|bound| on.report(bound)).collect()
}
