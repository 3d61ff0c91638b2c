//! Layers with only some of their experts on the device, against those with all of them there.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use testkit::layer::HostLayer;
use testkit::prelude::{Output, assert_same, gpu, random};
use wgmoe::layer::cached::{BoundCached, CacheOptions, CacheStats, CachedLayer, ExpertSource};
use wgmoe::layer::{Batch, LayerConfig};
use wgmoe::routing::{BlockRule, Routing, Score, TokenChoice};
use wgmoe::weights::{ExpertTypes, HostWeights, Projection};
use wgmoe::{
    Context, Error, ExpertWeights, Gpu, MoeLayer, Result, Slice, Variant, WeightType, wgpu,
};

pub(crate) const E: u32 = 20;
pub(crate) const D: usize = 64;

pub(crate) fn config(routing: Routing) -> LayerConfig {
    LayerConfig::new(D as u32, 40, E, routing).with_shared_experts(1)
}

pub(crate) const TOKEN_CHOICE: TokenChoice =
    TokenChoice::new(2).with_score(Score::Sigmoid).with_scale(2.5);

/// Budget for this many routed experts, and not a byte more.
pub(crate) fn budget(config: &LayerConfig, experts: u64) -> u64 {
    let shape = config.expert_shape(WeightType::Bf16);
    (experts + u64::from(config.shared_experts)) * shape.device_bytes()
        + 4 * u64::from(shape.experts)
}

pub(crate) fn cached(
    gpu: &Gpu,
    ctx: &Context,
    host: &Arc<HostLayer>,
    options: CacheOptions,
) -> CachedLayer {
    let router = host.router(ctx).unwrap();
    CachedLayer::new(ctx, &gpu.queue, host.config, router, host.clone(), options).unwrap()
}

#[test]
fn equal_bits_whatever_the_budget() {
    let Some(gpu) = gpu() else { return };
    let tokens = 40;
    let x: Vec<Vec<f32>> = (0..3).map(|i| random(60 + i, tokens * D)).collect();
    let mass = Some(BlockRule::mass(0.5).with_floor(4));
    for variant in Variant::all(&gpu.device).into_iter().filter(|v| !v.subgroups) {
        let ctx = Context::with_variant(&gpu.device, variant).unwrap();
        for coreset in [None, mass, Some(BlockRule::Capacity(6))] {
            let routing = Routing::TokenChoice(
                coreset.map_or(TOKEN_CHOICE, |c| TOKEN_CHOICE.with_coreset(c)),
            );
            let host = Arc::new(HostLayer::new(config(routing)));
            let hidden = Output::f32s(&gpu, tokens * D);
            let resident = host.layer_as(&ctx, &gpu.queue, WeightType::Bf16, None).unwrap();
            let out = Output::f32s(&gpu, tokens * D);
            let step =
                resident.bind(&Batch::new(hidden.slice(), 40).added_to(out.slice())).unwrap();
            let put = |slice: Slice<'_>, values: &[f32]| {
                gpu.queue.write_buffer(slice.buffer, 0, bytemuck::cast_slice(values));
            };
            let want: Vec<Vec<u32>> = x
                .iter()
                .map(|x| {
                    put(hidden.slice(), x);
                    put(out.slice(), x);
                    gpu.run_layer(&step).unwrap();
                    out.get(&gpu)
                })
                .collect();
            for (experts, staging) in [(20, 64 << 20), (4, 64 << 20), (4, 1), (1, 0)] {
                let what = format!("{variant:?} {coreset:?}, {experts} experts, {staging} staged");
                let bytes = budget(&host.config, experts) + 100;
                let options = CacheOptions { staging, ..options(bytes) };
                let mut layer = cached(&gpu, &ctx, &host, options);
                assert_eq!(layer.cache().capacity(), experts as usize, "{what}");
                let out = Output::f32s(&gpu, tokens * D);
                let mut step =
                    layer.bind(&Batch::new(hidden.slice(), 40).added_to(out.slice())).unwrap();
                for (x, want) in x.iter().zip(&want) {
                    put(hidden.slice(), x);
                    put(out.slice(), x);
                    layer.run(&gpu.queue, &mut step).unwrap();
                    assert_same(&out.get::<u32>(&gpu), want, &what);
                    let stats = wgmoe::plan::Stats::from_words(
                        &gpu.download(step.routing().stats()).unwrap(),
                    )
                    .unwrap();
                    assert_eq!(step.union().len(), stats.unique_experts as usize, "{what}");
                }
                let cache = layer.cache();
                let stats = cache.stats();
                assert!(cache.device_bytes() <= bytes, "{what}");
                assert!(stats.peak_bytes <= cache.device_bytes(), "{what}");
                assert_eq!(stats.miss_bytes, stats.misses * cache.expert_bytes(), "{what}");
                if experts == 1 {
                    // One round for the shared expert and perhaps the one that is there, one for each missing.
                    assert_eq!(stats.rounds, 3 + stats.misses, "{what}");
                }
            }
        }
    }
}

