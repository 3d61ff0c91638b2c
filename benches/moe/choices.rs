//! From logits to a choice.
use crate::timing::{Bench, Ready, columns, pairs};
use criterion::{Criterion, Throughput};
use testkit::compare::{close, same};
use testkit::works::{BIAS, CHOICES, SCORES, choice, fill};
use wgmoe::ops::{capacity, coreset, scores, sequence_top, token_choice};
use wgmoe::routing::schedule::{Schedule, ScheduleKind};
use wgmoe::routing::{BlockRule, Groups};
use wgmoe::{Context, Score};

pub(super) fn bench_scores(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("scores");
    for (name, tokens, experts, score) in [
        ("LLaDA2 sigmoid T32 E256", 32, 256, Score::Sigmoid),
        ("LLaDA2 sigmoid T512 E256", 512, 256, Score::Sigmoid),
        ("EC-DLM softmax T4096 E512", 4096, 512, Score::Softmax),
    ] {
        bench.case(&mut group, name, &bench.contexts, pairs(tokens, experts), |ctx, what| {
            let (logits, bias) = (fill(SCORES, tokens * experts, 8.0), fill(BIAS, experts, 0.1));
            let gpu = &bench.gpu;
            let (logits_in, bias_in) = (gpu.upload(&logits), gpu.upload(&bias));
            let [s, r] = [(); 2].map(|()| bench.poisoned(tokens * experts));
            let args = scores::Args {
                logits: (&logits_in).into(),
                bias: Some((&bias_in).into()),
                scores: (&s).into(),
                values: (&r).into(),
            };
            let op = scores::Scores::new(ctx).unwrap();
            let step =
                op.bind(&scores::Dims { tokens, experts, score, by_logits: false }, args).unwrap();
            gpu.run(&step).unwrap();
            let want = scores::cpu(&logits, experts as usize, score, false, Some(&bias));
            close(&bench.download(&s), &want.0, 1e-30, 1e-5, &format!("{what}: s")).unwrap();
            close(&bench.download(&r), &want.1, 1e-6, 1e-5, &format!("{what}: r")).unwrap();
            step.into()
        });
    }
}

pub(super) fn bench_expert_choice(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("expert_choice");
    for (name, shape) in CHOICES {
        bench.case(&mut group, name, &bench.contexts, pairs(shape[0], shape[1]), |ctx, what| {
            choice(&bench.gpu, ctx, shape).unwrap_or_else(|e| panic!("{what}: {e}")).into()
        });
    }
    group.finish();
    // How its time grows: with tokens at equal experts and an eighth of the tokens each, with
    // experts, with the capacity.
    for (axis, shapes) in [
        ("tokens", vec![[1024, 64, 128], [4096, 64, 512], [16384, 64, 2048], [65536, 64, 8192]]),
        (
            "tokens, 512 experts",
            vec![[1024, 512, 128], [4096, 512, 512], [16384, 512, 2048], [65536, 512, 8192]],
        ),
        ("experts", vec![[4096, 16, 512], [4096, 64, 512], [4096, 256, 512], [4096, 512, 512]]),
        ("capacity", vec![[4096, 64, 8], [4096, 64, 256], [4096, 64, 2048]]),
    ] {
        let mut group = c.benchmark_group(format!("expert_choice over {axis}"));
        for shape in shapes {
            let [tokens, experts, capacity] = shape;
            let name = format!("T{tokens} E{experts} C{capacity}");
            let best = &bench.contexts[..1];
            bench.case(&mut group, &name, best, pairs(tokens, experts), |ctx, what| {
                choice(&bench.gpu, ctx, shape).unwrap_or_else(|e| panic!("{what}: {e}")).into()
            });
        }
    }
}

pub(super) fn token_choice_step(
    bench: &Bench,
    ctx: &Context,
    [tokens, experts, top]: [u32; 3],
    groups: Option<Groups>,
    what: &str,
) -> Ready {
    let gpu = &bench.gpu;
    let r = fill(SCORES, tokens * experts, 1.0);
    let r_in = gpu.upload(&r);
    let assigned = bench.poisoned(experts * columns(tokens));
    let args = token_choice::Args {
        experts_per_token: None,
        values: (&r_in).into(),
        coresets: None,
        assigned: (&assigned).into(),
    };
    let op = token_choice::TokenChoice::new(ctx, experts, top, groups).unwrap();
    let step = op.bind(&token_choice::Dims { tokens }, args).unwrap();
    gpu.run(&step).unwrap();
    let want = token_choice::cpu(&r, experts as usize, top as usize, groups, &|_, _| true);
    same(&bench.download(&assigned), &want, what).unwrap();
    step.into()
}

pub(super) fn bench_token_choice(bench: &Bench, c: &mut Criterion) {
    let groups = Some(Groups::new(8, 4));
    let mut group = c.benchmark_group("token_choice");
    for (name, shape, groups) in [
        ("LLaDA2 T32 E256 K8 of 4 of 8 groups", [32, 256, 8], groups),
        ("LLaDA2 T4096 E256 K8 of 4 of 8 groups", [4096, 256, 8], groups),
        ("SDAR T4096 E128 K8", [4096, 128, 8], None),
    ] {
        bench.case(&mut group, name, &bench.contexts, pairs(shape[0], shape[1]), |ctx, what| {
            token_choice_step(bench, ctx, shape, groups, what)
        });
    }
    group.finish();
    let mut group = c.benchmark_group("token_choice over top");
    for top in [1, 4, 8, 32] {
        let name = format!("T4096 E256 K{top}");
        bench.case(&mut group, &name, &bench.contexts[..1], pairs(4096, 256), |ctx, what| {
            token_choice_step(bench, ctx, [4096, 256, top], None, what)
        });
    }
}

