//! `cargo bench -p benches`: a group for each op, and the layer. Every case is compared with the
//! CPU twin (the largest ones in sampled rows) before it is timed; work of which a filter leaves
//! nothing is not even made. With `-- --test` each case is compared and run once.
//!
//! A time is that of one submission: encoding, submitting and waiting. Below criterion's estimate
//! of the mean stands the least. Elements are (token, expert) pairs for routing and plans,
//! floating-point operations on routed rows for matmuls, W1 and W2, tokens for a block. Variants of
//! a case run in turns, so that they meet the same state of the machine.
//!
//! `WGMOE_BENCH_FULL=1` makes the block one of all 256 experts (in four types: 3.8 GB on the device), not of 64, and adds prompts of
//! 16,384 tokens.
//! Where the device has matrix units, `matmul_rows` runs on them too.
//! `WGMOE_BENCH_VARIANTS=1` runs matmuls and layers in every variant too, not only in the one that
//! the device gets by default.
mod backward;
mod choices;
mod layers;
mod plans;
mod rows;
mod timing;
mod training;

use criterion::{Criterion, criterion_group, criterion_main};
use std::time::Duration;

fn all(c: &mut Criterion) {
    let Some(bench) = timing::Bench::open() else { return };
    choices::bench_scores(&bench, c);
    choices::bench_expert_choice(&bench, c);
    choices::bench_token_choice(&bench, c);
    choices::bench_coreset(&bench, c);
    choices::bench_sequence_top(&bench, c);
    choices::bench_capacity(&bench, c);
    plans::bench_assign(&bench, c);
    plans::bench_assign_lists(&bench, c);
    plans::bench_plan(&bench, c);
    rows::bench_gather(&bench, c);
    rows::bench_matmul(&bench, c);
    rows::bench_matmul_rows(&bench, c);
    rows::bench_combine(&bench, c);
    plans::bench_expert_union(&bench, c);
    plans::bench_expert_lists(&bench, c);
    backward::bench_backward(&bench, c);
    training::bench_gates_backward(&bench, c);
    training::bench_router_loss(&bench, c);
    training::bench_balance_loss(&bench, c);
    training::bench_cross_entropy(&bench, c);
    training::bench_loss_sum(&bench, c);
    training::bench_bias_update(&bench, c);
    training::bench_training(&bench, c);
    layers::bench_layer(&bench, c);
    layers::bench_prefill(&bench, c);
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .nresamples(2000);
    targets = all
}
criterion_main!(benches);
