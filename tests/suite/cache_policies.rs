//! Which experts caches keep: intervals, pinned ones, the layers of a model; and futures that are dropped.
use crate::cache::{D, E, Scripted, TOKEN_CHOICE, budget, cached, config};
use std::sync::Arc;
use std::task::{Context as Task, Waker};
use testkit::compare::close;
use testkit::layer::HostLayer;
use testkit::prelude::{Output, assert_same, gpu, random};
use wgmoe::layer::Batch;
use wgmoe::layer::cached::{
    CacheOptions, CachePolicy, CacheStats, CachedLayer, CachedModel, MissesOnHost, ModelLayer,
};
use wgmoe::routing::Routing;
use wgmoe::{Context, FloatType, Floats, Gpu, Result, Slice, WeightType, wgpu};

const INTERVAL: CachePolicy = CachePolicy::Interval { steps: 2, passing: 1 };

fn options(experts: u64, policy: CachePolicy, pinned: &[u32]) -> CacheOptions {
    let budget = budget(&config(Routing::TokenChoice(TOKEN_CHOICE)), experts);
    CacheOptions { policy, pinned: pinned.to_vec(), ..CacheOptions::new(budget) }
}

#[test]
fn places_change_at_intervals() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let mut script = Scripted::with(&gpu, &ctx, options(4, INTERVAL, &[]));
    let mut step = script.bind();
    let each = script.layer.cache().expert_bytes();
    let counts = |s: CacheStats| {
        assert_eq!((s.miss_bytes, s.prefetch_bytes), (s.misses * each, s.prefetched * each));
        [s.hits, s.misses, s.prefetched, s.exchanged, s.rounds]
    };
    let resident = |s: &Scripted| s.layer.cache().resident();
    // The first step fills the three places.
    assert_eq!(counts(script.run(&mut step, [[5, 1], [1, 9]])), [0, 3, 0, 3, 2]);
    assert_eq!(resident(&script), [1, 5, 9]);
    // 2 and 3 pass through the fourth, one after the other, and nothing else changes.
    assert_eq!(counts(script.run(&mut step, [[2, 1], [2, 3]])), [1, 2, 0, 0, 3]);
    assert_eq!(resident(&script), [5, 9, 1, 3]);
    // Two steps on: 2 took 4 slots and 3 took 1, while 5 and 9 took none. 4 passes through.
    assert_eq!(counts(script.run(&mut step, [[2, 4], [2, 1]])), [1, 2, 1, 2, 3]);
    assert_eq!(resident(&script), [1, 2, 3, 4]);
    // Not before two more.
    assert_eq!(counts(script.run(&mut step, [[8, 4], [8, 1]])), [2, 1, 0, 0, 2]);
    assert_eq!(resident(&script), [2, 3, 1, 8]);
    // Asked for by hand, nothing changes either.
    script.layer.prefetch(&gpu.queue, &[15]).unwrap();
    assert_eq!(resident(&script), [2, 3, 1, 8]);
}

#[test]
fn pinned_experts_stay() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let interval = CachePolicy::Interval { steps: 1, passing: 1 };
    for policy in [CachePolicy::LeastRecentlyUsed, interval] {
        let mut script = Scripted::with(&gpu, &ctx, options(3, policy, &[7]));
        assert_eq!(script.layer.cache().resident(), [7]);
        let mut step = script.bind();
        for i in 0..4 {
            let stats = script.run(&mut step, [[i, 7], [i + 10, i + 1]]);
            assert!(stats.hits >= 1, "{policy:?} {i}: {stats:?}");
            assert!(script.layer.cache().resident().contains(&7), "{policy:?} {i}");
        }
        // Under a policy without it, it leaves.
        let mut script = Scripted::with(&gpu, &ctx, options(3, policy, &[]));
        let mut step = script.bind();
        for experts in [[[7, 1], [7, 2]], [[3, 4], [3, 5]], [[3, 4], [3, 5]]] {
            script.run(&mut step, experts);
        }
        assert!(!script.layer.cache().resident().contains(&7), "{policy:?}");
    }
}

