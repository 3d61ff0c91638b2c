//! The experts' matmuls forwards and backwards: what training adds to inference, step by step.
use crate::timing::{Bench, Ready};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use std::time::Duration;
use testkit::works::{BACKWARDS, backward};
use wgmoe::WeightType;

/// All steps of a shape run in turns, so that their ratios hold on a machine with other work: forwards as
/// training and as inference has it, then the way back, in parts and whole.
pub(super) fn bench_backward(bench: &Bench, c: &mut Criterion) {
    let mut group = c.benchmark_group("backward");
    group.sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(3));
    for (name, dims) in BACKWARDS {
        let [experts, rows, hidden, intermediate] = dims.map(u64::from);
        for weight_type in [WeightType::F32, WeightType::Bf16] {
            // Multiply-adds of one matrix, of which forwards has three and backwards six.
            let flops = 2 * experts * rows * hidden * intermediate;
            for (variant, ctx) in bench.best() {
                let names = ["inference", "forward", "dA", "dz", "dX", "dWdown", "dWgate, dWup"];
                let of = weight_type.name().to_lowercase();
                let id = |step| BenchmarkId::new(format!("{name} {of} {step}"), variant);
                let ids = names.into_iter().chain(["backward"]).map(id).collect();
                bench.turns(&mut group, ids, Throughput::Elements(flops), || {
                    let steps = backward(&bench.gpu, ctx, dims, weight_type)
                        .unwrap_or_else(|e| panic!("{name} {of}, {variant}: {e}"));
                    let all = steps.parts().map(|(_, step)| step.clone());
                    let whole = all.iter().cloned().fold(Default::default(), wgmoe::BoundOp::then);
                    let forwards = [steps.inference.clone(), steps.forward.clone()];
                    let ready = forwards.into_iter().chain(all).chain([whole]);
                    ready.map(Ready::from).collect()
                });
            }
        }
    }
}
