//! The CPU twins: each says which of its arguments does not fit the others, and the plan's own.
use std::panic::catch_unwind;
use wgmoe::PlanShape;
use wgmoe::ops::capacity::HostSource;
use wgmoe::ops::logits::cpu as cpu_logits;
use wgmoe::ops::plan_count::Scales;
use wgmoe::ops::{
    assign, assign_lists, balance_loss, bias_update, capacity, combine, coreset, cross_entropy,
    expert_choice, expert_union, gates_backward, gather, plan_count, router_loss, scores,
    sequence_top, token_choice,
};
use wgmoe::plan::{HostPlan, bits};
use wgmoe::routing::schedule::Schedule;
use wgmoe::routing::{BlockRule, GateRule, Groups, Score};

const R6: [f32; 6] = [0.5; 6];
const R10: [f32; 10] = [0.5; 10];
const PLAIN: Scales<&[f32]> = Scales { scale_by_count: None, scale_by_expert: None };

fn all(_: usize, _: usize) -> bool {
    true
}

fn token_choice(r: &[f32], experts: usize, top: usize, groups: Option<[u32; 2]>) {
    let groups = groups.map(|[count, top]| Groups::new(count, top));
    token_choice::cpu(r, experts, top, groups, &all);
}

fn count(assigned: &[u32], source: &[f32], experts: usize, scales: Scales<&[f32]>) {
    plan_count::cpu(assigned, source, experts, GateRule::Unnormalised, 1.0, scales);
}

fn election(rule: BlockRule, r: &[f32], experts: usize, own: &[u32], offsets: &[u32]) {
    coreset::cpu(rule, r, experts, own, offsets, None);
}

fn plan(tile_rows: u32, assigned: &[u32], gates: &[f32]) -> HostPlan {
    let shape = PlanShape::on_host(2, 3, 6).with_item_rows(tile_rows, 4);
    HostPlan::cpu(&shape, assigned, gates)
}

fn back(chosen: &[u32], dgates: &[f32], source: &[f32], experts: usize, scales: Scales<&[f32]>) {
    let (gate, score, scale) = (GateRule::Softmax, Score::Softmax, 1.0);
    let rule = gates_backward::Rule { gate, score, scale };
    let plan = plan(8, &[3; 3], &R6);
    gates_backward::cpu(&plan, dgates, chosen, source, experts, rule, scales);
}

fn router_z([tokens, experts, experts_per_token]: [u32; 3], logits: &[f32], counts: &[u32]) {
    let dims = router_loss::Dims { tokens, experts, experts_per_token };
    router_loss::cpu(&dims, router_loss::Coefficients::default(), logits, counts);
}

fn balanced([tokens, experts, experts_per_token]: [u32; 3], logits: &[f32], taken: &[u32]) {
    let dims = balance_loss::Dims { tokens, experts, experts_per_token };
    balance_loss::cpu(&dims, 1.0, logits, taken);
}

/// A twin, and what it must say.
type Case = (&'static str, fn(), &'static str);

const UNION: BlockRule = BlockRule::Union(1);

