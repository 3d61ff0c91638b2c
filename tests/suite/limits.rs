//! Layers larger than a storage binding: equal bits to those that fit one.
use testkit::compare::largest;
use testkit::layer::{HostLayer, chosen};
use testkit::prelude::{Output, assert_same, gpu, random};
use wgmoe::layer::{Batch, LayerConfig, MoeLayer, cpu_token};
use wgmoe::routing::{BlockRule, ExpertChoice, Routing, Score, TokenChoice};
use wgmoe::weights::{HostWeights, Projection};
use wgmoe::{
    Context, Error, ExpertWeights, FloatType, Floats, Gpu, Target, Variant, WeightType, wgpu,
};

const TOKEN_CHOICE: TokenChoice = TokenChoice::new(3).with_score(Score::Sigmoid).with_scale(2.5);

const EXPERT_CHOICE: Routing = Routing::ExpertChoice(ExpertChoice::new(3));

fn config(hidden: u32, routing: Routing) -> LayerConfig {
    LayerConfig::new(hidden, 40, 12, routing).with_shared_experts(1)
}

/// A device of the same adapter whose storage bindings hold no more than `bytes`.
pub(super) fn small(gpu: &Gpu, bytes: u64) -> Gpu {
    let all = pollster::block_on(Gpu::adapters());
    let same = |a: &&wgpu::Adapter| a.get_info() == gpu.info;
    let adapter = all.iter().find(same).expect("the adapter that was there before");
    let required_limits =
        wgpu::Limits { max_storage_buffer_binding_size: bytes, ..adapter.limits() };
    let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
        required_features: gpu.device.features(),
        required_limits,
        // Matrix units are among the features where the adapter has them.
        experimental_features: testkit::device::experimental(),
        ..Default::default()
    }))
    .expect("a device with smaller limits");
    Gpu { device, queue, info: adapter.get_info() }
}

/// What a layer adds to a residual, in and out in one type.
fn run(
    gpu: &Gpu,
    layer: &MoeLayer,
    (x, float_type): (&[f32], FloatType),
    tokens: u32,
) -> (Vec<u32>, usize) {
    let residual: Vec<f32> = x.iter().map(|v| 1.0 - v).collect();
    let hidden = gpu.upload(&float_type.encode(x));
    let out = Output::holding(gpu, &float_type.encode(&residual));
    let batch = Batch::new(Floats::new(&hidden, float_type), tokens);
    let batch = batch.added_to(Floats::new(out.slice(), float_type));
    let step = layer.bind(&batch).unwrap();
    gpu.run_layer(&step).unwrap();
    (out.get(gpu), step.dispatches().count())
}

#[test]
fn tensors_larger_than_a_binding() {
    let Some(gpu) = gpu() else { return };
    const LIMIT: u64 = 48 << 10;
    let small = small(&gpu, LIMIT);
    let tokens = 90;
    let token_choice = |coreset: Option<BlockRule>| {
        Routing::TokenChoice(coreset.map_or(TOKEN_CHOICE, |c| TOKEN_CHOICE.with_coreset(c)))
    };
    let mass = token_choice(Some(BlockRule::mass(0.5).with_floor(4)));
    // Rows of whole vectors, and rows of which only one in 4 or 8 starts where a binding may.
    let odd = 512 - (gpu.device.limits().min_storage_buffer_offset_alignment / 32).max(1);
    let (f32, bf16) = (FloatType::F32, FloatType::Bf16);
    let rules = [
        (512, token_choice(None), f32),
        (512, EXPERT_CHOICE, bf16),
        (512, mass, f32),
        (odd, mass, f32),
        (odd - odd % 2, mass, FloatType::F16),
    ];
    // A software driver takes seconds to compile a matmul; subgroups change none of the kernels that this is about.
    for variant in Variant::all(&gpu.device).into_iter().filter(|v| !v.subgroups) {
        let devices =
            [&small, &gpu].map(|gpu| (gpu, Context::with_variant(&gpu.device, variant).unwrap()));
        let rules = if variant.target == Target::Wide { &rules[..2] } else { &rules[..] };
        for &(hidden, routing, float_type) in rules {
            let what = format!("{variant:?} D {hidden} {routing:?} {float_type:?}");
            let host = HostLayer::new(config(hidden, routing));
            let x = random(3, (tokens * hidden) as usize);
            assert!(x.len() as u64 * float_type.bytes() > 3 * LIMIT / (4 / float_type.bytes()));
            let [(got, dispatches), (want, fewer)] = devices.each_ref().map(|(gpu, ctx)| {
                run(
                    gpu,
                    &host.layer_as(ctx, &gpu.queue, WeightType::Bf16, None).unwrap(),
                    (&x, float_type),
                    tokens,
                )
            });
            assert!(dispatches > 2 * fewer, "{what}: {dispatches} dispatches, {fewer} at once");
            assert_same(&got, &want, &what);
        }
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let Some(gpu) = gpu() else { return };
    let small = small(&gpu, 16 << 10);
    let ctx = Context::new(&small.device).unwrap();
    let host = HostLayer::new(config(64, Routing::TokenChoice(TOKEN_CHOICE)));
    let layer = host.layer_as(&ctx, &small.queue, WeightType::Bf16, None).unwrap();
    for (tokens, argument) in [(400, "logits"), (40, "tokens"), (300, "plan")] {
        let b = small.upload(&vec![0f32; 2 * 64 * tokens as usize]);
        let bytes = 256 * u64::from(tokens);
        let [hidden, out] = [0, bytes].map(|at| wgmoe::Slice::new(&b, at, bytes));
        match layer.bind(&Batch::new(hidden, tokens).into_out(out)) {
            Err(Error::Limit { name, .. }) => assert_eq!(name, argument, "{tokens} tokens"),
            other => panic!("{tokens} tokens: {other:?}"),
        }
    }
}

#[test]
fn page_limits_give_equal_bits() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    // 2.6 MB a matrix in f32: columns of one expert in a page, several experts, all of them.
    let config = {
        let mut config = config(1024, Routing::TokenChoice(TOKEN_CHOICE));
        config.hidden = 1024;
        config.intermediate = 640;
        config.experts = 9;
        config
    };
    let host = HostLayer::new(config);
    let tokens = 33;
    let x = random(5, (tokens * config.hidden) as usize);
    let mut want = None;
    let mut pages = vec![];
    for limit in [128 << 20, 16 << 20, 1 << 20] {
        let layer = host.layer_as(&ctx, &gpu.queue, WeightType::F32, Some(limit)).unwrap();
        pages.push(layer.weights().page_counts());
        let (got, _) = run(&gpu, &layer, (&x, FloatType::F32), tokens);
        assert_same(&got, want.get_or_insert(got.clone()), &format!("pages of {limit} bytes"));
    }
    assert_eq!(pages, [[1, 1], [2, 2], [30, 30]]);
}

