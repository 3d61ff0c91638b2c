//! What layers of one device share, and what threads and devices do not.
use std::time::Instant;
use testkit::layer::HostLayer;
use testkit::prelude::*;
use testkit::rules::every_rule;
use wgmoe::layer::cached::{BoundCached, CachedModel};
use wgmoe::layer::*;
use wgmoe::ops::*;
use wgmoe::routing::{BlockRule, Routing};
use wgmoe::weights::ExpertGradients;
use wgmoe::wgpu::{self, BufferUsages, Features};
use wgmoe::{CachedLayer, Context, ContextOptions, Gpu, Slice, Target, Variant, models};

fn config() -> LayerConfig {
    let config = models::find("llada2-mini").unwrap().config;
    {
        let mut config = config;
        config.hidden = 64;
        config.intermediate = 32;
        config.experts = 32;
        config
    }
}

#[test]
fn public_types_cross_threads() {
    fn crosses<T: Send + Sync>() {}
    crosses::<(Context, wgmoe::Dispatch, wgmoe::BoundOp, wgmoe::Variant, wgmoe::Target)>();
    crosses::<(Gpu, Slice<'_>, wgmoe::Error)>();
    crosses::<(MoeLayer, MoeRouting, MoeExperts, BoundLayer, Scratch)>();
    crosses::<(LayerConfig, Tensor, Router, Batch<'_>, KeptCoresets<'_>)>();
    crosses::<(TrainingBatch<'_>, Losses<'_>, BoundBackward, BoundPart, ExpertGradients)>();
    crosses::<(CachedLayer, CachedModel, BoundCached, wgmoe::Floats<'_>)>();
    crosses::<(ContextOptions, wgmoe::MatrixUnits)>();
    crosses::<(activation::Activate, activation_gradient::ActivationGradient)>();
    crosses::<(matmul_transposed::MatmulTransposed, weight_gradient::WeightGradient)>();
    crosses::<(gates_backward::GatesBackward, router_loss::RouterLoss)>();
    crosses::<(balance_loss::BalanceLoss, cross_entropy::CrossEntropy, loss_sum::LossSum)>();
    crosses::<(bias_update::BiasUpdate, active_rows::ActiveRows, coverage::Coverage)>();
    crosses::<(Assignments<'_>, Sequences<'_>, Blocks<'_>)>();
    crosses::<(HostRouter<'_>, HostSequences<'_>, HostBlocks<'_>, HostBatch<'_>, HostRouting)>();
    crosses::<HostExperts<'_>>();
    crosses::<(wgmoe::ExpertWeights, wgmoe::weights::HostWeights<'_>, wgmoe::weights::Projection)>(
    );
    crosses::<(wgmoe::PlanShape, wgmoe::plan::Sections, wgmoe::plan::HostPlan)>();
    crosses::<(wgmoe::device::Spec, wgmoe::device::Binding, wgmoe::device::Prelude)>();
    crosses::<(
        wgmoe::routing::schedule::Schedule,
        wgmoe::routing::scaling::ScalingTable,
        models::Model,
    )>();
    crosses::<(assign::Assign, assign_lists::AssignLists, block_choice::BlockChoice)>();
    crosses::<(block_plan::BlockPlan, capacity::Capacity, combine::Combine, coreset::Coreset)>();
    crosses::<(expert_choice::ExpertChoice, expert_union::ExpertUnion, gather::Gather)>();
    crosses::<(grouped_matmul::GroupedMatmul, logits::Logits, plan_count::PlanCount)>();
    crosses::<(plan_fill::PlanFill, plan_scan::PlanScan, scores::Scores)>();
    crosses::<(sequence_top::SequenceTop, token_choice::TokenChoice, wgmoe::plan::Stats)>();
}

/// The layer's output for these hidden states, which lie in one buffer with it; submitted and read back here.
fn output(gpu: &Gpu, layer: &MoeLayer, x: &[f32]) -> Vec<f32> {
    let size = x.len() as u64 * 4;
    let both = gpu.upload(&[x, &vec![f32::NAN; x.len()]].concat());
    let [hidden, out] = [0, size].map(|at| Slice::new(&both, at, size));
    let tokens = x.len() as u32 / layer.config().hidden;
    let batch = Batch::new(hidden, tokens).into_out(out);
    let step = layer.bind(&batch).unwrap();
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    step.encode(&mut encoder);
    gpu.queue.submit([encoder.finish()]);
    gpu.download(out).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn threads_share_a_device() {
    let Some(gpu) = gpu() else { return };
    let (sample, ctx) = (HostLayer::new(config()), contexts(&gpu)[0].clone());
    let layer = sample.layer(&ctx, &gpu.queue).unwrap();
    let inputs: Vec<Vec<f32>> = (0..6).map(|i| random(10 + i, 64 * (20 + i as usize))).collect();
    let alone: Vec<_> = inputs.iter().map(|x| output(&gpu, &layer, x)).collect();
    assert_close(&alone[0], &sample.twin(&inputs[0]), 1e-4, 1e-4, "alone");
    std::thread::scope(|threads| {
        for (x, want) in inputs.iter().zip(&alone) {
            let (gpu, ctx, layer, sample) = (&gpu, &ctx, &layer, &sample);
            threads.spawn(move || {
                // A layer of everybody's, and one made here at the same time as elsewhere.
                let own = sample.layer(ctx, &gpu.queue).unwrap();
                for layer in [layer, &own, layer] {
                    assert_same(&bits(&output(gpu, layer, x)), &bits(want), "in a thread");
                }
            });
        }
    });
}

#[test]
fn two_devices_in_one_process() {
    if gpu().is_none() {
        return;
    }
    let adapters = pollster::block_on(Gpu::adapters());
    let sample = HostLayer::new(config());
    let x = random(3, 64 * 33);
    let outputs = [(); 2].map(|()| {
        let gpu = pollster::block_on(Gpu::from_adapter(&adapters[0])).unwrap();
        let ctx = Context::new(&gpu.device).unwrap();
        let layer = sample.layer(&ctx, &gpu.queue).unwrap();
        (gpu, layer)
    });
    // Scratch is of one context: that of the other device is refused.
    let foreign = Scratch::new(outputs[0].1.context());
    let there = outputs[1].0.upload(&vec![0f32; 2 * x.len()]);
    let size = x.len() as u64 * 4;
    let [hidden, out] = [0, size].map(|at| Slice::new(&there, at, size));
    let batch = Batch::new(hidden, 33).into_out(out).with_scratch(&foreign);
    let refused = outputs[1].1.bind(&batch).unwrap_err();
    assert_eq!(refused.to_string(), "`scratch`: made for another context");
    let outputs = outputs.map(|(gpu, layer)| output(&gpu, &layer, &x));
    assert_close(&outputs[0], &sample.twin(&x), 1e-4, 1e-4, "a device");
    assert_same(&bits(&outputs[1]), &bits(&outputs[0]), "another device");
}

#[test]
fn a_layer_makes_all_its_pipelines() {
    let (device, queue) = wgpu::Device::noop(&wgpu::DeviceDescriptor::default());
    let base = config();
    let Routing::TokenChoice(rule) = base.routing else { unreachable!() };
    let choice = |rule| Routing::TokenChoice(rule);
    let Routing::ExpertChoice(few) = models::find("ec-dlm").unwrap().config.routing else {
        unreachable!()
    };
    let few = few.with_max(1);
    let every = every_rule(base.routing, 32).into_iter().map(|(_, routing)| (routing, 32));
    for (routing, experts) in every.chain([
        (models::find("ec-dlm").unwrap().config.routing, 33),
        (choice(rule.with_coreset(BlockRule::Capacity(10))), 512),
        // Narrow, so that many tokens fit.
        (choice(rule.without_groups().with_capacity_factor(1.0).with_experts_per_token(1)), 4),
        (Routing::ExpertChoice(few.with_experts_per_token(1)), 4),
        (Routing::ExpertChoice(few.with_experts_per_token(1)), 5),
    ]) {
        let shared_experts = u32::from(experts > 5);
        let base = {
            let mut config = base.with_shared_experts(shared_experts);
            config.hidden = 4;
            config.intermediate = 4;
            config
        };
        let config = {
            let mut config = base.with_routing(routing);
            config.experts = experts;
            config
        };
        for (target, small_items) in
            [(Target::Wide, false), (Target::Wide, true), (Target::Serial, false)]
        {
            let variant = Variant { target, small_items, ..Variant::PORTABLE };
            let made = Context::with_variant(&device, variant).unwrap();
            let layer = HostLayer::new(config).layer(&made, &queue).unwrap();
            let pipelines = made.pipelines();
            // Past 32, 4,096, and 2^18 tokens other kernels do the work. One buffer holds both slices.
            for tokens in [1u32, 33, 5000, (1 << 18) + 1] {
                if tokens > 5000 && experts > 5 {
                    continue;
                }
                let size = u64::from(tokens) * 16;
                let both = device.create_buffer(&wgpu::BufferDescriptor {
                    label: None,
                    size: 2 * size + 256,
                    usage: BufferUsages::STORAGE,
                    mapped_at_creation: false,
                });
                let [hidden, out] =
                    [0, size.next_multiple_of(256)].map(|at| Slice::new(&both, at, size));
                let step = layer.bind(&Batch::new(hidden, tokens).into_out(out)).unwrap();
                let mut encoder = device.create_command_encoder(&Default::default());
                step.encode(&mut encoder);
                let what = format!("{target:?} {small_items} {routing:?} T {tokens}");
                assert_eq!(made.pipelines(), pipelines, "{what}");
            }
        }
    }
}

#[test]
fn twenty_layers_of_one_model() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let sample = HostLayer::new(config());
    let scratch = Scratch::new(&ctx);
    let x = random(3, 64 * 40);
    let hidden = gpu.upload(&x);
    let out = Output::f32s(&gpu, x.len());
    let weights = sample.weights(&ctx, &gpu.queue).unwrap();
    let mut times = vec![];
    let mut made = vec![];
    for _ in 0..20 {
        let router = sample.router(&ctx).unwrap();
        let start = Instant::now();
        let layer = MoeLayer::new(&ctx, sample.config, router, weights.clone()).unwrap();
        times.push(start.elapsed());
        let batch = Batch::new(&hidden, 40).into_out(out.slice());
        layer.bind(&batch.with_scratch(&scratch)).unwrap();
        made.push((ctx.pipelines(), scratch.bytes()));
    }
    let (pipelines, bytes) = made[0];
    assert_eq!(made, [made[0]; 20], "later layers make pipelines or scratch");
    let rest: std::time::Duration = times[1..].iter().sum();
    eprintln!(
        "20 layers: {pipelines} pipelines, the first in {:?}, the others in {rest:?}; {bytes} bytes of scratch shared",
        times[0]
    );
}

#[test]
fn the_callers_pipeline_cache() {
    if gpu().is_none() {
        return;
    }
    let adapters = pollster::block_on(Gpu::adapters());
    if !adapters[0].features().contains(Features::PIPELINE_CACHE) {
        eprintln!("skipped: no pipeline caches on this adapter");
        return;
    }
    let descriptor = wgpu::DeviceDescriptor {
        required_features: Features::PIPELINE_CACHE,
        ..Default::default()
    };
    let devices =
        [(); 2].map(|()| pollster::block_on(adapters[0].request_device(&descriptor)).unwrap());
    let caches = devices.each_ref().map(|(device, _)| {
        let descriptor = wgpu::PipelineCacheDescriptor { label: None, data: None, fallback: true };
        #[expect(unsafe_code, reason = "wgpu has no other way to make one; no data is given")]
        unsafe {
            device.create_pipeline_cache(&descriptor)
        }
    });
    let sample = HostLayer::new(config());
    let (device, queue) = &devices[0];
    let layer = |cache: &wgpu::PipelineCache| {
        let options = ContextOptions::default().with_cache(cache.clone());
        let ctx = Context::with_options(device, options)?;
        sample.layer(&ctx, queue)
    };
    let x = random(3, 64 * 33);
    let gpu = Gpu { device: device.clone(), queue: queue.clone(), info: adapters[0].get_info() };
    assert_close(&output(&gpu, &layer(&caches[0]).unwrap(), &x), &sample.twin(&x), 1e-4, 1e-4, "y");
    // It is handed over indeed: wgpu refuses that of another device.
    let refused = layer(&caches[1]).unwrap_err().to_string();
    assert!(refused.contains("evice"), "{refused}");
}