/// Outputs of three batches with all experts on the device.
fn want(gpu: &Gpu, ctx: &Context, host: &HostLayer, x: &[Vec<f32>]) -> Vec<Vec<u32>> {
    let resident = host.layer_as(ctx, &gpu.queue, WeightType::Bf16, None).unwrap();
    let run = |x: &Vec<f32>| {
        let (hidden, out) = (gpu.upload(x), Output::f32s(gpu, x.len()));
        let batch = Batch::new(&hidden, 40).into_out(out.slice());
        gpu.run_layer(&resident.bind(&batch).unwrap()).unwrap();
        out.get(gpu)
    };
    x.iter().map(run).collect()
}

#[test]
fn equal_bits_under_every_policy() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let host = Arc::new(HostLayer::new(config(Routing::TokenChoice(TOKEN_CHOICE))));
    let x: Vec<Vec<f32>> = (0..5).map(|i| random(60 + i, 40 * D)).collect();
    let want = want(&gpu, &ctx, &host, &x);
    let lru = CachePolicy::LeastRecentlyUsed;
    let every = |steps, passing| CachePolicy::Interval { steps, passing };
    for (policy, experts, pinned) in [
        (every(1, 1), 2, &[][..]),
        (every(1, 3), 8, &[]),
        (every(3, 2), 8, &[3, 19]),
        (every(2, 4), 4, &[]),
        (lru, 3, &[0, 5]),
        (lru, 20, &[0]),
    ] {
        for staging in [0, 64 << 20] {
            let options = CacheOptions { staging, ..options(experts, policy, pinned) };
            let what = format!("{policy:?}, {experts} experts, {pinned:?} pinned, {staging}");
            let mut layer = cached(&gpu, &ctx, &host, options);
            let (hidden, out) = (Output::f32s(&gpu, 40 * D), Output::f32s(&gpu, 40 * D));
            let batch = Batch::new(hidden.slice(), 40).into_out(out.slice());
            let mut step = layer.bind(&batch).unwrap();
            for (x, want) in x.iter().zip(&want) {
                gpu.queue.write_buffer(hidden.slice().buffer, 0, bytemuck::cast_slice(x));
                layer.run(&gpu.queue, &mut step).unwrap();
                assert_same(&out.get::<u32>(&gpu), want, &what);
            }
            let stats = layer.cache().stats();
            let asked: usize = stats.steps as usize * E as usize;
            assert!(stats.hits + stats.misses <= asked as u64, "{what}: {stats:?}");
            assert!(stats.peak_bytes <= layer.cache().device_bytes(), "{what}");
        }
    }
}

