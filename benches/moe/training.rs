//! Backward of the gates, the losses of a router, and training steps of whole layers.
use crate::plans::planned;
use crate::timing::{Bench, Pass, Ready, pairs};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use testkit::cases::random;
use testkit::compare::close;
use testkit::golden::expert_gradients;
use testkit::layer::HostLayer;
use testkit::works::{INDEX, SCORES, TABLE, chosen, fill, mix};
use wgmoe::layer::{Batch, LayerConfig, TrainingBatch};
use wgmoe::ops::gates_backward::{self, GatesBackward, Rule};
use wgmoe::ops::plan_count::Scales;
use wgmoe::ops::{balance_loss, bias_update, cross_entropy, loss_sum, router_loss};
use wgmoe::plan::bits;
use wgmoe::routing::{ExpertChoice, GateRule, TokenChoice};
use wgmoe::weights::ExpertGradients;
use wgmoe::{Context, Score, WeightType};

/// Tokens, experts, experts of each token.
const SIZES: [(&str, [u32; 3]); 2] =
    [("EC-DLM T512 E512 K20", [512, 512, 20]), ("T4096 E256 K8", [4096, 256, 8])];

pub(super) fn bench_gates_backward(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("gates_backward");
    for (name, [tokens, experts, k]) in SIZES {
        for gate in [GateRule::Softmax, GateRule::Unnormalised] {
            let name = format!("{name} {gate:?}");
            bench.case(&mut group, &name, &bench.contexts, pairs(tokens, experts), |ctx, what| {
                let gpu = &bench.gpu;
                let (logits, assigned) = chosen(tokens, experts, k);
                let planned = planned(bench, ctx, [tokens, experts], &logits, &assigned, what);
                let dgates = fill(TABLE, planned.shape.slots().unwrap(), 1.0);
                let source = fill(SCORES, tokens * experts, 1.0);
                let [dgates_in, source_in] = [&dgates, &source].map(|v| gpu.upload(v));
                let (chosen_in, out) = (gpu.upload(&assigned), bench.poisoned(tokens * experts));
                let rule = Rule { gate, score: Score::Softmax, scale: 1.0 };
                let args = gates_backward::Args {
                    dgates: (&dgates_in).into(),
                    plan: (&planned.plan).into(),
                    chosen: (&chosen_in).into(),
                    source: (&source_in).into(),
                    scales: Scales { scale_by_count: None, scale_by_expert: None },
                    dlogits: (&out).into(),
                };
                let step =
                    GatesBackward::new(ctx).unwrap().bind(&planned.shape, rule, args).unwrap();
                gpu.run(&step).unwrap();
                let (plan, e) = (&planned.host, experts as usize);
                let want = gates_backward::cpu(
                    plan,
                    &dgates,
                    &assigned,
                    &source,
                    e,
                    rule,
                    Scales::default(),
                );
                close(&bench.download(&out), &want, 1e-4, 1e-4, what).unwrap();
                step.into()
            });
        }
    }
}

pub(super) fn bench_router_loss(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("router_loss");
    for (name, [tokens, experts, k]) in SIZES {
        bench.case(&mut group, name, &bench.contexts, pairs(tokens, experts), |ctx, what| {
            let gpu = &bench.gpu;
            let (logits, assigned) = chosen(tokens, experts, k);
            let counts: Vec<u32> = (0..experts as usize)
                .map(|e| bits::tokens_of(&assigned, tokens as usize, e).len() as u32)
                .collect();
            let (logits_in, counts_in) = (gpu.upload(&logits), gpu.upload(&counts));
            let out = bench.poisoned(tokens * experts);
            let (terms, values) = (bench.poisoned(2 * tokens), gpu.upload(&[0f32; 2]));
            let dims = router_loss::Dims { tokens, experts, experts_per_token: k };
            let of = router_loss::Coefficients { router_z: 1.0, balance: 100.0 };
            let args = router_loss::Args {
                logits: (&logits_in).into(),
                counts: Some(router_loss::Counts::Given((&counts_in).into())),
                dropped: None,
                dlogits: (&out).into(),
                add: false,
                terms: (&terms).into(),
                values: (&values).into(),
                add_values: false,
            };
            let step = router_loss::RouterLoss::new(ctx).unwrap().bind(&dims, of, args).unwrap();
            gpu.run(&step).unwrap();
            let (values_of, want) = router_loss::cpu(&dims, of, &logits, &counts);
            close(&bench.download(&out), &want, 1e-5, 1e-4, what).unwrap();
            close(&bench.download(&values), &values_of, 1e-5, 1e-4, what).unwrap();
            step.into()
        });
    }
}

