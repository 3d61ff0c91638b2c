use testkit::{cases, prelude::*};
use wgmoe::ops::cross_entropy::{Args, CrossEntropy, Dims, cpu, masked_weights};
use wgmoe::{Context, Gpu};

pub(crate) struct Got {
    pub(crate) value: f32,
    pub(crate) losses: Vec<f32>,
    pub(crate) dlogits: Vec<f32>,
}

pub(crate) fn on_gpu(
    gpu: &Gpu,
    ctx: &Context,
    classes: usize,
    logits: &[f32],
    targets: &[u32],
    weights: &[f32],
) -> Got {
    let (g, of, w) = (gpu.upload(logits), gpu.upload(targets), gpu.upload(weights));
    let dlogits = Output::f32s(gpu, logits.len());
    let losses = Output::f32s(gpu, targets.len());
    let value = Output::f32s(gpu, 1);
    let args = Args {
        logits: (&g).into(),
        targets: (&of).into(),
        weights: (&w).into(),
        dlogits: dlogits.slice(),
        losses: losses.slice(),
        value: value.slice(),
    };
    let dims = Dims { tokens: targets.len() as u32, classes: classes as u32 };
    run(gpu, &CrossEntropy::new(ctx).unwrap().bind(&dims, args).unwrap());
    let value: Vec<f32> = value.get(gpu);
    Got { value: value[0], losses: losses.get(gpu), dlogits: dlogits.get(gpu) }
}

#[test]
fn equals_twin() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for (tokens, classes) in [(1, 1), (37, 5), (20, 256), (3, 40_000)] {
            let logits = cases::values("random", 3, tokens * classes);
            // The last row's target is no class.
            let targets: Vec<u32> = (0..tokens)
                .map(|t| if t + 1 == tokens && t > 0 { classes } else { t * 7 % classes } as u32)
                .collect();
            let weights: Vec<f32> = (0..tokens).map(|t| [0.5, 0.0, 2.0][t % 3]).collect();
            let what = format!("{} {tokens} of {classes}", variant_name(&ctx));
            let (losses, dlogits) = cpu(&logits, classes, &targets, &weights);
            let got = on_gpu(&gpu, &ctx, classes, &logits, &targets, &weights);
            assert_close(&got.losses, &losses, 2e-6, 1e-5, &what);
            assert_close(&got.dlogits, &dlogits, 1e-6, 1e-5, &what);
            assert_close(&[got.value], &[losses.iter().sum()], 1e-5, 1e-5, &what);
            let again = on_gpu(&gpu, &ctx, classes, &logits, &targets, &weights);
            assert_same(&exact(&again.dlogits), &exact(&got.dlogits), "twice");
        }
    }
}

#[test]
fn twin_has_the_slopes_of_its_value() {
    let logits: Vec<f32> = cases::values("random", 2, 20).iter().map(|g| g * 0.3).collect();
    let (targets, weights) = ([0, 4, 2, 1], [1.0, 0.5, 0.0, 2.0]);
    let (_, dlogits) = cpu(&logits, 5, &targets, &weights);
    for (at, &d) in dlogits.iter().enumerate() {
        let value = |by: f32| {
            let mut moved = logits.clone();
            moved[at] += by;
            let sum: f64 = cpu(&moved, 5, &targets, &weights).0.iter().map(|&v| f64::from(v)).sum();
            (sum, f64::from(moved[at]))
        };
        let ((high, above), (low, below)) = (value(0.01), value(-0.01));
        let slope = (high - low) / (above - below);
        assert!((slope - f64::from(d)).abs() < 1e-3, "at {at}: {d}, {slope}");
    }
}

#[test]
fn weights_of_masked_tokens() {
    let mask = [true, false, true, true, false, false];
    // The second sequence has one masked token of four, which the loss looks at; the first two of two,
    // of which it looks at one.
    let loss_mask = [true, true, false, true, true, true];
    let got = masked_weights(&mask, &loss_mask, &[0, 1, 6], true);
    assert_close(&got, &[0.2, 0.0, 0.0, 0.5, 0.0, 0.0], 1e-7, 1e-6, "by ratio");
    let got = masked_weights(&mask, &loss_mask, &[0, 1, 6], false);
    assert_close(&got, &[0.2, 0.0, 0.0, 0.2, 0.0, 0.0], 1e-7, 1e-6, "plain");
    // Tokens outside all sequences; nothing that the loss looks at.
    assert_eq!(masked_weights(&mask, &loss_mask, &[0, 1], true)[3], 0.0);
    assert_eq!(masked_weights(&mask, &[false; 6], &[0, 6], true), [0.0; 6]);
}
