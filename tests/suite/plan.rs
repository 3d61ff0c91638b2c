//! The three plan kernels together.
//!
//! Long: the plan's cases share one comparison of every section.
use testkit::{cases, prelude::*};
use wgmoe::ops::block_plan;
use wgmoe::ops::plan_count::{self, Gates, PlanCount, Scales};
use wgmoe::ops::plan_fill::{self, PlanFill};
use wgmoe::ops::plan_scan::{self, Lost, PlanScan};
use wgmoe::plan::HostPlan;
use wgmoe::plan::Stats;
use wgmoe::plan::bits;
use wgmoe::routing::GateRule;
use wgmoe::{Context, Gpu, PlanShape};

/// What a device made of an assignment.
pub(crate) struct Made {
    pub(crate) plan: Vec<u32>,
    pub(crate) gates: Vec<f32>,
    pub(crate) stats: Stats,
}

/// How gates are made: rule, source, scale, factors.
pub(crate) type How<'a> = (GateRule, &'a [f32], f32, Scales<&'a [f32]>);
/// Lost (counts, how many are drops) and offsets to report.
pub(crate) type Reports<'a> = (Option<(&'a [u32], u32)>, Option<&'a [u32]>);

pub(crate) fn make(
    gpu: &Gpu,
    ctx: &Context,
    shape: &PlanShape,
    assigned: &[u32],
    (rule, source, scale, scales): How<'_>,
    (lost, offsets): Reports<'_>,
) -> Made {
    let plan = Output::u32s(gpu, shape.bytes().unwrap() as usize / 4);
    let stats = Output::u32s(gpu, 8 + shape.experts as usize);
    let gates = Output::f32s(gpu, source.len());
    let (a, s) = (gpu.upload(assigned), gpu.upload(source));
    let scale_by_count = scales.scale_by_count.map(|s| gpu.upload(s));
    let scale_by_expert = scales.scale_by_expert.map(|s| gpu.upload(s));
    let counts = lost.map(|(l, dropped)| (gpu.upload(l), dropped, l.len() as u32 - dropped));
    let ranges = offsets.map(|o| gpu.upload(o));
    let gate_args = Gates {
        rule,
        source: (&s).into(),
        scale,
        scales: Scales {
            scale_by_count: scale_by_count.as_ref().map(Into::into),
            scale_by_expert: scale_by_expert.as_ref().map(Into::into),
        },
        gates: gates.slice(),
    };
    let count =
        plan_count::Args { assigned: (&a).into(), gates: Some(gate_args), plan: plan.slice() };
    let scan = plan_scan::Args {
        lost: counts.as_ref().map(|(c, dropped, ignored)| Lost {
            counts: c.into(),
            dropped: *dropped,
            ignored: *ignored,
        }),
        offsets: ranges.as_ref().map(Into::into),
        plan: plan.slice(),
        stats: stats.slice(),
        add_stats: false,
    };
    let fill = plan_fill::Args { assigned: (&a).into(), gates: gates.slice(), plan: plan.slice() };
    let step = PlanCount::new(ctx).unwrap().bind(shape, count).unwrap();
    let step = step.then(PlanScan::new(ctx).unwrap().bind(shape, scan).unwrap());
    run(gpu, &step.then(PlanFill::new(ctx).unwrap().bind(shape, fill).unwrap()));
    let stats = Stats::from_words(&stats.get::<u32>(gpu)).unwrap();
    Made { plan: plan.get(gpu), gates: gates.get(gpu), stats }
}

pub(crate) const PLAIN: Scales<&[f32]> = Scales { scale_by_count: None, scale_by_expert: None };

