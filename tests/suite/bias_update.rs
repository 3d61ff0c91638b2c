use testkit::{cases, prelude::*};
use wgmoe::ops::bias_update::{Args, BiasUpdate, cpu};
use wgmoe::{Context, Gpu};

pub(crate) fn on_gpu(
    gpu: &Gpu,
    ctx: &Context,
    bias: &[f32],
    counts: &[u32],
    rate: f32,
) -> Vec<f32> {
    let (n, b) = (gpu.upload(counts), Output::holding(gpu, bias));
    let args = Args { counts: (&n).into(), bias: b.slice() };
    run(gpu, &BiasUpdate::new(ctx).unwrap().bind(bias.len() as u32, rate, args).unwrap());
    b.get(gpu)
}

#[test]
fn equals_twin_bit_for_bit() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for experts in [1, 2, 63, 64, 65, 1024] {
            let bias = cases::values("random", 1, experts);
            let random = cases::stale(experts as u64, experts);
            let few: Vec<u32> = random.iter().map(|n| n % 7).collect();
            // Counts next to their mean, past 16 bits and up to 32.
            let near: Vec<u32> = (0..experts as u32).map(|e| u32::MAX - e % 3).collect();
            let edge: Vec<u32> = (0..experts as u32).map(|e| 65_535 + e % 2).collect();
            for counts in [vec![5; experts], vec![0; experts], few, random, near, edge] {
                let mut want = bias.clone();
                cpu(&mut want, &counts, 0.001);
                let got = on_gpu(&gpu, &ctx, &bias, &counts, 0.001);
                assert_same(
                    &exact(&got),
                    &exact(&want),
                    &format!("{} {experts}", variant_name(&ctx)),
                );
                // The same counts as statistics have them.
                let stats: Vec<u32> = [&[9; 8][..], &counts].concat();
                let got = on_gpu(&gpu, &ctx, &bias, &stats, 0.001);
                assert_same(&exact(&got), &exact(&want), "statistics");
            }
        }
    }
}

#[test]
fn the_mean_is_met_exactly() {
    let mut bias = [0.0; 3];
    cpu(&mut bias, &[4, 5, 6], 0.5);
    assert_eq!(bias, [0.5, 0.0, -0.5]);
    let mut bias = [0.0; 3];
    cpu(&mut bias, &[0, 0, 1], 0.5);
    assert_eq!(bias, [0.5, 0.5, -0.5]);
}
