//! Whole layers.
use crate::timing::{Bench, Ready};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, SamplingMode, Throughput};
use std::time::Duration;
use testkit::block_on;
use testkit::rules::rules;
use testkit::works::{Part, Work};
use wgmoe::layer::Scratch;
use wgmoe::models::find;
use wgmoe::routing::{BlockRule, Routing, Score, TokenChoice};
use wgmoe::{Gpu, MoeLayer, WeightType};

pub(super) fn bench_layer(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("layer");
    group.sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(3));
    let gpu = &bench.gpu;
    let w1 = Work::w1();
    bench_types(
        bench,
        &mut group,
        &w1,
        WeightType::ALL,
        ("W1", Throughput::Elements(w1.flops(32 * 8))),
    );
    let w2 = Work::w2(512);
    bench_types(
        bench,
        &mut group,
        &w2,
        &[WeightType::F32],
        ("W2", Throughput::Elements(w2.flops(64 * 64))),
    );

    // A block of LLaDA2.0-mini under each rule, over the same weights.
    let experts = if bench.full { 256 } else { 64 };
    let work = Work::block(experts);
    let what = format!("LLaDA2-mini block of 32, {experts} experts bf16");
    bench_rules(bench, &mut group, &work, WeightType::Bf16, &what, &|_| true);
    if bench.full {
        let types = [WeightType::Bf16, WeightType::Q8_0, WeightType::Q4_K, WeightType::Fp8];
        let tokens = Throughput::Elements(work.tokens.into());
        bench_types(bench, &mut group, &work, &types, ("block of 32, 256 experts", tokens));
    }
    group.finish();

    // Equal slots, unequal demand.
    let mut group = c.benchmark_group("expert choice against token choice");
    group.sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(3));
    let either = |rule: &str| ["original", "expert_choice"].contains(&rule);
    let work = Work::w2(512).skewed();
    bench_rules(bench, &mut group, &work, WeightType::F32, "W2 skewed f32", &either);
    group.finish();

    // How a layer's time grows with its slots: eight a token.
    let mut group = c.benchmark_group("layer over tokens");
    group.sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(3));
    for tokens in [512, 1024, 2048, 4096] {
        let work = Work::w2(tokens);
        let slots = Throughput::Elements(u64::from(tokens) * 8);
        bench.case(
            &mut group,
            &format!("W2 f32 T{tokens}"),
            &bench.contexts[..1],
            slots,
            |ctx, what| {
                let weights = block_on(work.weights(gpu, ctx, WeightType::F32)).unwrap();
                layer_step(gpu, &work, &work.layer(ctx, weights).unwrap(), what)
            },
        );
    }
}

/// Prompts, and many blocks at once: whether a slot costs the same however many there are, and what a limit of
/// scratch costs.
pub(super) fn bench_prefill(bench: &Bench, c: &mut Criterion) {
    let gpu = &bench.gpu;
    let mut group = c.benchmark_group("prefill");
    group.sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(3));
    let top = TokenChoice::new(8).with_score(Score::Sigmoid).with_scale(2.5);
    let lengths: &[u32] = match bench.full {
        true => &[512, 2048, 4096, 8192, 16_384],
        false => &[512, 2048, 8192],
    };
    for &tokens in lengths {
        let limits = [None, Some(u64::from(tokens) * 4096 + (8 << 20))];
        let (variant, ctx) = &bench.contexts[0];
        let name = |limit: &Option<u64>| match limit {
            None => format!("W2 f32 T{tokens}"),
            Some(bytes) => format!("W2 f32 T{tokens} within {} MiB", bytes >> 20),
        };
        let ids = limits.iter().map(|limit| BenchmarkId::new(name(limit), variant)).collect();
        let slots = Throughput::Elements(u64::from(tokens) * 8);
        bench.turns(&mut group, ids, slots, || {
            let work = Work::w2(tokens);
            let weights = block_on(work.weights(gpu, ctx, WeightType::F32)).unwrap();
            let layer = work.layer(ctx, weights).unwrap().with_routing(top).unwrap();
            let step = |limit: &Option<u64>| step_within(gpu, &work, &layer, *limit, &name(limit));
            limits.iter().map(step).collect()
        });
    }
    if bench.full {
        bench_long_prefill(bench, &mut group);
    }
    for blocks in [1, 16, 64] {
        let rule = top.with_coreset(BlockRule::mass(0.6).with_floor(8));
        let name = format!("{blocks} blocks of 32, W2 f32, mass");
        let slots = Throughput::Elements(u64::from(blocks) * 32 * 8);
        bench.case(&mut group, &name, &bench.contexts[..1], slots, |ctx, what| {
            let work = Work::w2(32 * blocks);
            let weights = block_on(work.weights(gpu, ctx, WeightType::F32)).unwrap();
            let layer = work.layer(ctx, weights).unwrap().with_routing(rule).unwrap();
            layer_step(gpu, &work, &layer, what)
        });
    }
    group.finish();
}

