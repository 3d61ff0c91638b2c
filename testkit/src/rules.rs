//! The routing rules that are compared over one layer.
use wgmoe::Routing;
use wgmoe::routing::GateRule;
use wgmoe::routing::{BlockRule, ExpertChoice, Normalise, Scope, Score, SequenceTop, TokenChoice};

/// A rule and its name. Names of the counts that stand for 256 experts say the count for the experts there are.
pub type Rule = (String, Routing);

/// What every model is run under: each token's own choice (without a coreset, where the model has one), the block rules, the
/// highest pairs of a sequence, expert choice. A line each.
pub fn rules(own: Routing, experts: u32) -> Vec<Rule> {
    let tokens = match own {
        Routing::TokenChoice(rule) => TokenChoice { coreset: None, ..rule },
        _ => TokenChoice {
            score: own.score(),
            gate: match own.score() {
                Score::Softmax => GateRule::Softmax,
                Score::Sigmoid => GateRule::Normalised,
            },
            top: average(own),
            groups: None,
            scale: 1.0,
            capacity_factor: None,
            coreset: None,
        },
    };
    let TokenChoice { score, gate, top, scale, .. } = tokens;
    let experts_choose = match own {
        Routing::ExpertChoice(_) => own,
        _ => Routing::ExpertChoice(ExpertChoice {
            score,
            normalise: Normalise::AfterSelection,
            scope: Scope::Batch,
            experts_per_token: top,
            max_experts_per_token: top,
        }),
    };
    let block = |rule| Routing::TokenChoice(TokenChoice { coreset: Some(rule), ..tokens });
    let of_256 = |n: u32| (n * experts / 256).max(top).min(experts);
    let floor = 8.min(experts);
    let (capacity, vote) = (of_256(48), of_256(38));
    vec![
        ("original".into(), Routing::TokenChoice(tokens)),
        (format!("mass(0.6, {floor})"), block(BlockRule::Mass { p: 0.6, floor })),
        (format!("capacity({capacity})"), block(BlockRule::Capacity(capacity))),
        (format!("vote({vote})"), block(BlockRule::Vote(vote))),
        ("union(2)".into(), block(BlockRule::Union(2.min(experts)))),
        ("sequence_top".into(), Routing::SequenceTop(SequenceTop { score, gate, top, scale })),
        ("expert_choice".into(), experts_choose),
    ]
}

/// Experts that a token has on average.
fn average(routing: Routing) -> u32 {
    match routing {
        Routing::ExpertChoice(rule) => rule.experts_per_token,
        Routing::TokenChoice(rule) => rule.top,
        Routing::SequenceTop(rule) => rule.top,
        _ => 8,
    }
}
