//! Shapes and routing of the models that use these layers.
use crate::layer::LayerConfig;
use crate::routing::GateRule;
use crate::routing::Groups;
use crate::routing::{
    Activation, BlockRule, ExpertChoice, Normalise, Routing, Scope, Score, TokenChoice,
};

/// A model whose layers this crate runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Model {
    /// Name, in lower case with dashes.
    pub name: &'static str,
    /// One MoE layer of it.
    pub settings: LayerConfig,
    /// Layers in all, and how many of the first are dense.
    pub layers: [u32; 2],
}

impl Model {
    /// A layer of the model with fewer experts, for machines that cannot hold all. Groups keep their size, and the share of
    /// them that a token may use (at least one, and enough for its K experts); where groups no longer divide the experts,
    /// there are none. K and k are cut to the experts there are; a block elects its share of them, at least K.
    pub fn with_experts(&self, experts: u32) -> LayerConfig {
        let mut settings = LayerConfig { experts, ..self.settings };
        match &mut settings.routing {
            Routing::TokenChoice(rule) => {
                rule.top = rule.top.min(experts);
                rule.groups = rule.groups.and_then(|Groups { count, top }| {
                    let size = self.settings.experts / count;
                    let groups = experts / size;
                    let fits = experts.is_multiple_of(size);
                    let top = (groups * top / count).max(rule.top.div_ceil(size)).max(1);
                    (fits && top <= groups).then_some(Groups { count: groups, top })
                });
                let share = |count: u32| {
                    (count * experts / self.settings.experts).max(rule.top).min(experts)
                };
                rule.coreset = rule.coreset.map(|coreset| match coreset {
                    BlockRule::Mass { p, floor } => {
                        BlockRule::Mass { p, floor: floor.min(experts) }
                    }
                    BlockRule::Capacity(count) => BlockRule::Capacity(share(count)),
                    BlockRule::Vote(count) => BlockRule::Vote(share(count)),
                    BlockRule::Union(count) => BlockRule::Union(count.min(experts)),
                });
            }
            Routing::ExpertChoice(rule) => {
                rule.experts_per_token = rule.experts_per_token.min(experts);
                rule.max_experts_per_token = rule.max_experts_per_token.min(experts);
            }
            Routing::SequenceTop(rule) => rule.top = rule.top.min(experts),
        }
        settings
    }
}

const LLADA2: TokenChoice = TokenChoice {
    score: Score::Sigmoid,
    gate: GateRule::Normalised,
    top: 8,
    groups: Some(Groups { count: 8, top: 4 }),
    scale: 2.5,
    capacity_factor: None,
    coreset: None,
};

const LLADA2_MINI: LayerConfig = LayerConfig {
    hidden: 2048,
    intermediate: 512,
    experts: 256,
    shared_experts: 1,
    activation: Activation::Silu,
    routing: Routing::TokenChoice(LLADA2),
};

/// Trained with a coreset of 48 experts a block of 32 tokens, without groups: its outputs are wrong without it.
const LLADA22_MINI: LayerConfig = LayerConfig {
    routing: Routing::TokenChoice(TokenChoice {
        groups: None,
        coreset: Some(BlockRule::Capacity(48)),
        ..LLADA2
    }),
    ..LLADA2_MINI
};

const fn flash(mini: LayerConfig) -> LayerConfig {
    LayerConfig { hidden: 4096, intermediate: 1024, ..mini }
}

const SOFTMAX_8: TokenChoice = TokenChoice {
    score: Score::Softmax,
    gate: GateRule::Normalised,
    groups: None,
    scale: 1.0,
    ..LLADA2
};

/// Every model.
pub const MODELS: &[Model] = &[
    Model { name: "llada2-mini", settings: LLADA2_MINI, layers: [20, 1] },
    Model { name: "llada2-flash", settings: flash(LLADA2_MINI), layers: [32, 1] },
    Model { name: "llada2.2-mini", settings: LLADA22_MINI, layers: [20, 1] },
    Model { name: "llada2.2-flash", settings: flash(LLADA22_MINI), layers: [32, 1] },
    Model {
        name: "llada-moe",
        settings: LayerConfig {
            intermediate: 1024,
            experts: 64,
            shared_experts: 0,
            routing: Routing::TokenChoice(TokenChoice { gate: GateRule::Plain, ..SOFTMAX_8 }),
            ..LLADA2_MINI
        },
        layers: [16, 0],
    },
    Model {
        name: "sdar-30b",
        settings: LayerConfig {
            intermediate: 768,
            experts: 128,
            shared_experts: 0,
            routing: Routing::TokenChoice(SOFTMAX_8),
            ..LLADA2_MINI
        },
        layers: [48, 0],
    },
    Model {
        name: "ec-dlm",
        settings: LayerConfig {
            hidden: 512,
            intermediate: 384,
            experts: 512,
            shared_experts: 2,
            activation: Activation::Silu,
            routing: Routing::ExpertChoice(ExpertChoice {
                score: Score::Softmax,
                normalise: Normalise::AfterSelection,
                scope: Scope::Sequence,
                experts_per_token: 20,
                max_experts_per_token: 32,
            }),
        },
        layers: [16, 0],
    },
    Model {
        name: "diffusion-gemma",
        settings: LayerConfig {
            hidden: 2816,
            intermediate: 704,
            experts: 128,
            // The dense 2112 beside the experts is three of them.
            shared_experts: 3,
            activation: Activation::Gelu,
            routing: Routing::TokenChoice(SOFTMAX_8),
        },
        layers: [30, 0],
    },
];

/// The model of this name.
pub fn find(name: &str) -> Option<Model> {
    MODELS.iter().copied().find(|m| m.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_experts_make_a_rule_that_holds() {
        for model in MODELS {
            assert_eq!(model.with_experts(model.settings.experts), model.settings);
            for experts in [1, 7, 20, 32, 64] {
                let settings = model.with_experts(experts);
                assert_eq!(settings.routing.check(experts), Ok(()), "{} of {experts}", model.name);
            }
        }
        let Routing::TokenChoice(rule) = find("llada2-mini").unwrap().with_experts(64).routing
        else {
            panic!("LLaDA2 routes tokens")
        };
        assert_eq!(rule.groups, Some(Groups { count: 2, top: 1 }));
    }
}