pub(super) fn bench_balance_loss(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("balance_loss");
    for (name, [tokens, experts, k]) in SIZES {
        bench.case(&mut group, name, &bench.contexts, pairs(tokens, experts), |ctx, what| {
            let gpu = &bench.gpu;
            let logits = fill(SCORES, tokens * experts, 1.0);
            let taken: Vec<u32> = (0..tokens).map(|t| mix(INDEX, t) % (2 * k)).collect();
            let (logits_in, taken_in) = (gpu.upload(&logits), gpu.upload(&taken));
            let out = bench.poisoned(tokens * experts);
            let (terms, values) = (bench.poisoned(experts), gpu.upload(&[0f32; 2]));
            let dims = balance_loss::Dims { tokens, experts, experts_per_token: k };
            let args = balance_loss::Args {
                logits: (&logits_in).into(),
                taken: balance_loss::Taken::Given((&taken_in).into()),
                dlogits: (&out).into(),
                add: false,
                terms: (&terms).into(),
                values: (&values).into(),
                add_values: false,
            };
            let op = balance_loss::BalanceLoss::new(ctx).unwrap();
            let step = op.bind(&dims, 1000.0, args).unwrap();
            gpu.run(&step).unwrap();
            let (_, want) = balance_loss::cpu(&dims, 1000.0, &logits, &taken);
            close(&bench.download(&out), &want, 1e-5, 1e-4, what).unwrap();
            step.into()
        });
    }
}

pub(super) fn bench_cross_entropy(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("cross_entropy");
    for (name, tokens, classes) in [("T512 V256", 512u32, 256u32), ("T64 V32000", 64, 32_000)] {
        bench.case(&mut group, name, &bench.contexts, pairs(tokens, classes), |ctx, what| {
            let gpu = &bench.gpu;
            let logits = fill(SCORES, tokens * classes, 1.0);
            let targets: Vec<u32> = (0..tokens).map(|t| mix(INDEX, t) % classes).collect();
            let weights = vec![1.0 / tokens as f32; tokens as usize];
            let [logits_in, weights_in] = [&logits, &weights].map(|v| gpu.upload(v));
            let targets_in = gpu.upload(&targets);
            let (out, losses) = (bench.poisoned(tokens * classes), bench.poisoned(tokens));
            let value = gpu.upload(&[0f32]);
            let args = cross_entropy::Args {
                logits: (&logits_in).into(),
                targets: (&targets_in).into(),
                weights: (&weights_in).into(),
                dlogits: (&out).into(),
                losses: (&losses).into(),
                value: (&value).into(),
            };
            let dims = cross_entropy::Dims { tokens, classes };
            let step = cross_entropy::CrossEntropy::new(ctx).unwrap().bind(&dims, args).unwrap();
            gpu.run(&step).unwrap();
            let (of_rows, want) = cross_entropy::cpu(&logits, classes as usize, &targets, &weights);
            close(&bench.download(&out), &want, 1e-6, 1e-4, what).unwrap();
            close(&bench.download(&losses), &of_rows, 1e-6, 1e-4, what).unwrap();
            step.into()
        });
    }
}

pub(super) fn bench_loss_sum(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("loss_sum");
    for (name, count) in [("T512", 512u32), ("T65536", 65_536)] {
        let throughput = Throughput::Elements(count.into());
        bench.case(&mut group, name, &bench.contexts[..1], throughput, |ctx, what| {
            let terms = fill(TABLE, count, 1.0);
            let (terms_in, values) = (bench.gpu.upload(&terms), bench.gpu.upload(&[0f32]));
            let args =
                loss_sum::Args { terms: (&terms_in).into(), values: (&values).into(), add: false };
            let dims = loss_sum::Dims { first: 0, count, at: 0, scale: 1.0 };
            let step = loss_sum::LossSum::new(ctx).unwrap().bind(&dims, args).unwrap();
            bench.gpu.run(&step).unwrap();
            let want = [loss_sum::cpu(&terms, 1.0)];
            close(&bench.download(&values), &want, 1e-2, 1e-4, what).unwrap();
            step.into()
        });
    }
}

