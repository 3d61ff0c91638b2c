//! Shapes and routing rules of known models, and the block rules of papers.
//!
//! [`find`] gives a model by its name:
//!
//! | name | model | D | F | E | K | rule | layers (dense first) | source |
//! |---|---|---|---|---|---|---|---|---|
//! | `llada2-mini` | LLaDA2.0-mini | 2048 | 512 | 256 | 8 | sigmoid, 4 of 8 groups, times 2.5 | 20 (1) | 1 |
//! | `llada2-flash` | LLaDA2.0-flash | 4096 | 1024 | 256 | 8 | as mini | 32 (1) | 1 |
//! | `llada2.1-mini` | LLaDA2.1-mini | 2048 | 512 | 256 | 8 | as LLaDA2.0 | 20 (1) | 2 |
//! | `llada2.1-flash` | LLaDA2.1-flash | 4096 | 1024 | 256 | 8 | as LLaDA2.0 | 32 (1) | 2 |
//! | `llada2.2-mini` | LLaDA2.2-mini | 2048 | 512 | 256 | 8 | as LLaDA2.0; coreset of 48, no groups | 20 (1) | 3 |
//! | `llada2.2-flash` | LLaDA2.2-flash | 4096 | 1024 | 256 | 8 | as mini | 32 (1) | 4 |
//! | `llada-moe` | LLaDA-MoE-7B-A1B | 2048 | 1024 | 64 | 8 | softmax, not normalised | 16 (0) | 5 |
//! | `sdar-30b` | SDAR-30B-A3B | 2048 | 768 | 128 | 8 | softmax, normalised | 48 (0) | 6 |
//! | `ec-dlm` | EC-DLM | 512 | 384 | 512 | 20 | expert choice, up to 32 | 16 (0) | 7 |
//! | `diffusion-gemma` | DiffusionGemma-26B-A4B | 2816 | 704 | 128 | 8 | softmax, normalised; GELU | 30 (0) | 8 |
//!
//! D is the hidden size, F the intermediate size of an expert, E the routed experts, K the experts
//! of a token. [`Model::source`] names each row's source in a few words. What was read, and what
//! could not be confirmed:
//!
//! 1. `configs/model_configs/llada2_{mini,flash}/config.json` of [inclusionAI/dFactory] (all
//!    numbers), and its `modeling_llada2_moe.py` (sigmoid, bias in the choice alone, a group's
//!    value is the sum of its two highest, gates divided by their sum + 1e-20).
//! 2. [FLX-OSS/FluxServe]'s notes on LLaDA2.1: "shares the LLaDA2.0 architecture and checkpoint
//!    layout and loads through the same class with no overrides". No `config.json` of it was at
//!    hand.
//! 3. [coder543/minnow], an engine for this model: capacity 48, block 32, K 8, E 256, scale 2.5;
//!    the coreset goes by the highest score with bias, groups are not used. D, F and the number of
//!    layers are taken to be those of LLaDA2.0-mini: **not confirmed**.
//! 4. The card of the conversion `Akicou/inclusionAI_LLaDA2.2-flash-GGUF`: all numbers.
//! 5. [ggml-org/llama.cpp], `src/models/llada-moe.cpp` (softmax, gates not normalised, no shared
//!    expert, 16 layers), and the facts in `llada_moe/README.md` of [Sarim-MBZUAI/dlm_bias], which
//!    were read from the released configuration (D, F, E, K).
//! 6. [JetAstra/SDAR] trains it from Qwen3-30B-A3B-Base, whose sizes are in
//!    `scripts/models/qwen3-30B-A3B.sh` of [zyzshishui/slime]. No `config.json` of SDAR itself was
//!    at hand; that it keeps Qwen3's `norm_topk_prob` is **not confirmed**.
//! 7. `examples/dlm_training/openwebtxt-H200/EC/*topk20.sh` of [zhangshuibai/EC-DLM]: all numbers;
//!    its README gives the schedules' range, 8 to 32. The paper (arXiv 2604.01622) has larger
//!    configurations too.
//! 8. `modular_diffusion_gemma.py` of [huggingface/transformers] for the computation. The sizes are
//!    those of the checkpoint's configuration as other programs' tests quote it.
//!
//! [inclusionAI/dFactory]: https://github.com/inclusionAI/dFactory
//! [FLX-OSS/FluxServe]: https://github.com/FLX-OSS/FluxServe
//! [coder543/minnow]: https://github.com/coder543/minnow
//! [ggml-org/llama.cpp]: https://github.com/ggml-org/llama.cpp
//! [Sarim-MBZUAI/dlm_bias]: https://github.com/Sarim-MBZUAI/dlm_bias
//! [JetAstra/SDAR]: https://github.com/JetAstra/SDAR
//! [zyzshishui/slime]: https://github.com/zyzshishui/slime
//! [zhangshuibai/EC-DLM]: https://github.com/zhangshuibai/EC-DLM
//! [huggingface/transformers]: https://github.com/huggingface/transformers
//!
//! # DiffusionGemma beside its experts
//!
//! `diffusion-gemma` is the routed experts alone. The model adds a dense network of width 2112 to
//! them, but normalises each of the two, in and out, before it sums them: that network and the
//! norms are the engine's. Its router reads a norm of its own and has a scale for each expert:
//! fold the norm's weights into the columns of the router, and give the scales to
//! [`Router::with_scale_by_expert`](crate::layer::Router::with_scale_by_expert).
//!
//! # Other models
//!
//! A model of another name runs all the same: write its [`LayerConfig`], or read it from the
//! model's `config.json` (feature `checkpoint`).
//!
//! ```
//! use wgmoe::{models, routing::Routing};
//!
//! let mini = models::find("llada2-mini").expect("a model of the table").config;
//! assert_eq!((mini.hidden, mini.experts), (2048, 256));
//! // The same model as dMoE decodes it: blocks of tokens elect the experts that they share.
//! let Routing::TokenChoice(rule) = mini.routing else { unreachable!("LLaDA2 routes tokens") };
//! let shared = mini.with_routing(rule.with_coreset(models::dmoe_v2()));
//! assert!(shared.routing.check(shared.experts).is_ok());
//! ```
use crate::layer::LayerConfig;
use crate::routing::{Activation, BlockRule, ExpertChoice, GateRule, Routing, Score, TokenChoice};

