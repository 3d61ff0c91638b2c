use testkit::{cases, prelude::*};
use wgmoe::ops::gates_backward::{Args, GatesBackward, Rule, cpu};
use wgmoe::ops::plan_count::Scales;
use wgmoe::ops::scores;
use wgmoe::plan::{HostPlan, bits};
use wgmoe::routing::GateRule;
use wgmoe::{Context, Gpu, PlanShape, Score, Slice};

/// Every way of making gates.
const RULES: [(GateRule, Score); 6] = [
    (GateRule::Softmax, Score::Softmax),
    (GateRule::Softmax, Score::Sigmoid),
    (GateRule::Normalised, Score::Softmax),
    (GateRule::Normalised, Score::Sigmoid),
    (GateRule::Unnormalised, Score::Softmax),
    (GateRule::Unnormalised, Score::Sigmoid),
];

struct Case {
    experts: usize,
    shape: PlanShape,
    plan: HostPlan,
    /// Before some were dropped.
    chosen: Vec<u32>,
    logits: Vec<f32>,
    dgates: Vec<f32>,
    by_count: Vec<f32>,
    by_expert: Vec<f32>,
}

/// A choice of which some pairs are dropped, and `short` slots cut.
fn case(tokens: usize, experts: usize, probability: f64, short: u32, logits: Vec<f32>) -> Case {
    let chosen = cases::assignment(6, tokens, experts, probability);
    let mut kept = chosen.clone();
    for (word, drop) in kept.iter_mut().zip(cases::assignment(9, tokens, experts, 0.2)) {
        *word &= !drop;
    }
    let slots: usize = (0..experts).map(|e| bits::tokens_of(&kept, tokens, e).len()).sum();
    let shape =
        PlanShape::on_host(tokens as u32, experts as u32, slots as u32 - short.min(slots as u32))
            .with_shared_experts(1);
    let plan = HostPlan::cpu(&shape, &kept, &vec![0.25; tokens * experts]);
    // Shared experts' slots hold what nobody may read.
    let routed = plan.expert_offsets[experts] as usize;
    let mut dgates = cases::values("random", 3, shape.slots().unwrap() as usize);
    dgates[routed..].fill(f32::NAN);
    Case {
        experts,
        shape,
        plan,
        chosen,
        logits,
        dgates,
        by_count: (0..=experts).map(|n| 0.5 + n as f32 * 0.125).collect(),
        by_expert: (0..experts).map(|e| 2.0 - e as f32 * 0.001).collect(),
    }
}

impl Case {
    /// Logits or scores, whichever the rule reads.
    fn source(&self, gate: GateRule, score: Score) -> Vec<f32> {
        if gate == GateRule::Softmax {
            return self.logits.clone();
        }
        scores::cpu(&self.logits, self.experts, score, false, None).0
    }

    fn scales(&self, all: bool) -> Scales<&[f32]> {
        match all {
            true => Scales {
                scale_by_count: Some(&self.by_count),
                scale_by_expert: Some(&self.by_expert),
            },
            false => Scales::default(),
        }
    }

    fn twin(&self, rule: Rule, scaled: bool) -> Vec<f32> {
        let source = self.source(rule.gate, rule.score);
        let (plan, scales) = (&self.plan, self.scales(scaled));
        cpu(plan, &self.dgates, &self.chosen, &source, self.experts, rule, scales)
    }

    fn on_gpu(&self, gpu: &Gpu, ctx: &Context, rule: Rule, scaled: bool) -> Vec<f32> {
        let source = gpu.upload(&self.source(rule.gate, rule.score));
        let [dgates, by_count, by_expert] =
            [&self.dgates, &self.by_count, &self.by_expert].map(|v| gpu.upload(v));
        let plan = gpu.upload(&self.plan.to_words(&self.shape).unwrap());
        let chosen = gpu.upload(&self.chosen);
        let out = Output::f32s(gpu, self.logits.len());
        let args = Args {
            dgates: (&dgates).into(),
            plan: (&plan).into(),
            chosen: (&chosen).into(),
            source: (&source).into(),
            scales: Scales {
                scale_by_count: scaled.then_some((&by_count).into()),
                scale_by_expert: scaled.then_some((&by_expert).into()),
            },
            dlogits: out.slice(),
        };
        run(gpu, &GatesBackward::new(ctx).unwrap().bind(&self.shape, rule, args).unwrap());
        out.get(gpu)
    }
}

