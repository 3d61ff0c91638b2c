//! Long batches within a limit of scratch: the same bits as without one.
use super::limits::small;
use testkit::layer::{HostLayer, router};
use testkit::prelude::*;
use testkit::rules::every_rule;
use wgmoe::layer::cached::{CacheOptions, CachedLayer};
use wgmoe::layer::{Batch, LayerConfig, MoeLayer, MoeRouting, Scratch};
use wgmoe::models::find;
use wgmoe::routing::{Routing, Score, TokenChoice};
use wgmoe::{
    Context, Error, ExpertWeights, FloatType, Floats, Gpu, Slice, Target, Variant, WeightType, wgpu,
};

const K: u32 = 3;

fn config(hidden: u32, routing: Routing) -> LayerConfig {
    LayerConfig::new(hidden, 40, 12, routing).with_shared_experts(1)
}

fn token_choice() -> Routing {
    TokenChoice::new(K).with_score(Score::Sigmoid).with_scale(2.5).into()
}

/// What a batch is, beside its limit.
#[derive(Clone, Copy, Debug)]
struct Form {
    float_type: FloatType,
    add: bool,
    active: bool,
}

/// The output, the dispatches and the scratch of a layer under a limit.
fn run(
    gpu: &Gpu,
    layer: &MoeLayer,
    (x, tokens): (&[f32], u32),
    form: Form,
    limit: Option<u64>,
) -> Result<(Vec<u32>, usize, u64), Error> {
    let Form { float_type, add, active } = form;
    let before: Vec<f32> = x.iter().map(|v| 1.0 - v).collect();
    let hidden = gpu.upload(&float_type.encode(x));
    let out = Output::holding(gpu, &float_type.encode(&before));
    let active_bits = gpu.upload(&vec![0xdb6d_b6db_u32; tokens.div_ceil(32) as usize]);
    let scratch = Scratch::new(layer.context());
    let mut batch = Batch::new(Floats::new(&hidden, float_type), tokens).with_scratch(&scratch);
    let floats = Floats::new(out.slice(), float_type);
    batch = if add { batch.added_to(floats) } else { batch.into_out(floats) };
    if active {
        batch = batch.with_active(&active_bits);
    }
    if let Some(limit) = limit {
        batch = batch.with_scratch_limit(limit);
    }
    let bound = layer.bind(&batch)?;
    gpu.run_layer(&bound).unwrap();
    Ok((out.get(gpu), bound.dispatches().count(), scratch.bytes()))
}

/// The least limit, as the error for too small a one says.
fn least(error: &Error) -> u64 {
    let Error::Invalid { name: "scratch_limit", reason } = error else { panic!("{error}") };
    let words: Vec<&str> = reason.split(' ').collect();
    assert_eq!(words[1..4], ["bytes,", "at", "least"], "{reason}");
    words[4].parse().unwrap()
}

fn check(gpu: &Gpu, layer: &MoeLayer, x: &[f32], tokens: u32, form: Form, what: &str) {
    let of = |limit| run(gpu, layer, (x, tokens), form, limit);
    let (want, at_once, bytes) = of(None).unwrap();
    let least = least(&of(Some(1)).unwrap_err());
    assert!(least < bytes, "{what}: {least} of {bytes}");
    let mut last = at_once;
    for limit in [bytes, (bytes + least) / 2, least + (bytes - least) / 8, least] {
        let what = format!("{what}, {limit} of {bytes} bytes");
        let (got, dispatches, taken) = of(Some(limit)).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_same(&got, &want, &what);
        assert!(taken <= limit, "{what}: {taken} taken");
        last = dispatches;
    }
    assert_ne!(last, at_once, "{what}: dispatches");
    assert!(of(Some(least - 1)).is_err(), "{what}");
}

const FORMS: [Form; 4] = [
    Form { float_type: FloatType::F32, add: false, active: false },
    Form { float_type: FloatType::F32, add: true, active: true },
    Form { float_type: FloatType::Bf16, add: false, active: true },
    Form { float_type: FloatType::Bf16, add: true, active: false },
];

#[test]
fn equal_bits_whatever_the_limit() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu).into_iter().filter(|ctx| !ctx.variant().subgroups) {
        for (i, (name, routing)) in every_rule(token_choice(), 12).into_iter().enumerate() {
            let host = HostLayer::new(config(64, routing));
            let layer = host.layer(&ctx, &gpu.queue).unwrap();
            let tokens = 300;
            let x = random(3, tokens as usize * 64);
            // All forms of the first rule, one of each other.
            for form in if i == 0 { &FORMS[..] } else { &FORMS[i % 4..][..1] } {
                let what = format!("{name}, {}, {form:?}", variant_name(&ctx));
                check(&gpu, &layer, &x, tokens, *form, &what);
            }
        }
    }
}

/// Hidden states and outputs in several bindings: rows are copied turn by turn.
#[test]
fn windows_of_turns() {
    let Some(gpu) = gpu() else { return };
    let small = small(&gpu, 96 << 10);
    let ctx = Context::new(&small.device).unwrap();
    for (hidden, forms) in [(256, &FORMS[..2]), (508, &FORMS[2..])] {
        let config = LayerConfig::new(hidden, 256, 12, token_choice()).with_shared_experts(1);
        let host = HostLayer::new(config);
        let layer = host.layer_as(&ctx, &small.queue, WeightType::Bf16, None).unwrap();
        let tokens = 180;
        let x = random(4, (tokens * hidden) as usize);
        for &form in forms {
            check(&small, &layer, &x, tokens, form, &format!("D {hidden}, {form:?}"));
        }
    }
}

