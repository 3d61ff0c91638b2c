//! What a recorded step of a layer costs beside its work: dispatches, and nothing made.
use testkit::compare::largest;
use testkit::layer::HostLayer;
use testkit::prelude::{assert_close, contexts, gpu, random};
use testkit::rules::every_block_rule;
use wgmoe::layer::{Batch, MoeLayer};
use wgmoe::measure::tune::{Candidate, tune};
use wgmoe::routing::{ExpertChoice, Score, TokenChoice};
use wgmoe::{BlockRule, Context, Gpu, LayerConfig, Routing, Target, Variant, WeightType};

const HIDDEN: u32 = 64;
const EXPERTS: u32 = 40;

fn expert_choice() -> Routing {
    Routing::ExpertChoice(ExpertChoice::new(3).with_score(Score::Sigmoid))
}

fn block(rule: BlockRule) -> Routing {
    Routing::TokenChoice(
        TokenChoice::new(4).with_score(Score::Sigmoid).with_scale(2.5).with_coreset(rule),
    )
}

fn host(routing: Routing) -> HostLayer {
    let config = LayerConfig::new(HIDDEN, 64, EXPERTS, routing).with_shared_experts(1);
    HostLayer::new(config).with_bias()
}

fn layer(gpu: &Gpu, ctx: &Context, routing: Routing, page_limit: Option<u64>) -> MoeLayer {
    host(routing).layer_as(ctx, &gpu.queue, WeightType::Bf16, page_limit).unwrap()
}

/// Router logits, shared experts and combination included.
#[test]
fn dispatches_are_few() {
    let Some(gpu) = gpu() else { return };
    let blocks = every_block_rule(EXPERTS, 4).map(|rule| (12, block(rule)));
    let rules: Vec<_> = [(9, expert_choice())].into_iter().chain(blocks).collect();
    for ctx in contexts(&gpu) {
        for &(most, routing) in &rules {
            for page_limit in [None, Some(64 * 64 * 2 * 10)] {
                let layer = layer(&gpu, &ctx, routing, page_limit);
                let [first, second] = layer.weights().page_counts();
                assert_eq!((first, second), if page_limit.is_none() { (1, 1) } else { (5, 5) });
                for tokens in [1, 8, 32, 33, 500] {
                    let [x, out] =
                        [0, 1].map(|_| gpu.upload(&vec![0f32; (tokens * HIDDEN) as usize]));
                    let batch = Batch::new(&x, tokens).into_out(&out);
                    let step = layer.bind(&batch).unwrap();
                    // Both matmuls, once for each page and kind of item: skinny ones alone up to 8
                    // tokens, no tiles up to 32 where there are small ones.
                    let Variant { target, matrix, small_items, .. } = ctx.variant();
                    let small = small_items && !matrix && target == Target::Wide;
                    let shapes = match tokens {
                        0..=8 => 1,
                        33.. if small => 3,
                        _ => 2,
                    };
                    let allowed = most - 2 + (first + second) * shapes;
                    let names: Vec<_> = step.dispatches().map(|d| d.name()).collect();
                    assert!(
                        names.len() <= allowed,
                        "{routing:?}, {tokens} tokens: {} dispatches, at most {allowed}: {names:?}",
                        names.len()
                    );
                }
            }
        }
    }
}

#[test]
fn recording_makes_nothing() {
    if gpu().is_none() {
        return;
    }
    // A device of its own: the counters are the device's, and other tests run meanwhile.
    let gpu = Gpu::new().unwrap();
    let ctx = Context::new(&gpu.device).unwrap();
    for routing in [expert_choice(), block(BlockRule::Capacity(12))] {
        let layer = layer(&gpu, &ctx, routing, None);
        let tokens = 40;
        let [x, out] = [0, 1].map(|_| gpu.upload(&vec![0f32; (tokens * HIDDEN) as usize]));
        let step = layer.bind(&Batch::new(&x, tokens).into_out(&out)).unwrap();
        let made = || {
            let hal = gpu.device.get_internal_counters().hal;
            [
                hal.buffers.read(),
                hal.bind_groups.read(),
                hal.bind_group_layouts.read(),
                hal.compute_pipelines.read(),
                hal.shader_modules.read(),
            ]
        };
        let before = made();
        assert!(before.iter().all(|&n| n > 0), "the counters count: {before:?}");
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        for _ in 0..3 {
            step.encode(&mut encoder);
        }
        assert_eq!(made(), before, "{routing:?}");
    }
}

#[test]
fn the_device_chooses_among_equals() {
    let Some(gpu) = gpu() else { return };
    let ctx = contexts(&gpu).pop().unwrap();
    let layer = layer(&gpu, &ctx, expert_choice(), None);
    let tokens = 33;
    let values = random(5, (tokens * HIDDEN) as usize);
    let (x, out) = (gpu.upload(&values), gpu.upload(&vec![7f32; values.len()]));
    let batch = Batch::new(&x, tokens).into_out(&out);
    let tuning = tune(&layer, &gpu.queue, &batch).unwrap();

    let mut found: Vec<Variant> = tuning.candidates.iter().map(|c| c.variant).collect();
    assert_eq!(found[0], ctx.variant(), "the layer's own comes first");
    let mut all = Variant::all(&gpu.device);
    found.sort_by_key(|v| format!("{v:?}"));
    all.sort_by_key(|v| format!("{v:?}"));
    assert_eq!(found, all);
    // `agrees` lets a token in eight differ; here no value lies so close to another that a choice
    // may fall otherwise.
    let equal = |c: &Candidate| c.agrees && c.tokens_apart == 0 && c.difference <= 1e-5;
    assert!(tuning.candidates.iter().all(|c| equal(c) && c.ms > 0.0), "{tuning:?}");
    let best = tuning.candidates.iter().find(|c| c.variant == tuning.variant).unwrap();
    assert!(tuning.candidates.iter().all(|c| best.ms <= c.ms), "{tuning:?}");
    assert_eq!(gpu.download::<f32>(&out).unwrap(), vec![7f32; values.len()], "not written to");

    // Kept, and given back.
    let kept = serde_json::to_string(&tuning.variant).unwrap();
    let variant: Variant = serde_json::from_str(&kept).unwrap();
    assert_eq!(variant, tuning.variant);
    let tuned = Context::with_variant(&gpu.device, variant).unwrap();
    gpu.run_layer(&layer.with_context(&tuned).unwrap().bind(&batch).unwrap()).unwrap();
    let want = host(expert_choice()).stored_as(WeightType::Bf16).twin(&values);
    let got: Vec<f32> = gpu.download(&out).unwrap();
    assert_close(&got, &want, 2e-5 * largest(&want), 1e-4, &kept);

    let none = {
        let mut batch = batch;
        batch.tokens = 0;
        batch
    };
    assert!(tune(&layer, &gpu.queue, &none).unwrap_err().to_string().contains("tokens"));
}
