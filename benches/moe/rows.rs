//! Rows of hidden states: gathered, multiplied, summed up.
use crate::plans::planned;
use crate::timing::Bench;
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use std::time::Duration;
use testkit::block_on;
use testkit::compare::close;
use testkit::works::{GATHERS, INDEX, OP2, TABLE, chosen, fill, gather, grouped_matmul, mix};
use wgmoe::WeightType;
use wgmoe::ops::combine;

pub(super) fn bench_gather(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("gather");
    for (name, [rows, hidden]) in GATHERS {
        let bytes = Throughput::BytesDecimal(2 * 4 * u64::from(rows) * u64::from(hidden));
        bench.case(&mut group, name, &bench.contexts[..1], bytes, |ctx, what| {
            let x = fill(TABLE, rows * hidden, 1.0);
            let token_of: Vec<u32> = (0..rows).map(|i| mix(INDEX, i) % rows).collect();
            let x_in = bench.gpu.upload(&x);
            let step = block_on(gather(&bench.gpu, ctx, (&x_in, &x), hidden, &token_of));
            step.unwrap_or_else(|e| panic!("{what}: {e}")).into()
        });
    }
}

pub(super) fn bench_matmul(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("matmul");
    group.sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(3));
    // Every type is in W1; here those of the tables.
    for weight_type in [WeightType::F32, WeightType::Bf16, WeightType::Q8_0, WeightType::Q4_K] {
        let name = match weight_type {
            WeightType::F32 => "OP2 32x[64,2048]x[2048,512] f32".to_string(),
            _ => format!("OP2 {}", weight_type.name().to_lowercase()),
        };
        let flops = 2 * OP2.iter().map(|&n| u64::from(n)).product::<u64>();
        bench.case(&mut group, &name, bench.best(), Throughput::Elements(flops), |ctx, what| {
            let step = grouped_matmul(&bench.gpu, ctx, weight_type, OP2);
            step.unwrap_or_else(|e| panic!("{what}: {e}")).into()
        });
    }
}

/// Rows of each expert, and storage types: where one kernel follows another, and one item size another.
const ROWS: [u32; 13] = [1, 2, 4, 8, 9, 12, 16, 24, 32, 48, 64, 96, 128];

/// Time against the rows of each expert: a cliff is a step above the line between neighbours. They take
/// turns.
pub(super) fn bench_matmul_rows(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("matmul_rows");
    group.sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(1));
    let units = bench.matrix_units();
    for (variant, ctx) in bench.best().iter().chain(&units) {
        for weight_type in [WeightType::Bf16, WeightType::Q8_0, WeightType::Q4_K] {
            let name = weight_type.name().to_lowercase();
            let ids = ROWS.iter().map(|rows| BenchmarkId::new(format!("{name} {variant}"), rows));
            bench.turns(&mut group, ids.collect(), Throughput::Elements(1), || {
                let of = |&rows| grouped_matmul(&bench.gpu, ctx, weight_type, [8, rows, 1024, 512]);
                ROWS.iter().map(|rows| of(rows).unwrap_or_else(|e| panic!("{e}")).into()).collect()
            });
        }
    }
}

pub(super) fn bench_combine(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("combine");
    for (name, tokens, experts, hidden) in [
        ("LLaDA2 T32 K8 D2048", 32, 256, 2048),
        ("W2 T512 K8 D512", 512, 64, 512),
        ("T4096 K8 D512", 4096u32, 64, 512u32),
    ] {
        let bytes = 4 * u64::from(tokens) * u64::from(hidden) * (8 + 1);
        let best = &bench.contexts[..1];
        bench.case(&mut group, name, best, Throughput::BytesDecimal(bytes), |ctx, what| {
            let gpu = &bench.gpu;
            let (logits, assigned) = chosen(tokens, experts, 8);
            let planned = planned(bench, ctx, [tokens, experts], &logits, &assigned, what);
            let y = fill(TABLE, planned.shape.slots().unwrap() * hidden, 1.0);
            let (y_in, out) = (gpu.upload(&y), bench.poisoned(tokens * hidden));
            let args = combine::Args {
                y: (&y_in).into(),
                plan: (&planned.plan).into(),
                out: (&out).into(),
                columns: 0..hidden,
                hidden,
                add: false,
            };
            let step = combine::Combine::new(ctx).unwrap().bind(&planned.shape, args).unwrap();
            gpu.run(&step).unwrap();
            let want = combine::cpu(&planned.host, &y, hidden as usize, None);
            close(&bench.download(&out), &want, 1e-6, 1e-5, what).unwrap();
            step.into()
        });
    }
}
