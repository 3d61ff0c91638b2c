//! The single works that the benches time, each compared with its twin in every variant.
use testkit::block_on;
use testkit::prelude::{contexts, gpu, variant_name};
use testkit::works::{
    CHOICES, GATHERS, INDEX, PLANS, TABLE, backward, chosen, fill, gather, mix, plan,
};
use wgmoe::WeightType;

#[test]
fn choices() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for (name, shape) in CHOICES {
            testkit::works::choice(&gpu, &ctx, shape)
                .unwrap_or_else(|e| panic!("{name}, {}: {e}", variant_name(&ctx)));
        }
    }
}

#[test]
fn plans() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for (name, [tokens, experts, top]) in PLANS {
            let (logits, assigned) = chosen(tokens, experts, top);
            plan(&gpu, &ctx, [tokens, experts], &logits, &assigned)
                .unwrap_or_else(|e| panic!("{name}, {}: {e}", variant_name(&ctx)));
        }
    }
}

#[test]
fn gathers() {
    let Some(gpu) = gpu() else { return };
    for (name, [rows, hidden]) in GATHERS {
        let x = fill(TABLE, rows * hidden, 1.0);
        let token_of: Vec<u32> = (0..rows).map(|i| mix(INDEX, i) % rows).collect();
        let x_in = gpu.upload(&x);
        for ctx in contexts(&gpu) {
            block_on(gather(&gpu, &ctx, (&x_in, &x), hidden, &token_of))
                .unwrap_or_else(|e| panic!("{name}, {}: {e}", variant_name(&ctx)));
        }
    }
}

/// The steps that the bench of the way back times, at a size that is soon done.
#[test]
fn ways_back() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for weight_type in [WeightType::F32, WeightType::Bf16] {
            backward(&gpu, &ctx, [3, 20, 72, 40], weight_type)
                .unwrap_or_else(|e| panic!("{}: {e}", variant_name(&ctx)));
        }
    }
}