pub(super) fn bench_bias_update(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("bias_update");
    for (name, experts) in [("E64", 64u32), ("E512", 512)] {
        let throughput = Throughput::Elements(experts.into());
        bench.case(&mut group, name, &bench.contexts[..1], throughput, |ctx, what| {
            let gpu = &bench.gpu;
            let counts: Vec<u32> = (0..experts).map(|e| mix(INDEX, e) % 64).collect();
            let mut want = fill(TABLE, experts, 1.0);
            let (counts_in, bias_in) = (gpu.upload(&counts), gpu.upload(&want));
            let args = bias_update::Args { counts: (&counts_in).into(), bias: (&bias_in).into() };
            let op = bias_update::BiasUpdate::new(ctx).unwrap();
            let step = op.bind(experts, 0.001, args).unwrap();
            gpu.run(&step).unwrap();
            bias_update::cpu(&mut want, &counts, 0.001);
            close(&bench.download(&bias_in), &want, 0.0, 0.0, what).unwrap();
            step.into()
        });
    }
}

/// Forward, backward and both, of one layer of experts that all learn. Elements are tokens.
pub(super) fn bench_training(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("training");
    group.sampling_mode(SamplingMode::Flat);
    let by_tokens = TokenChoice::new(4).with_gate(GateRule::Softmax);
    let cases: [(&str, u32, LayerConfig); 2] = [
        ("T512 E32 K4 D128 F96", 512, LayerConfig::new(128, 96, 32, by_tokens)),
        ("T512 E64 k8 D512 F384", 512, LayerConfig::new(512, 384, 64, ExpertChoice::new(8))),
    ];
    for (name, tokens, config) in cases {
        for (variant, ctx) in bench.best() {
            let ids = ["forward", "backward", "both"]
                .map(|pass| BenchmarkId::new(format!("{name} {pass}"), variant));
            bench.turns(&mut group, ids.into(), Throughput::Elements(tokens.into()), || {
                let [forward, backward] = training(bench, ctx, tokens, config, name);
                let both = vec![forward.clone(), backward.clone()];
                vec![
                    Ready::Training(vec![forward]),
                    Ready::Training(vec![backward]),
                    Ready::Training(both),
                ]
            });
        }
    }
}

/// The passes of a training step, run once; the output compared in two tokens.
fn training(
    bench: &Bench,
    ctx: &Context,
    tokens: u32,
    config: LayerConfig,
    what: &str,
) -> [Pass; 2] {
    let (gpu, d) = (&bench.gpu, config.hidden as usize);
    let host = HostLayer::new(config);
    let layer = host.layer_as(ctx, &gpu.queue, WeightType::F32, None).unwrap();
    let size = tokens * config.hidden;
    let (hidden, dout) = (random(1, size as usize), random(2, size as usize));
    let [hidden_in, dout_in] = [&hidden, &dout].map(|v| gpu.upload(v));
    let [out, dhidden] = [(); 2].map(|()| bench.poisoned(size));
    let drouter = bench.poisoned(config.experts * config.hidden);
    let gradients = ExpertGradients::new(ctx, &layer.weights().shape()).unwrap();
    let of = TrainingBatch::new(Batch::new(&hidden_in, tokens).into_out(&out), &dout_in, &dhidden)
        .with_router_gradient(&drouter)
        .with_expert_gradients(&gradients);
    let (forward, backward) = layer.bind_training(&of).unwrap();
    let mut encoder = gpu.device.create_command_encoder(&Default::default());
    forward.encode(&mut encoder);
    backward.encode(&mut encoder).unwrap();
    gpu.queue.submit([encoder.finish()]);

    let got: Vec<f32> = bench.download(&out);
    let [bits, gates] = [forward.assigned(), forward.gates()].map(|slice| slice.unwrap());
    let (assigned, gates): (Vec<u32>, Vec<f32>) =
        (gpu.download(bits).unwrap(), gpu.download(gates).unwrap());
    let counts = [tokens as usize, config.experts as usize];
    for t in [0, tokens as usize - 1] {
        let chosen = testkit::layer::chosen(&assigned, &gates, counts, t);
        let want = host.token(&hidden[t * d..][..d], &chosen);
        close(&got[t * d..][..d], &want, 1e-3, 1e-4, what).unwrap();
    }
    let all = [bench.download(&dhidden), bench.download(&drouter)].concat();
    let of_experts = expert_gradients(gpu, &gradients).unwrap().concat().concat();
    assert!(all.iter().chain(&of_experts).all(|v| v.is_finite()), "{what}: not finite");
    [Pass::Forward(Box::new(forward)), Pass::Backward(backward)]
}
