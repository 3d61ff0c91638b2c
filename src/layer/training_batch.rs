//! What a training step is bound to: the caller's slices.
use super::Batch;
use crate::Slice;
use crate::ops::router_loss::Coefficients;
use crate::weights::ExpertGradients;

/// The slices of a training step: a [`Batch`], the gradient of its output, and where gradients go.
///
/// The batch's hidden states and all gradients are f32. From the forward to the backward pass the hidden
/// states, and any of the router's tensors, must stay as they are.
///
/// ```
/// # use wgmoe::layer::{Batch, TrainingBatch};
/// # use wgmoe::{Slice, weights::ExpertGradients};
/// # fn f<'a>(batch: Batch<'a>, dout: Slice<'a>, dhidden: Slice<'a>, drouter: Slice<'a>,
/// #     gradients: &'a ExpertGradients) -> TrainingBatch<'a> {
/// TrainingBatch::new(batch, dout, dhidden)
///     .with_router_gradient(drouter)
///     .with_expert_gradients(gradients)
/// # }
/// ```
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct TrainingBatch<'a> {
    /// What the forward pass reads and writes.
    pub batch: Batch<'a>,
    /// `[T, D]` f32, read by the backward pass: the gradient of the layer's output.
    pub dout: Slice<'a>,
    /// `[T, D]` f32, written by the backward pass: the gradient of the hidden states.
    pub dhidden: Slice<'a>,
    /// Whether the output was added to the hidden states themselves, so that `dout` is part of their
    /// gradient.
    pub residual: bool,
    /// `[E, D]` f32: the gradient of the router's weights; a router that does not learn where absent.
    pub router: Option<Slice<'a>>,
    /// The gradients of the experts' weights, shared experts' too; experts that do not learn where absent.
    pub experts: Option<&'a ExpertGradients>,
    /// Whether the router's and the experts' gradients are added to what is there, over micro-batches,
    /// rather than written.
    pub add: bool,
    /// Whether the backward pass makes `z` again, from the weights as they are then, rather than the
    /// forward pass keeping it.
    pub recompute_z: bool,
    /// Losses of the router.
    pub losses: Option<Losses<'a>>,
}

/// Losses of the router, whose gradients the backward pass adds to those of the logits.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Losses<'a> {
    /// How much each counts. The balance loss is Switch's under token choice, EC-DLM's under expert choice.
    pub coefficients: Coefficients,
    /// `[2]` f32, written by the backward pass: the values of the router z-loss and the balance loss.
    pub values: Slice<'a>,
    /// Whether values are added to those that are there, sums over layers and micro-batches.
    pub add_values: bool,
    /// Experts per token that the balance loss divides by: the rule's own where absent. Where sequences
    /// have a k each, their mean, truncated.
    pub experts_per_token: Option<u32>,
}

impl<'a> Losses<'a> {
    /// Losses of these coefficients, values written into `[2]` f32.
    pub fn new(coefficients: Coefficients, values: impl Into<Slice<'a>>) -> Self {
        Self { coefficients, values: values.into(), add_values: false, experts_per_token: None }
    }

    /// Adds the values to those that are there.
    #[must_use]
    pub fn added(self) -> Self {
        Self { add_values: true, ..self }
    }

    /// Divides the balance loss by another number of experts per token than the rule's.
    #[must_use]
    pub fn with_experts_per_token(self, experts: u32) -> Self {
        Self { experts_per_token: Some(experts), ..self }
    }
}

impl<'a> TrainingBatch<'a> {
    /// A batch, the gradient of its output `[T, D]` f32, and where the gradient of its hidden states
    /// `[T, D]` f32 goes. Nothing else learns.
    pub fn new(
        batch: Batch<'a>,
        dout: impl Into<Slice<'a>>,
        dhidden: impl Into<Slice<'a>>,
    ) -> Self {
        Self {
            batch,
            dout: dout.into(),
            dhidden: dhidden.into(),
            residual: false,
            router: None,
            experts: None,
            add: false,
            recompute_z: false,
            losses: None,
        }
    }

    /// Writes the gradient of the router's weights, `[E, D]` f32.
    #[must_use]
    pub fn with_router_gradient(self, router: impl Into<Slice<'a>>) -> Self {
        Self { router: Some(router.into()), ..self }
    }

    /// Writes the gradients of the experts' weights.
    #[must_use]
    pub fn with_expert_gradients(self, experts: &'a ExpertGradients) -> Self {
        Self { experts: Some(experts), ..self }
    }

    /// Adds the gradients of weights to those that are there.
    #[must_use]
    pub fn adding(self) -> Self {
        Self { add: true, ..self }
    }

    /// Counts `dout` into the gradient of the hidden states: the output was added to these.
    #[must_use]
    pub fn with_residual(self) -> Self {
        Self { residual: true, ..self }
    }

    /// Makes `z` again in the backward pass: less memory between the two, one more matmul.
    #[must_use]
    pub fn with_recomputed_z(self) -> Self {
        Self { recompute_z: true, ..self }
    }

    /// Adds losses of the router.
    #[must_use]
    pub fn with_losses(self, losses: Losses<'a>) -> Self {
        Self { losses: Some(losses), ..self }
    }
}