#[test]
fn equals_twin() {
    let Some(gpu) = gpu() else { return };
    for ctx in contexts(&gpu) {
        for (tokens, experts, probability, short) in
            [(1, 1, 1.0, 0), (33, 40, 0.2, 0), (70, 96, 0.05, 30), (17, 1024, 0.3, 7)]
        {
            for (seed, kind) in cases::KINDS.iter().enumerate() {
                let logits = cases::values(kind, seed as u64, tokens * experts);
                let case = case(tokens, experts, probability, short, logits);
                for (gate, score) in RULES {
                    for (scale, scaled) in [(1.0, false), (2.5, true)] {
                        let rule = Rule { gate, score, scale };
                        let what = format!("{} {kind} {rule:?} E {experts}", variant_name(&ctx));
                        let want = case.twin(rule, scaled);
                        let got = case.on_gpu(&gpu, &ctx, rule, scaled);
                        // Differences of sums whose terms are up to 6 times a factor; that factor is
                        // up to 5 times half a hundred for tokens of many experts.
                        let atol = if scaled { 2e-4 * experts as f32 / 64.0 } else { 1e-5 };
                        assert_close(&got, &want, atol.max(1e-5), 1e-4, &what);
                        let again = case.on_gpu(&gpu, &ctx, rule, scaled);
                        assert_same(&exact(&again), &exact(&got), "twice");
                    }
                }
            }
        }
    }
}

/// A NaN among the gradients reaches the logits of its token, and no others.
#[test]
fn nan_goes_through() {
    let Some(gpu) = gpu() else { return };
    let (tokens, experts) = (40, 12);
    let mut case = case(tokens, experts, 0.4, 0, cases::values("random", 1, tokens * experts));
    case.dgates[3] = f32::NAN;
    let t = case.plan.token_of[3] as usize;
    for (gate, score) in RULES {
        let rule = Rule { gate, score, scale: 1.0 };
        let want = case.twin(rule, false);
        let touched = |i: &usize| want[*i].is_nan();
        assert!((0..want.len()).any(|i| touched(&i)), "{rule:?}: the twin lost it");
        assert!((0..want.len()).filter(touched).all(|i| i / experts == t), "{rule:?}");
        for ctx in contexts(&gpu) {
            let got = case.on_gpu(&gpu, &ctx, rule, false);
            let nan = |v: &[f32]| v.iter().map(|v| v.is_nan()).collect::<Vec<_>>();
            assert_same(&nan(&got), &nan(&want), &format!("{} {rule:?}", variant_name(&ctx)));
        }
    }
}

#[test]
fn many_rows() {
    let Some(gpu) = gpu() else { return };
    // More rows than a grid's dimension holds.
    let case = case(70_001, 2, 0.6, 0, cases::values("random", 1, 2 * 70_001));
    let rule = Rule { gate: GateRule::Softmax, score: Score::Softmax, scale: 1.0 };
    let want = case.twin(rule, false);
    for ctx in contexts(&gpu) {
        let got = case.on_gpu(&gpu, &ctx, rule, false);
        assert_close(&got, &want, 1e-5, 1e-4, &variant_name(&ctx));
    }
}

/// The sum of all gates times their gradients, in f64, from logits in f64: another way to the gates than
/// the twin's.
fn weighed(case: &Case, rule: Rule, logits: &[f64]) -> f64 {
    let (tokens, experts) = (case.shape.tokens as usize, case.experts);
    let mut sum = 0.0;
    for e in 0..experts {
        for slot in case.plan.expert_offsets[e]..case.plan.expert_offsets[e + 1] {
            let t = case.plan.token_of[slot as usize] as usize;
            let row = &logits[t * experts..][..experts];
            let all: f64 = row.iter().map(|g| g.exp()).sum();
            let score = |e: usize| match (rule.gate, rule.score) {
                (GateRule::Softmax, _) => row[e].exp(),
                (_, Score::Softmax) => row[e].exp() / all,
                (_, _) => 1.0 / (1.0 + (-row[e]).exp()),
            };
            let mine = bits::experts_of(&case.chosen, tokens, t);
            let over = match rule.gate {
                GateRule::Unnormalised => 1.0,
                _ => mine.iter().map(|&e| score(e)).sum::<f64>(),
            };
            let factor = rule.scale * case.by_count[mine.len()] * case.by_expert[e];
            sum += f64::from(case.dgates[slot as usize]) * f64::from(factor) * score(e) / over;
        }
    }
    sum
}