/// Makes the plan and compares it with the twin's, whole; the words no section's list fills keep their poison.
fn check(gpu: &Gpu, ctx: &Context, shape: &PlanShape, assigned: &[u32], what: &str) {
    let what = format!("{} {shape:?} {what}", variant_name(ctx));
    let (tokens, experts) = (shape.tokens as usize, shape.experts as usize);
    let source = cases::values("random", 77, tokens * experts);
    let how = (GateRule::Unnormalised, &source[..], 1.0, PLAIN);
    let made = make(gpu, ctx, shape, assigned, how, (None, None));
    let want = HostPlan::cpu(shape, assigned, &source);
    let got = HostPlan::from_words(shape, &made.plan).unwrap();
    assert_same(&got.expert_offsets, &want.expert_offsets, &format!("{what}: expert_offsets"));
    assert_same(&got.token_offsets, &want.token_offsets, &format!("{what}: token_offsets"));
    assert_same(&got.active, &want.active, &format!("{what}: active"));
    assert_same(&got.skinny.offsets, &want.skinny.offsets, &format!("{what}: skinny_offsets"));
    assert_same(&got.skinny.items, &want.skinny.items, &format!("{what}: skinny_items"));
    assert_same(&got.tiles.offsets, &want.tiles.offsets, &format!("{what}: tile_offsets"));
    assert_same(&got.tiles.items, &want.tiles.items, &format!("{what}: tile_items"));
    assert_same(&got.token_of, &want.token_of, &format!("{what}: token_of"));
    assert_same(&got.slot_of, &want.slot_of, &format!("{what}: slot_of"));
    assert_same(&got.gate_of, &want.gate_of, &format!("{what}: gate_of"));

    let at = shape.sections().unwrap();
    let slots = got.token_of.len() as u32;
    for (name, first, used, end) in [
        ("active", at.active, got.active.len() as u32, at.skinny_offsets),
        ("skinny_items", at.skinny_items, 2 * got.skinny.items.len() as u32, at.tile_items),
        ("tile_items", at.tile_items, 2 * got.tiles.items.len() as u32, at.ranks),
        ("token_of", at.token_of, slots, at.gate_of),
        ("gate_of", at.gate_of, slots, at.slot_of),
        ("slot_of", at.slot_of, slots, at.words),
    ] {
        let rest = &made.plan[(first + used) as usize..end as usize];
        assert!(rest.iter().all(|&w| w == u32::MAX), "{what}: {name}: written past the list");
    }

    let tokens_per_expert: Vec<u32> =
        want.expert_offsets[..experts + 1].windows(2).map(|w| w[1] - w[0]).collect();
    let chosen = ones(assigned, tokens, experts);
    let routed: u32 = tokens_per_expert.iter().sum();
    assert_eq!(routed, chosen.min(shape.routed_slots), "{what}: the twin");
    assert_eq!(slots, routed + shape.shared_experts * shape.tokens, "{what}: the twin");
    let stats = Stats {
        slots: routed,
        unique_experts: want.active.len() as u32,
        dropped: 0,
        ignored: 0,
        untouched: (0..tokens).filter(|&t| bits::experts_of(assigned, tokens, t).is_empty()).count()
            as u32,
        clamped: 0,
        cut: chosen - routed,
        tokens_per_expert,
    };
    assert_eq!(made.stats, stats, "{what}");
}

/// Bits of all experts.
pub(crate) fn ones(assigned: &[u32], tokens: usize, experts: usize) -> u32 {
    (0..experts).map(|e| bits::tokens_of(assigned, tokens, e).len() as u32).sum()
}

#[test]
fn equals_twin() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu).into_iter().filter(|c| !c.variant().subgroups) {
        for (tokens, experts) in [(1, 1), (31, 5), (33, 40), (64, 96), (100, 384), (65, 1024)] {
            for (i, probability) in [0.0, 0.1, 0.6, 1.0].into_iter().enumerate() {
                let assigned = cases::assignment(i as u64, tokens, experts, probability);
                for shared_experts in [0, 1, 2] {
                    for (tile_rows, skinny_rows) in
                        [(16, 0), (16, 4), (64, 16), (1, 0), (8, 7), (8, 8)]
                    {
                        let shape = PlanShape::on_host(
                            tokens as u32,
                            experts as u32,
                            ones(&assigned, tokens, experts) + 3 * i as u32,
                        )
                        .with_item_rows(tile_rows, skinny_rows)
                        .with_shared_experts(shared_experts);
                        check(&gpu, &ctx, &shape, &assigned, "");
                    }
                }
            }
        }
    }
}

#[test]
fn an_expert_nobody_wants() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (50, 300);
    let mut assigned = bits::empty(tokens, experts);
    for t in 0..tokens {
        bits::set(&mut assigned, tokens, if t % 3 == 0 { 299 } else { 7 }, t);
    }
    let shape = PlanShape::on_host(50, 300, 50).with_item_rows(16, 3);
    for ctx in contexts(&gpu) {
        check(&gpu, &ctx, &shape, &assigned, "two experts");
    }
}

#[test]
fn slots_past_the_bound_are_cut_off() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (70, 40);
    let assigned = cases::assignment(3, tokens, experts, 0.3);
    let all = ones(&assigned, tokens, experts);
    for ctx in contexts(&gpu) {
        for routed_slots in [0, 1, all / 2, all - 1, all] {
            for shared_experts in [0, 1, 2] {
                let shape = PlanShape::on_host(tokens as u32, experts as u32, routed_slots)
                    .with_item_rows(16, 4)
                    .with_shared_experts(shared_experts);
                check(&gpu, &ctx, &shape, &assigned, "cut off");
            }
        }
    }
}

