//! The whole layer against the CPU twins.
use testkit::compare::largest;
use testkit::layer::HostLayer;
use testkit::prelude::{Output, assert_close, assert_same, contexts, gpu, random};
use testkit::rules::{assert_every_kind, every_block_rule};
use wgmoe::layer::{Batch, HostBatch, LayerConfig, Sequences};
use wgmoe::plan::{HostPlan, Stats, bits};
use wgmoe::routing::{ExpertChoice, Normalise, Routing, Score, SequenceTop, TokenChoice};
use wgmoe::{Activation, Context, Gpu, WeightType};

const TOKEN_CHOICE: TokenChoice = TokenChoice::new(4).with_score(Score::Sigmoid).with_scale(2.5);

const EXPERT_CHOICE: ExpertChoice = ExpertChoice::new(3);

fn config(
    hidden: u32,
    intermediate: u32,
    experts: u32,
    shared_experts: u32,
    routing: Routing,
) -> LayerConfig {
    LayerConfig::new(hidden, intermediate, experts, routing).with_shared_experts(shared_experts)
}

struct Case {
    config: LayerConfig,
    weight_type: WeightType,
    page_limit: Option<u64>,
    tokens: u32,
    bias: bool,
}

/// Runs a layer, checks routing exactly and the output within tolerance, and returns the output.
fn check(gpu: &Gpu, ctx: &Context, case: &Case) -> Vec<f32> {
    let Case { config, tokens, .. } = *case;
    let (d, e) = (config.hidden as usize, config.experts as usize);
    let what = format!("{:?} {config:?} T {tokens} {:?}", ctx.variant(), case.weight_type);
    let host = HostLayer::new(config);
    let host = if case.bias { host.with_bias() } else { host };
    let layer = host.layer_as(ctx, &gpu.queue, case.weight_type, case.page_limit).unwrap();
    let host = host.stored_as(case.weight_type);
    let x = random(3, tokens as usize * d);
    let hidden = gpu.upload(&x);
    let out = Output::f32s(gpu, tokens as usize * d);
    let step = layer.bind(&Batch::new(&hidden, tokens).into_out(out.slice())).unwrap();
    let run = || {
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        step.encode(&mut encoder);
        gpu.queue.submit([encoder.finish()]);
        out.get::<f32>(gpu)
    };
    let got = run();
    assert_eq!(
        run().iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
        got.iter().map(|v| v.to_bits()).collect::<Vec<_>>(),
        "{what}: twice"
    );

    let [logits, s, r] = testkit::layer::selection(&step)
        .unwrap()
        .map(|t| gpu.download::<f32>(t.buffer).unwrap()[..tokens as usize * e].to_vec());
    let want_logits = wgmoe::ops::logits::cpu(&x, &host.router, d);
    assert_close(&logits, &want_logits, 1e-5 * (d as f32).sqrt(), 1e-5, &format!("{what}: logits"));
    let want = host.routing(HostBatch::default(), [&logits, &s, &r]);
    let assigned: Vec<u32> = gpu.download(step.assigned().unwrap().buffer).unwrap();
    assert_same(&assigned[..want.assigned.len()], &want.assigned, &format!("{what}: assigned"));
    if let Some(coreset) = &want.coreset {
        let got: Vec<u32> = gpu.download(step.coreset().unwrap().buffer).unwrap();
        assert_same(&got[..coreset.len()], coreset, &format!("{what}: coreset"));
    }
    let stats = Stats::from_words(&gpu.download::<u32>(step.stats().buffer).unwrap()).unwrap();
    let slots: u32 = want.assigned.iter().map(|w| w.count_ones()).sum();
    assert_eq!((stats.slots, stats.dropped), (slots, want.dropped.iter().sum()), "{what}: stats");

    let output = host.outputs(&x, &want.assigned, &want.gates);
    for (t, (got, want)) in got.chunks(d).zip(output.chunks(d)).enumerate() {
        let what = format!("{what}: token {t}");
        assert_close(got, want, 2e-5 * largest(want) + 1e-6, 2e-5, &what);
    }
    got
}

