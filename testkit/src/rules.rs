//! The tables of rules that one layer is run under: for the tests, for the benches and the bench
//! program, and for the main job. A rule that is missing here is a panic, or does not compile.
use wgmoe::Routing;
use wgmoe::routing::{BlockRule, ExpertChoice, GateRule, Score, SequenceTop, TokenChoice};

/// A rule and its name. Names of the counts that stand for 256 experts say the count for the
/// experts there are.
pub type Rule = (String, Routing);

/// Every block rule, each once.
pub type BlockRules = [BlockRule; BlockRule::NAMES.len()];

/// Every block rule at these counts.
fn block_rules(floor: u32, capacity: u32, vote: u32, union: u32) -> BlockRules {
    let rules = [
        BlockRule::Mass { p: 0.6, floor },
        BlockRule::Capacity(capacity),
        BlockRule::Vote(vote),
        BlockRule::Union(union),
    ];
    assert_eq!(rules.map(BlockRule::name), BlockRule::NAMES, "each block rule once");
    rules
}

/// Every block rule, at the papers' shares of the experts there are. A union is of fewer than K, so
/// that it asks for another choice than the tokens' own.
pub fn every_block_rule(experts: u32, experts_per_token: u32) -> BlockRules {
    let share = |of_256: u32| (experts * of_256).div_ceil(256).max(1);
    let union = experts_per_token.saturating_sub(1).clamp(1, 3).min(experts);
    block_rules(8.min(experts), share(48), share(38), union)
}

/// Panics where a kind of rule is missing.
#[track_caller]
pub fn assert_every_kind<'a>(rules: impl IntoIterator<Item = &'a Routing>) {
    let there: Vec<_> = rules.into_iter().map(Routing::name).collect();
    for name in Routing::NAMES {
        assert!(there.contains(&name), "no rule is {name}: {there:?}");
    }
}

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
/// one), the block rules, the highest pairs of a sequence, expert choice.
pub fn rules(own: Routing, experts: u32) -> Vec<Rule> {
    let tokens = by_tokens(own).without_coreset();
    let of_256 = |n: u32| (n * experts / 256).max(tokens.experts_per_token).min(experts);
    let blocks = block_rules(8.min(experts), of_256(48), of_256(38), 2.min(experts));
    let mut rules: Vec<Rule> = vec![("original".into(), tokens.into())];
    rules.extend(blocks.map(|rule| (rule.to_string(), tokens.with_coreset(rule).into())));
    rules.push(("sequence_top".into(), by_pairs(tokens, tokens.experts_per_token)));
    rules.push(("expert_choice".into(), by_experts(own, experts)));
    assert_every_kind(rules.iter().map(|(_, routing)| routing));
    rules
}

/// What the main job runs, and tests that need a layer of every kind: the model's own rule first,
/// with a coreset where it has one, and a capacity factor too. Sequences choose apart.
pub fn every_rule(own: Routing, experts: u32) -> Vec<Rule> {
    if !matches!(own, Routing::TokenChoice(_) | Routing::ExpertChoice(_)) {
        return vec![("the model's own".into(), own)];
    }
    let tokens = by_tokens(own);
    let blocks = every_block_rule(experts, tokens.experts_per_token);
    let mut rules: Vec<Rule> = vec![
        ("token choice".into(), tokens.into()),
        ("token choice, capacity 1.25".into(), tokens.with_capacity_factor(1.25).into()),
        ("expert choice".into(), by_experts(own, experts)),
    ];
    if matches!(own, Routing::ExpertChoice(_)) {
        rules.rotate_right(1);
    }
    rules.extend(blocks.map(|rule| (format!("block {rule}"), tokens.with_coreset(rule).into())));
    let pairs = by_pairs(tokens, tokens.experts_per_token.min(experts));
    rules.push(("sequence top".into(), pairs));
    assert_every_kind(rules.iter().map(|(_, routing)| routing));
    rules
}
