//! The twins beside an oracle that sorts: the same choices and gates under every rule.
use testkit::cases::{random, values};
use testkit::layer::host_router;
use testkit::oracle::{choose, compare};
use testkit::rules::every_rule;
use wgmoe::layer::{HostBatch, HostRouting, LayerConfig};
use wgmoe::reference::{layer_routing, scores};
use wgmoe::{Routing, models};

const TOKENS: u32 = 80; // two blocks and a half

/// What the twins choose of these logits under a rule.
fn twin(config: &LayerConfig, bias: &[f32], logits: &[f32]) -> ([Vec<f32>; 2], HostRouting) {
    let (rule, e) = (config.routing, config.experts as usize);
    let (s, r) = scores(logits, e, rule.score(), rule.by_logits(), Some(bias));
    let router = host_router(&[], None);
    let routed = layer_routing(config, &router, HostBatch::default(), [logits, &s, &r]);
    ([s, r], routed)
}

/// Layers of models whose rules differ in scores, gates and groups, under every rule of the table.
fn each_layer() -> impl Iterator<Item = (String, LayerConfig)> {
    let models = ["llada2-mini", "llada2.2-mini", "llada-moe", "sdar-30b", "ec-dlm"];
    models.into_iter().flat_map(|name| {
        let config = models::find(name).expect("a model").with_experts(64);
        let rules = every_rule(config.routing, config.experts);
        rules
            .into_iter()
            .map(move |(rule, routing)| (format!("{name}, {rule}"), config.with_routing(routing)))
    })
}

#[test]
fn twins_choose_what_sorting_finds() {
    for (name, config) in each_layer() {
        let e = config.experts as usize;
        let bias: Vec<f32> = random(3, e).iter().map(|v| 0.1 * v).collect();
        for kind in ["random", "ties"] {
            // Gates that are equal but for their rounding are dropped by that.
            if kind == "ties" && name.contains("capacity 1.25") {
                continue;
            }
            let logits = values(kind, 1, TOKENS as usize * e);
            // Pairs of experts have one bias, so that ties stay ties.
            let bias: Vec<f32> = (0..e).map(|i| bias[i / 2]).collect();
            let ([s, r], routed) = twin(&config, &bias, &logits);
            let want = choose(config.routing, e, [&logits, &s, &r]);
            let compared = compare(&routed.assigned, &routed.gates, e, &want);
            compared.unwrap_or_else(|difference| panic!("{name}, {kind}: {difference}"));
        }
    }
}

/// A choice that is off by one pair, or a gate that is off, is seen.
#[test]
fn a_wrong_choice_is_seen() {
    let config = models::find("llada2-mini").expect("a model").with_experts(64);
    let logits = random(1, TOKENS as usize * 64);
    let ([s, r], routed) = twin(&config, &[0.0; 64], &logits);
    let want = choose(config.routing, 64, [&logits, &s, &r]);
    assert!(compare(&routed.assigned, &routed.gates, 64, &want).is_ok());
    let mut assigned = routed.assigned.clone();
    assigned[0] ^= 1;
    assert!(compare(&assigned, &routed.gates, 64, &want).is_err());
    let doubled: Vec<f32> = routed.gates.iter().map(|g| 2.0 * g).collect();
    assert!(compare(&routed.assigned, &doubled, 64, &want).is_err());
    // And so is another rule's.
    let Routing::TokenChoice(tokens) = config.routing else { panic!("it routes tokens") };
    let other = choose(tokens.with_experts_per_token(7).into(), 64, [&logits, &s, &r]);
    assert!(compare(&routed.assigned, &routed.gates, 64, &other).is_err());
}
