//! What tensors are called.

/// Names of a layer's tensors, as plain data. `{layer}` and `{expert}` stand for numbers. [`Names::known`] has those of the
/// models that are known here; write your own for others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// Router `[E, D]`.
    pub router: String,
    /// Bias `[E]` that experts are chosen by; read where it is there, needed where `config.json` says so.
    pub bias: String,
    /// The routed experts.
    pub experts: ExpertNames,
    /// The shared FFN, of intermediate size m F; not looked at where the model has none.
    pub shared: ExpertNames,
}

/// Names of experts' matrices. With `{expert}` in it, a name stands for one tensor `[out, in]` for each expert; without, for
/// one tensor of all experts, `[E, out, in]`, or, where they are fused, also `[E, in, out]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExpertNames {
    /// Gate, up, down apart: `[F, D]`, `[F, D]`, `[D, F]`.
    Apart {
        /// Gate.
        gate: String,
        /// Up.
        up: String,
        /// Down.
        down: String,
    },
    /// Gate and up in one, gate first: `[2F, D]` and `[D, F]` as transformers 5 has them in memory and some tools write them;
    /// `[D, 2F]` and `[F, D]` as transformers 4 wrote those of Qwen3-VL-MoE. Which of the two is told by the shapes of both.
    Fused {
        /// Gate and up.
        gate_up: String,
        /// Down.
        down: String,
    },
}

const ROUTER: &str = "model.layers.{layer}.mlp.gate.weight";
const EXPERTS: &str = "model.layers.{layer}.mlp.experts";
const SHARED: &str = "model.layers.{layer}.mlp.shared_experts";

impl Names {
    /// LLaDA2.x, LLaDA-MoE, SDAR, Qwen3-MoE: a tensor for each matrix of each expert.
    pub fn each() -> Self {
        Self::with(ExpertNames::apart(&format!("{EXPERTS}.{{expert}}"), ".weight"))
    }

    /// The same, experts stacked.
    pub fn stacked() -> Self {
        Self::with(ExpertNames::apart(EXPERTS, ""))
    }

    /// The same, experts stacked, gate and up fused.
    pub fn fused() -> Self {
        Self::with(ExpertNames::Fused {
            gate_up: format!("{EXPERTS}.gate_up_proj"),
            down: format!("{EXPERTS}.down_proj"),
        })
    }

    /// All of these: a checkpoint is read by the first whose tensors are there.
    pub fn known() -> Vec<Self> {
        vec![Self::each(), Self::stacked(), Self::fused()]
    }

    /// Those of GGUF files, as llama.cpp has them: experts stacked, gate and up apart or fused.
    pub fn gguf() -> Vec<Self> {
        let name = |tensor: &str| format!("blk.{{layer}}.{tensor}");
        let apart = |suffix: &str| {
            let name = |matrix: &str| name(&format!("ffn_{matrix}_{suffix}.weight"));
            ExpertNames::Apart { gate: name("gate"), up: name("up"), down: name("down") }
        };
        let fused = ExpertNames::Fused {
            gate_up: name("ffn_gate_up_exps.weight"),
            down: name("ffn_down_exps.weight"),
        };
        let with = |experts| Self {
            router: name("ffn_gate_inp.weight"),
            bias: name("exp_probs_b.bias"),
            experts,
            shared: apart("shexp"),
        };
        vec![with(apart("exps")), with(fused)]
    }

    fn with(experts: ExpertNames) -> Self {
        Self {
            router: ROUTER.into(),
            bias: "model.layers.{layer}.mlp.gate.expert_bias".into(),
            experts,
            shared: ExpertNames::apart(SHARED, ".weight"),
        }
    }
}

impl ExpertNames {
    /// `gate_proj`, `up_proj` and `down_proj`, as nearly all models have it.
    pub fn apart(prefix: &str, suffix: &str) -> Self {
        let name = |matrix: &str| format!("{prefix}.{matrix}_proj{suffix}");
        Self::Apart { gate: name("gate"), up: name("up"), down: name("down") }
    }

    /// The names there are.
    pub(super) fn all(&self) -> Vec<&str> {
        match self {
            Self::Apart { gate, up, down } => vec![gate, up, down],
            Self::Fused { gate_up, down } => vec![gate_up, down],
        }
    }
}

/// A name with its numbers.
pub(super) fn fill(name: &str, layer: u32, expert: u32) -> String {
    name.replace("{layer}", &layer.to_string()).replace("{expert}", &expert.to_string())
}

/// Whether a name stands for one tensor of all experts.
pub(super) fn is_stacked(name: &str) -> bool {
    !name.contains("{expert}")
}