#[test]
fn a_cut_leaves_every_token_what_is_there() {
    // Two experts that all 5 tokens chose, room for 7: the second expert keeps tokens 0 and 1.
    let shape = PlanShape::on_host(5, 2, 7).with_item_rows(4, 0).with_shared_experts(1);
    let assigned = [0b11111, 0b11111];
    let gates: Vec<f32> = (0..10).map(|i| i as f32).collect();
    let want = HostPlan::cpu(&shape, &assigned, &gates);
    assert_eq!(want.expert_offsets, [0, 5, 7, 12]);
    assert_eq!(want.token_of, [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]);
    assert_eq!(want.gate_of, [0.0, 2.0, 4.0, 6.0, 8.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
    assert_eq!(want.token_offsets, [0, 3, 6, 8, 10, 12]);
    assert_eq!(want.slot_of, [0, 5, 7, 1, 6, 8, 2, 9, 3, 10, 4, 11]);
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        check(&gpu, &ctx, &shape, &assigned, "cut");
        let how = (GateRule::Unnormalised, &gates[..], 1.0, PLAIN);
        let stats = make(&gpu, &ctx, &shape, &assigned, how, (None, None)).stats;
        assert_eq!((stats.slots, stats.cut, stats.ignored), (7, 3, 0));
        assert_eq!(stats.tokens_per_expert, [5, 2]);
        assert_eq!(stats.untouched, 0);
    }
}

#[test]
fn cuts_of_long_batches() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts, probability, shared_experts) in
        [(65_537, 16, 0.5, 1), (4000, 1024, 0.03, 2), (300_000, 3, 0.7, 1)]
    {
        let assigned = cases::assignment(5, tokens, experts, probability);
        let all = ones(&assigned, tokens, experts);
        for routed_slots in [all / 3, all - all / 50] {
            let shape = PlanShape::on_host(tokens as u32, experts as u32, routed_slots)
                .with_item_rows(32, 8)
                .with_shared_experts(shared_experts);
            for ctx in contexts(&gpu).into_iter().filter(|c| !c.variant().subgroups) {
                check(&gpu, &ctx, &shape, &assigned, "cut");
            }
        }
    }
}

#[test]
fn bits_past_the_last_token_are_ignored() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (70, 40);
    let mut assigned = cases::assignment(3, tokens, experts, 0.3);
    let shape = PlanShape::on_host(70, 40, ones(&assigned, tokens, experts))
        .with_item_rows(16, 4)
        .with_shared_experts(1);
    for e in 0..experts {
        assigned[e * 3 + 2] |= u32::MAX << (tokens % 32);
    }
    for ctx in contexts(&gpu) {
        check(&gpu, &ctx, &shape, &assigned, "stale bits");
    }
}

#[test]
fn long_batches() {
    let Some(gpu) = gpu() else { return };
    for (tokens, experts, probability, shared_experts) in
        [(65_536, 4, 1.0, 0), (65_537, 16, 0.5, 1), (65_536, 256, 0.03, 1), (2_200_000, 1, 0.2, 0)]
    {
        let assigned = cases::assignment(5, tokens, experts, probability);
        let shape =
            PlanShape::on_host(tokens as u32, experts as u32, ones(&assigned, tokens, experts))
                .with_item_rows(32, 8)
                .with_shared_experts(shared_experts);
        for ctx in contexts(&gpu).into_iter().filter(|c| !c.variant().subgroups) {
            check(&gpu, &ctx, &shape, &assigned, "");
        }
    }
}

#[test]
fn a_plan_of_given_gates() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (40, 12);
    let assigned = cases::assignment(2, tokens, experts, 0.3);
    let gates = cases::values("random", 1, tokens * experts);
    let shape = PlanShape::on_host(40, 12, ones(&assigned, tokens, experts))
        .with_item_rows(16, 4)
        .with_shared_experts(1);
    for ctx in contexts(&gpu) {
        let plan = Output::u32s(&gpu, shape.bytes().unwrap() as usize / 4);
        let stats = Output::u32s(&gpu, 8 + experts);
        let (a, g) = (gpu.upload(&assigned), gpu.upload(&gates));
        let count = plan_count::Args { assigned: (&a).into(), gates: None, plan: plan.slice() };
        let scan = plan_scan::Args {
            lost: None,
            offsets: None,
            plan: plan.slice(),
            stats: stats.slice(),
            add_stats: false,
        };
        let fill =
            plan_fill::Args { assigned: (&a).into(), gates: (&g).into(), plan: plan.slice() };
        let step = PlanCount::new(&ctx).unwrap().bind(&shape, count).unwrap();
        let step = step.then(PlanScan::new(&ctx).unwrap().bind(&shape, scan).unwrap());
        run(&gpu, &step.then(PlanFill::new(&ctx).unwrap().bind(&shape, fill).unwrap()));
        let got = HostPlan::from_words(&shape, &plan.get::<u32>(&gpu)).unwrap();
        assert_eq!(got, HostPlan::cpu(&shape, &assigned, &gates), "{}", variant_name(&ctx));
    }
}