/// The host computes what is missing: as far from the device's sums as rounding in another order is.
#[test]
fn experts_on_the_host() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let host = Arc::new(HostLayer::new(config(Routing::TokenChoice(TOKEN_CHOICE))));
    let x: Vec<Vec<f32>> = (0..4).map(|i| random(60 + i, 40 * D)).collect();
    let lru = CachePolicy::LeastRecentlyUsed;
    for (weight_type, policy, how, float_type) in [
        (WeightType::Bf16, INTERVAL, MissesOnHost::Always, FloatType::F32),
        (WeightType::F32, INTERVAL, MissesOnHost::Always, FloatType::Bf16),
        (WeightType::Q8_0, INTERVAL, MissesOnHost::Always, FloatType::F32),
        (WeightType::Q4_K, lru, MissesOnHost::Always, FloatType::F16),
        (WeightType::Bf16, lru, MissesOnHost::Measured, FloatType::F32),
    ] {
        let what = format!("{weight_type:?} {policy:?} {how:?} {float_type:?}");
        let shape = host.config.expert_shape(weight_type);
        let resident = host.layer_as(&ctx, &gpu.queue, weight_type, None).unwrap();
        let options = CacheOptions {
            budget: 6 * shape.device_bytes() + 4 * u64::from(shape.experts),
            types: Some(weight_type.into()),
            policy,
            host: how,
            ..CacheOptions::new(0)
        };
        let mut layer = cached(&gpu, &ctx, &host, options);
        let hidden = Output::holding(&gpu, &vec![0u8; 40 * D * 4]);
        let outs = [(); 2].map(|()| Output::f32s(&gpu, 40 * D));
        let bytes = (40 * D) as u64 * float_type.bytes();
        let floats = Floats::new(Slice::new(hidden.slice().buffer, 0, bytes), float_type);
        let [of_all, of_some] =
            outs.each_ref().map(|out| Batch::new(floats, 40).into_out(out.slice()));
        let all = resident.bind(&of_all).unwrap();
        let mut step = layer.bind(&of_some).unwrap();
        for x in &x {
            let bytes = float_type.encode(x);
            gpu.queue.write_buffer(hidden.slice().buffer, 0, &bytes);
            gpu.run_layer(&all).unwrap();
            layer.run(&gpu.queue, &mut step).unwrap();
            let [want, got] = outs.each_ref().map(|out| out.get::<f32>(&gpu));
            close(&got, &want, 1e-5, 1e-4, &what).unwrap();
        }
        let stats = layer.cache().stats();
        assert!(stats.on_host > 0 && stats.on_host <= stats.misses, "{what}: {stats:?}");
        let brought = (stats.misses - stats.on_host) * layer.cache().expert_bytes();
        assert_eq!(stats.miss_bytes, brought, "{what}: {stats:?}");
        // What the host computed is not brought in ahead of the next step either.
        if how == MissesOnHost::Always {
            assert_eq!(stats.prefetched, 0, "{what}: {stats:?}");
        }
        // The place for what passes through is not needed here; else no place stays empty.
        let empty = u64::from(policy == INTERVAL) * layer.cache().expert_bytes();
        assert_eq!(layer.cache().device_bytes() - stats.peak_bytes, empty, "{what}");
    }
}

/// Rows that take no part, a plan that cuts slots, a residual, and `y` in stretches of columns.
#[test]
fn experts_on_the_host_of_a_cut_batch() {
    let Some(gpu) = gpu() else { return };
    // So small a binding that 32 columns of 95 slots are a stretch.
    let tokens = 45u32;
    let small = crate::limits::small(&gpu, 16 << 10);
    for gpu in [&gpu, &small] {
        let ctx = Context::new(&gpu.device).unwrap();
        let host = Arc::new(HostLayer::new(config(Routing::TokenChoice(TOKEN_CHOICE))));
        let x = random(71, tokens as usize * D);
        let hidden = gpu.upload(&x);
        let active = gpu.upload(&[0xaaaa_5555u32, 0x0000_0ff3]);
        let outs = [(); 2].map(|()| Output::holding(gpu, &random(72, tokens as usize * D)));
        let [of_all, of_some] = outs.each_ref().map(|out| {
            let batch = Batch::new(&hidden, tokens).added_to(out.slice());
            batch.with_active(&active).with_routed_slots(50)
        });
        let resident = host.layer_as(&ctx, &gpu.queue, WeightType::Bf16, None).unwrap();
        let options = CacheOptions { host: MissesOnHost::Always, ..options(5, INTERVAL, &[]) };
        let mut layer = cached(gpu, &ctx, &host, options);
        gpu.run_layer(&resident.bind(&of_all).unwrap()).unwrap();
        let mut step = layer.bind(&of_some).unwrap();
        layer.run(&gpu.queue, &mut step).unwrap();
        let [want, got] = outs.each_ref().map(|out| out.get::<f32>(gpu));
        close(&got, &want, 1e-5, 1e-4, "out").unwrap();
        assert!(layer.cache().stats().on_host > 0);
        let stats = gpu.download(step.routing().stats()).unwrap();
        let stats = wgmoe::plan::Stats::from_words(&stats).unwrap();
        assert!(stats.cut > 0, "{stats:?}");
    }
}

