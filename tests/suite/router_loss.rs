use testkit::{cases, prelude::*};
use wgmoe::ops::router_loss::{Args, Coefficients, Counts, Dims, RouterLoss, cpu};
use wgmoe::plan::{HostPlan, bits};
use wgmoe::{Context, Gpu, PlanShape};

/// Tokens of each expert, for the device.
pub(crate) enum Tokens<'a> {
    None,
    Given(&'a [u32]),
    /// A plan's, and those dropped.
    Plan(PlanShape, &'a HostPlan, &'a [u32]),
}

pub(crate) struct Got {
    pub(crate) values: [f32; 2],
    pub(crate) dlogits: Vec<f32>,
}

/// What the device makes of logits; added to `before`, and to values of 1 and 2, where that is given.
pub(crate) fn on_gpu(
    gpu: &Gpu,
    ctx: &Context,
    (dims, coefficients, tokens): (&Dims, Coefficients, Tokens<'_>),
    logits: &[f32],
    before: Option<&[f32]>,
) -> Got {
    let g = gpu.upload(logits);
    let (counts, dropped) = match &tokens {
        Tokens::None => (None, None),
        Tokens::Given(counts) => (Some(gpu.upload(counts)), None),
        Tokens::Plan(shape, plan, dropped) => {
            (Some(gpu.upload(&plan.to_words(shape).unwrap())), Some(gpu.upload(dropped)))
        }
    };
    let counted = counts.as_ref().map(|counts| match &tokens {
        Tokens::Plan(shape, ..) => Counts::Plan(*shape, counts.into()),
        _ => Counts::Given(counts.into()),
    });
    let dlogits = match before {
        Some(before) => Output::holding(gpu, before),
        None => Output::f32s(gpu, logits.len()),
    };
    let terms = Output::f32s(gpu, 2 * dims.tokens as usize);
    let values = match before {
        Some(_) => Output::holding(gpu, &[1f32, 2.0]),
        None => Output::f32s(gpu, 2),
    };
    let args = Args {
        logits: (&g).into(),
        counts: counted,
        dropped: dropped.as_ref().map(Into::into),
        dlogits: dlogits.slice(),
        add: before.is_some(),
        terms: terms.slice(),
        values: values.slice(),
        add_values: before.is_some(),
    };
    run(gpu, &RouterLoss::new(ctx).unwrap().bind(dims, coefficients, args).unwrap());
    let _: Vec<f32> = terms.get(gpu);
    Got { values: values.get::<f32>(gpu).try_into().unwrap(), dlogits: dlogits.get(gpu) }
}

#[test]
fn equals_twin() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for (tokens, experts, k) in [(1, 1, 1), (33, 40, 4), (70, 96, 8), (9, 1024, 20)] {
            let dims =
                Dims { tokens: tokens as u32, experts: experts as u32, experts_per_token: k };
            let assigned = cases::assignment(5, tokens, experts, f64::from(k) / experts as f64);
            let counts: Vec<u32> =
                (0..experts).map(|e| bits::tokens_of(&assigned, tokens, e).len() as u32).collect();
            let dropped: Vec<u32> = (0..experts as u32).map(|e| e % 3).collect();
            let slots = counts.iter().sum();
            let shape = PlanShape::on_host(tokens as u32, experts as u32, slots);
            let shape = shape.with_shared_experts(1);
            let plan = HostPlan::cpu(&shape, &assigned, &vec![0.5; tokens * experts]);
            let before_drop: Vec<u32> = counts.iter().zip(&dropped).map(|(n, d)| n + d).collect();
            for kind in ["random", "equal", "-inf", "nan", "subnormal"] {
                let mut logits = cases::values(kind, 3, tokens * experts);
                if kind == "nan" {
                    // Some among numbers.
                    let numbers = cases::values("random", 4, logits.len());
                    logits.iter_mut().zip(numbers).step_by(2).for_each(|(g, n)| *g = n);
                }
                for (router_z, balance) in [(0.5, 0.0), (0.0, 3.0), (0.5, 3.0)] {
                    let coefficients = Coefficients { router_z, balance };
                    let what = format!("{} {kind} {dims:?} {coefficients:?}", variant_name(&ctx));
                    let (values, want) = cpu(&dims, coefficients, &logits, &before_drop);
                    let tokens = || Tokens::Plan(shape, &plan, &dropped);
                    let how = (&dims, coefficients, tokens());
                    let got = on_gpu(&gpu, &ctx, how, &logits, None);
                    assert_close(&got.values, &values, 1e-6, 1e-5, &what);
                    assert_close(&got.dlogits, &want, 1e-6, 1e-5, &what);
                    let again = on_gpu(&gpu, &ctx, (&dims, coefficients, tokens()), &logits, None);
                    assert_same(&exact(&again.dlogits), &exact(&got.dlogits), "twice");
                    assert_same(&exact(&again.values), &exact(&got.values), "twice");

                    let before = cases::values("random", 8, want.len());
                    let given = Tokens::Given(&before_drop);
                    let how = (&dims, coefficients, given);
                    let added = on_gpu(&gpu, &ctx, how, &logits, Some(&before));
                    let sums: Vec<f32> = before.iter().zip(&want).map(|(a, b)| a + b).collect();
                    assert_close(&added.dlogits, &sums, 2e-6, 1e-5, &what);
                    let sums = [1.0 + values[0], 2.0 + values[1]];
                    assert_close(&added.values, &sums, 2e-6, 1e-5, &what);
                }
            }
        }
    }
}