/// 16,384 tokens of LLaDA2.0-mini, whose hidden states fill a binding of 128 MiB.
fn bench_long_prefill(bench: &Bench, group: &mut BenchmarkGroup<'_, WallTime>) {
    let (gpu, (variant, ctx)) = (&bench.gpu, &bench.contexts[0]);
    let config = find("llada2-mini").unwrap().config;
    let lengths = [512, 16_384];
    let limits = [None, Some(192 << 20)];
    let all: Vec<_> = lengths.into_iter().flat_map(|t| limits.map(|limit| (t, limit))).collect();
    let name = |&(tokens, limit): &(u32, Option<u64>)| {
        let within = limit.map_or(String::new(), |bytes| format!(" within {} MiB", bytes >> 20));
        format!("LLaDA2.0-mini bf16 T{tokens}{within}")
    };
    for case in &all {
        let ids = vec![BenchmarkId::new(name(case), variant)];
        let slots = Throughput::Elements(u64::from(case.0) * 8);
        bench.turns(group, ids, slots, || {
            let work = Work::synthetic(config, case.0);
            let weights = block_on(work.weights(gpu, ctx, WeightType::Bf16)).unwrap();
            let layer = work.layer(ctx, weights).unwrap();
            vec![step_within(gpu, &work, &layer, case.1, &name(case))]
        });
    }
}

/// One layer in several storage types, which take turns.
fn bench_types(
    bench: &Bench,
    group: &mut BenchmarkGroup<'_, WallTime>,
    work: &Work,
    types: &[WeightType],
    (what, throughput): (&str, Throughput),
) {
    let gpu = &bench.gpu;
    let name = |t: WeightType| format!("{what} {}", t.name().to_lowercase());
    for (variant, ctx) in bench.best() {
        let ids = types.iter().map(|&t| BenchmarkId::new(name(t), variant)).collect();
        bench.turns(group, ids, throughput.clone(), || {
            let step = |&t: &WeightType| {
                let layer = work.layer(ctx, block_on(work.weights(gpu, ctx, t)).unwrap()).unwrap();
                layer_step(gpu, work, &layer, &format!("{}, {variant}", name(t)))
            };
            types.iter().map(step).collect()
        });
    }
}

/// One layer under several rules, which take turns.
pub(super) fn bench_rules(
    bench: &Bench,
    group: &mut BenchmarkGroup<'_, WallTime>,
    work: &Work,
    weight_type: WeightType,
    what: &str,
    wanted: &dyn Fn(&str) -> bool,
) {
    let gpu = &bench.gpu;
    let mut rules = rules(work.config.routing, work.config.experts);
    rules.retain(|(rule, _)| wanted(rule));
    for (variant, ctx) in bench.best() {
        let name = |rule: &str| format!("{what}, {rule}");
        let ids = rules.iter().map(|(rule, _)| BenchmarkId::new(name(rule), variant)).collect();
        bench.turns(group, ids, Throughput::Elements(work.tokens.into()), || {
            let weights = block_on(work.weights(gpu, ctx, weight_type)).unwrap();
            let layer = work.layer(ctx, weights).unwrap();
            let step = |(rule, routing): &(String, Routing)| {
                let what = format!("{}, {variant}", name(rule));
                layer_step(gpu, work, &layer.with_routing(*routing).unwrap(), &what)
            };
            rules.iter().map(step).collect()
        });
    }
}

/// The layer bound to the work's input, run once and compared: choice and plan whole, the output in
/// eight tokens.
pub(super) fn layer_step(gpu: &Gpu, work: &Work, layer: &MoeLayer, what: &str) -> Ready {
    step_within(gpu, work, layer, None, what)
}

/// The same within a limit of scratch.
fn step_within(gpu: &Gpu, work: &Work, layer: &MoeLayer, limit: Option<u64>, what: &str) -> Ready {
    let scratch = Scratch::new(layer.context());
    let bound = work.bind_within(gpu, layer, Some(&scratch), limit).unwrap();
    let dispatches = bound.step.dispatches().count();
    let taken = scratch.bytes() >> 20;
    eprintln!("{what}: {dispatches} dispatches, {taken} MiB of scratch, limit {limit:?}");
    block_on(bound.run(gpu, &Part::ALL)).unwrap();
    let checked = block_on(async {
        let choice = work.check_choice(gpu, &bound).await?;
        work.check_plan(gpu, &bound, &choice).await?;
        work.check_output(gpu, layer, &bound, &choice, 8).await.map(|()| choice)
    });
    let choice = checked.unwrap_or_else(|e: String| panic!("{what}: {e}"));
    let (config, unique) = (layer.config(), choice.unique_experts());
    let loads = choice.loads();
    eprintln!(
        "{what}: {} slots, {unique} of {} routed experts used, at most {} slots each, weights of {:.1} MB read",
        choice.slots(),
        config.experts,
        loads.iter().max().unwrap_or(&0),
        f64::from(unique + config.shared_experts) * layer.weights().shape().device_bytes() as f64
            / 1e6
    );
    // What a batched matmul of equal parts would pad and drop; here nothing is padded beyond an
    // item.
    for factor in [1.25, 1.5] {
        let rows = (factor * f64::from(choice.slots()) / loads.len() as f64).ceil() as u32;
        let kept: u32 = loads.iter().map(|&n| n.min(rows)).sum();
        eprintln!(
            "    in {rows} rows an expert (capacity {factor}): {} padded of {}, {} slots dropped",
            rows * loads.len() as u32 - kept,
            rows * loads.len() as u32,
            choice.slots() - kept
        );
    }
    Ready::Layer(Box::new(bound))
}
