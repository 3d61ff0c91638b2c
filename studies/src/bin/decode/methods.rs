//! The ways of computing less that are compared.
use wgmoe::models;
use wgmoe::routing::{BlockRule, Routing};

/// A way of decoding. What a paper learns or derives stands here as a plain schedule: the study shows what the layer
/// reads and takes, not what a model keeps of its accuracy.
#[derive(Clone, Copy)]
pub(super) struct Method {
    pub(super) name: &'static str,
    pub(super) routing: Routing,
    /// Experts of a token that is decided; the rule's K where absent.
    pub(super) decided_take: Option<u32>,
    /// Whether only tokens that are not decided take part.
    pub(super) leaves_decided_out: bool,
    /// Whether coresets serve several steps.
    pub(super) keeps: bool,
}

impl Method {
    /// Whether its blocks elect a coreset.
    pub(super) fn elects(&self) -> bool {
        matches!(self.routing, Routing::TokenChoice(rule) if rule.coreset.is_some())
    }
}

/// Every method, in the order printed.
pub(super) fn methods(experts: u32) -> Result<Vec<Method>, String> {
    let config = models::find("llada2-mini").ok_or("no llada2-mini")?.config;
    let Routing::TokenChoice(own) = config.routing else {
        return Err("llada2-mini does not route by token choice".into());
    };
    let fewer = |rule: BlockRule| -> Routing {
        // The coreset's numbers are those of 256 experts.
        let whole = Routing::TokenChoice(own.with_coreset(rule));
        whole.with_fewer_experts(256, experts)
    };
    let plain = |name, routing| Method {
        name,
        routing,
        decided_take: None,
        leaves_decided_out: false,
        keeps: false,
    };
    let own = Routing::TokenChoice(own.without_coreset()).with_fewer_experts(256, experts);
    let v2 = fewer(models::dmoe_v2());
    Ok(vec![
        plain("original", own),
        plain("dMoE v1", fewer(models::dmoe_v1())),
        plain("dMoE v2", v2),
        Method { decided_take: Some(2), ..plain("k by token (as REFLEX): 2, decided", own) },
        Method { keeps: true, ..plain("dMoE v2, kept", v2) },
        Method {
            keeps: true,
            leaves_decided_out: true,
            ..plain("kept, undecided rows (as Epoch)", v2)
        },
        Method { leaves_decided_out: true, ..plain("original, undecided rows", own) },
    ])
}
