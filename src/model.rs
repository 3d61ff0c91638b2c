//! Shapes and routing of the models that use these layers (METHODS 6; sources there).
use crate::layer::Settings;
use crate::ops::plan_count::GateRule;
use crate::ops::token_choice::Groups;
use crate::routing::{
    Activation, BlockRule, ExpertChoice, Normalise, Routing, Scope, Score, TokenChoice,
};

/// A model whose layers this crate runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Model {
    /// Name, in lower case with dashes.
    pub name: &'static str,
    /// One MoE layer of it.
    pub settings: Settings,
    /// Layers in all, and how many of the first are dense.
    pub layers: [u32; 2],
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

const LLADA2_MINI: Settings = Settings {
    hidden: 2048,
    intermediate: 512,
    experts: 256,
    shared_experts: 1,
    activation: Activation::Silu,
    routing: Routing::TokenChoice(LLADA2),
};

/// Trained with a coreset of 48 experts a block of 32 tokens, without groups: its outputs are wrong without it.
const LLADA22_MINI: Settings = Settings {
    routing: Routing::TokenChoice(TokenChoice {
        groups: None,
        coreset: Some(BlockRule::Capacity(48)),
        ..LLADA2
    }),
    ..LLADA2_MINI
};

const fn flash(mini: Settings) -> Settings {
    Settings { hidden: 4096, intermediate: 1024, ..mini }
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
        settings: Settings {
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
        settings: Settings {
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
        settings: Settings {
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
        settings: Settings {
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