#[test]
fn matches_the_twins() {
    let Some(gpu) = gpu() else { return };
    let ec = Routing::ExpertChoice(EXPERT_CHOICE);
    let tc = Routing::TokenChoice(TOKEN_CHOICE);
    let grouped = Routing::TokenChoice(TOKEN_CHOICE.with_groups(4, 2));
    let dropping = Routing::TokenChoice(TOKEN_CHOICE.with_capacity_factor(1.0));
    let block = |rule| Routing::TokenChoice(TOKEN_CHOICE.with_coreset(rule));
    let pairs = Routing::SequenceTop(SequenceTop::new(4));
    let sigmoid = Routing::ExpertChoice(EXPERT_CHOICE.with_score(Score::Sigmoid));
    let before = Routing::ExpertChoice(EXPERT_CHOICE.with_normalise(Normalise::BeforeSelection));
    // A software driver takes seconds to compile a matmul: all rules with one weight type, all types with one rule.
    let mut rules = vec![
        (config(64, 32, 16, 1, tc), 40),
        (config(32, 48, 8, 2, ec), 130),
        (config(64, 32, 16, 0, grouped), 70),
        (config(64, 32, 12, 1, dropping), 50),
        (config(64, 32, 4, 0, sigmoid), 3),
        (config(64, 32, 6, 1, before), 9),
        (config(64, 32, 40, 1, pairs), 70),
    ];
    rules.extend(every_block_rule(40, 4).map(|rule| (config(64, 32, 40, 1, block(rule)), 70)));
    assert_every_kind(rules.iter().map(|(config, _)| &config.routing));
    let shapes = [
        (config(7, 5, 9, 1, ec), 33),
        (config(36, 20, 16, 0, tc), 70),
        (config(1, 1, 4, 0, tc), 1),
        (config(132, 68, 5, 0, tc), 65),
    ];
    for ctx in contexts(&gpu) {
        let start = std::time::Instant::now();
        let run = |(config, tokens), weight_type| {
            check(
                &gpu,
                &ctx,
                &Case { config, weight_type, page_limit: None, tokens, bias: tokens % 2 == 0 },
            );
        };
        for &case in rules.iter().chain(&shapes) {
            run(case, WeightType::F32);
        }
        for weight_type in [WeightType::F16, WeightType::Bf16] {
            run(rules[0], weight_type);
            run(shapes[0], weight_type);
        }
        eprintln!("{:?}: {} pipelines, {:?}", ctx.variant(), ctx.pipelines(), start.elapsed());
    }
}

#[test]
fn gelu_and_page_sizes() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for weight_type in [WeightType::F32, WeightType::Bf16] {
            let base = config(72, 96, 6, 1, Routing::TokenChoice(TOKEN_CHOICE));
            let config = base.with_activation(Activation::Gelu);
            let run = |page_limit| {
                check(&gpu, &ctx, &Case { config, weight_type, page_limit, tokens: 50, bias: true })
            };
            let whole = run(None);
            // Two experts a page; pages of one expert's columns.
            for limit in [2 * 96 * 72 * 4 + 100, 40 * 96 * 4] {
                assert_same(
                    &run(Some(limit)),
                    &whole,
                    &format!("{:?} page limit {limit}", ctx.variant()),
                );
            }
        }
    }
}

#[test]
fn a_cut_batch_adds_up_and_keeps_its_shared_expert() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts, d) = (64, 32, 16);
    let config = config(16, 8, experts, 1, Routing::ExpertChoice(ExpertChoice::new(4)));
    let host = HostLayer::new(config);
    let x = random(3, tokens as usize * d);
    let [hidden, offsets, capacity] =
        [gpu.upload(&x), gpu.upload(&[0, tokens]), gpu.upload(&[30u32])];
    for ctx in contexts(&gpu).into_iter().filter(|c| !c.variant().subgroups) {
        let what = format!("{:?}", ctx.variant());
        let layer = host.layer(&ctx, &gpu.queue).unwrap();
        let out = Output::f32s(&gpu, tokens as usize * d);
        // Experts take 30 tokens each; there is room for 8.
        let sequences = Sequences::new(1, &offsets).with_capacity(&capacity);
        let batch = Batch::new(&hidden, tokens).into_out(out.slice()).with_sequences(sequences);
        let step = layer.bind(&batch).unwrap();
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        step.encode(&mut encoder);
        gpu.queue.submit([encoder.finish()]);

        let stats = Stats::from_words(&gpu.download(step.stats()).unwrap()).unwrap();
        assert_eq!((stats.slots, stats.cut), (256, 704), "{what}");
        assert_eq!((stats.ignored, stats.dropped, stats.untouched), (0, 0, 0), "{what}");
        assert_eq!(stats.tokens_per_expert.iter().sum::<u32>(), 256, "{what}");

        let (shape, plan) = step.plan().unwrap();
        assert_eq!((shape.routed_slots, shape.slots().unwrap()), (256, 256 + tokens));
        let plan = HostPlan::from_words(&shape, &gpu.download(plan).unwrap()).unwrap();
        let assigned: Vec<u32> = gpu.download(step.assigned().unwrap()).unwrap();
        let gates: Vec<f32> = gpu.download(step.gates().unwrap()).unwrap();
        assert_eq!(plan, HostPlan::cpu(&shape, &assigned, &gates), "{what}");

        // What the plan holds, and the shared expert for every token.
        let lists: Vec<&[u32]> = plan
            .expert_offsets
            .windows(2)
            .take(experts as usize)
            .map(|span| &plan.token_of[span[0] as usize..span[1] as usize])
            .collect();
        let kept = bits::from_lists(tokens as usize, &lists);
        let want = host.outputs(&x, &kept, &gates);
        assert_close(&out.get(&gpu), &want, 2e-5 * largest(&want), 2e-5, &what);
    }
}