/// A model whose layers this crate runs.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Model {
    /// Name, in lower case with dashes.
    pub name: &'static str,
    /// One MoE layer of it.
    pub config: LayerConfig,
    /// Layers in all.
    pub layers: u32,
    /// How many of the first layers are dense.
    pub dense_layers: u32,
    /// Where the numbers are from.
    pub source: &'static str,
}

impl Model {
    /// A layer of the model with fewer experts, for machines that cannot hold all:
    /// [`Routing::with_fewer_experts`]. As many experts as the model has, or more, give the model's
    /// own layer.
    pub fn with_experts(&self, experts: u32) -> LayerConfig {
        let own = self.config.experts;
        let routing = self.config.routing.with_fewer_experts(own, experts);
        LayerConfig { experts: experts.min(own), routing, ..self.config }
    }
}

/// dMoE's coreset as of the first version of its paper (arXiv 2605.30876v1) and the first release
/// of its code: a mass of 0.6, at least 12 experts.
///
/// The paper reports for LLaDA2.0-mini, trained with it: from 69.5 to 14.6 experts that a block of
/// 32 tokens uses, with 99.11 % of the accuracy kept. The floor is `guard_size` of
/// [its code](https://github.com/fscdc/dMoE); the paper does not name it.
pub const fn dmoe_v1() -> BlockRule {
    BlockRule::mass(0.6).with_floor(12)
}

