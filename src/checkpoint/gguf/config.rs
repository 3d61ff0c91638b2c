//! Shape and routing of a model from the metadata of its GGUF file.
use super::super::config::{Config, MOST_LAYERS, MOST_SIZE, experts_of_size};
use super::super::failed;
use super::read::{Value, Values};
use crate::routing::{Activation, GateRule, Groups, MAX_EXPERTS, Routing, Score, TokenChoice};
use crate::{LayerConfig, Result};
use std::path::Path;

/// An architecture of llama.cpp's, and what its code does where metadata is silent
/// (`src/models/*.cpp` there).
struct Architecture {
    name: &'static str,
    /// None: the file must say.
    score: Option<Score>,
    normalised: bool,
    /// Whether routers may have a bias.
    bias: bool,
}

const ARCHITECTURES: [Architecture; 4] = [
    // LLaDA2.x, Ling 2.0.
    Architecture { name: "bailingmoe2", score: None, normalised: false, bias: true },
    Architecture { name: "llada-moe", score: Some(Score::Softmax), normalised: false, bias: false },
    // SDAR too.
    Architecture { name: "qwen3moe", score: Some(Score::Softmax), normalised: true, bias: false },
    Architecture { name: "qwen3vlmoe", score: Some(Score::Softmax), normalised: true, bias: false },
];

const ARCHITECTURE: &str = "general.architecture";

/// What the metadata says of a model's MoE layers.
///
/// # Errors
///
/// [`crate::Error::Checkpoint`], naming the key: an architecture that is not known, a key that is
/// missing, of another type or out of range, or settings that make no sense together.
pub(super) fn read(path: &Path, values: &Values<'_>) -> Result<Config> {
    let name = match values.get(ARCHITECTURE) {
        None => return Err(failed(path, Some(ARCHITECTURE), "is missing")),
        Some(Value::Text(text)) => String::from_utf8_lossy(text),
        Some(_) => return Err(failed(path, Some(ARCHITECTURE), "expected a string")),
    };
    let Some(architecture) = ARCHITECTURES.iter().find(|a| a.name == name) else {
        let known = ARCHITECTURES.map(|a| a.name).join(", ");
        let name: String = name.chars().take(60).collect();
        let reason = format!("{name:?} is not known: expected one of {known}");
        return Err(failed(path, Some(ARCHITECTURE), reason));
    };
    Keys { path, values, architecture }.config()
}

