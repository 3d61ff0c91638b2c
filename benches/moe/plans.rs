//! From a choice to a plan, and what is counted of it.
use crate::timing::{Bench, columns, pairs};
use criterion::{Criterion, Throughput};
use testkit::compare::same;
use testkit::works::{INDEX, PLANS, Planned, SCORES, chosen, fill, mix, plan};
use wgmoe::Context;
use wgmoe::ops::{assign, assign_lists, expert_lists, expert_union};

pub(super) fn bench_assign(bench: &Bench, c: &mut Criterion) {
    const TOP: u32 = 8;
    let mut group = c.benchmark_group("assign");
    for (name, tokens, experts) in [("T32 E256 K8", 32, 256), ("T4096 E256 K8", 4096u32, 256u32)] {
        let throughput = Throughput::Elements(u64::from(tokens * TOP));
        bench.case(&mut group, name, &bench.contexts[..1], throughput, |ctx, what| {
            let gpu = &bench.gpu;
            // Some ids are out of range, some repeated.
            let ids: Vec<u32> = (0..tokens * TOP).map(|i| mix(INDEX, i) % (experts + 4)).collect();
            let weights = fill(SCORES, tokens * TOP, 1.0);
            let (ids_in, weights_in) = (gpu.upload(&ids), gpu.upload(&weights));
            let assigned = bench.poisoned(experts * columns(tokens));
            let gates = gpu.upload(&vec![0f32; (tokens * experts) as usize]);
            let ignored = bench.poisoned(columns(tokens));
            let args = assign::Args {
                ids: (&ids_in).into(),
                weights: (&weights_in).into(),
                assigned: (&assigned).into(),
                gates: (&gates).into(),
                ignored: (&ignored).into(),
            };
            let dims = assign::Dims { tokens, experts, experts_per_token: TOP };
            let step = assign::Assign::new(ctx).unwrap().bind(&dims, args).unwrap();
            gpu.run(&step).unwrap();
            let want = assign::cpu(&ids, &weights, TOP as usize, experts as usize);
            same(&bench.download(&assigned), &want.0, &format!("{what}: assigned")).unwrap();
            same(&bench.download(&gates), &want.1, &format!("{what}: gates")).unwrap();
            same(&bench.download(&ignored), &want.2, &format!("{what}: ignored")).unwrap();
            step.into()
        });
    }
}

pub(super) fn bench_assign_lists(bench: &Bench, c: &mut Criterion) {
    const LENGTH: u32 = 128;
    let mut group = c.benchmark_group("assign_lists");
    for (name, tokens, experts) in [("T32 E256", 32, 256), ("T4096 E256", 4096u32, 256u32)] {
        let length = LENGTH.min(tokens);
        let entries = experts * length;
        let throughput = Throughput::Elements(entries.into());
        bench.case(&mut group, name, &bench.contexts[..1], throughput, |ctx, what| {
            let gpu = &bench.gpu;
            // Some tokens are out of range, some repeated.
            let list: Vec<u32> = (0..entries).map(|i| mix(INDEX, i) % (tokens + 4)).collect();
            let offsets: Vec<u32> = (0..=experts).map(|e| e * length).collect();
            let weights = fill(SCORES, entries, 1.0);
            let [offsets_in, list_in] = [&offsets, &list].map(|v| gpu.upload(v));
            let weights_in = gpu.upload(&weights);
            let assigned = bench.poisoned(experts * columns(tokens));
            let gates = gpu.upload(&vec![0f32; (tokens * experts) as usize]);
            let ignored = bench.poisoned(experts);
            let args = assign_lists::Args {
                offsets: (&offsets_in).into(),
                list: (&list_in).into(),
                weights: (&weights_in).into(),
                assigned: (&assigned).into(),
                gates: (&gates).into(),
                ignored: (&ignored).into(),
            };
            let dims = assign_lists::Dims { tokens, experts, entries };
            let step = assign_lists::AssignLists::new(ctx).unwrap().bind(&dims, args).unwrap();
            gpu.run(&step).unwrap();
            let want = assign_lists::cpu(&offsets, &list, &weights, tokens as usize);
            same(&bench.download(&assigned), &want.0, &format!("{what}: assigned")).unwrap();
            same(&bench.download(&gates), &want.1, &format!("{what}: gates")).unwrap();
            same(&bench.download(&ignored), &want.2, &format!("{what}: ignored")).unwrap();
            step.into()
        });
    }
}