#[rustfmt::skip] // a table
const CASES: &[Case] = &[
    ("scores", || { scores::cpu(&R10, 3, Score::Softmax, false, None); }, "`logits`: expected rows of 3 values, got 10"),
    ("scores", || { scores::cpu(&R10, 0, Score::Softmax, false, None); }, "`experts`: expected 1 or more, got 0"),
    ("scores", || { scores::cpu(&R10, 2, Score::Softmax, false, Some(&R10[..5])); }, "`bias`: expected 2 values, got 5"),
    ("token_choice", || token_choice(&R10, 3, 1, None), "`values`: expected rows of 3 values, got 10"),
    ("token_choice", || token_choice(&R10, 0, 0, None), "`experts`: expected 1 or more, got 0"),
    ("token_choice", || token_choice(&R10, 2, 3, None), "`top`: expected at most 2, got 3"),
    ("token_choice", || token_choice(&R10, 10, 2, Some([4, 1])), "`groups`: 4 groups do not divide 10 experts"),
    ("token_choice", || token_choice(&R10, 10, 2, Some([0, 0])), "`groups`: expected 1 or more, got 0"),
    ("token_choice", || token_choice(&R10, 10, 2, Some([5, 6])), "`groups`: expected at most 5, got 6"),
    ("expert_choice", || { expert_choice::cpu(&R10, 3, &[0, 3], None, &[1]); }, "`values`: expected rows of 3 values, got 10"),
    ("expert_choice", || { expert_choice::cpu(&R10[..7], 2, &[0, 3], None, &[1]); }, "`values`: expected rows of 2 values, got 7"),
    ("expert_choice", || { expert_choice::cpu(&R10, 0, &[0, 3], None, &[1]); }, "`experts`: expected 1 or more, got 0"),
    ("expert_choice", || { expert_choice::cpu(&R10, 2, &[], None, &[]); }, "`offsets`: expected one value more than there are ranges, got 0"),
    ("expert_choice", || { expert_choice::cpu(&R10, 2, &[0, 5], None, &[1, 1, 1]); }, "`capacity`: expected 1 values, got 3"),
    ("expert_choice", || { expert_choice::cpu(&R10, 2, &[0, 5], Some(&[5, 5]), &[1]); }, "`lengths`: expected 1 values, got 2"),
    ("drop", || { expert_choice::cpu_drop(&R10, 3, &[0; 3], 1); }, "`gates`: expected rows of 3 values, got 10"),
    ("drop", || { expert_choice::cpu_drop(&R10, 0, &[], 1); }, "`experts`: expected 1 or more, got 0"),
    ("drop", || { expert_choice::cpu_drop(&R10, 2, &[0; 3], 1); }, "`assigned`: expected 2 values, got 3"),
    ("sequence_top", || { sequence_top::cpu(&R10, 3, 1, &[0, 3]); }, "`values`: expected rows of 3 values, got 10"),
    ("sequence_top", || { sequence_top::cpu(&R10, 0, 0, &[0, 3]); }, "`experts`: expected 1 or more, got 0"),
    ("sequence_top", || { sequence_top::cpu(&R10, 2, 3, &[0, 5]); }, "`top`: expected at most 2, got 3"),
    ("sequence_top", || { sequence_top::cpu(&R10, 2, 1, &[]); }, "`offsets`: expected one value more than there are ranges, got 0"),
    ("coreset", || election(UNION, &R10, 3, &[0; 3], &[0, 3]), "`values`: expected rows of 3 values, got 10"),
    ("coreset", || election(UNION, &R10, 0, &[], &[0, 3]), "`experts`: expected 1 or more, got 0"),
    ("coreset", || election(UNION, &R10, 2, &[0; 3], &[0, 5]), "`own_choice`: expected 2 values, got 3"),
    ("coreset", || election(UNION, &R10, 2, &[0; 2], &[]), "`offsets`: expected one value more than there are ranges, got 0"),
    ("coreset", || election(BlockRule::Vote(3), &R10, 2, &[0; 2], &[0, 5]), "`vote`: 3 of only 2 experts"),
    ("coreset", || { coreset::cpu(UNION, &R10, 2, &[0; 2], &[0, 5], Some(&[1; 4])); }, "`voters`: expected 5 values, got 4"),
    ("assign", || { assign::cpu(&[0; 7], &R10[..7], 2, 3); }, "`ids`: expected rows of 2 values, got 7"),
    ("assign", || { assign::cpu(&[0; 6], &R10, 2, 3); }, "`weights`: expected 6 values, got 10"),
    ("assign", || { assign::cpu(&[0; 6], &R6, 0, 3); }, "`experts_per_token`: expected 1 or more, got 0"),
    ("assign", || { assign::cpu(&[0; 6], &R6, 2, 0); }, "`experts`: expected 1 or more, got 0"),
    ("assign_lists", || { assign_lists::cpu(&[], &[0; 6], &R6, 3); }, "`offsets`: expected one value more than there are ranges, got 0"),
    ("assign_lists", || { assign_lists::cpu(&[0, 6], &[0; 6], &R10, 3); }, "`weights`: expected 6 values, got 10"),
    ("capacity", || { capacity::cpu(HostSource::ExpertsPerToken(&[1, 2]), 8, 4, &[0, 8], None); }, "`experts_per_token`: expected 1 values, got 2"),
    ("capacity", || { capacity::cpu(HostSource::Ratios(&Schedule::fixed(2), &[]), 8, 4, &[0, 8], None); }, "`ratios`: expected 1 values, got 0"),
    ("capacity", || { capacity::cpu(HostSource::Masked(&Schedule::fixed(2), &[]), 8, 4, &[0, 8], None); }, "`masked`: expected 1 values, got 0"),
    ("capacity", || { capacity::cpu(HostSource::ExpertsPerToken(&[1]), 8, 0, &[0, 8], None); }, "`experts`: expected 1 or more, got 0"),
    ("capacity", || { capacity::cpu(HostSource::ExpertsPerToken(&[]), 8, 4, &[], None); }, "`offsets`: expected one value more than there are ranges, got 0"),
    ("capacity", || { capacity::cpu(HostSource::ExpertsPerToken(&[1]), 8, 4, &[0, 8], Some(&[])); }, "`lengths`: expected 1 values, got 0"),
    ("expert_union", || { expert_union::cpu(&[0; 3], 33, 2, &[0, 33], 1); }, "`assigned`: expected 4 values, got 3"),
    ("expert_union", || { expert_union::cpu(&[0; 4], 33, 2, &[], 1); }, "`offsets`: expected one value more than there are ranges, got 0"),
    ("Totals::add", || expert_union::Totals::default().add(&[1], &[0, 1, 2], 2), "`offsets`: expected 2 values, got 3"),
    ("plan_count", || count(&[0; 3], &R10, 3, PLAIN), "`source`: expected rows of 3 values, got 10"),
    ("plan_count", || count(&[], &R10, 0, PLAIN), "`experts`: expected 1 or more, got 0"),
    ("plan_count", || count(&[], &R10, 2, PLAIN), "`assigned`: expected 2 values, got 0"),
    ("plan_count", || count(&[0; 2], &R10, 2, Scales { scale_by_count: Some(&R6), scale_by_expert: None }), "`scale_by_count`: expected 3 values, got 6"),
    ("plan_count", || count(&[0; 2], &R10, 2, Scales { scale_by_count: None, scale_by_expert: Some(&R6) }), "`scale_by_expert`: expected 2 values, got 6"),
    ("HostPlan", || { plan(8, &[0; 4], &R6); }, "`assigned`: expected 3 values, got 4"),
    ("HostPlan", || { plan(8, &[0; 3], &R10[..5]); }, "`gates`: expected 6 values, got 5"),
    ("HostPlan", || { plan(0, &[3; 3], &R6); }, "`tile_rows`: expected 1 or more, got 0"),
    ("gather", || { gather::cpu(&R10, 3, &[0]); }, "`x`: expected rows of 3 values, got 10"),
    ("gather", || { gather::cpu(&R10, 0, &[0]); }, "`hidden`: expected 1 or more, got 0"),
    ("combine", || { combine::cpu(&plan(8, &[3; 3], &R6), &R10, 3, None); }, "`y`: expected rows of 3 values, got 10"),
    ("combine", || { combine::cpu(&plan(8, &[3; 3], &R6), &R10, 2, None); }, "`y`: expected 6 rows, got 5"),
    ("combine", || { combine::cpu(&plan(8, &[3; 3], &R6), &R10, 0, None); }, "`hidden`: expected 1 or more, got 0"),
    ("combine", || { combine::cpu(&plan(8, &[1; 3], &R6), &R10, 2, Some(&R6)); }, "`residual`: expected 4 values, got 6"),
    ("cpu_sum", || { combine::cpu_sum(&plan(8, &[3; 3], &R6), &R10, 3, None); }, "`y`: expected rows of 3 values, got 10"),
    ("gates_backward", || back(&[3; 3], &R6, &R10, 3, PLAIN), "`source`: expected rows of 3 values, got 10"),
    ("gates_backward", || back(&[3; 2], &R6, &R6, 3, PLAIN), "`chosen`: expected 3 values, got 2"),
    ("gates_backward", || back(&[3; 3], &R6[..5], &R6, 3, PLAIN), "`dgates`: expected 6 values, got 5"),
    ("gates_backward", || back(&[3; 3], &R6, &R6, 3, Scales { scale_by_count: Some(&R6), scale_by_expert: None }), "`scale_by_count`: expected 4 values, got 6"),
    ("gates_backward", || back(&[3; 3], &R6, &R6, 3, Scales { scale_by_count: None, scale_by_expert: Some(&R6) }), "`scale_by_expert`: expected 3 values, got 6"),
    ("router_loss", || router_z([2, 3, 0], &R6, &[0; 3]), "`experts_per_token`: expected 1 or more, got 0"),
    ("router_loss", || router_z([2, 3, 1], &R10, &[0; 3]), "`logits`: expected rows of 3 values, got 10"),
    ("router_loss", || router_z([3, 3, 1], &R6, &[0; 3]), "`logits`: expected 9 values, got 6"),
    ("router_loss", || router_z([2, 3, 1], &R6, &[0; 4]), "`counts`: expected 3 values, got 4"),
    ("balance_loss", || balanced([2, 3, 0], &R6, &[0; 2]), "`experts_per_token`: expected 1 or more, got 0"),
    ("balance_loss", || balanced([2, 3, 1], &R10, &[0; 2]), "`logits`: expected rows of 3 values, got 10"),
    ("balance_loss", || balanced([2, 3, 1], &R6, &[0; 3]), "`taken`: expected 2 values, got 3"),
    ("bias_update", || bias_update::cpu(&mut [0.0; 3], &[1; 4], 1.0), "`bias`: expected 4 values, got 3"),
    ("cross_entropy", || { cross_entropy::cpu(&R10, 3, &[0; 3], &R6[..3]); }, "`logits`: expected rows of 3 values, got 10"),
    ("cross_entropy", || { cross_entropy::cpu(&R6, 0, &[0; 3], &R6[..3]); }, "`classes`: expected 1 or more, got 0"),
    ("cross_entropy", || { cross_entropy::cpu(&R6, 3, &[0; 3], &R6[..2]); }, "`targets`: expected 2 values, got 3"),
    ("cross_entropy", || { cross_entropy::cpu(&R6, 3, &[0; 2], &R6[..3]); }, "`weights`: expected 2 values, got 3"),
    ("masked_weights", || { cross_entropy::masked_weights(&[true; 2], &[true], &[0, 2], true); }, "`loss_mask`: expected 2 values, got 1"),
    ("masked_weights", || { cross_entropy::masked_weights(&[true; 2], &[true; 2], &[], true); }, "`offsets`: expected one value more than there are ranges, got 0"),
    ("masked_weights", || { cross_entropy::masked_weights(&[true; 2], &[true; 2], &[0, 3], true); }, "`offsets`: not of 2 tokens"),
    ("cpu_logits", || { cpu_logits(&R6, &R10[..7], 3); }, "`weights`: expected rows of 3 values, got 7"),
    ("cpu_logits", || { cpu_logits(&R10, &R6, 3); }, "`x`: expected rows of 3 values, got 10"),
    ("cpu_logits", || { cpu_logits(&R6, &R6, 0); }, "`hidden`: expected 1 or more, got 0"),
    ("bits::get", || { bits::get(&[0; 4], 40, 1, 40); }, "`t`: token 40 of 40"),
    ("bits::get", || { bits::get(&[0; 4], 40, 2, 0); }, "`e`: expert 2 of 2"),
    ("bits::set", || bits::set(&mut [0; 2], 4, 0, 40), "`t`: token 40 of 4"),
    ("bits::set", || bits::set(&mut [0; 4], 40, 2, 0), "`e`: expert 2 of 2"),
    ("bits::set", || bits::set(&mut [0; 4], 0, 0, 0), "`t`: token 0 of 0"),
    ("bits::experts_of", || { bits::experts_of(&[0; 4], 40, 40); }, "`t`: token 40 of 40"),
    ("bits::tokens_of", || { bits::tokens_of(&[0; 4], 40, 2); }, "`e`: expert 2 of 2"),
    ("bits::from_lists", || { bits::from_lists(4, &[vec![0], vec![4]]); }, "`lists`: token 4 of 4, for expert 1"),
    ("bits::first_difference", || { bits::first_difference(&[0; 4], &[0; 3], 40); }, "`b`: expected 4 values, got 3"),
    ("bits::first_difference", || { bits::first_difference(&[0; 3], &[0; 3], 40); }, "`a`: expected rows of 2, got 3"),
];

