use testkit::{cases, prelude::*};
use wgmoe::ops::scores::{Args, Dims, Scores, cpu};
use wgmoe::{Context, Gpu, Score};

/// `(s, r)` of the device.
fn scores(
    gpu: &Gpu,
    ctx: &Context,
    logits: &[f32],
    experts: usize,
    score: Score,
    from_logits: bool,
    bias: Option<&[f32]>,
) -> (Vec<f32>, Vec<f32>) {
    let (g, b) = (gpu.upload(logits), bias.map(|b| gpu.upload(b)));
    let [s, r] = [(); 2].map(|()| Output::f32s(gpu, logits.len()));
    let args = Args {
        logits: (&g).into(),
        bias: b.as_ref().map(Into::into),
        scores: s.slice(),
        values: r.slice(),
    };
    let dims = Dims {
        tokens: (logits.len() / experts) as u32,
        experts: experts as u32,
        score,
        by_logits: from_logits,
    };
    run(gpu, &Scores::new(ctx).unwrap().bind(&dims, args).unwrap());
    (s.get(gpu), r.get(gpu))
}

/// Rows of every kind, then random ones with a steep range.
fn awkward_logits(experts: usize) -> Vec<f32> {
    let mut logits: Vec<f32> = vec![];
    for (seed, kind) in cases::KINDS.iter().enumerate() {
        logits.extend(cases::values(kind, seed as u64, 3 * experts));
    }
    logits.extend(cases::values("random", 99, 7 * experts).iter().map(|g| g * 16.0));
    // One finite logit among none, at the far end.
    let mut row = cases::values("nan", 5, experts);
    row[experts - 1] = -3.0;
    logits.extend(row);
    logits
}

#[test]
fn equals_twin() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for experts in [1, 5, 40, 96, 384, 1024] {
            let logits = awkward_logits(experts);
            let bias = cases::values("random", 7, experts);
            for score in [Score::Softmax, Score::Sigmoid] {
                for from_logits in [false, true] {
                    for bias in [None, Some(&bias[..])] {
                        let what = format!(
                            "{} E {experts} {score:?} from_logits {from_logits} bias {}",
                            variant_name(&ctx),
                            bias.is_some()
                        );
                        let (s, r) = scores(&gpu, &ctx, &logits, experts, score, from_logits, bias);
                        let (want, _) = cpu(&logits, experts, score, from_logits, bias);
                        // exp_negative is 0 below -87, where exp is at most 1.7e-38; sums of up to 1024 terms in f32.
                        assert_close(&s, &want, 2e-38, 2e-6, &what);
                        // The selection value follows exactly from the device's own score.
                        let selection: Vec<f32> = (0..s.len())
                            .map(|i| {
                                let value = if from_logits || logits[i].is_nan() {
                                    logits[i]
                                } else {
                                    s[i]
                                };
                                bias.map_or(value, |b| flush(flush(value) + b[i % experts]))
                            })
                            .collect();
                        let r: Vec<f32> =
                            r.iter().map(|&r| if bias.is_some() { flush(r) } else { r }).collect();
                        assert_same(&exact(&r), &exact(&selection), &what);
                    }
                }
            }
        }
    }
}

/// Devices may take subnormal operands and results as 0 (WGSL, floating-point evaluation).
fn flush(v: f32) -> f32 {
    if v.is_subnormal() || v == 0.0 { 0.0 } else { v }
}

#[test]
fn within_a_few_ulp_of_f64() {
    let Some(gpu) = gpu() else { return };
    // Rows of two logits: softmax gives 1 / (1 + exp(x)) and its rest, sigmoid the same of one.
    let mut logits = vec![];
    for i in 0..20_000 {
        logits.extend([0.0, i as f32 * -0.00434]);
    }
    for ctx in contexts(&gpu) {
        for score in [Score::Softmax, Score::Sigmoid] {
            let (s, _) = scores(&gpu, &ctx, &logits, 2, score, false, None);
            let mut worst = (0.0f64, 0.0);
            for (row, got) in logits.chunks_exact(2).zip(s.chunks_exact(2)) {
                let x = f64::from(row[1]);
                let z = x.exp();
                let low = z / (1.0 + z);
                let high = if score == Score::Softmax { 1.0 / (1.0 + z) } else { 0.5 };
                for (&got, want) in got.iter().zip([high, low]) {
                    let ulp = f64::from((want as f32).next_up() - want as f32);
                    let error = (f64::from(got) - want).abs() / ulp;
                    if error > worst.0 {
                        worst = (error, x);
                    }
                }
            }
            println!("{} {score:?}: {:.2} ulp at {}", variant_name(&ctx), worst.0, worst.1);
            // exp_negative 2 ulp, a sum, and a division that WGSL lets be 2.5 ulp off.
            assert!(
                worst.0 <= 6.0,
                "{} {score:?}: {:.2} ulp at {}",
                variant_name(&ctx),
                worst.0,
                worst.1
            );
        }
    }
}

#[test]
fn infinite_logits_share_one_and_nan_has_none() {
    let Some(gpu) = gpu() else { return };
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    // Logits, their softmax, their sigmoid.
    let rows = [
        ([nan, nan, nan, nan], [0.0; 4], [0.0; 4]),
        ([-inf, -inf, -inf, -inf], [0.0; 4], [0.0; 4]),
        ([-inf, nan, -inf, nan], [0.0; 4], [0.0; 4]),
        ([inf, nan, -inf, nan], [1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]),
        ([inf, nan, -inf, inf], [0.5, 0.0, 0.0, 0.5], [1.0, 0.0, 0.0, 1.0]),
        ([inf, 0.0, inf, nan], [0.5, 0.0, 0.5, 0.0], [1.0, 0.5, 1.0, 0.0]),
        ([nan, 0.0, -inf, nan], [0.0, 1.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0]),
    ];
    let logits: Vec<f32> = rows.iter().flat_map(|row| row.0).collect();
    // A NaN logit ranks last whatever its bias.
    let bias = [3.0, inf, -inf, 0.5];
    for ctx in contexts(&gpu) {
        for (score, want) in [
            (Score::Softmax, rows.iter().flat_map(|row| row.1).collect::<Vec<f32>>()),
            (Score::Sigmoid, rows.iter().flat_map(|row| row.2).collect()),
        ] {
            for from_logits in [false, true] {
                let what = format!("{} {score:?} from_logits {from_logits}", variant_name(&ctx));
                let (s, r) = scores(&gpu, &ctx, &logits, 4, score, from_logits, Some(&bias));
                assert_same(&s, &want, &what);
                assert_same(&cpu(&logits, 4, score, from_logits, None).0, &want, &what);
                for (g, r) in logits.iter().zip(r).filter(|(g, _)| g.is_nan()) {
                    assert!(r.is_nan(), "{what}: {g} with a bias gave {r}");
                }
            }
        }
    }
}

#[test]
fn many_rows() {
    let Some(gpu) = gpu() else { return };
    // More rows than a grid's dimension holds.
    let logits = cases::values("random", 1, 2 * 70_001);
    let (want, _) = cpu(&logits, 2, Score::Softmax, true, None);
    for ctx in contexts(&gpu) {
        let (s, r) = scores(&gpu, &ctx, &logits, 2, Score::Softmax, true, None);
        assert_close(&s, &want, 0.0, 2e-6, &variant_name(&ctx));
        assert_same(&r, &logits, &variant_name(&ctx));
        let again = scores(&gpu, &ctx, &logits, 2, Score::Softmax, true, None);
        assert_same(&exact(&again.0), &exact(&s), "twice");
    }
}