/// The twin's gradients are the slopes of the gates, dropped slots among them.
#[test]
fn twin_has_the_slopes_of_the_gates() {
    let (tokens, experts) = (9, 7);
    let logits: Vec<f32> =
        cases::values("random", 2, tokens * experts).iter().map(|g| g * 0.4).collect();
    let case = case(tokens, experts, 0.6, 2, logits);
    let exact: Vec<f64> = case.logits.iter().map(|&g| g.into()).collect();
    for (gate, score) in RULES {
        let rule = Rule { gate, score, scale: 1.5 };
        let dlogits = case.twin(rule, true);
        let mut dropped_ones = 0;
        for (at, &d) in dlogits.iter().enumerate() {
            let moved = |by: f64| {
                let mut logits = exact.clone();
                logits[at] += by;
                weighed(&case, rule, &logits)
            };
            let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            // Scores come to the twin as f32.
            let near = (slope - f64::from(d)).abs() <= 2e-6 + 2e-6 * slope.abs();
            assert!(near, "{rule:?} at {at}: {d}, {slope}");
            let (t, e) = (at / experts, at % experts);
            let mine = case.plan.expert_offsets[e]..case.plan.expert_offsets[e + 1];
            let kept = mine.into_iter().any(|s| case.plan.token_of[s as usize] as usize == t);
            let chosen = bits::get(&case.chosen, tokens, e, t);
            dropped_ones += usize::from(chosen && !kept && d != 0.0);
        }
        let some = gate != GateRule::Unnormalised || score == Score::Softmax;
        assert_eq!(dropped_ones > 0, some, "{rule:?}: gradients of dropped slots");
    }
}

#[test]
fn slices_that_do_not_fit_are_named() {
    let Some(gpu) = gpu() else { return };
    let shape = PlanShape::on_host(10, 4, 20);
    let words = shape.sections().unwrap().words;
    let buffer = gpu.upload(&vec![0u32; 1024]);
    let of = |n: u32| Slice::new(&buffer, 0, 4 * u64::from(n));
    let op = GatesBackward::new(&contexts(&gpu)[0]).unwrap();
    let rule = Rule { gate: GateRule::Softmax, score: Score::Softmax, scale: 1.0 };
    let refused = |change: fn(&mut [u32; 7])| {
        let mut sizes = [20, words, 4, 40, 5, 4, 40];
        change(&mut sizes);
        let [dgates, plan, chosen, source, by_count, by_expert, dlogits] = sizes.map(of);
        let scales = Scales { scale_by_count: Some(by_count), scale_by_expert: Some(by_expert) };
        let args = Args { dgates, plan, chosen, source, scales, dlogits };
        op.bind(&shape, rule, args).unwrap_err().to_string()
    };
    assert_eq!(refused(|s| s[0] = 21), "`dgates`: expected 80 bytes, [20] f32, got 84");
    assert!(refused(|s| s[1] += 1).starts_with("`plan`: expected"));
    assert_eq!(refused(|s| s[2] = 3), "`chosen`: expected 16 bytes, [4, 1] u32, got 12");
    assert_eq!(refused(|s| s[3] = 41), "`source`: expected 160 bytes, [10, 4] f32, got 164");
    assert_eq!(refused(|s| s[4] = 4), "`scale_by_count`: expected 20 bytes, [5] f32, got 16");
    assert_eq!(refused(|s| s[5] = 5), "`scale_by_expert`: expected 16 bytes, [4] f32, got 20");
    assert_eq!(refused(|s| s[6] = 39), "`dlogits`: expected 160 bytes, [10, 4] f32, got 156");
    // All in one buffer.
    assert!(refused(|_| ()).contains("`dlogits`"));
}