struct Keys<'a> {
    path: &'a Path,
    values: &'a Values<'a>,
    architecture: &'a Architecture,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.name)
    }

    fn fail<T>(&self, name: &str, reason: impl Into<String>) -> Result<T> {
        Err(failed(self.path, Some(&self.key(name)), reason))
    }

    fn find(&self, name: &str) -> Option<&Value<'_>> {
        self.values.get(&*self.key(name))
    }

    fn number(&self, name: &str, most: u32) -> Result<Option<u32>> {
        match self.find(name) {
            None => Ok(None),
            Some(&Value::Whole(n)) if (0..=most.into()).contains(&n) => Ok(Some(n as u32)),
            Some(other) => {
                self.fail(name, format!("expected a whole number up to {most}, got {other:?}"))
            }
        }
    }

    fn needed(&self, name: &str, most: u32) -> Result<u32> {
        match self.number(name, most)? {
            Some(0) => self.fail(name, "must not be 0"),
            Some(n) => Ok(n),
            None => self.fail(name, "is missing"),
        }
    }

    fn config(&self) -> Result<Config> {
        let experts = self.needed("expert_count", MAX_EXPERTS)?;
        let taken = self.needed("expert_used_count", MAX_EXPERTS)?;
        let intermediate = self.intermediate(taken)?;
        let rule = TokenChoice {
            score: self.score()?,
            gate: if self.normalised()? { GateRule::Normalised } else { GateRule::Unnormalised },
            by_logits: false,
            experts_per_token: taken,
            groups: self.groups()?,
            scale: self.scale()?,
            capacity_factor: None,
            coreset: None,
        };
        let layer = LayerConfig {
            hidden: self.needed("embedding_length", MOST_SIZE)?,
            intermediate,
            experts,
            shared_experts: self.shared_experts(intermediate)?,
            activation: Activation::Silu,
            routing: Routing::TokenChoice(rule),
        };
        layer.routing.check(experts).map_err(|e| failed(self.path, None, e.to_string()))?;
        // Layers that predict further tokens come last, and are counted.
        let blocks = self.needed("block_count", MOST_LAYERS)?;
        let further = self.number("nextn_predict_layers", MOST_LAYERS)?.unwrap_or(0);
        let Some(layers) = blocks.checked_sub(further).filter(|&n| n > 0) else {
            return self.fail("nextn_predict_layers", format!("{further} of {blocks} layers"));
        };
        Ok(Config {
            layer,
            layers,
            dense: self.number("leading_dense_block_count", u32::MAX)?.unwrap_or(0),
            more_dense: vec![],
            block_size: None,
            bias: if self.architecture.bias { None } else { Some(false) },
        })
    }

    fn intermediate(&self, taken: u32) -> Result<u32> {
        let name = "expert_feed_forward_length";
        if self.find(name).is_some() {
            return self.needed(name, MOST_SIZE);
        }
        let whole = "feed_forward_length";
        if self.architecture.score.is_none() || self.find(whole).is_none() {
            return self.fail(name, "is missing");
        }
        // Files before that key: that of all experts which a token takes.
        match self.needed(whole, u32::MAX)? / taken {
            n @ 1..=MOST_SIZE => Ok(n),
            n => self.fail(whole, format!("{n} for each of {taken} experts")),
        }
    }

    fn score(&self) -> Result<Score> {
        let name = "expert_gating_func";
        match (self.number(name, u32::MAX)?, self.architecture.score) {
            (Some(1), _) => Ok(Score::Softmax),
            (Some(2), _) => Ok(Score::Sigmoid),
            (Some(n), _) => {
                self.fail(name, format!("expected 1 (softmax) or 2 (sigmoid), got {n}"))
            }
            (None, Some(score)) => Ok(score),
            (None, None) => self.fail(name, "is missing"),
        }
    }

    fn normalised(&self) -> Result<bool> {
        let name = "expert_weights_norm";
        match self.find(name) {
            None => Ok(self.architecture.normalised),
            Some(Value::Flag(flag)) => Ok(*flag),
            Some(other) => self.fail(name, format!("expected true or false, got {other:?}")),
        }
    }

    /// The factor of gates. 0 is what llama.cpp takes for none.
    fn scale(&self) -> Result<f32> {
        let name = "expert_weights_scale";
        match self.find(name) {
            None => Ok(1.0),
            Some(&Value::Real(scale)) if (scale as f32).is_finite() => {
                Ok(if scale == 0.0 { 1.0 } else { scale as f32 })
            }
            Some(other) => self.fail(name, format!("expected a finite number, got {other:?}")),
        }
    }

    fn groups(&self) -> Result<Option<Groups>> {
        let top = "expert_group_used_count";
        match (self.number("expert_group_count", MAX_EXPERTS)?, self.number(top, MAX_EXPERTS)?) {
            (None | Some(0 | 1), _) => Ok(None),
            (Some(count), Some(per_token)) => Ok(Some(Groups::new(count, per_token))),
            (Some(_), None) => self.fail(top, "is missing, with groups of experts"),
        }
    }

    /// The shared FFN as so many experts of the routed ones' size. The converter writes the width
    /// of all of them, llama.cpp's loader takes it for that of one: a width of one expert is that.
    fn shared_experts(&self, intermediate: u32) -> Result<u32> {
        let shared = self.number("expert_shared_count", MAX_EXPERTS)?.unwrap_or(0);
        let name = "expert_shared_feed_forward_length";
        let width = self.number(name, MOST_SIZE)?.unwrap_or(0);
        if shared == 0 || width == 0 || width == intermediate {
            return Ok(shared);
        }
        experts_of_size(width, intermediate).or_else(|reason| self.fail(name, reason))
    }
}