/// Without counts there is no balance loss, and its value is left alone.
#[test]
fn counts_are_for_the_balance_loss_alone() {
    let Some(gpu) = gpu() else { return };
    let ctx = &contexts(&gpu)[0];
    let dims = Dims { tokens: 3, experts: 4, experts_per_token: 2 };
    let logits = cases::values("random", 1, 12);
    let z = Coefficients { router_z: 1.0, balance: 0.0 };
    let got = on_gpu(&gpu, ctx, (&dims, z, Tokens::None), &logits, None);
    let (want, _) = cpu(&dims, z, &logits, &[0; 4]);
    assert_close(&got.values[..1], &want[..1], 1e-6, 1e-5, "z");
    assert!(got.values[1].is_nan(), "written");
    let b = gpu.upload(&[0f32; 64]);
    let all = |n: u64| wgmoe::Slice::new(&b, 0, 4 * n);
    let args = Args {
        logits: all(12),
        counts: None,
        dropped: None,
        dlogits: all(12),
        add: false,
        terms: all(6),
        values: all(2),
        add_values: false,
    };
    let both = Coefficients { router_z: 1.0, balance: 1.0 };
    let error = RouterLoss::new(ctx).unwrap().bind(&dims, both, args).unwrap_err();
    assert_eq!(error.to_string(), "`counts`: missing: the balance loss needs them");
}

/// The twin's gradients are the slopes of its values.
#[test]
fn twin_has_the_slopes_of_its_values() {
    let dims = Dims { tokens: 5, experts: 6, experts_per_token: 2 };
    let logits: Vec<f32> = cases::values("random", 2, 30).iter().map(|g| g * 0.5).collect();
    let counts = [3, 0, 1, 4, 0, 2];
    for coefficients in [
        Coefficients { router_z: 1.0, balance: 0.0 },
        Coefficients { router_z: 0.0, balance: 50.0 },
    ] {
        let value = |at: usize, by: f32| {
            let mut moved = logits.clone();
            moved[at] += by;
            let (values, _) = cpu(&dims, coefficients, &moved, &counts);
            (f64::from(values[0]) + f64::from(values[1]), f64::from(moved[at]))
        };
        let (_, dlogits) = cpu(&dims, coefficients, &logits, &counts);
        for (at, &d) in dlogits.iter().enumerate() {
            let ((high, above), (low, below)) = (value(at, 0.01), value(at, -0.01));
            let slope = (high - low) / (above - below);
            // A value is f32; a third derivative is at most a few units.
            assert!((slope - f64::from(d)).abs() < 2e-3, "{coefficients:?} at {at}: {d}, {slope}");
        }
        assert!(dlogits.iter().any(|d| d.abs() > 0.1), "{coefficients:?}: all small");
    }
}
