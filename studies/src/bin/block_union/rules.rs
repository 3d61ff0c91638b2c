//! The rows of the table: rules, and what was published of them.
use wgmoe::layer::LayerConfig;
use wgmoe::models;
use wgmoe::routing::{BlockRule, Routing, SequenceTop};

/// Tokens that LLaDA2.x decodes together.
pub(super) const BLOCK: u32 = 32;

/// A rule, and what was published of it.
#[derive(Clone, Copy)]
pub(super) struct Rule {
    pub(super) name: &'static str,
    pub(super) routing: Routing,
    pub(super) block: u32,
    pub(super) published: Option<f64>,
    /// Only tokens that are marked have a say: half of them, here.
    pub(super) marked: bool,
}

impl Rule {
    pub(super) fn coreset(&self) -> Option<BlockRule> {
        match self.routing {
            Routing::TokenChoice(rule) => rule.coreset,
            _ => None,
        }
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
    // The paper's code has a floor of 16, above what the paper reports of p 0.4 to 0.6.
    let mass = |p| BlockRule::Mass { p, floor: 8 };
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
        elect("dMoE, p 0.4", 10.4, mass(0.4)),
        elect("dMoE, p 0.5", 11.7, mass(0.5)),
        elect("dMoE, p 0.6", 14.6, mass(0.6)),
        elect("dMoE, p 0.7", 19.7, mass(0.7)),
        elect("dMoE, p 0.8", 27.8, mass(0.8)),
        rule("LLaDA2.2, C 48", BLOCK, 45.2, trained),
        unpublished(elect("DES-S, k' 2", 0.0, BlockRule::Union(2))),
        Rule { marked: true, ..unpublished(elect("TEAM, k' 3", 0.0, BlockRule::Union(3))) },
        unpublished(rule("SeqTopK", BLOCK, 0.0, pairs)),
        choose("original", 8, 31.8, None),
        choose("dMoE, p 0.6", 8, 14.6, Some(mass(0.6))),
        choose("original", 16, 48.8, None),
        choose("dMoE, p 0.6", 16, 16.3, Some(mass(0.6))),
        choose("original", 24, 60.6, None),
        choose("dMoE, p 0.6", 24, 15.9, Some(mass(0.6))),
    ])
}
