use rand::{Rng, SeedableRng, rngs::StdRng};
use testkit::{cases, prelude::*};
use wgmoe::ops::assign_lists::{Args, AssignLists, Dims, cpu};
use wgmoe::plan::bits;
use wgmoe::{Context, Gpu};

/// Runs the kernel on lists and compares everything it writes with the twin.
fn check(gpu: &Gpu, ctx: &Context, tokens: usize, offsets: &[u32], list: &[u32], what: &str) {
    let experts = offsets.len() - 1;
    let weights = cases::values("random", 2, list.len());
    let (want, want_gates, want_ignored) = cpu(offsets, list, &weights, tokens);
    let assigned = Output::u32s(gpu, want.len());
    let gates = Output::f32s(gpu, tokens * experts);
    let ignored = Output::u32s(gpu, experts);
    let [o, l] = [offsets, list].map(|v| gpu.upload(v));
    let w = gpu.upload(&weights);
    let args = Args {
        offsets: (&o).into(),
        list: (&l).into(),
        weights: (&w).into(),
        assigned: assigned.slice(),
        gates: gates.slice(),
        ignored: ignored.slice(),
    };
    let entries = list.len() as u32;
    let dims = Dims { tokens: tokens as u32, experts: experts as u32, entries };
    run(gpu, &AssignLists::new(ctx).unwrap().bind(&dims, args).unwrap());
    assert_same(&assigned.get::<u32>(gpu), &want, &format!("{what}: assigned"));
    assert_same(&ignored.get::<u32>(gpu), &want_ignored, &format!("{what}: ignored"));
    // Poison stays where nothing is assigned.
    let want_gates: Vec<f32> = (0..tokens * experts)
        .map(|i| {
            let taken = bits::get(&want, tokens, i % experts, i / experts);
            if taken { want_gates[i] } else { f32::NAN }
        })
        .collect();
    let gates: Vec<f32> = gates.get(gpu);
    assert_same(&exact(&gates), &exact(&want_gates), &format!("{what}: gates"));
}

#[test]
fn equals_twin() {
    let Some(gpu) = gpu() else { return };
    let mut rng = StdRng::seed_from_u64(1);
    for (tokens, experts, most) in
        [(1, 1, 3), (33, 40, 70), (100, 384, 9), (31, 1024, 2), (5000, 3, 900), (70_000, 2, 80_000)]
    {
        let lengths: Vec<u32> = (0..experts).map(|_| rng.random_range(0..=most)).collect();
        let offsets: Vec<u32> = (0..=experts).map(|e| lengths[..e].iter().sum()).collect();
        // Tokens in range, out of range, repeated near and far, and empty places.
        let mut list: Vec<u32> = vec![];
        for i in 0..offsets[experts].max(1) as usize {
            list.push(match rng.random_range(0..10) {
                0 => u32::MAX,
                1 => tokens as u32,
                2 => u32::MAX - 1,
                3 if i > 0 => list[i - 1],
                4 if i > 0 => list[rng.random_range(0..i)],
                _ => rng.random_range(0..tokens as u32),
            });
        }
        for ctx in contexts(&gpu) {
            let what = format!("{} T {tokens} E {experts}", variant_name(&ctx));
            check(&gpu, &ctx, tokens, &offsets, &list, &what);
        }
    }
}

#[test]
fn awkward_lists() {
    let Some(gpu) = gpu() else { return };
    let ctx = &contexts(&gpu)[0];
    let ones = [7u32; 200];
    check(&gpu, ctx, 40, &[0, 200], &ones, "one token, 200 times");
    check(&gpu, ctx, 40, &[0, 0, 0, 0], &ones, "empty lists");
    let all: Vec<u32> = (0..200).rev().collect();
    check(&gpu, ctx, 200, &[0, 200], &all, "every token, in falling order");
    // Offsets that fall, that start late, and that pass the end.
    check(&gpu, ctx, 200, &[10, 60, 40, 90, u32::MAX], &all, "offsets");
    check(&gpu, ctx, 33, &[0, 1, 2], &[32, 32], "one token of two experts");
}