/// A source of quantized experts, the shared one in another type.
struct Quantized(HostLayer);

const ROUTED: ExpertTypes = ExpertTypes { gate_up: WeightType::Q4_K, down: WeightType::Q6_K };
const SHARED: ExpertTypes = ExpertTypes { gate_up: WeightType::Q8_0, down: WeightType::Q8_0 };

impl ExpertSource for Quantized {
    fn matrix(&self, expert: u32, projection: Projection) -> Result<HostWeights<'_>> {
        Ok(self.0.matrix(expert, projection))
    }

    fn types(&self) -> Result<[ExpertTypes; 2]> {
        Ok([ROUTED, SHARED])
    }
}

#[test]
fn types_of_the_source() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let host = HostLayer::new(config(Routing::TokenChoice(TOKEN_CHOICE)));
    let shape = host.config.expert_shape(ROUTED).with_last_types(1, SHARED);
    let weights = ExpertWeights::new(&ctx, shape).unwrap();
    host.write(&gpu.queue, &weights).unwrap();
    let resident = MoeLayer::new(&ctx, host.config, host.router(&ctx).unwrap(), weights).unwrap();
    let shared = host.config.expert_shape(SHARED).device_bytes();
    let budget = 4 * shape.device_bytes() + shared + 4 * u64::from(shape.experts);
    let source = Arc::new(Quantized(host.clone()));
    let new = |budget| {
        let (source, options) = (source.clone(), CacheOptions::new(budget));
        CachedLayer::new(&ctx, &gpu.queue, host.config, host.router(&ctx)?, source, options)
    };
    assert_eq!(new(budget - 1).unwrap().cache().capacity(), 3);
    let mut layer = new(budget).unwrap();
    assert_eq!((layer.cache().capacity(), layer.cache().device_bytes()), (4, budget));

    let hidden = gpu.upload(&random(60, 40 * D));
    let outs = [(); 2].map(|()| Output::f32s(&gpu, 40 * D));
    let [want, got] = outs.each_ref().map(|out| Batch::new(&hidden, 40).into_out(out.slice()));
    gpu.run_layer(&resident.bind(&want).unwrap()).unwrap();
    let mut step = layer.bind(&got).unwrap();
    layer.run(&gpu.queue, &mut step).unwrap();
    let [want, got] = outs.map(|out| out.get::<u32>(&gpu));
    assert_same(&got, &want, "out");

    // Whatever the source says, the options have the last word.
    let types = Some(SHARED);
    let options = CacheOptions { types, ..options(budget) };
    let router = host.router(&ctx).unwrap();
    let layer = CachedLayer::new(&ctx, &gpu.queue, host.config, router, source, options).unwrap();
    assert_eq!(layer.cache().expert_bytes(), shared);
}

fn options(budget: u64) -> CacheOptions {
    CacheOptions::new(budget)
}

/// A layer of which each token's hidden state says which two experts it takes.
pub(crate) struct Scripted {
    gpu: Gpu,
    pub(crate) layer: CachedLayer,
    hidden: Output,
    out: Output,
}

impl Scripted {
    fn new(gpu: &Gpu, ctx: &Context, experts: u64) -> Self {
        let config = config(Routing::TokenChoice(TOKEN_CHOICE));
        Self::with(gpu, ctx, options(budget(&config, experts)))
    }

    pub(crate) fn with(gpu: &Gpu, ctx: &Context, options: CacheOptions) -> Self {
        let host = HostLayer::scripted(config(Routing::TokenChoice(TOKEN_CHOICE)));
        let layer = cached(gpu, ctx, &Arc::new(host), options);
        let [hidden, out] = [0; 2].map(|_| Output::f32s(gpu, 2 * D));
        Self { gpu: gpu.clone(), layer, hidden, out }
    }

    pub(crate) fn bind(&self) -> BoundCached {
        self.layer.bind(&Batch::new(self.hidden.slice(), 2).into_out(self.out.slice())).unwrap()
    }