/// A whole layer of a model in bf16: `MODEL=llada2-mini cargo test --release --test suite full_size -- --ignored --nocapture`.
/// LLaDA2-flash takes 6.4 GB on the device.
#[test]
#[ignore = "takes gigabytes and minutes"]
fn full_size() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let name = std::env::var("MODEL").unwrap_or_else(|_| "llada2-mini".into());
    let limit = std::env::var("PAGE_LIMIT").ok().map(|v| v.parse().expect("PAGE_LIMIT: bytes"));
    let config = wgmoe::models::find(&name).expect("MODEL: a model's name").config;
    let (d, e) = (config.hidden as usize, config.experts as usize);
    let shape = config.expert_shape(WeightType::Bf16);
    let size = d * config.intermediate as usize;
    // Windows of one pool: no two matrices alike, no copy of each.
    let pool: Vec<half::bf16> = random(1, size + 3 * shape.experts as usize * 1009)
        .into_iter()
        .map(|v| half::bf16::from_f32(v * 0.03))
        .collect();
    let matrix = |e: u32, p| {
        let place = 3 * e as usize + Projection::ALL.iter().position(|&q| q == p).unwrap();
        HostWeights::Bf16(&pool[place * 1009..][..size])
    };
    let start = std::time::Instant::now();
    let weights = ExpertWeights::with_page_limit(&ctx, shape, limit.unwrap_or(u64::MAX)).unwrap();
    for e in 0..shape.experts {
        for p in Projection::ALL {
            weights.write(&gpu.queue, e, p, matrix(e, p)).unwrap();
        }
        gpu.queue.submit([]);
        gpu.wait().unwrap();
    }
    eprintln!(
        "{name}: {} bytes in {:?} pages, {:?}",
        weights.bytes(),
        weights.page_counts(),
        start.elapsed()
    );
    let router = HostLayer::new({
        let mut config = config;
        config.intermediate = 1;
        config
    })
    .router(&ctx)
    .unwrap();
    let layer = MoeLayer::new(&ctx, config, router, weights).unwrap();
    for tokens in [32, 512, 4096] {
        let x = random(u64::from(tokens), tokens as usize * d);
        let (hidden, out) = (gpu.upload(&x), Output::f32s(&gpu, x.len()));
        let step = layer.bind(&Batch::new(&hidden, tokens).into_out(out.slice())).unwrap();
        let start = std::time::Instant::now();
        gpu.run_layer(&step).unwrap();
        let (elapsed, count) = (start.elapsed(), step.dispatches().count());
        eprintln!("{tokens} tokens: {elapsed:?}, {count} dispatches, binding limit {}", {
            gpu.device.limits().max_storage_buffer_binding_size
        });
        let got: Vec<f32> = out.get(&gpu);
        let assigned: Vec<u32> = gpu.download(step.assigned().unwrap()).unwrap();
        let gates: Vec<f32> = gpu.download(step.gates().unwrap()).unwrap();
        for t in [0, tokens as usize / 2, tokens as usize - 1] {
            let chosen = chosen(&assigned, &gates, [tokens as usize, e], t);
            assert!(!chosen.is_empty());
            let want = cpu_token(&config, &matrix, &x[t * d..][..d], &chosen);
            let what = format!("{name}, {tokens} tokens, token {t}");
            testkit::prelude::assert_close(
                &got[t * d..][..d],
                &want,
                2e-5 * largest(&want),
                2e-5,
                &what,
            );
        }
    }
}
