//! The rows of the table: rules, and what was published of them.
use wgmoe::layer::LayerConfig;
use wgmoe::models;
use wgmoe::routing::{BlockRule, Routing, SequenceTop};

/// Tokens that LLaDA2.x decodes together.
pub(super) const BLOCK: u32 = 32;

/// The rule that is shown by block size beside the original one.
pub(super) const BY_SIZE: &str = "dMoE v1, p 0.6";

/// A rule, and what was published of it.
#[derive(Clone, Copy)]
pub(super) struct Rule {
    pub(super) name: &'static str,
    pub(super) routing: Routing,
    pub(super) block: u32,
    pub(super) published: Option<f64>,
    /// Share of the model's accuracy that was published with it, in percent.
    pub(super) kept: Option<f64>,
    /// Only tokens that are marked have a say: half of them, here.
    pub(super) marked: bool,
}

impl Rule {
    /// Whether its blocks elect a coreset: a layer takes no blocks under other rules.
    pub(super) fn elects(&self) -> bool {
        matches!(self.routing, Routing::TokenChoice(rule) if rule.coreset.is_some())
    }
}

/// The layer whose experts are counted.
pub(super) fn mini() -> Result<LayerConfig, String> {
    Ok(models::find("llada2-mini").ok_or("no llada2-mini")?.config)
}

/// Every row, in the order printed. Rules elect their coresets without regard to groups; LLaDA2.0's
/// tokens then choose within its groups, 4 of 8.
pub(super) fn rules() -> Result<Vec<Rule>, String> {
    let trained = models::find("llada2.2-mini").ok_or("no llada2.2-mini")?.config.routing;
    let Routing::TokenChoice(own) = mini()?.routing else {
        return Err("llada2-mini does not route by token choice".into());
    };
    let rule = |name, block, published, routing| Rule {
        name,
        routing,
        block,
        published: Some(published),
        kept: None,
        marked: false,
    };
    let choose = |name, block, published, coreset: Option<BlockRule>| {
        rule(
            name,
            block,
            published,
            Routing::TokenChoice(coreset.map_or(own, |c| own.with_coreset(c))),
        )
    };
    let elect = |name, published, elected| choose(name, BLOCK, published, Some(elected));
    // Other masses and block sizes are published of the first version, with its floor.
    let v1 = models::dmoe_v1();
    let BlockRule::Mass { floor, .. } = v1 else { return Err("dMoE elects by mass".into()) };
    let mass = |p| BlockRule::Mass { p, floor };
    let top_4 = Routing::TokenChoice(own.with_experts_per_token(4));
    let pairs = Routing::SequenceTop(
        SequenceTop::new(own.experts_per_token)
            .with_score(own.score)
            .with_gate(own.gate)
            .with_scale(own.scale),
    );
    let unpublished = |rule| Rule { published: None, ..rule };
    Ok(vec![
        choose("original", BLOCK, 69.5, None),
        rule("top-4", BLOCK, 43.5, top_4),
        elect("DES-S, k' 3", 41.1, BlockRule::Union(3)),
        elect("DES-V, M 38", 36.9, BlockRule::Vote(38)),
        elect("dMoE v1, p 0.4", 10.4, mass(0.4)),
        elect("dMoE v1, p 0.5", 11.7, mass(0.5)),
        Rule { kept: Some(99.11), ..elect(BY_SIZE, 14.6, v1) },
        Rule { kept: Some(99.55), ..elect("dMoE v2, p 0.6", 16.5, models::dmoe_v2()) },
        elect("dMoE v1, p 0.7", 19.7, mass(0.7)),
        elect("dMoE v1, p 0.8", 27.8, mass(0.8)),
        rule("LLaDA2.2, C 48", BLOCK, 45.2, trained),
        unpublished(elect("DES-S, k' 2", 0.0, BlockRule::Union(2))),
        Rule { marked: true, ..unpublished(elect("TEAM, k' 3", 0.0, BlockRule::Union(3))) },
        unpublished(rule("SeqTopK", BLOCK, 0.0, pairs)),
        choose("original", 8, 31.8, None),
        choose(BY_SIZE, 8, 14.6, Some(v1)),
        choose("original", 16, 48.8, None),
        choose(BY_SIZE, 16, 16.3, Some(v1)),
        choose("original", 24, 60.6, None),
        choose(BY_SIZE, 24, 15.9, Some(v1)),
    ])
}
