//! The table of routing rules that one layer is run under, for the benches and the bench program,
//! and for the main job.
use wgmoe::Routing;
use wgmoe::routing::{BlockRule, ExpertChoice, GateRule, Score, SequenceTop, TokenChoice};

/// A rule and its name. Names of the counts that stand for 256 experts say the count for the
/// experts there are.
pub type Rule = (String, Routing);

/// A model's own choice by tokens; where experts choose, tokens that have as many on average.
fn by_tokens(own: Routing) -> TokenChoice {
    if let Routing::TokenChoice(rule) = own {
        return rule;
    }
    let gate = match own.score() {
        Score::Softmax => GateRule::Softmax,
        _ => GateRule::Normalised,
    };
    TokenChoice::new(own.experts_per_token()).with_score(own.score()).with_gate(gate)
}

/// A model's own choice by experts; where tokens choose, as many slots.
fn by_experts(own: Routing, most: u32) -> Routing {
    let k = own.experts_per_token().min(most);
    match own {
        Routing::ExpertChoice(_) => own,
        _ => Routing::ExpertChoice(ExpertChoice::new(k).with_score(own.score())),
    }
}

fn by_pairs(tokens: TokenChoice, top: u32) -> Routing {
    let TokenChoice { score, gate, scale, .. } = tokens;
    Routing::SequenceTop(SequenceTop::new(top).with_score(score).with_gate(gate).with_scale(scale))
}

/// What every model is timed under: each token's own choice (without a coreset, where the model has
/// one), the block rules, the highest pairs of a sequence, expert choice. A line each.
pub fn rules(own: Routing, experts: u32) -> Vec<Rule> {
    let tokens = by_tokens(own).without_coreset();
    let block = |rule| Routing::TokenChoice(tokens.with_coreset(rule));
    let of_256 = |n: u32| (n * experts / 256).max(tokens.experts_per_token).min(experts);
    let floor = 8.min(experts);
    let (capacity, vote) = (of_256(48), of_256(38));
    vec![
        ("original".into(), Routing::TokenChoice(tokens)),
        (format!("mass(0.6, {floor})"), block(BlockRule::Mass { p: 0.6, floor })),
        (format!("capacity({capacity})"), block(BlockRule::Capacity(capacity))),
        (format!("vote({vote})"), block(BlockRule::Vote(vote))),
        ("union(2)".into(), block(BlockRule::Union(2.min(experts)))),
        ("sequence_top".into(), by_pairs(tokens, tokens.experts_per_token)),
        ("expert_choice".into(), by_experts(own, experts)),
    ]
}

/// What the main job runs: the model's own rule first, with a coreset where it has one, and a
/// capacity factor too. Sequences choose apart; counts of 256 experts are shares. A line each.
pub fn of_main_job(own: Routing, experts: u32) -> Vec<(&'static str, Routing)> {
    if !matches!(own, Routing::TokenChoice(_) | Routing::ExpertChoice(_)) {
        return vec![("the model's own", own)];
    }
    let tokens = by_tokens(own);
    let capacity = tokens.with_capacity_factor(1.25);
    let block = |rule| Routing::TokenChoice(tokens.with_coreset(rule));
    let share = |of_256: u32| (experts * of_256).div_ceil(256).max(1);
    let mut rules = vec![
        ("token choice", Routing::TokenChoice(tokens)),
        ("token choice, capacity 1.25", Routing::TokenChoice(capacity)),
        ("expert choice", by_experts(own, experts)),
    ];
    if matches!(own, Routing::ExpertChoice(_)) {
        rules.rotate_right(1);
    }
    let floor = 8.min(experts);
    rules.extend([
        ("block mass(0.6, 8)", block(BlockRule::Mass { p: 0.6, floor })),
        ("block capacity(48/256)", block(BlockRule::Capacity(share(48)))),
        ("block vote(38/256)", block(BlockRule::Vote(share(38)))),
        ("block union(3)", block(BlockRule::Union(3.min(experts)))),
        ("sequence top", by_pairs(tokens, tokens.experts_per_token.min(experts))),
    ]);
    rules
}
