//! Shape and routing of a model from its `config.json`.
use super::{failed, fp8};
use crate::routing::{
    Activation, BlockRule, GateRule, Groups, MAX_EXPERTS, Routing, Score, TokenChoice,
};
use crate::{LayerConfig, Result};
use serde_json::Value;
use std::path::Path;

/// Largest hidden or intermediate size: a thousand times that of models of today would not fit a file.
pub(super) const MOST_SIZE: u32 = 1 << 20;
/// What the `model_type` of models begins with whose routing and experts are as this module reads them. Others have fields of
/// the same names and mean something else: Mixtral and others have no `norm_topk_prob` and normalise all the same, Qwen2-MoE
/// weighs its shared experts by a gate, DeepSeek-V2 values groups by their highest expert.
const KNOWN: [&str; 7] =
    ["llada", "sdar", "qwen3_moe", "qwen3_vl_moe", "bailing_moe", "deepseek_v3", "diffusion_gemma"];
/// Most layers.
pub(super) const MOST_LAYERS: u32 = 1 << 16;

/// What `config.json` says of a model's MoE layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Shape and routing of an MoE layer.
    pub layer: LayerConfig,
    /// Layers in all.
    pub layers: u32,
    /// Layers at the front that are dense.
    pub dense: u32,
    /// Layers further on that are dense, in ascending order.
    pub more_dense: Vec<u32>,
    /// Tokens that are decoded together, where it says so: blocks for the rule, [`crate::layer::BLOCK`] if absent.
    pub block_size: Option<u32>,
    /// Whether routers have a bias; not said: where the tensor is there.
    pub bias: Option<bool>,
}

impl Config {
    /// Reads the text of a `config.json`; `path` is what errors call it.
    ///
    /// Names of fields are those of LLaDA2.x, and others where models differ: `hidden_size`, `moe_intermediate_size`
    /// (`expert_intermediate_size`), `num_experts` (`n_routed_experts`, `num_local_experts`), `num_experts_per_tok`,
    /// `num_shared_experts` (`n_shared_experts`, or `shared_expert_intermediate_size`), `n_group` and `topk_group`
    /// (`router_num_group`, `router_topk_group`), `routed_scaling_factor`, `norm_topk_prob`, `score_function`
    /// (`scoring_func`, `moe_router_score_function`), `moe_router_enable_expert_bias`, `first_k_dense_replace`,
    /// `mlp_only_layers`, `decoder_sparse_step`, `moe_layer_freq`, `num_hidden_layers`, `hidden_act`, and LLaDA2.2's
    /// `expert_capacity` and `block_size`. Of `quantization_config` only `weight_block_size` is looked at. A `model_type`, where there is one, must be of LLaDA, SDAR, Qwen3-MoE, Bailing,
    /// DeepSeek-V3 or DiffusionGemma. `null` is as good as absent. Without a score function, LLaDA2.x and models with a
    /// router bias have sigmoid, others softmax; without `norm_topk_prob` gates of sigmoid scores are normalised, others are
    /// not: the defaults of their code.
    ///
    /// # Errors
    ///
    /// [`crate::Error::Checkpoint`], naming the field: text that is no JSON object, a `model_type` that is not known, a field that is missing, of another type
    /// or out of range, or settings that make no sense together ([`Routing::check`]).
    pub fn from_json(path: &Path, json: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(json)
            .map_err(|e| failed(path, None, format!("is not JSON: {e}")))?;
        if !value.is_object() {
            return Err(failed(path, None, "expected a JSON object"));
        }
        Fields { path, value: &value }.config()
    }

    /// Whether a layer is dense; of no meaning past the last one.
    pub fn is_dense(&self, layer: u32) -> bool {
        layer < self.dense || self.more_dense.binary_search(&layer).is_ok()
    }
}

struct Fields<'a> {
    path: &'a Path,
    value: &'a Value,
}

/// What fields are called: the first that is there counts.
type Keys = &'static [&'static str];

impl<'a> Fields<'a> {
    fn fail<T>(&self, key: &str, reason: impl Into<String>) -> Result<T> {
        Err(failed(self.path, Some(key), reason))
    }

    fn find(&self, keys: Keys) -> Option<(&'static str, &'a Value)> {
        keys.iter().find_map(|&key| {
            self.value.get(key).filter(|value| !value.is_null()).map(|value| (key, value))
        })
    }

    fn number(&self, keys: Keys, most: u32) -> Result<Option<u32>> {
        let Some((key, value)) = self.find(keys) else { return Ok(None) };
        match value.as_u64() {
            Some(n) if n <= u64::from(most) => Ok(Some(n as u32)),
            _ => self
                .fail(key, format!("expected a whole number up to {most}, got {}", short(value))),
        }
    }