/// dMoE's coreset as of the second version of its paper (arXiv 2605.30876v2) and the later code: a
/// mass of 0.6, at least 16 experts.
///
/// The paper reports for LLaDA2.0-mini, trained with it: from 69.5 to 16.5 experts that a block of
/// 32 tokens uses, with 99.55 % of the accuracy kept (16.6 as the mean of its table).
pub const fn dmoe_v2() -> BlockRule {
    BlockRule::mass(0.6).with_floor(16)
}

const LLADA2: TokenChoice =
    TokenChoice::new(8).with_score(Score::Sigmoid).with_groups(8, 4).with_scale(2.5);

const LLADA2_MINI: LayerConfig = LayerConfig {
    hidden: 2048,
    intermediate: 512,
    experts: 256,
    shared_experts: 1,
    activation: Activation::Silu,
    routing: Routing::TokenChoice(LLADA2),
};

/// Trained with a coreset of 48 experts a block of 32 tokens, without groups: its outputs are wrong
/// without it.
const LLADA22_MINI: LayerConfig = LayerConfig {
    routing: Routing::TokenChoice(LLADA2.without_groups().with_coreset(BlockRule::capacity(48))),
    ..LLADA2_MINI
};

const fn flash(mini: LayerConfig) -> LayerConfig {
    LayerConfig { hidden: 4096, intermediate: 1024, ..mini }
}

const fn model(
    name: &'static str,
    config: LayerConfig,
    layers: u32,
    dense_layers: u32,
    source: &'static str,
) -> Model {
    Model { name, config, layers, dense_layers, source }
}

const LLADA20: &str = "config.json and model code in inclusionAI/dFactory; arXiv 2512.15745";
const LLADA21: &str = "FLX-OSS/FluxServe: the architecture and checkpoint layout of LLaDA2.0";
const LLADA22_MINI_SOURCE: &str =
    "coder543/minnow: capacity 48, block 32, no groups; sizes as LLaDA2.0-mini, not confirmed";
const LLADA22_FLASH_SOURCE: &str = "the card of Akicou/inclusionAI_LLaDA2.2-flash-GGUF";

/// Every model.
pub const MODELS: &[Model] = &[
    model("llada2-mini", LLADA2_MINI, 20, 1, LLADA20),
    model("llada2-flash", flash(LLADA2_MINI), 32, 1, LLADA20),
    model("llada2.1-mini", LLADA2_MINI, 20, 1, LLADA21),
    model("llada2.1-flash", flash(LLADA2_MINI), 32, 1, LLADA21),
    model("llada2.2-mini", LLADA22_MINI, 20, 1, LLADA22_MINI_SOURCE),
    model("llada2.2-flash", flash(LLADA22_MINI), 32, 1, LLADA22_FLASH_SOURCE),
    model(
        "llada-moe",
        LayerConfig {
            intermediate: 1024,
            experts: 64,
            shared_experts: 0,
            routing: Routing::TokenChoice(TokenChoice::new(8).with_gate(GateRule::Unnormalised)),
            ..LLADA2_MINI
        },
        16,
        0,
        "llama.cpp's llada-moe.cpp; Sarim-MBZUAI/dlm_bias; arXiv 2509.24389",
    ),
    model(
        "sdar-30b",
        LayerConfig {
            intermediate: 768,
            experts: 128,
            shared_experts: 0,
            routing: Routing::TokenChoice(TokenChoice::new(8)),
            ..LLADA2_MINI
        },
        48,
        0,
        "Qwen3-30B-A3B's sizes, which it is trained from (JetAstra/SDAR); arXiv 2510.06303",
    ),
    model(
        "ec-dlm",
        LayerConfig {
            hidden: 512,
            intermediate: 384,
            experts: 512,
            shared_experts: 2,
            activation: Activation::Silu,
            routing: Routing::ExpertChoice(ExpertChoice::new(20).with_max(32)),
        },
        16,
        0,
        "the OpenWebText scripts of zhangshuibai/EC-DLM; arXiv 2604.01622",
    ),
    model(
        "diffusion-gemma",
        LayerConfig {
            hidden: 2816,
            intermediate: 704,
            experts: 128,
            // The dense network beside the experts has norms of its own: it is the engine's.
            shared_experts: 0,
            activation: Activation::Gelu,
            routing: Routing::TokenChoice(TokenChoice::new(8)),
        },
        30,
        0,
        "transformers' diffusion_gemma; sizes of google/diffusiongemma-26B-A4B-it",
    ),
];

