//! How far `WeightType::encode` may move a value: the table of its documentation, on rows of many kinds.
use testkit::prelude::random;
use wgmoe::WeightType;

const DEPTH: usize = 512;

/// Rows by name: what makes scales large, small, one-sided or uneven.
fn rows() -> Vec<(&'static str, Vec<f32>)> {
    let base = random(1, 40 * DEPTH);
    let map = |f: &dyn Fn(usize, f32) -> f32| -> Vec<f32> {
        base.iter().enumerate().map(|(i, &v)| f(i, v)).collect()
    };
    vec![
        ("even", map(&|_, v| v)),
        ("large", map(&|_, v| v * 1000.0)),
        ("small", map(&|_, v| v * 0.05)),
        ("positive", map(&|_, v| v.abs() + 1.0)),
        ("negative", map(&|_, v| -v.abs())),
        ("outliers", map(&|i, v| if i % 97 == 0 { v * 50.0 } else { v })),
        ("heavy tails", map(&|_, v| v * v * v)),
        ("groups of many sizes", map(&|i, v| v * 0.5f32.powi((i / 16 % 8) as i32))),
        ("one value", map(&|i, v| if i % 32 == 5 { v } else { 0.0 })),
        ("whole numbers", map(&|i, _| ((i * 7) % 17) as f32 - 8.0)),
    ]
}

fn largest(values: &[f32]) -> f64 {
    values.iter().fold(0.0, |most: f64, v| most.max(f64::from(v.abs())))
}

/// What the documentation allows value `i` of a row to be off.
fn bound(weight_type: WeightType, row: &[f32], i: usize) -> f64 {
    let v = f64::from(row[i].abs());
    let group = |n: usize| &row[i / n * n..][..n];
    let low = |g: &[f32]| g.iter().fold(0.0, |low: f64, &v| low.min(v.into()));
    let high = |g: &[f32]| g.iter().fold(0.0, |high: f64, &v| high.max(v.into()));
    match weight_type {
        WeightType::F32 => 0.0,
        WeightType::F16 => v * 2f64.powi(-11) + 2f64.powi(-25),
        WeightType::Bf16 => v * 2f64.powi(-8),
        WeightType::Q8_0 => largest(group(32)) / 127.0 / 2.0 + v * 2f64.powi(-11),
        WeightType::Q4_0 => {
            let g = group(32);
            let d = largest(g) / 8.0;
            // Codes reach from -8 to 7 times d, -8 on the side of the value of largest magnitude.
            let reach = if row[i] < 0.0 { [-low(g), high(g)] } else { [high(g), -low(g)] };
            (if reach[0] > reach[1] { d / 2.0 } else { d }) + v * 2f64.powi(-11)
        }
        WeightType::Q4_K => {
            let groups = group(256).chunks(32);
            let step = |g: &[f32]| (high(g) - low(g)) / 15.0;
            let steps = groups.clone().map(step).fold(0.0, f64::max);
            let minimum = groups.map(|g| -low(g)).fold(0.0, f64::max) / 63.0;
            steps / 2.0 + minimum / 2.0
        }
        WeightType::Q6_K => {
            1.25 * group(256).chunks(16).map(|g| largest(g) / 32.0).fold(0.0, f64::max)
        }
        WeightType::Mxfp4 => largest(group(32)) / 4.0,
        WeightType::Fp8 => {
            let scale = largest(group(128)) / 448.0;
            (v * 2f64.powi(-4)).max(scale * 2f64.powi(-10))
        }
        other => panic!("{other:?}: its bound is not written here"),
    }
}

#[test]
fn no_value_is_moved_further_than_documented() {
    for &weight_type in WeightType::ALL {
        let mut most = 0.0;
        for (name, values) in rows() {
            let stored = weight_type.round(&values, DEPTH);
            for (r, (row, stored)) in values.chunks(DEPTH).zip(stored.chunks(DEPTH)).enumerate() {
                for i in 0..DEPTH {
                    let error = (f64::from(row[i]) - f64::from(stored[i])).abs();
                    // Scales are made in f32 and stored in f16.
                    let allowed = bound(weight_type, row, i) * (1.0 + 2f64.powi(-9)) + 1e-30;
                    let what = format!("{weight_type:?}, {name}, row {r}, {i}: {}", row[i]);
                    assert!(error <= allowed, "{what} is {}, {error} of {allowed}", stored[i]);
                    most = f64::max(most, error / allowed);
                }
            }
        }
        // No wider than it must be.
        assert!(most > 0.5 || weight_type == WeightType::F32, "{weight_type:?}: {most}");
    }
}