    fn needed(&self, keys: Keys, most: u32) -> Result<u32> {
        match self.number(keys, most)? {
            Some(0) => self.fail(self.find(keys).map_or(keys[0], |(key, _)| key), "must not be 0"),
            Some(n) => Ok(n),
            None => self.fail(keys[0], "is missing"),
        }
    }

    fn flag(&self, key: Keys) -> Result<Option<bool>> {
        let Some((key, value)) = self.find(key) else { return Ok(None) };
        match value.as_bool() {
            Some(flag) => Ok(Some(flag)),
            None => self.fail(key, format!("expected true or false, got {}", short(value))),
        }
    }

    fn text(&self, keys: Keys) -> Result<Option<(&'static str, &'a str)>> {
        let Some((key, value)) = self.find(keys) else { return Ok(None) };
        match value.as_str() {
            Some(text) => Ok(Some((key, text))),
            None => self.fail(key, format!("expected a string, got {}", short(value))),
        }
    }

    /// Whether the model's layers are of a kind that is read here.
    fn known_model(&self) -> Result<()> {
        match self.text(&["model_type"])? {
            Some((key, other)) if !KNOWN.iter().any(|known| other.starts_with(known)) => {
                let known = KNOWN.join(", ");
                let reason = format!(
                    "{other:?} is not known: expected one that begins with {known}, or no field where the layers are of \
                     such a model"
                );
                self.fail(key, reason)
            }
            _ => Ok(()),
        }
    }

    /// Whether scales of 8-bit floats, if any, are for tiles as they are read here.
    fn known_tiles(&self) -> Result<()> {
        let Some((key, value)) = self.find(&["quantization_config"]) else { return Ok(()) };
        match value.get("weight_block_size") {
            Some(size) if !size.is_null() && *size != serde_json::json!([fp8::TILE, fp8::TILE]) => {
                let reason =
                    format!("`weight_block_size` {}, expected [128, 128] or none", short(size));
                self.fail(key, reason)
            }
            _ => Ok(()),
        }
    }

    fn config(&self) -> Result<Config> {
        self.known_model()?;
        self.known_tiles()?;
        let hidden = self.needed(&["hidden_size"], MOST_SIZE)?;
        let intermediate =
            self.needed(&["moe_intermediate_size", "expert_intermediate_size"], MOST_SIZE)?;
        let experts =
            self.needed(&["num_experts", "n_routed_experts", "num_local_experts"], MAX_EXPERTS)?;
        let layers = self.needed(&["num_hidden_layers"], MOST_LAYERS)?;
        let bias = self.flag(&["moe_router_enable_expert_bias"])?;
        let score = self.score(bias)?;
        let normalised = self.flag(&["norm_topk_prob"])?.unwrap_or(score == Score::Sigmoid);
        let block_size = self.number(&["block_size"], MOST_SIZE)?.filter(|&n| n > 0);
        let coreset = self.number(&["expert_capacity"], MAX_EXPERTS)?.filter(|&n| n > 0);
        let groups = self.groups()?;
        let scale = match self.find(&["routed_scaling_factor"]) {
            None => 1.0,
            Some((key, value)) => match value.as_f64().map(|v| v as f32) {
                Some(scale) if scale.is_finite() => scale,
                _ => {
                    return self
                        .fail(key, format!("expected a finite number, got {}", short(value)));
                }
            },
        };
        let rule = TokenChoice {
            score,
            gate: if normalised { GateRule::Normalised } else { GateRule::Unnormalised },
            by_logits: false,
            experts_per_token: self.needed(&["num_experts_per_tok"], MAX_EXPERTS)?,
            // A model trained with a coreset of its blocks ignores groups.
            groups: if coreset.is_some() { None } else { groups },
            scale,
            capacity_factor: None,
            coreset: coreset.map(BlockRule::Capacity),
        };
        let layer = LayerConfig {
            hidden,
            intermediate,
            experts,
            shared_experts: self.shared_experts(intermediate)?,
            activation: self.activation()?,
            routing: Routing::TokenChoice(rule),
        };
        layer.routing.check(experts).map_err(|e| failed(self.path, None, e.to_string()))?;
        Ok(Config {
            layer,
            layers,
            dense: self.number(&["first_k_dense_replace"], u32::MAX)?.unwrap_or(0),
            more_dense: self.more_dense(layers)?,
            block_size,
            bias,
        })
    }

