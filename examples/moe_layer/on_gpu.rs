//! All of it on a GPU.
use crate::data::{BLOCK, Data, Source, flops, mean_of_blocks};
use crate::report::{Report, RuleReport, finite, kernel_times};
use crate::{ALLOCATED, Options, Subject, describe, replay};
use std::time::Instant;
use testkit::compare::{Checks, largest};
use testkit::layer::router;
use testkit::program::Progress;
use testkit::rules::every_rule;
use testkit::statistics::{median, spread, threads};
use wgmoe::layer::{
    Batch, BoundLayer, HostBatch, HostSequences, LayerConfig, MoeLayer, Sequences, cpu_routing,
    cpu_token,
};
use wgmoe::ops::{expert_choice, expert_union, scores};
use wgmoe::plan::{Stats, bits};
use wgmoe::routing::Routing;
use wgmoe::weights::Projection;
use wgmoe::{Context, Error, Gpu, wgpu};

/// Tolerances of the checks; of the output, as a share of the token's largest value.
pub(super) const OUTPUT: f32 = 2e-5;

pub(super) const LOGITS: f32 = 1e-4;

pub(super) const SCORES: f32 = 1e-5;

/// Milliseconds of one step as users record it: encode, submit, wait.
pub(super) fn wall(gpu: &Gpu, step: &BoundLayer) -> Result<f64, Error> {
    let start = Instant::now();
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    step.encode(&mut encoder);
    gpu.queue.submit([encoder.finish()]);
    let waited = gpu.device.poll(wgpu::PollType::wait_indefinitely());
    waited.map_err(|e| Error::Device(e.to_string()))?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// One layer on the device, with what the checks need.
pub(super) struct OnGpu<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) ctx: &'a Context,
    pub(super) layer: MoeLayer,
    pub(super) data: &'a Data<'a>,
    pub(super) hidden: wgpu::Buffer,
    pub(super) sample: Vec<usize>,
    pub(super) progress: &'a Progress,
    /// Whether every rule's kernel times are from GPU timestamps.
    pub(super) timestamps: bool,
}

