use testkit::{cases, prelude::*};
use wgmoe::ops::balance_loss::{self, Args, BalanceLoss, Dims, cpu};
use wgmoe::plan::{HostPlan, bits};
use wgmoe::{Context, Gpu, PlanShape};

/// Experts of each token, for the device.
pub(crate) enum Taken<'a> {
    Given(&'a [u32]),
    Plan(PlanShape, &'a HostPlan),
}

pub(crate) struct Got {
    pub(crate) value: f32,
    pub(crate) dlogits: Vec<f32>,
}

/// What the device makes of logits; added to `before`, and to a value of 1, where that is given.
pub(crate) fn on_gpu(
    gpu: &Gpu,
    ctx: &Context,
    (dims, coefficient, taken): (&Dims, f32, Taken<'_>),
    logits: &[f32],
    before: Option<&[f32]>,
) -> Got {
    let g = gpu.upload(logits);
    let words = match &taken {
        Taken::Given(taken) => gpu.upload(taken),
        Taken::Plan(shape, plan) => gpu.upload(&plan.to_words(shape).unwrap()),
    };
    let taken = match taken {
        Taken::Given(_) => balance_loss::Taken::Given((&words).into()),
        Taken::Plan(shape, _) => balance_loss::Taken::Plan(shape, (&words).into()),
    };
    let dlogits = match before {
        Some(before) => Output::holding(gpu, before),
        None => Output::f32s(gpu, logits.len()),
    };
    let terms = Output::f32s(gpu, dims.experts as usize);
    let values = Output::holding(gpu, &[f32::NAN, if before.is_some() { 1.0 } else { f32::NAN }]);
    let args = Args {
        logits: (&g).into(),
        taken,
        dlogits: dlogits.slice(),
        add: before.is_some(),
        terms: terms.slice(),
        values: values.slice(),
        add_values: before.is_some(),
    };
    run(gpu, &BalanceLoss::new(ctx).unwrap().bind(dims, coefficient, args).unwrap());
    let _: Vec<f32> = terms.get(gpu);
    let values: Vec<f32> = values.get(gpu);
    assert!(values[0].is_nan(), "the other value was written");
    Got { value: values[1], dlogits: dlogits.get(gpu) }
}

#[test]
fn equals_twin() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for (tokens, experts, k) in [(1, 1, 1), (33, 40, 4), (300, 17, 8), (9, 1024, 20)] {
            let dims =
                Dims { tokens: tokens as u32, experts: experts as u32, experts_per_token: k };
            let assigned = cases::assignment(5, tokens, experts, f64::from(k) / experts as f64);
            let taken: Vec<u32> =
                (0..tokens).map(|t| bits::experts_of(&assigned, tokens, t).len() as u32).collect();
            let shape = PlanShape::on_host(dims.tokens, dims.experts, taken.iter().sum());
            let shape = shape.with_shared_experts(2);
            let plan = HostPlan::cpu(&shape, &assigned, &vec![0.5; tokens * experts]);
            for kind in ["random", "equal", "-inf", "nan", "mixed", "infinities"] {
                let logits = cases::values(kind, 3, tokens * experts);
                let what = format!("{} {kind} {dims:?}", variant_name(&ctx));
                let (value, want) = cpu(&dims, 40.0, &logits, &taken);
                let how = || (&dims, 40.0, Taken::Plan(shape, &plan));
                let got = on_gpu(&gpu, &ctx, how(), &logits, None);
                assert_close(&[got.value], &[value], 1e-6, 1e-5, &what);
                assert_close(&got.dlogits, &want, 2e-6, 1e-5, &what);
                let again = on_gpu(&gpu, &ctx, how(), &logits, None);
                assert_same(&exact(&again.dlogits), &exact(&got.dlogits), "twice");
                assert_same(&exact(&[again.value]), &exact(&[got.value]), "twice");

                let before = cases::values("random", 8, want.len());
                let how = (&dims, 40.0, Taken::Given(&taken));
                let added = on_gpu(&gpu, &ctx, how, &logits, Some(&before));
                let sums: Vec<f32> = before.iter().zip(&want).map(|(a, b)| a + b).collect();
                assert_close(&added.dlogits, &sums, 4e-6, 1e-5, &what);
                assert_close(&[added.value], &[1.0 + value], 2e-6, 1e-5, &what);
            }
        }
    }
}

/// More tokens than one lane of a software driver may go over.
#[test]
fn many_tokens() {
    let Some(gpu) = gpu() else { return };
    let dims = Dims { tokens: 30_000, experts: 2, experts_per_token: 1 };
    let logits = cases::values("random", 1, 60_000);
    let taken: Vec<u32> = (0..30_000).map(|t| t % 3).collect();
    let (value, want) = cpu(&dims, 1e4, &logits, &taken);
    for ctx in contexts(&gpu) {
        let what = variant_name(&ctx);
        let got = on_gpu(&gpu, &ctx, (&dims, 1e4, Taken::Given(&taken)), &logits, None);
        assert_close(&[got.value], &[value], 1e-4, 1e-4, &what);
        assert_close(&got.dlogits, &want, 1e-5, 1e-4, &what);
    }
}

/// The twin's gradients are the slopes of its value.
#[test]
fn twin_has_the_slopes_of_its_value() {
    let dims = Dims { tokens: 6, experts: 3, experts_per_token: 1 };
    let logits: Vec<f32> = cases::values("random", 2, 18).iter().map(|g| g * 0.3).collect();
    let taken = [0, 2, 1, 3, 0, 1];
    let (_, dlogits) = cpu(&dims, 5.0, &logits, &taken);
    for (at, &d) in dlogits.iter().enumerate() {
        let value = |by: f32| {
            let mut moved = logits.clone();
            moved[at] += by;
            (f64::from(cpu(&dims, 5.0, &moved, &taken).0), f64::from(moved[at]))
        };
        let ((high, above), (low, below)) = (value(0.01), value(-0.01));
        let slope = (high - low) / (above - below);
        assert!((slope - f64::from(d)).abs() < 1e-3, "at {at}: {d}, {slope}");
    }
    assert!(dlogits.iter().any(|d| d.abs() > 0.1), "all small");
}
