//! A layer as plain data, and the router's own weights.
use crate::device::Tensor;
use crate::routing::{Activation, BlockRule, Routing, TokenChoice};
use crate::weights::{ExpertShape, ExpertTypes};
use crate::{Error, Result};

/// The shape of a layer and its routing rule.
///
/// ```
/// use wgmoe::layer::LayerConfig;
/// use wgmoe::routing::*;
///
/// let rule = TokenChoice::new(8).with_score(Score::Sigmoid).with_scale(2.5);
/// let config = LayerConfig::new(2048, 512, 256, rule).with_shared_experts(1);
/// assert_eq!(config.routing.check(config.experts), Ok(()));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerConfig {
    /// D: hidden size.
    pub hidden: u32,
    /// F: intermediate size of one expert.
    pub intermediate: u32,
    /// E: routed experts.
    pub experts: u32,
    /// Shared experts, each of the routed ones' shape. A shared FFN of intermediate size m F is m
    /// of them.
    pub shared_experts: u32,
    /// Activation of the experts.
    pub activation: Activation,
    /// How experts and tokens find each other.
    pub routing: Routing,
}

impl LayerConfig {
    /// Experts `[F, D]` with SwiGLU, none of them shared.
    pub fn new(hidden: u32, intermediate: u32, experts: u32, routing: impl Into<Routing>) -> Self {
        let routing = routing.into();
        let activation = Activation::Silu;
        Self { hidden, intermediate, experts, shared_experts: 0, activation, routing }
    }

    /// The same with shared experts: each takes every token with gate 1.
    #[must_use]
    pub const fn with_shared_experts(self, shared_experts: u32) -> Self {
        Self { shared_experts, ..self }
    }

    /// The same with another activation.
    #[must_use]
    pub const fn with_activation(self, activation: Activation) -> Self {
        Self { activation, ..self }
    }

    /// The same under another routing rule.
    #[must_use]
    pub fn with_routing(self, routing: impl Into<Routing>) -> Self {
        Self { routing: routing.into(), ..self }
    }

    /// The same, each block of tokens electing a coreset first.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where the routing is not token choice.
    pub fn with_coreset(self, coreset: BlockRule) -> Result<Self> {
        match self.routing {
            Routing::TokenChoice(rule) => {
                let rule = TokenChoice { coreset: Some(coreset), ..rule };
                Ok(Self { routing: Routing::TokenChoice(rule), ..self })
            }
            _ => Err(Error::invalid("coreset", "only token choice elects coresets")),
        }
    }

    /// Shape of the layer's weights, shared experts included.
    pub fn expert_shape(&self, types: impl Into<ExpertTypes>) -> ExpertShape {
        let experts = self.experts.saturating_add(self.shared_experts);
        ExpertShape::new(experts, self.hidden, self.intermediate, types)
    }
}

/// The router's own weights.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Router {
    /// `Wr [E, D]` f32.
    pub weight: Tensor,
    /// `[E]` f32, added to what experts are chosen by, never to what they weigh.
    pub bias: Option<Tensor>,
    /// `[E + 1]` f32: a factor for the gates of tokens that n experts took (EC-DLM's table,
    /// [`scaling`](crate::routing::scaling)).
    pub scale_by_count: Option<Tensor>,
    /// `[E]` f32: a factor of each expert's gates (DiffusionGemma).
    pub scale_by_expert: Option<Tensor>,
}

impl Router {
    /// A router of `Wr [E, D]` f32, without bias and factors.
    pub fn new(weight: impl Into<Tensor>) -> Self {
        let weight = weight.into();
        Self { weight, bias: None, scale_by_count: None, scale_by_expert: None }
    }

    /// The same with a bias `[E]` f32.
    #[must_use]
    pub fn with_bias(self, bias: impl Into<Tensor>) -> Self {
        Self { bias: Some(bias.into()), ..self }
    }

    /// The same with factors `[E + 1]` f32 by the number of a token's experts.
    #[must_use]
    pub fn with_scale_by_count(self, scale: impl Into<Tensor>) -> Self {
        Self { scale_by_count: Some(scale.into()), ..self }
    }

    /// The same with a factor `[E]` f32 for each expert.
    #[must_use]
    pub fn with_scale_by_expert(self, scale: impl Into<Tensor>) -> Self {
        Self { scale_by_expert: Some(scale.into()), ..self }
    }

    /// Checks the sizes of the tensors.
    pub(crate) fn check(&self, hidden: u32, experts: u32) -> Result<()> {
        self.weight.slice().f32s("router weight", &[experts.into(), hidden.into()])?;
        for (name, tensor, length) in [
            ("router bias", &self.bias, u64::from(experts)),
            ("scale_by_count", &self.scale_by_count, u64::from(experts) + 1),
            ("scale_by_expert", &self.scale_by_expert, experts.into()),
        ] {
            if let Some(tensor) = tensor {
                tensor.slice().f32s(name, &[length])?;
            }
        }
        Ok(())
    }
}
