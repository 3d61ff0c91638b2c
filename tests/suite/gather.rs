use testkit::prelude::*;
use wgmoe::ops::gather::{Args, Dims, Gather, cpu};

#[test]
fn equals_twin() {
    let Some(gpu) = gpu() else { return };
    for (tokens, slots, hidden) in [
        (1, 1, 1),
        (7, 33, 5),
        (40, 257, 16),
        (9, 65, 264),
        (4, 67, 516),
        (3, 100, 2048),
        (65, 64, 1030),
        (5, 70_000, 3),
        (600_000, 600_000, 16),
    ] {
        let x: Vec<f32> = (0..tokens * hidden).map(|i| i as f32 * 0.5 - 7.0).collect();
        // Every fifth slot names no token.
        let token_of: Vec<u32> = (0..slots)
            .map(|s| match s % 10 {
                3 => tokens as u32,
                8 => u32::MAX,
                _ => (s * 7919 % tokens) as u32,
            })
            .collect();
        let want = cpu(&x, hidden, &token_of);
        let (x, of) = (gpu.upload(&x), gpu.upload(&token_of));
        for ctx in contexts(&gpu) {
            let out = Output::f32s(&gpu, slots * hidden);
            let args = Args { x: (&x).into(), token_of: (&of).into(), out: out.slice() };
            let dims = Dims { tokens: tokens as u32, slots: slots as u32, hidden: hidden as u32 };
            run(&gpu, &Gather::new(&ctx).unwrap().bind(&dims, args).unwrap());
            let what = format!("{} T {tokens} S {slots} D {hidden}", variant_name(&ctx));
            assert_same(&out.get::<f32>(&gpu), &want, &what);
        }
    }
}
