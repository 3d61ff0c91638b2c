use testkit::{cases, prelude::*};
use wgmoe::PlanShape;
use wgmoe::ops::gather::{Args, Dims, Gather, PlanArgs, cpu};
use wgmoe::ops::{plan_count, plan_fill, plan_scan};
use wgmoe::plan::HostPlan;

#[test]
fn equals_twin() {
    let Some(gpu) = gpu() else { return };
    for (tokens, slots, hidden) in [
        (1, 1, 1),
        (7, 33, 5),
        (40, 257, 16),
        (9, 65, 264),
        (4, 67, 516),
        (3, 100, 2048),
        (65, 64, 1030),
        (5, 70_000, 3),
        (600_000, 600_000, 16),
    ] {
        let x: Vec<f32> = (0..tokens * hidden).map(|i| i as f32 * 0.5 - 7.0).collect();
        // Every fifth slot names no token.
        let token_of: Vec<u32> = (0..slots)
            .map(|s| match s % 10 {
                3 => tokens as u32,
                8 => u32::MAX,
                _ => (s * 7919 % tokens) as u32,
            })
            .collect();
        let want = cpu(&x, hidden, &token_of);
        let (x, of) = (gpu.upload(&x), gpu.upload(&token_of));
        for ctx in contexts(&gpu) {
            let out = Output::f32s(&gpu, slots * hidden);
            let args = Args { x: (&x).into(), token_of: (&of).into(), out: out.slice() };
            let dims = Dims { tokens: tokens as u32, slots: slots as u32, hidden: hidden as u32 };
            run(&gpu, &Gather::new(&ctx).unwrap().bind(&dims, args).unwrap());
            let what = format!("{} T {tokens} S {slots} D {hidden}", variant_name(&ctx));
            assert_same(&out.get::<f32>(&gpu), &want, &what);
        }
    }
}

#[test]
fn a_plan_is_read_where_it_lies() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts, hidden, cut) in [(33, 5, 16, 0), (70, 12, 5, 0), (70, 12, 264, 40)] {
        let assigned = cases::assignment(3, tokens, experts, 0.4);
        let chosen: u32 = assigned.iter().map(|w| w.count_ones()).sum();
        // More room than slots, or less.
        let slots = if cut == 0 { chosen + 9 } else { chosen - cut };
        let shape = PlanShape::on_host(tokens as u32, experts as u32, slots).with_shared_experts(1);
        let at = shape.sections().unwrap();
        // A slice of the section could not be bound at all.
        assert_ne!(at.token_of % 64, 0, "{shape:?}");
        let gates = cases::values("random", 1, tokens * experts);
        let x = cases::values("random", 2, tokens * hidden);
        let slots = shape.slots().unwrap() as usize;
        let mut token_of = HostPlan::cpu(&shape, &assigned, &gates).token_of;
        token_of.resize(slots, u32::MAX);
        let want = cpu(&x, hidden, &token_of);
        let [a, g, x] = [gpu.upload(&assigned), gpu.upload(&gates), gpu.upload(&x)];
        for ctx in contexts(&gpu) {
            // Stale words past the lists of the plan are tokens, too.
            let plan = Output::holding(&gpu, &vec![0u32; at.words as usize]);
            let stats = Output::u32s(&gpu, 8 + experts);
            let out = Output::f32s(&gpu, slots * hidden);
            let (assigned, gates, plan) = ((&a).into(), (&g).into(), plan.slice());
            let count = plan_count::Args { assigned, gates: None, plan };
            let stats = stats.slice();
            let scan = plan_scan::Args { lost: None, offsets: None, plan, stats, add_stats: false };
            let fill = plan_fill::Args { assigned, gates, plan };
            let args = PlanArgs { x: (&x).into(), plan, out: out.slice(), hidden: hidden as u32 };
            let steps = plan_count::PlanCount::new(&ctx).unwrap().bind(&shape, count).unwrap();
            let steps = steps
                .then(plan_scan::PlanScan::new(&ctx).unwrap().bind(&shape, scan).unwrap())
                .then(plan_fill::PlanFill::new(&ctx).unwrap().bind(&shape, fill).unwrap())
                .then(Gather::new(&ctx).unwrap().bind_plan(&shape, args).unwrap());
            run(&gpu, &steps);
            let what = format!("{} T {tokens} D {hidden} cut {cut}", variant_name(&ctx));
            assert_same(&out.get::<f32>(&gpu), &want, &what);
        }
    }
}