    /// Runs a step whose two tokens take these experts; what it did.
    pub(crate) fn run(&mut self, step: &mut BoundCached, experts: [[u32; 2]; 2]) -> CacheStats {
        let mut x = random(9, 2 * D);
        for (row, experts) in x.chunks_exact_mut(D).zip(experts) {
            for e in 0..E {
                row[e as usize] = if experts.contains(&e) { 3.0 } else { -3.0 };
            }
        }
        let slice = self.hidden.slice();
        self.gpu.queue.write_buffer(slice.buffer, 0, bytemuck::cast_slice(&x));
        self.layer.reset_stats();
        self.layer.run(&self.gpu.queue, step).unwrap();
        assert!(self.out.get::<f32>(&self.gpu).iter().all(|v| v.is_finite()));
        let mut union = experts.concat();
        union.sort_unstable();
        union.dedup();
        assert_eq!(step.union(), union);
        self.layer.cache().stats()
    }
}

#[test]
fn statistics_and_order_of_a_script() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let mut script = Scripted::new(&gpu, &ctx, 4);
    let each = script.layer.cache().expert_bytes();
    let fixed = budget(script.layer.config(), 0);
    let counts = |s: CacheStats| {
        assert_eq!((s.miss_bytes, s.prefetch_bytes), (s.misses * each, s.prefetched * each));
        assert_eq!(s.steps, 1);
        [s.hits, s.misses, s.prefetched, s.rounds, (s.peak_bytes - fixed) / each]
    };
    let (mut a, mut b) = (script.bind(), script.bind());
    let resident = |s: &Scripted| s.layer.cache().resident();

    // hits, misses, prefetched, rounds, most experts at once
    assert_eq!(counts(script.run(&mut a, [[5, 1], [1, 9]])), [0, 3, 0, 2, 3]);
    assert_eq!(resident(&script), [1, 5, 9]);
    // The same again: all there, one round.
    assert_eq!(counts(script.run(&mut a, [[1, 5], [9, 5]])), [3, 0, 0, 1, 3]);
    // One more fits; used ones become the newest.
    assert_eq!(counts(script.run(&mut a, [[1, 2], [2, 1]])), [1, 1, 0, 2, 4]);
    assert_eq!(resident(&script), [5, 9, 1, 2]);
    // Another step of the layer throws out the two least recently used.
    assert_eq!(counts(script.run(&mut b, [[7, 8], [2, 8]])), [1, 2, 0, 2, 4]);
    assert_eq!(resident(&script), [1, 2, 7, 8]);
    assert_eq!(counts(script.run(&mut b, [[3, 4], [8, 4]])), [1, 2, 0, 2, 4]);
    assert_eq!(resident(&script), [7, 8, 3, 4]);
    // The first step comes back: what it used last, 1 and 2, is brought in ahead.
    assert_eq!(counts(script.run(&mut a, [[1, 2], [1, 2]])), [2, 0, 2, 1, 4]);
    assert_eq!(resident(&script), [3, 4, 1, 2]);
    // Ahead in vain: its last use was 3, 4 and 8, it now wants 10.
    assert_eq!(counts(script.run(&mut b, [[3, 10], [4, 10]])), [2, 1, 1, 2, 4]);
    assert_eq!(resident(&script), [8, 3, 4, 10]);

    // Asked for by hand.
    script.layer.reset_stats();
    script.layer.prefetch(&gpu.queue, &[4, 11, 12]).unwrap();
    assert_eq!(script.layer.cache().stats().prefetched, 2);
    assert_eq!(resident(&script), [4, 10, 11, 12]);
    script.layer.prefetch(&gpu.queue, &[13, 14, 15, 16, 17, 18]).unwrap();
    assert_eq!(script.layer.cache().stats().prefetched, 6);
    assert_eq!(resident(&script), [13, 14, 15, 16]);
    let error = script.layer.prefetch(&gpu.queue, &[E]).unwrap_err().to_string();
    assert_eq!(error, "`experts`: 20 of 20");

    // More than fit: those that are there first, the others in rounds of at most as many as fit.
    let mut one = Scripted::new(&gpu, &ctx, 1);
    let mut step = one.bind();
    assert_eq!(counts(one.run(&mut step, [[5, 1], [1, 9]])), [0, 3, 0, 4, 1]);
    assert_eq!(counts(one.run(&mut step, [[5, 1], [1, 9]])), [1, 2, 0, 3, 1]);
    assert_eq!(resident(&one), [5]);
    assert!((one.layer.cache().stats().hit_rate() - 1.0 / 3.0).abs() < 1e-9);
}

