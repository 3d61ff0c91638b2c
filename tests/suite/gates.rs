//! Gates, as the first of the plan's kernels makes them.
use crate::plan::{PLAIN, make, ones};
use testkit::{cases, prelude::*};
use wgmoe::PlanShape;
use wgmoe::ops::plan_count::{self, Scales};
use wgmoe::plan::{HostPlan, bits};
use wgmoe::routing::GateRule;

#[test]
fn gates_equal_twin() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu).into_iter().filter(|c| !c.variant().subgroups) {
        for (tokens, experts, probability) in
            [(1, 1, 1.0), (33, 40, 0.2), (70, 96, 0.03), (40, 1024, 0.3)]
        {
            let assigned = cases::assignment(6, tokens, experts, probability);
            let shape =
                PlanShape::on_host(tokens as u32, experts as u32, ones(&assigned, tokens, experts))
                    .with_item_rows(16, 4)
                    .with_shared_experts(1);
            let scale_by_count: Vec<f32> = (0..=experts).map(|n| 0.5 + n as f32 * 0.125).collect();
            let scale_by_expert: Vec<f32> = (0..experts).map(|e| 2.0 - e as f32 * 0.001).collect();
            for (seed, kind) in cases::KINDS.iter().enumerate() {
                for rule in [GateRule::Softmax, GateRule::Normalised, GateRule::Unnormalised] {
                    let mut source = cases::values(kind, seed as u64, tokens * experts);
                    if rule != GateRule::Softmax {
                        // Scores lie in [0, 1].
                        source
                            .iter_mut()
                            .for_each(|s| *s = if s.is_finite() { s.abs().min(1.0) } else { 0.0 });
                    }
                    for (scale, scales) in [
                        (1.0, PLAIN),
                        (
                            2.5,
                            Scales {
                                scale_by_count: Some(&scale_by_count[..]),
                                scale_by_expert: None,
                            },
                        ),
                        (
                            1.0,
                            Scales {
                                scale_by_count: None,
                                scale_by_expert: Some(&scale_by_expert[..]),
                            },
                        ),
                        (
                            0.5,
                            Scales {
                                scale_by_count: Some(&scale_by_count[..]),
                                scale_by_expert: Some(&scale_by_expert[..]),
                            },
                        ),
                    ] {
                        let what = format!(
                            "{} {kind} {rule:?} T {tokens} E {experts}",
                            variant_name(&ctx)
                        );
                        let how = (rule, &source[..], scale, scales);
                        let made = make(&gpu, &ctx, &shape, &assigned, how, (None, None));
                        let want =
                            plan_count::cpu(&assigned, &source, experts, rule, scale, scales);
                        let pair =
                            |i: &usize| bits::get(&assigned, tokens, i % experts, i / experts);
                        let [got, want] = [&made.gates, &want]
                            .map(|g| (0..g.len()).filter(pair).map(|i| g[i]).collect::<Vec<f32>>());
                        // Sums of up to 1,024 terms in f32; below exp(-87): 0 is allowed. A device may also take
                        // subnormal scores for 0, which a tiny sum blows up.
                        let flushed: Vec<f32> = source
                            .iter()
                            .map(|&s| if s.is_subnormal() { 0.0 } else { s })
                            .collect();
                        let zeroed =
                            plan_count::cpu(&assigned, &flushed, experts, rule, scale, scales);
                        let zeroed: Vec<f32> =
                            (0..zeroed.len()).filter(pair).map(|i| zeroed[i]).collect();
                        let near = mismatch(&got, &want, 2e-36, 4e-6).is_none();
                        assert_close(&got, if near { &want } else { &zeroed }, 2e-36, 4e-6, &what);
                        let rest = (0..made.gates.len()).filter(|i| !pair(i));
                        assert!(
                            rest.into_iter().all(|i| made.gates[i].is_nan()),
                            "{what}: written elsewhere"
                        );
                        let plan = HostPlan::from_words(&shape, &made.plan).unwrap();
                        let twin = HostPlan::cpu(&shape, &assigned, &made.gates);
                        assert_same(&plan.gate_of, &twin.gate_of, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn infinite_logits_share_the_gates() {
    let Some(gpu) = gpu() else { return };
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    // Logits of three experts, of which a token has the first two, and their gates.
    let rows = [
        ([inf, nan, inf], [1.0, 0.0]),
        ([inf, inf, 0.0], [0.5, 0.5]),
        ([inf, 7.0, inf], [1.0, 0.0]),
        ([inf, -inf, nan], [1.0, 0.0]),
        ([nan, -inf, inf], [0.0, 0.0]),
        ([nan, nan, 3.0], [0.0, 0.0]),
        ([nan, 2.0, 3.0], [0.0, 1.0]),
    ];
    let source: Vec<f32> = rows.iter().flat_map(|row| row.0).collect();
    let shape = PlanShape::on_host(7, 3, 14).with_item_rows(16, 4);
    let assigned = [0x7f, 0x7f, 0];
    for ctx in contexts(&gpu) {
        let how = (GateRule::Softmax, &source[..], 1.0, PLAIN);
        let made = make(&gpu, &ctx, &shape, &assigned, how, (None, None));
        let want = plan_count::cpu(&assigned, &source, 3, GateRule::Softmax, 1.0, PLAIN);
        for (t, (_, gates)) in rows.iter().enumerate() {
            assert_same(&made.gates[3 * t..][..2], gates, &format!("{} {t}", variant_name(&ctx)));
            assert_same(&want[3 * t..][..2], gates, "the twin");
        }
    }
}

#[test]
fn gates_of_mixed_sign_keep_the_bound_of_their_sum() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (32, 1000);
    let assigned = cases::assignment(6, tokens, experts, 1.0);
    let source = cases::values("random", 3, tokens * experts);
    let shape = PlanShape::on_host(tokens as u32, experts as u32, (tokens * experts) as u32)
        .with_item_rows(16, 4);
    let want = plan_count::cpu(&assigned, &source, experts, GateRule::Normalised, 1.0, PLAIN);
    for ctx in contexts(&gpu).into_iter().filter(|c| !c.variant().subgroups) {
        let how = (GateRule::Normalised, &source[..], 1.0, PLAIN);
        let got = make(&gpu, &ctx, &shape, &assigned, how, (None, None)).gates;
        let mut worst = 0.0f64;
        for (t, row) in source.chunks_exact(experts).enumerate() {
            let sum: f64 = row.iter().map(|&s| f64::from(s)).sum();
            let all: f64 = row.iter().map(|&s| f64::from(s).abs()).sum();
            let bound = (experts + 6) as f64 * 2f64.powi(-24) * (all / sum.abs());
            for i in t * experts..(t + 1) * experts {
                let off = ((f64::from(got[i]) - f64::from(want[i])) / f64::from(want[i])).abs();
                assert!(off <= bound, "{} at {i}: off by {off:e} of {bound:e}", variant_name(&ctx));
                worst = worst.max(off);
            }
        }
        println!("{}: at most {worst:e}", variant_name(&ctx));
    }
}