#[test]
fn statistics_add_up_what_was_lost() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (300, 600);
    let assigned = cases::assignment(2, tokens, experts, 0.004);
    let source = cases::values("random", 1, tokens * experts);
    let shape =
        PlanShape::on_host(300, 600, ones(&assigned, tokens, experts)).with_item_rows(16, 4);
    let lost: Vec<u32> = (0..610).map(|i| i * i % 17).collect();
    let offsets = [0, 40, 30, 90, 301, 300, 300, u32::MAX];
    for ctx in contexts(&gpu) {
        let how = (GateRule::Softmax, &source[..], 1.0, PLAIN);
        let reports = (Some((&lost[..], 600)), Some(&offsets[..]));
        let stats = make(&gpu, &ctx, &shape, &assigned, how, reports).stats;
        assert_eq!(stats.dropped, lost[..600].iter().sum::<u32>());
        assert_eq!(stats.ignored, lost[600..].iter().sum::<u32>());
        // 30 and the first 300 decrease, 301 and the last exceed the tokens.
        assert_eq!(stats.clamped, 4);
        let twice = make(&gpu, &ctx, &shape, &assigned, how, reports).stats;
        assert_eq!(stats, twice);
    }
}

#[test]
fn statistics_are_added_to_what_is_there() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (32, 300);
    let assigned = cases::assignment(2, tokens, experts, 0.04);
    let source = cases::values("random", 1, tokens * experts);
    let chosen = ones(&assigned, tokens, experts);
    let shape =
        PlanShape::on_host(32, 300, chosen - 9).with_item_rows(16, 4).with_shared_experts(1);
    let (a, s) = (gpu.upload(&assigned), gpu.upload(&source));
    let offsets = gpu.upload(&[0u32, 20, 10, 32]);
    for ctx in contexts(&gpu) {
        for block in [false, true] {
            let what = format!("{} block {block}", variant_name(&ctx));
            let plan = Output::u32s(&gpu, shape.bytes().unwrap() as usize / 4);
            let gates = Output::f32s(&gpu, source.len());
            // What is there: a little, a sum about to pass 32 bits, a sum at their end.
            let mut before = vec![3; 8 + experts];
            before[0] = u32::MAX - 2;
            before[8] = u32::MAX;
            let sums = Output::holding(&gpu, &before);
            let own = Output::u32s(&gpu, 8 + experts);
            let gate_args = Gates {
                rule: GateRule::Unnormalised,
                source: (&s).into(),
                scale: 1.0,
                scales: Scales { scale_by_count: None, scale_by_expert: None },
                gates: gates.slice(),
            };
            let bind = |stats: &Output, add_stats| {
                let (assigned, plan) = ((&a).into(), plan.slice());
                let (stats, offsets) = (stats.slice(), Some((&offsets).into()));
                if block {
                    let args = block_plan::Args {
                        assigned,
                        gates: gate_args,
                        offsets,
                        plan,
                        stats,
                        add_stats,
                    };
                    return block_plan::BlockPlan::new(&ctx).unwrap().bind(&shape, args).unwrap();
                }
                let count = plan_count::Args { assigned, gates: Some(gate_args), plan };
                let scan = plan_scan::Args { lost: None, offsets, plan, stats, add_stats };
                let count = PlanCount::new(&ctx).unwrap().bind(&shape, count).unwrap();
                count.then(PlanScan::new(&ctx).unwrap().bind(&shape, scan).unwrap())
            };
            run(&gpu, &bind(&own, false));
            let adding = bind(&sums, true);
            run(&gpu, &adding);
            run(&gpu, &adding);
            let own = own.get::<u32>(&gpu);
            assert_eq!((own[0], own[5], own[6], own[7]), (chosen - 9, 1, 9, 0), "{what}");
            let want: Vec<u32> =
                before.iter().zip(&own).map(|(b, n)| b.saturating_add(2 * n)).collect();
            assert_same(&sums.get::<u32>(&gpu), &want, &what);
        }
    }
}

#[test]
fn twice_gives_equal_bits() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (1000, 96);
    let assigned = cases::assignment(2, tokens, experts, 0.1);
    let source = cases::values("random", 1, tokens * experts);
    let shape = PlanShape::on_host(1000, 96, ones(&assigned, tokens, experts))
        .with_item_rows(16, 4)
        .with_shared_experts(1);
    for ctx in contexts(&gpu) {
        let how = (GateRule::Softmax, &source[..], 1.0, PLAIN);
        let [a, b] = [(); 2].map(|()| make(&gpu, &ctx, &shape, &assigned, how, (None, None)));
        assert_same(&a.plan, &b.plan, "plan");
        assert_same(&exact(&a.gates), &exact(&b.gates), "gates");
    }
}