/// Prefills of 16,384 tokens, whose hidden states fill a binding of 128 MiB, and of 65,536.
#[test]
fn long_prefills() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let wide = LayerConfig::new(2048, 64, 16, TokenChoice::new(2));
    let narrow = LayerConfig::new(64, 32, 8, TokenChoice::new(2));
    for (config, tokens, limit) in [(wide, 16_384, 48 << 20), (narrow, 65_536, 20 << 20)] {
        let host = HostLayer::new(config);
        let layer = host.layer_as(&ctx, &gpu.queue, WeightType::Bf16, None).unwrap();
        let few = random(5, 64 * config.hidden as usize);
        let all = (tokens * config.hidden) as usize;
        let x: Vec<f32> = few.iter().cycle().take(all).copied().collect();
        let form = FORMS[0];
        let (want, at_once, bytes) = run(&gpu, &layer, (&x, tokens), form, None).unwrap();
        assert!(bytes > 2 * limit, "{bytes}");
        let (got, dispatches, taken) = run(&gpu, &layer, (&x, tokens), form, Some(limit)).unwrap();
        assert_same(&got, &want, &format!("{tokens} tokens"));
        assert!(taken <= limit, "{taken}");
        // The tokens repeat themselves, 64 of them, so that every expert has whole tiles: one kernel, equal bits.
        assert_same(&got[all - few.len()..], &got[..few.len()], "the last 64 tokens");
        println!("{tokens} tokens: {at_once} dispatches, {bytes} bytes; {dispatches}, {taken}");
    }
}

/// 65,536 tokens of LLaDA2.0-mini's shape in one bind on WebGPU's default bindings: what it records and takes.
#[test]
fn very_long_batches_are_bound_at_once() {
    // Buffers of 512 MiB, bindings of 128.
    let required_limits = wgpu::Limits { max_buffer_size: 1 << 30, ..wgpu::Limits::default() };
    let (device, _) =
        wgpu::Device::noop(&wgpu::DeviceDescriptor { required_limits, ..Default::default() });
    assert_eq!(device.limits().max_storage_buffer_binding_size, 128 << 20);
    // A software driver's kinds of items, and a GPU's, which has small ones as well.
    for (what, small_items, most) in
        [("software drivers", false, [40, 200, 600]), ("GPUs", true, [50, 250, 750])]
    {
        let target = if small_items { Target::Wide } else { Target::Serial };
        let variant = Variant { target, small_items, ..Variant::PORTABLE };
        bind_very_long(what, &Context::with_variant(&device, variant).unwrap(), most);
    }
}

fn bind_very_long(what: &str, ctx: &Context, most: [usize; 3]) {
    let config = find("llada2-mini").unwrap().with_experts(64);
    let weights = ExpertWeights::new(ctx, config.expert_shape(WeightType::Bf16)).unwrap();
    let router_weight = vec![0.0; (config.experts * config.hidden) as usize];
    let bias = vec![0.0; config.experts as usize];
    let router = router(ctx, &router_weight, Some(&bias)).unwrap();
    let layer = MoeLayer::new(ctx, config, router, weights).unwrap();
    let lengths = [(512u32, 64u64 << 20), (16_384, 192 << 20), (65_536, 512 << 20)];
    for ((tokens, limit), most) in lengths.into_iter().zip(most) {
        let bytes = 4 * u64::from(tokens) * u64::from(config.hidden);
        let [x, out] = [0; 2].map(|_| {
            ctx.device().create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: bytes,
                usage: wgpu::BufferUsages::STORAGE,
                mapped_at_creation: false,
            })
        });
        let scratch = Scratch::new(ctx);
        let batch = Batch::new(&x, tokens).into_out(&out).with_scratch(&scratch);
        let bound = layer.bind(&batch.with_scratch_limit(limit)).unwrap();
        let dispatches = bound.dispatches().count();
        println!("{what}, {tokens} tokens: {dispatches} dispatches, {} bytes", scratch.bytes());
        assert!(scratch.bytes() <= limit, "{tokens} tokens: {}", scratch.bytes());
        assert!(dispatches <= most, "{what}, {tokens} tokens: {dispatches} dispatches");
    }
}

#[test]
fn what_has_no_turns() {
    let Some(gpu) = gpu() else { return };
    let ctx = Context::new(&gpu.device).unwrap();
    let host = std::sync::Arc::new(HostLayer::new(config(64, token_choice())));
    let b = gpu.upload(&vec![0f32; 2 * 64 * 20]);
    let [hidden, out] = [0, 5120].map(|at| Slice::new(&b, at, 5120));
    let batch = Batch::new(hidden, 20).with_scratch_limit(1 << 20);
    let op = MoeRouting::new(&ctx, host.config, host.router(&ctx).unwrap()).unwrap();
    let error = op.bind(&batch).unwrap_err().to_string();
    assert!(error.starts_with("`scratch_limit`"), "{error}");
    let (router, options) = (host.router(&ctx).unwrap(), CacheOptions::new(1 << 20));
    let cached =
        CachedLayer::new(&ctx, &gpu.queue, host.config, router, host.clone(), options).unwrap();
    let error = cached.bind(&batch.into_out(out)).unwrap_err().to_string();
    assert!(error.starts_with("`scratch_limit`"), "{error}");
}