#[test]
fn arguments_that_do_not_fit_are_named() {
    let mut wrong = vec![];
    for (name, run, want) in CASES {
        let got = match catch_unwind(run) {
            Ok(()) => "no panic".to_string(),
            Err(payload) => match payload.downcast::<String>() {
                Ok(text) => *text,
                Err(payload) => payload.downcast_ref::<&str>().unwrap_or(&"?").to_string(),
            },
        };
        if got != *want {
            wrong.push(format!("{name}: got \"{got}\", want \"{want}\""));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_tokens_are_no_error() {
    assert!(scores::cpu(&[], 3, Score::Softmax, false, None).0.is_empty());
    assert!(token_choice::cpu(&[], 3, 2, None, &all).is_empty());
    assert!(expert_choice::cpu(&[], 3, &[0, 0], None, &[4]).is_empty());
    assert!(sequence_top::cpu(&[], 3, 2, &[0, 0]).is_empty());
    assert!(gather::cpu(&[], 3, &[]).is_empty());
    let shape = PlanShape::on_host(0, 3, 1).with_item_rows(8, 4).with_shared_experts(1);
    assert_eq!(HostPlan::cpu(&shape, &[], &[]).expert_offsets, [0; 5]);
}

#[test]
fn bits_from_lists_and_their_differences() {
    let lists = [vec![], vec![40, 3, 3], vec![0, 31, 32, 63, 64]];
    let words = bits::from_lists(65, &lists);
    assert_eq!(words.len(), 9);
    assert_eq!(bits::tokens_of(&words, 65, 1), [3, 40]);
    assert_eq!(bits::tokens_of(&words, 65, 2), [0, 31, 32, 63, 64]);
    assert_eq!(bits::first_difference(&words, &words, 65), None);
    let mut other = words.clone();
    other[5] |= 1 << 1; // past the last token: no pair
    assert_eq!(bits::first_difference(&words, &other, 65), None);
    other[8] = 0;
    assert_eq!(bits::first_difference(&words, &other, 65), Some((2, 64)));
    other[3] = 0;
    assert_eq!(bits::first_difference(&words, &other, 65), Some((1, 3)));
    assert_eq!(bits::first_difference(&[], &[], 0), None);
}

#[test]
fn a_nan_logit_has_no_score_and_no_value() {
    let inf = f32::INFINITY;
    for (score, half, whole) in [(Score::Softmax, 0.5, 0.0), (Score::Sigmoid, 1.0, 0.5)] {
        for bias in [-inf, 0.0, 3.0, inf] {
            let logits = [inf, f32::NAN, inf, 0.0];
            let (s, r) = scores::cpu(&logits, 4, score, false, Some(&[bias; 4]));
            assert_eq!(s, [half, 0.0, half, whole]);
            assert!(r[1].is_nan());
        }
    }
}
