//! Backward of the gates, and the losses of a router.
use crate::plans::planned;
use crate::timing::{Bench, pairs};
use criterion::{Criterion, Throughput};
use testkit::compare::close;
use testkit::works::{INDEX, SCORES, TABLE, chosen, fill, mix};
use wgmoe::Score;
use wgmoe::ops::gates_backward::{self, GatesBackward, Rule};
use wgmoe::ops::plan_count::Scales;
use wgmoe::ops::{balance_loss, bias_update, cross_entropy, loss_sum, router_loss};
use wgmoe::plan::bits;
use wgmoe::routing::GateRule;

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
                    scales: Scales::default(),
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