pub(super) fn bench_coreset(bench: &Bench, c: &mut Criterion) {
    const EXPERTS: u32 = 256;
    let mut group = c.benchmark_group("coreset");
    for (name, tokens, rule) in [
        ("mass(0.6, 8) T32 E256", 32, BlockRule::mass(0.6).with_floor(8)),
        ("capacity(48) T32 E256", 32, BlockRule::Capacity(48)),
        ("vote(38) T32 E256", 32, BlockRule::Vote(38)),
        ("union(3) T32 E256", 32, BlockRule::Union(3)),
        ("mass(0.6, 8) T4096 E256", 4096, BlockRule::mass(0.6).with_floor(8)),
    ] {
        bench.case(&mut group, name, &bench.contexts, pairs(tokens, EXPERTS), |ctx, what| {
            let gpu = &bench.gpu;
            // Positive, as sigmoid scores are.
            let r: Vec<f32> = fill(SCORES, tokens * EXPERTS, 1.0).iter().map(|v| v + 0.5).collect();
            let top = rule.own_top(8).unwrap_or(8) as usize;
            let own = token_choice::cpu(&r, EXPERTS as usize, top, None, &|_, _| true);
            let blocks = tokens / 32;
            let offsets: Vec<u32> = (0..=blocks).map(|b| b * 32).collect();
            let (r_in, own_in, offsets_in) =
                (gpu.upload(&r), gpu.upload(&own), gpu.upload(&offsets));
            let (members, block_of) =
                (bench.poisoned(blocks * EXPERTS / 32), bench.poisoned(tokens));
            let args = coreset::Args {
                refresh: None,
                values: (&r_in).into(),
                own_choice: rule.own_top(8).map(|_| (&own_in).into()),
                offsets: (&offsets_in).into(),
                voters: None,
                members: (&members).into(),
                block_of: (&block_of).into(),
            };
            let op = coreset::Coreset::new(ctx, EXPERTS, rule).unwrap();
            let step = op.bind(&coreset::Dims { tokens, blocks }, args).unwrap();
            gpu.run(&step).unwrap();
            let want = coreset::cpu(rule, &r, EXPERTS as usize, &own, &offsets, None);
            same(&bench.download(&members), &want.0, &format!("{what}: members")).unwrap();
            same(&bench.download(&block_of), &want.1, &format!("{what}: block_of")).unwrap();
            step.into()
        });
    }
}

pub(super) fn bench_sequence_top(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("sequence_top");
    for (name, tokens, experts, top) in
        [("T512 E64 K8", 512, 64, 8), ("T4096 E256 K8", 4096, 256, 8)]
    {
        bench.case(&mut group, name, &bench.contexts, pairs(tokens, experts), |ctx, what| {
            let gpu = &bench.gpu;
            let r = fill(SCORES, tokens * experts, 1.0);
            let (r_in, offsets) = (gpu.upload(&r), gpu.upload(&[0, tokens]));
            let assigned = bench.poisoned(experts * columns(tokens));
            let args = sequence_top::Args {
                values: (&r_in).into(),
                offsets: (&offsets).into(),
                assigned: (&assigned).into(),
            };
            let dims = sequence_top::Dims { tokens, experts, sequences: 1, experts_per_token: top };
            let step = sequence_top::SequenceTop::new(ctx).unwrap().bind(&dims, args).unwrap();
            gpu.run(&step).unwrap();
            let want = sequence_top::cpu(&r, experts as usize, top as usize, &[0, tokens]);
            same(&bench.download(&assigned), &want, what).unwrap();
            step.into()
        });
    }
}

pub(super) fn bench_capacity(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("capacity");
    let sequences = 64;
    let throughput = Throughput::Elements(sequences.into());
    bench.case(&mut group, "EC-DLM 64 sequences", &bench.contexts, throughput, |ctx, what| {
        let gpu = &bench.gpu;
        let (tokens, experts) = (sequences * 512, 512);
        let schedule = Schedule::new(ScheduleKind::CosineReverse, 8, 32);
        let ratios: Vec<f32> = fill(SCORES, sequences, 1.0).iter().map(|v| v + 0.5).collect();
        let offsets: Vec<u32> = (0..=sequences).map(|b| b * 512).collect();
        let steps = gpu.upload(&schedule.staircase().unwrap().words());
        let (ratios_in, offsets_in) = (gpu.upload(&ratios), gpu.upload(&offsets));
        let [capacity_of, k_of] = [(); 2].map(|()| bench.poisoned(sequences));
        let args = capacity::Args {
            source: capacity::Source::Ratios {
                ratios: (&ratios_in).into(),
                steps: (&steps).into(),
            },
            offsets: (&offsets_in).into(),
            lengths: None,
            capacity_of: (&capacity_of).into(),
            k_of: (&k_of).into(),
        };
        let dims = capacity::Dims { tokens, experts, sequences };
        let step = capacity::Capacity::new(ctx).unwrap().bind(&dims, args).unwrap();
        gpu.run(&step).unwrap();
        let source = capacity::HostSource::Ratios(&schedule, &ratios);
        let want = capacity::cpu(source, tokens as usize, experts, &offsets, None);
        same(&bench.download(&capacity_of), &want.0, &format!("{what}: capacity_of")).unwrap();
        same(&bench.download(&k_of), &want.1, &format!("{what}: k_of")).unwrap();
        step.into()
    });
}
