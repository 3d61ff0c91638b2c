use rand::{Rng, SeedableRng, rngs::StdRng};
use testkit::{cases, prelude::*};
use wgmoe::ops::assign::{Args, Assign, Dims, cpu};
use wgmoe::plan::bits;

#[test]
fn equals_twin() {
    let Some(gpu) = gpu() else { return };
    let mut rng = StdRng::seed_from_u64(1);
    for (tokens, experts, top) in
        [(1, 1, 1), (33, 40, 3), (64, 96, 8), (100, 384, 64), (31, 1024, 70), (70_000, 3, 2)]
    {
        // Ids in range, out of range, repeated, and empty places.
        let ids: Vec<u32> = (0..tokens * top)
            .map(|_| match rng.random_range(0..10) {
                0 => u32::MAX,
                1 => u32::MAX - 1,
                2 => experts as u32,
                3 => 0,
                _ => rng.random_range(0..experts as u32),
            })
            .collect();
        let weights = cases::values("random", 2, ids.len());
        let (want, want_gates, want_ignored) = cpu(&ids, &weights, top, experts);
        for ctx in contexts(&gpu) {
            let what = format!("{} T {tokens} E {experts} K {top}", variant_name(&ctx));
            let assigned = Output::u32s(&gpu, want.len());
            let gates = Output::f32s(&gpu, tokens * experts);
            let ignored = Output::u32s(&gpu, want_ignored.len());
            let (i, w) = (gpu.upload(&ids), gpu.upload(&weights));
            let args = Args {
                ids: (&i).into(),
                weights: (&w).into(),
                assigned: assigned.slice(),
                gates: gates.slice(),
                ignored: ignored.slice(),
            };
            let [tokens_in, experts_in, experts_per_token] =
                [tokens, experts, top].map(|n| n as u32);
            let dims = Dims { tokens: tokens_in, experts: experts_in, experts_per_token };
            run(&gpu, &Assign::new(&ctx).unwrap().bind(&dims, args).unwrap());
            assert_same(&assigned.get::<u32>(&gpu), &want, &what);
            assert_same(&ignored.get::<u32>(&gpu), &want_ignored, &what);
            // Poison stays where nothing is assigned.
            let gates: Vec<f32> = gates.get(&gpu);
            let want_gates: Vec<f32> = (0..tokens * experts)
                .map(|i| {
                    if bits::get(&want, tokens, i % experts, i / experts) {
                        want_gates[i]
                    } else {
                        f32::NAN
                    }
                })
                .collect();
            assert_same(&exact(&gates), &exact(&want_gates), &what);
        }
    }
}