/// The model of this name.
pub fn find(name: &str) -> Option<Model> {
    MODELS.iter().copied().find(|m| m.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::Groups;

    fn tokens(config: LayerConfig) -> TokenChoice {
        match config.routing {
            Routing::TokenChoice(rule) => rule,
            other => panic!("{other:?} routes no tokens"),
        }
    }

    #[test]
    fn fewer_experts_make_a_rule_that_holds() {
        for model in MODELS {
            let own = model.config.experts;
            for all in [own, own + 1, u32::MAX] {
                assert_eq!(model.with_experts(all), model.config);
            }
            for experts in [1, 7, 20, 32, 64] {
                let config = model.with_experts(experts);
                assert_eq!(config.experts, experts);
                assert_eq!(config.routing.check(experts), Ok(()), "{} of {experts}", model.name);
            }
            assert!(model.with_experts(0).routing.check(0).is_err());
        }
        let mini = find("llada2-mini").unwrap();
        let rule = tokens(mini.with_experts(64));
        assert_eq!(rule.groups, Some(Groups::new(2, 1)));
    }

    #[test]
    fn a_floor_is_a_share_but_never_below_k() {
        let fewer = |rule, to| {
            let rule = tokens(find("llada2-mini").unwrap().config).with_coreset(rule);
            match Routing::from(rule).with_fewer_experts(256, to) {
                Routing::TokenChoice(rule) => rule.coreset.unwrap(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(fewer(dmoe_v2(), 256), dmoe_v2());
        assert_eq!(fewer(dmoe_v2().with_floor(64), 64), dmoe_v2().with_floor(16));
        assert_eq!(fewer(dmoe_v2(), 64), dmoe_v2().with_floor(8));
        assert_eq!(fewer(dmoe_v2(), 4), dmoe_v2().with_floor(4));
        // Never more than it was.
        assert_eq!(fewer(dmoe_v2().with_floor(1), 128), dmoe_v2().with_floor(1));
        assert_eq!(fewer(BlockRule::capacity(48), 128), BlockRule::capacity(24));
        assert_eq!(fewer(BlockRule::union(2), 1), BlockRule::union(1));
    }

    /// The table of this module's documentation has a line for each model, with its numbers.
    #[test]
    fn the_table_is_true() {
        let lines: Vec<Vec<&str>> = include_str!("models.rs")
            .lines()
            .filter_map(|line| line.strip_prefix("//! | `"))
            .map(|line| line.trim_end_matches(" |").split(" | ").collect())
            .collect();
        let names: Vec<&str> = lines.iter().map(|l| l[0].trim_end_matches('`')).collect();
        assert_eq!(names, MODELS.iter().map(|m| m.name).collect::<Vec<_>>());
        for (line, model) in lines.iter().zip(MODELS) {
            let LayerConfig { hidden, intermediate, experts, routing, .. } = model.config;
            let k = routing.experts_per_token();
            let numbers = [hidden, intermediate, experts, k].map(|n| n.to_string());
            assert_eq!(line[2..6], numbers, "{}", model.name);
            assert_eq!(line[7], format!("{} ({})", model.layers, model.dense_layers));
            let listed = include_str!("models.rs").contains(&format!("\n//! {}. ", line[8]));
            assert!(listed, "{}: source {} is not described", model.name, line[8]);
            assert!(!model.source.is_empty());
        }
    }
}
