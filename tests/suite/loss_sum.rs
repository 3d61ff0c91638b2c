use testkit::{cases, prelude::*};
use wgmoe::ops::loss_sum::{Args, Dims, LossSum, cpu};

#[test]
fn equals_twin() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for (first, count) in [(0, 0), (0, 1), (5, 64), (100, 10_000)] {
            let terms = cases::values("random", 1, 10_200);
            let of = gpu.upload(&terms);
            let part = &terms[first..first + count];
            for add in [false, true] {
                let values = Output::holding(&gpu, &[1f32, 2.0, 3.0]);
                let args = Args { terms: (&of).into(), values: values.slice(), add };
                let dims = Dims { first: first as u32, count: count as u32, at: 1, scale: 0.25 };
                let op = LossSum::new(&ctx).unwrap().bind(&dims, args).unwrap();
                run(&gpu, &op);
                let got: Vec<f32> = values.get(&gpu);
                let want = if add { 2.0 } else { 0.0 } + cpu(part, 0.25);
                assert_close(&got, &[1.0, want, 3.0], 2e-3, 1e-6, &variant_name(&ctx));
            }
        }
    }
}

#[test]
fn what_lies_past_the_end_is_an_error() {
    let Some(gpu) = gpu() else { return };
    let (terms, values) = (gpu.upload(&[0f32; 4]), gpu.upload(&[0f32; 4]));
    let op = LossSum::new(&contexts(&gpu)[0]).unwrap();
    let args = || Args { terms: (&terms).into(), values: (&values).into(), add: false };
    let dims = Dims { first: 2, count: 3, at: 0, scale: 1.0 };
    let error = op.bind(&dims, args()).unwrap_err().to_string();
    assert_eq!(error, "`terms`: expected 20 bytes, got 16");
    let error = op.bind(&Dims { first: 0, count: 4, at: 4, scale: 1.0 }, args()).unwrap_err();
    assert_eq!(error.to_string(), "`values`: expected 20 bytes, got 16");
}