#[test]
fn the_host_must_be_able_to_read() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let host = Arc::new(HostLayer::new(config(Routing::TokenChoice(TOKEN_CHOICE))));
    let options = CacheOptions { host: MissesOnHost::Always, ..options(6, INTERVAL, &[]) };
    let layer = cached(&gpu, &ctx, &host, options);
    let hidden = gpu.device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 40 * D as u64 * 4,
        usage: wgpu::BufferUsages::STORAGE,
        mapped_at_creation: false,
    });
    let out = Output::f32s(&gpu, 40 * D);
    let error = layer.bind(&Batch::new(&hidden, 40).into_out(out.slice())).unwrap_err();
    assert!(error.to_string().starts_with("`hidden`: its buffer lacks COPY_SRC"), "{error}");
}

#[test]
fn a_model_shares_one_budget_out() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let small = config(Routing::TokenChoice(TOKEN_CHOICE));
    let mut large = small;
    large.experts = 40;
    let hosts = [small, large, small].map(|config| Arc::new(HostLayer::new(config)));
    let layers = || {
        hosts.iter().map(|host| {
            let router = host.router(&ctx).unwrap();
            ModelLayer::new(host.config, router, host.clone()).with_pinned(vec![3])
        })
    };
    // A quarter of each, and not a byte more.
    let whole: u64 = hosts.iter().map(|h| budget(&h.config, u64::from(h.config.experts) / 4)).sum();
    let new =
        |budget| CachedModel::new(&ctx, &gpu.queue, layers().collect(), CacheOptions::new(budget));
    let mut model = new(whole).unwrap();
    let capacities: Vec<usize> = model.layers().iter().map(|l| l.cache().capacity()).collect();
    assert_eq!(capacities, [5, 10, 5]);
    assert_eq!(model.device_bytes(), whole);
    assert!(model.layers().iter().all(|layer| layer.cache().resident() == [3]));

    let x = random(60, 40 * D);
    let hidden = gpu.upload(&x);
    let mut sum = CacheStats::default();
    for (i, host) in hosts.iter().enumerate() {
        let out = Output::f32s(&gpu, 40 * D);
        let batch = Batch::new(&hidden, 40).into_out(out.slice());
        let mut step = model.layers()[i].bind(&batch).unwrap();
        model.layer_mut(i).run(&gpu.queue, &mut step).unwrap();
        assert_same(
            &out.get::<u32>(&gpu),
            &want(&gpu, &ctx, host, std::slice::from_ref(&x))[0],
            "out",
        );
        // What it used last is there again before the next step, as far as it fits.
        model.layer_mut(i).prefetch_for(&gpu.queue, &step).unwrap();
        sum += model.layers()[i].cache().stats();
    }
    let stats = model.stats();
    assert_eq!(stats, sum);
    assert_eq!((stats.steps, stats.peak_bytes), (3, whole));
    model.reset_stats();
    assert_eq!((model.stats().steps, model.stats().peak_bytes), (0, whole));

    // The pinned one, and a place for others.
    let least: u64 = hosts.iter().map(|h| budget(&h.config, 2)).sum();
    let error = new(least - 1).unwrap_err().to_string();
    assert!(error.starts_with("`budget`") && error.contains(&least.to_string()), "{error}");
    assert!(new(least).is_ok());
    let none = CachedModel::new(&ctx, &gpu.queue, vec![], CacheOptions::new(whole)).unwrap_err();
    assert_eq!(none.to_string(), "`layers`: none");
    let pinned = CacheOptions { pinned: vec![1], ..CacheOptions::new(whole) };
    let error = CachedModel::new(&ctx, &gpu.queue, layers().collect(), pinned).unwrap_err();
    assert!(error.to_string().starts_with("`pinned`"), "{error}");
}