impl OnGpu<'_> {
    pub(super) fn run(&mut self, name: &str, routing: Routing) -> Result<RuleReport, Error> {
        let (gpu, data, progress) = (self.gpu, self.data, self.progress);
        progress.say(format!("{}: first run, which compiles the kernels", name));
        let layer = self.layer.with_routing(routing)?;
        let config = *layer.config();
        let (tokens, d) = (data.tokens(), config.hidden as usize);
        let out = gpu.upload(&vec![f32::NAN; tokens * d]);
        let mut batch = Batch::new(&self.hidden, tokens as u32).into_out(&out);
        let capacity = data.capacity(routing);
        let buffers = capacity.as_ref().map(|c| (gpu.upload(&data.offsets), gpu.upload(c)));
        batch.sequences = buffers.as_ref().map(|(offsets, capacity)| {
            Sequences::new(data.lengths.len() as u32, offsets).with_capacity(capacity)
        });
        let step = layer.bind(&batch)?;
        gpu.run_layer(&step)?;
        let got: Vec<f32> = gpu.download(&out)?;

        progress.say(format!("{}: checking {} tokens", name, self.sample.len()));
        let mut checks = Checks::new(name, progress);
        let (assigned, stats) = self.check_routing(&mut checks, &config, &step)?;
        let max_error = self.check_output(&mut checks, &config, &step, &assigned, &got)?;
        let unique_experts_per_block = self.unions(&mut checks, &config, &step, &assigned)?;

        progress.say(format!("{}: timing", name));
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
            rule: name.into(),
            tokens: tokens as u32,
            experts: config.experts,
            slots: stats.slots,
            unique_experts_per_block,
            wall_ms,
            gflops: flops(&config, tokens as u32, stats.slots) / (wall_ms * 1e6),
            max_error: finite(max_error.into()),
            ok: checks.ok,
            kernels: kernel_times(names.zip(kernels.into_iter().map(|(_, ms)| ms))),
            dropped: stats.dropped,
        })
    }

    /// The choice, exactly, from the device's own logits and scores; logits and scores of the
    /// sample.
    pub(super) fn check_routing(
        &self,
        checks: &mut Checks<'_>,
        config: &LayerConfig,
        step: &BoundLayer,
    ) -> Result<(Vec<u32>, Stats), Error> {
        let (gpu, data) = (self.gpu, self.data);
        let (tokens, e, d) = (data.tokens(), config.experts as usize, config.hidden as usize);
        let none = || Error::Device("an empty step".into());
        let [logits, s, r] = testkit::layer::selection(step).ok_or_else(none)?;
        let [logits, s, r]: [Vec<f32>; 3] =
            [gpu.download(logits)?, gpu.download(s)?, gpu.download(r)?];
        let gates: Vec<f32> = gpu.download(step.gates().ok_or_else(none)?)?;
        let assigned: Vec<u32> = gpu.download(step.assigned().ok_or_else(none)?)?;
        let stats = Stats::from_words(&gpu.download::<u32>(step.stats())?)?;

        let (score, from_logits) = (config.routing.score(), config.routing.by_logits());
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

        // Before the capacity factor; the drop is checked with the device's own gates, as it
        // chooses by them.
        let mut free = *config;
        let mut most = None;
        if let Routing::TokenChoice(rule) = &mut free.routing {
            most = rule.capacity(tokens as u32, config.experts);
            rule.capacity_factor = None;
        }
        let capacity = data.capacity(config.routing);
        let sequences = capacity.as_ref().map(|capacity| HostSequences {
            offsets: &data.offsets,
            lengths: None,
            capacity: Some(capacity),
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
    pub(super) fn check_output(
        &self,
        checks: &mut Checks<'_>,
        config: &LayerConfig,
        step: &BoundLayer,
        assigned: &[u32],
        got: &[f32],
    ) -> Result<f32, Error> {
        let d = config.hidden as usize;
        let none = || Error::Device("an empty step".into());
        let gates: Vec<f32> = self.gpu.download(step.gates().ok_or_else(none)?)?;
        let want = self.data.twin(config, assigned, &gates, &self.sample);
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

    /// Experts that a block's tokens use together, on average over full blocks, counted on the
    /// device.
    pub(super) fn unions(
        &self,
        checks: &mut Checks<'_>,
        config: &LayerConfig,
        step: &BoundLayer,
        want_assigned: &[u32],
    ) -> Result<f64, Error> {
        let gpu = self.gpu;
        let (tokens, experts) = (self.data.tokens() as u32, config.experts);
        let offsets: Vec<u32> =
            (0..tokens).step_by(BLOCK as usize).chain(std::iter::once(tokens)).collect();
        let blocks = offsets.len() - 1;
        let members = gpu.upload(&vec![0u32; blocks * experts.div_ceil(32) as usize]);
        let counts = gpu.upload(&vec![0u32; blocks]);
        let bytes = gpu.upload(&vec![0u64; blocks]);
        let starts = gpu.upload(&offsets);
        let expert_bytes = self.layer.weights().shape().device_bytes();
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

/// A layer of synthetic weights.
pub(super) fn upload(
    data: &Data<'_>,
    gpu: &Gpu,
    ctx: &Context,
    progress: &Progress,
) -> Result<MoeLayer, Error> {
    let config = data.config;
    let shape = config.expert_shape(data.expert(0, Projection::Gate).weight_type());
    let bytes = u64::from(shape.experts) * shape.device_bytes();
    progress.say(format!("making and packing {} MB of expert weights", bytes / 1_000_000));
    let weights = testkit::layer::upload(gpu, ctx, shape, &|e, p| data.expert(e, p))?;
    MoeLayer::new(ctx, config, router(ctx, &data.router, data.bias.as_deref())?, weights)
}

/// All of it on a GPU.
pub(super) fn on_gpu(
    options: &Options,
    subject: &Subject,
    gpu: &Gpu,
    progress: &Progress,
) -> Result<Report, String> {
    let config = subject.config;
    let say = |e: Error| e.to_string();
    let ctx = Context::new(&gpu.device).map_err(say)?;
    let mut notes = vec![];
    let golden = replay(progress, Some((gpu, &ctx)), &mut notes)?;

    // Before anything as large is made on the host.
    let need = u64::from(options.tokens) * u64::from(config.hidden) * 4;
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
            let weight_type = options.weights;
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
    let data = Data::new(config, options.tokens, source, options.seed);
    let layer = match layer {
        Some(layer) => layer,
        None => upload(&data, gpu, &ctx, progress).map_err(say)?,
    };
    let hidden = gpu.upload(&data.x);

    // As many tokens as take the twin some three seconds, by the time of the first.
    let tokens = data.tokens();
    let all = |n: u32| (0..n).map(|e| (e, 1.0)).collect::<Vec<_>>();
    let start = Instant::now();
    cpu_token(
        &config,
        &|e, p| data.expert(e, p),
        data.row(0),
        &all(config.routing.experts_per_token()),
    );
    let count = 3.0 / start.elapsed().as_secs_f64() * threads() as f64;
    let sample = spread(tokens, (count as usize).clamp(4, 64));

    notes.push(describe(subject, &config, layer.weights().shape().types));
    notes.push(format!(
        "checked on the CPU: choices of all {tokens} tokens exactly; logits (within {LOGITS:e}), scores, gates and outputs of {} of them (within {OUTPUT:e} of a token's largest value)",
        sample.len()
    ));
    let mut on_gpu =
        OnGpu { gpu, ctx: &ctx, layer, data: &data, hidden, sample, progress, timestamps: true };
    let mut reports = vec![];
    for (name, routing) in every_rule(config.routing, config.experts) {
        reports.push(on_gpu.run(&name, routing).map_err(|e| format!("{name}: {e}"))?);
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
