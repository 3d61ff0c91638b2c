//! A step of the optimizer: Adam, all gradients clipped together.
use crate::model::Model;
use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{AdamConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::Tensor;

/// Adam as EC-DLM trains with it.
pub fn adam() -> ModuleOptimizer {
    AdamConfig::new().with_beta_1(0.9).with_beta_2(0.95).with_epsilon(1e-8).init()
}

/// Reads a number back.
pub fn number(value: &Tensor<1>) -> Result<f64, Box<dyn std::error::Error>> {
    let values: Vec<f32> = value.clone().try_into_vec_as()?;
    Ok(values[0].into())
}

/// One step down the gradient of a loss, whose norm over all weights is at most `clip`.
pub fn step(
    optimizer: &mut ModuleOptimizer,
    model: Model,
    loss: &Tensor<1>,
    rate: f64,
    clip: f32,
) -> Model {
    let mut gradients = GradientsParams::from_grads(loss.backward(), &model);
    let mut squares = Squares { gradients: &gradients, sum: None };
    model.visit(&mut squares);
    if let Some(sum) = squares.sum {
        let factor = (sum.sqrt() + 1e-6).recip().mul_scalar(clip).clamp_max(1.0);
        model.visit(&mut Scale { gradients: &mut gradients, factor });
    }
    optimizer.step(rate, model, gradients)
}

/// The sum of all gradients' squares.
struct Squares<'a> {
    gradients: &'a GradientsParams,
    sum: Option<Tensor<1>>,
}

impl ModuleVisitor for Squares<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            let own = (gradient.clone() * gradient).sum();
            self.sum = Some(match self.sum.take() {
                Some(sum) => sum + own,
                None => own,
            });
        }
    }
}

/// Every gradient times a factor.
struct Scale<'a> {
    gradients: &'a mut GradientsParams,
    factor: Tensor<1>,
}

impl ModuleVisitor for Scale<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.remove::<D>(param.id) {
            let factor = self.factor.clone().reshape([1; D]);
            self.gradients.register(param.id, gradient * factor);
        }
    }
}