#[test]
fn a_run_that_is_dropped_halfway_can_be_run_again() {
    let Some(_) = gpu() else { return };
    // Of its own: nobody else polls it.
    let gpu = testkit::device::plain(&testkit::device::adapter());
    let ctx = Context::new(&gpu.device).unwrap();
    let host = Arc::new(HostLayer::new(config(Routing::TokenChoice(TOKEN_CHOICE))));
    let x = random(60, 40 * D);
    let want = want(&gpu, &ctx, &host, std::slice::from_ref(&x)).remove(0);
    let (hidden, out) = (gpu.upload(&x), Output::f32s(&gpu, 40 * D));
    let batch = Batch::new(&hidden, 40).into_out(out.slice());
    let (mut ended, mut halfway) = (0, 0);
    for policy in [CachePolicy::LeastRecentlyUsed, INTERVAL] {
        // One expert an upload, so that there are many awaits.
        let options = CacheOptions { staging: 0, ..options(6, policy, &[]) };
        let mut layer = cached(&gpu, &ctx, &host, options);
        let mut step = layer.bind(&batch).unwrap();
        for polls in 0..6 {
            let before = layer.cache().stats();
            let mut run = Box::pin(layer.run_async(&gpu.queue, &mut step));
            let done = (0..polls).any(|_| {
                let ready = run.as_mut().poll(&mut Task::from_waker(Waker::noop())).is_ready();
                gpu.device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
                ready
            });
            ended += u32::from(done);
            drop(run);
            // A step that has not ended is as if it had not been. (On software drivers work is done as it is
            // submitted, so that most of these wait for their routing alone.)
            let steps = layer.cache().stats().steps;
            assert_eq!(steps, before.steps + u64::from(done), "{policy:?}, {polls} polls");
            halfway += u32::from(!done && polls > 0);
            let poison = vec![u32::MAX; 40 * D];
            gpu.queue.write_buffer(out.slice().buffer, 0, bytemuck::cast_slice(&poison));
            layer.run(&gpu.queue, &mut step).unwrap();
            assert_same(&out.get::<u32>(&gpu), &want, &format!("{policy:?}, {polls} polls"));
        }
        // What was dropped has changed no place for good: the first step has filled the cache.
        assert_eq!(layer.cache().resident().len(), 6, "{policy:?}");
    }
    assert!(ended > 0 && halfway > 0, "{ended} at their end, {halfway} halfway");
}

#[test]
fn policies_that_leave_no_place_are_refused() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let host = Arc::new(HostLayer::new(config(Routing::TokenChoice(TOKEN_CHOICE))));
    let new = |options| -> Result<CachedLayer> {
        let router = host.router(&ctx)?;
        CachedLayer::new(&ctx, &gpu.queue, host.config, router, host.clone(), options)
    };
    let lru = CachePolicy::LeastRecentlyUsed;
    let every = |steps, passing| CachePolicy::Interval { steps, passing };
    for (options, want) in [
        (options(3, every(0, 1), &[]), "`steps`: 0"),
        (options(3, every(1, 0), &[]), "`passing`: 0"),
        (
            options(3, every(1, 4), &[]),
            "`budget`: 3 experts fit; 0 are pinned, 4 must be free for others",
        ),
        (
            options(3, every(1, 2), &[4, 5]),
            "`budget`: 3 experts fit; 2 are pinned, 2 must be free for others",
        ),
        (
            options(3, lru, &[4, 5, 6]),
            "`budget`: 3 experts fit; 3 are pinned, 1 must be free for others",
        ),
        (options(3, lru, &[E]), "`pinned`: 20 of 20 experts, each at most once"),
        (options(3, lru, &[4, 4]), "`pinned`: 4 of 20 experts, each at most once"),
    ] {
        assert_eq!(new(options).unwrap_err().to_string(), want);
    }
    let all: Vec<u32> = (0..E).collect();
    assert!(new(options(20, lru, &all)).is_ok());
}