#[test]
fn an_encoder_of_ones_own() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let host = Arc::new(HostLayer::new(config(Routing::TokenChoice(TOKEN_CHOICE))));
    let mut layer = cached(&gpu, &ctx, &host, options(budget(&host.config, 4)));
    let x = random(8, 7 * D);
    let (source, hidden) = (gpu.upload(&x), Output::f32s(&gpu, x.len()));
    let outs = [0; 2].map(|_| Output::f32s(&gpu, x.len()));
    let mut step = layer.bind(&Batch::new(hidden.slice(), 7).into_out(outs[0].slice())).unwrap();
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    encoder.copy_buffer_to_buffer(&source, 0, hidden.slice().buffer, 0, 4 * x.len() as u64);
    step.encode_routing(&mut encoder);
    gpu.queue.submit([encoder.finish()]);
    // Somebody else polls.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                gpu.device.poll(wgpu::PollType::Poll).unwrap();
                std::thread::yield_now();
            }
        });
        let run = pollster::block_on(layer.run_experts_async(&gpu.queue, &mut step));
        stop.store(true, Ordering::Relaxed);
        run.unwrap();
    });
    let resident = host.layer_as(&ctx, &gpu.queue, WeightType::Bf16, None).unwrap();
    let want = resident.bind(&Batch::new(hidden.slice(), 7).into_out(outs[1].slice())).unwrap();
    gpu.run_layer(&want).unwrap();
    assert_same(&outs[0].get::<u32>(&gpu), &outs[1].get::<u32>(&gpu), "out");

    // No tokens, no work.
    let nothing = Slice::new(hidden.slice().buffer, 0, 0);
    let mut empty = layer.bind(&Batch::new(nothing, 0).into_out(nothing)).unwrap();
    let before = layer.cache().stats();
    layer.run(&gpu.queue, &mut empty).unwrap();
    assert_eq!(layer.cache().stats(), before);
}

/// Fails for one expert as long as it is told to.
struct Failing {
    host: HostLayer,
    fail: AtomicBool,
}

impl ExpertSource for Failing {
    fn matrix(&self, expert: u32, projection: Projection) -> Result<HostWeights<'_>> {
        if expert < E && projection == Projection::Down && self.fail.load(Ordering::Relaxed) {
            return Err(Error::ReadBack("the file is gone".into()));
        }
        Ok(self.host.matrix(expert, projection))
    }
}

#[test]
fn errors() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let host = Arc::new(HostLayer::new(config(Routing::TokenChoice(TOKEN_CHOICE))));
    let new = |budget| {
        let router = host.router(&ctx).unwrap();
        let options = options(budget);
        CachedLayer::new(&ctx, &gpu.queue, host.config, router, host.clone(), options)
    };
    let least = budget(&host.config, 1);
    for short in [0, least / 2, least - 1] {
        let error = new(short).unwrap_err().to_string();
        let want = format!("`budget`: {short} bytes; one expert and 1 shared ones take {least}");
        assert_eq!(error, want);
    }
    let mut layer = new(least).unwrap();
    assert_eq!(new(u64::MAX).unwrap().cache().capacity(), E as usize);

    let x = gpu.upload(&random(1, 3 * D));
    let out = Output::f32s(&gpu, 3 * D);
    let batch = Batch::new(&x, 3).into_out(out.slice());
    let mut other = new(least).unwrap().bind(&batch).unwrap();
    let error = layer.run(&gpu.queue, &mut other).unwrap_err().to_string();
    assert_eq!(error, "`step`: bound to another layer");

    // A source that fails is the step's error; afterwards all goes on.
    let failing = Arc::new(Failing { host: (*host).clone(), fail: AtomicBool::new(true) });
    let router = host.router(&ctx).unwrap();
    let mut shaky = CachedLayer::new(
        &ctx,
        &gpu.queue,
        host.config,
        router,
        failing.clone(),
        options(budget(&host.config, 3)),
    )
    .unwrap();
    let mut step = shaky.bind(&batch).unwrap();
    let error = shaky.run(&gpu.queue, &mut step).unwrap_err().to_string();
    assert_eq!(error, "read-back failed: the file is gone");
    assert_eq!(shaky.cache().resident(), [0u32; 0]);
    failing.fail.store(false, Ordering::Relaxed);
    shaky.run(&gpu.queue, &mut step).unwrap();
    let got: Vec<u32> = out.get(&gpu);
    let resident = host.layer_as(&ctx, &gpu.queue, WeightType::Bf16, None).unwrap();
    gpu.run_layer(&resident.bind(&batch).unwrap()).unwrap();
    assert_same(&got, &out.get::<u32>(&gpu), "after a failure");
}