/// The plan of an assignment.
pub(super) fn planned(
    bench: &Bench,
    ctx: &Context,
    dims: [u32; 2],
    logits: &[f32],
    assigned: &[u32],
    what: &str,
) -> Planned {
    plan(&bench.gpu, ctx, dims, logits, assigned).unwrap_or_else(|e| panic!("{what}: {e}"))
}

pub(super) fn bench_plan(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("plan");
    for (name, [tokens, experts, top]) in PLANS {
        bench.case(&mut group, name, &bench.contexts, pairs(tokens, experts), |ctx, what| {
            let (logits, assigned) = chosen(tokens, experts, top);
            planned(bench, ctx, [tokens, experts], &logits, &assigned, what).step.into()
        });
    }
}

pub(super) fn bench_expert_union(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("expert_union");
    for (name, tokens, experts) in
        [("one block T32 E256", 32, 256), ("128 blocks T4096 E256", 4096u32, 256u32)]
    {
        bench.case(&mut group, name, &bench.contexts, pairs(tokens, experts), |ctx, what| {
            let gpu = &bench.gpu;
            let (_, assigned) = chosen(tokens, experts, 8);
            let blocks = tokens / 32;
            let offsets: Vec<u32> = (0..=blocks).map(|b| b * 32).collect();
            let expert_bytes = 6 << 20;
            let (assigned_in, offsets_in) = (gpu.upload(&assigned), gpu.upload(&offsets));
            let members = bench.poisoned(blocks * experts.div_ceil(32));
            let (counts, bytes) = (bench.poisoned(blocks), bench.poisoned(blocks * 2));
            let args = expert_union::Args {
                assigned: (&assigned_in).into(),
                offsets: (&offsets_in).into(),
                members: (&members).into(),
                counts: (&counts).into(),
                bytes: (&bytes).into(),
                totals: None,
            };
            let dims = expert_union::Dims { tokens, experts, blocks, expert_bytes };
            let step = expert_union::ExpertUnion::new(ctx).unwrap().bind(&dims, args).unwrap();
            gpu.run(&step).unwrap();
            let (t, e) = (tokens as usize, experts as usize);
            let want = expert_union::cpu(&assigned, t, e, &offsets, expert_bytes);
            same(&bench.download(&members), &want.0, &format!("{what}: members")).unwrap();
            same(&bench.download(&counts), &want.1, &format!("{what}: counts")).unwrap();
            same(&bench.download(&bytes), &want.2, &format!("{what}: bytes")).unwrap();
            step.into()
        });
    }
}

pub(super) fn bench_expert_lists(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("expert_lists");
    for (name, tokens, experts) in [("T32 E256 K8", 32, 256), ("T4096 E256 K8", 4096u32, 256u32)] {
        bench.case(&mut group, name, &bench.contexts, pairs(tokens, experts), |ctx, what| {
            let gpu = &bench.gpu;
            let (_, assigned) = chosen(tokens, experts, 8);
            let room = tokens * 8;
            let assigned_in = gpu.upload(&assigned);
            let (offsets, list) = (bench.poisoned(experts + 1), bench.poisoned(room));
            let lost = bench.poisoned(experts);
            let args = expert_lists::Args {
                assigned: (&assigned_in).into(),
                offsets: (&offsets).into(),
                list: (&list).into(),
                lost: (&lost).into(),
            };
            let dims = expert_lists::Dims { tokens, experts, room };
            let step = expert_lists::ExpertLists::new(ctx).unwrap().bind(&dims, args).unwrap();
            gpu.run(&step).unwrap();
            let [t, e, room] = [tokens, experts, room].map(|n| n as usize);
            let want = expert_lists::cpu(&assigned, t, e, room);
            same(&bench.download(&offsets), &want.0, &format!("{what}: offsets")).unwrap();
            same(&bench.download(&list), &want.1, &format!("{what}: list")).unwrap();
            same(&bench.download(&lost), &want.2, &format!("{what}: lost")).unwrap();
            step.into()
        });
    }
}