    fn score(&self, bias: Option<bool>) -> Result<Score> {
        let keys: Keys = &["score_function", "scoring_func", "moe_router_score_function"];
        match self.text(keys)? {
            Some((_, "sigmoid")) => Ok(Score::Sigmoid),
            Some((_, "softmax")) => Ok(Score::Softmax),
            Some((key, other)) => {
                self.fail(key, format!("expected \"sigmoid\" or \"softmax\", got {other:?}"))
            }
            None => {
                let llada2 =
                    self.text(&["model_type"])?.is_some_and(|(_, t)| t.starts_with("llada2"));
                Ok(if llada2 || bias == Some(true) { Score::Sigmoid } else { Score::Softmax })
            }
        }
    }

    fn activation(&self) -> Result<Activation> {
        match self.text(&["hidden_act", "hidden_activation"])? {
            None | Some((_, "silu" | "swish")) => Ok(Activation::Silu),
            Some((_, "gelu_pytorch_tanh" | "gelu_tanh" | "gelu_new")) => Ok(Activation::Gelu),
            Some((key, other)) => {
                self.fail(key, format!("expected \"silu\" or \"gelu_pytorch_tanh\", got {other:?}"))
            }
        }
    }

    fn groups(&self) -> Result<Option<Groups>> {
        let count_keys: Keys = &["n_group", "router_num_group"];
        let top_keys: Keys = &["topk_group", "router_topk_group"];
        let count = self.number(count_keys, MAX_EXPERTS)?.unwrap_or(0);
        let top = self.number(top_keys, MAX_EXPERTS)?;
        match (count, top) {
            (0 | 1, _) => Ok(None),
            (count, Some(per_token)) => Ok(Some(Groups::new(count, per_token))),
            (_, None) => self.fail(top_keys[0], "is missing, with groups of experts"),
        }
    }

    fn shared_experts(&self, intermediate: u32) -> Result<u32> {
        if let Some(shared) =
            self.number(&["num_shared_experts", "n_shared_experts"], MAX_EXPERTS)?
        {
            return Ok(shared);
        }
        let key: Keys = &["shared_expert_intermediate_size"];
        let size = self.number(key, MOST_SIZE)?.unwrap_or(0);
        experts_of_size(size, intermediate).or_else(|reason| self.fail(key[0], reason))
    }

    /// Dense layers by Qwen3-MoE's and LLaDA-MoE's ways of saying so.
    fn more_dense(&self, layers: u32) -> Result<Vec<u32>> {
        let mut dense = vec![];
        if let Some((key, value)) = self.find(&["mlp_only_layers"]) {
            let list = value
                .as_array()
                .map(|list| list.iter().map(|v| v.as_u64()).collect::<Option<Vec<_>>>());
            let Some(Some(list)) = list else {
                return self.fail(key, format!("expected a list of layers, got {}", short(value)));
            };
            dense.extend(list.into_iter().filter_map(|n| u32::try_from(n).ok()));
        }
        // Every so many layers are MoE layers, the last of each stretch.
        let step = self.number(&["decoder_sparse_step"], MOST_LAYERS)?.unwrap_or(1);
        if step == 0 {
            return self.fail("decoder_sparse_step", "must not be 0");
        }
        if step > 1 {
            dense.extend((0..layers).filter(|layer| !(layer + 1).is_multiple_of(step)));
        }
        if let Some((key, value)) = self.find(&["moe_layer_freq"]) {
            match value {
                Value::Number(n) if n.as_u64() == Some(1) => {}
                Value::Array(list) => {
                    let is_dense = |v: &Value| match v.as_u64() {
                        Some(n @ (0 | 1)) => Some(n == 0),
                        _ => v.as_bool().map(|moe| !moe),
                    };
                    for (layer, value) in (0..).zip(list) {
                        match is_dense(value) {
                            Some(true) => dense.push(layer),
                            Some(false) => {}
                            None => {
                                return self.fail(key, format!("layer {layer}: expected 0 or 1"));
                            }
                        }
                    }
                }
                _ => {
                    return self.fail(
                        key,
                        format!("expected 1 or a list of 0 and 1, got {}", short(value)),
                    );
                }
            }
        }
        dense.sort_unstable();
        dense.dedup();
        Ok(dense)
    }
}

/// How many experts of an intermediate size a shared FFN is, or why it is none.
pub(super) fn experts_of_size(size: u32, intermediate: u32) -> std::result::Result<u32, String> {
    if !size.is_multiple_of(intermediate) {
        return Err(format!("{size} is no multiple of the experts' {intermediate}"));
    }
    match size / intermediate {
        n if n <= MAX_EXPERTS => Ok(n),
        n => Err(format!("{n} experts' size, at most {MAX_EXPERTS}")),
    }
}

/// A value for a message, however long it is.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{} ...", &text[..end]),
        None => text,
    }
}
