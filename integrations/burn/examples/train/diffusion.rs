//! Masked diffusion as EC-DLM trains it (arXiv 2604.01622): what is masked, the loss, and sampling by unmasking.
use crate::model::{CLASSES, MASK, Model, ints};
use burn::tensor::activation::{log_softmax, softmax};
use burn::tensor::{Device, Tensor, TensorData};
use rand::Rng;
use rand::rngs::StdRng;
use wgmoe_burn::wgmoe::ops::cross_entropy::masked_weights;
use wgmoe_burn::wgmoe::routing::schedule::{Schedule, capacity};

/// Sequences with some tokens masked.
#[derive(Clone, Debug)]
pub struct Masked {
    pub tokens: Vec<u8>,
    pub mask: Vec<bool>,
    pub length: usize,
}

impl Masked {
    /// A time for each sequence, uniform, each token masked with that probability; at least one is.
    pub fn new(tokens: Vec<u8>, length: usize, rng: &mut StdRng) -> Self {
        Self::at(tokens, length, rng, |rng| rng.random())
    }

    /// The same at times of one's own.
    pub fn at(
        tokens: Vec<u8>,
        length: usize,
        rng: &mut StdRng,
        mut time: impl FnMut(&mut StdRng) -> f64,
    ) -> Self {
        let mut mask = vec![];
        for _ in 0..tokens.len() / length {
            let t = time(rng).clamp(0.0, 1.0);
            let first = mask.len();
            mask.extend((0..length).map(|_| rng.random_bool(t)));
            if mask[first..].iter().all(|m| !m) {
                mask[first + rng.random_range(0..length)] = true;
            }
        }
        Self { tokens, mask, length }
    }

    fn sequences(&self) -> usize {
        self.tokens.len() / self.length
    }

    /// Masked tokens of each sequence.
    pub fn masked(&self) -> Vec<u32> {
        self.mask.chunks(self.length).map(|m| m.iter().filter(|m| **m).count() as u32).collect()
    }

    /// Tokens that each expert takes of each sequence, by its share of masked tokens.
    pub fn capacity(&self, schedule: &Schedule, experts: u32) -> Vec<u32> {
        let length = self.length as u32;
        let of = |masked| capacity(length, schedule.k_of_counts(masked, length), experts);
        self.masked().into_iter().map(of).collect()
    }

    /// What the model sees.
    fn inputs(&self) -> Vec<i32> {
        let seen = |(&token, &masked): (&u8, &bool)| if masked { MASK } else { token.into() };
        self.tokens.iter().zip(&self.mask).map(seen).collect()
    }

    /// `-log p` of every token, `[tokens]`.
    pub fn surprise(&self, model: &Model, routing: &Routing, device: &Device) -> Tensor<1> {
        let shape = [self.sequences(), self.length];
        let capacity = routing.schedule.map(|s| self.capacity(&s, routing.experts));
        let inputs = ints(self.inputs(), shape, device);
        let logits = model.forward(inputs, capacity.as_deref(), routing.apart);
        let count = self.tokens.len();
        let log = log_softmax(logits.reshape([count, CLASSES]), 1);
        let targets = ints(self.tokens.iter().map(|&t| t.into()).collect(), [count, 1], device);
        -log.gather(1, targets).reshape([count])
    }

    /// Cross entropy of masked tokens over the exact share that is masked, over all tokens.
    pub fn loss(&self, model: &Model, routing: &Routing, device: &Device) -> Tensor<1> {
        let ends: Vec<u32> = (0..=self.sequences()).map(|i| (i * self.length) as u32).collect();
        let counted = vec![true; self.mask.len()];
        let weights = masked_weights(&self.mask, &counted, &ends, true);
        let count = weights.len();
        let weights = Tensor::<1>::from_data(TensorData::new(weights, [count]), device);
        (self.surprise(model, routing, device) * weights).sum()
    }
}

/// How the layers' batches are routed.
#[derive(Clone, Copy, Debug)]
pub struct Routing {
    /// Whether experts choose among the tokens of each sequence apart.
    pub apart: bool,
    pub schedule: Option<Schedule>,
    pub experts: u32,
}

/// Text from nothing but masks: at each of `steps` the places that the model is surest of are filled, each by a draw.
pub fn sample(
    model: &Model,
    routing: &Routing,
    device: &Device,
    rng: &mut StdRng,
    (length, steps, temperature): (usize, usize, f64),
) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let mut text = Masked { tokens: vec![0; length], mask: vec![true; length], length };
    for step in 0..steps {
        let capacity = routing.schedule.map(|s| text.capacity(&s, routing.experts));
        let inputs = ints(text.inputs(), [1, length], device);
        let logits = model.forward(inputs, capacity.as_deref(), routing.apart);
        let logits = logits.reshape([length, CLASSES]) / temperature.max(1e-3);
        let shares: Vec<f32> = softmax(logits, 1).try_into_vec_as()?;
        let mut drawn: Vec<(f32, usize, u8)> = vec![];
        for (place, row) in shares.chunks(CLASSES).enumerate().filter(|(i, _)| text.mask[*i]) {
            let mut left: f32 = rng.random::<f32>() * row.iter().sum::<f32>();
            let found = row.iter().position(|&share| {
                left -= share;
                left <= 0.0
            });
            let token = found.unwrap_or(CLASSES - 1);
            drawn.push((row[token], place, token as u8));
        }
        drawn.sort_by(|a, b| b.0.total_cmp(&a.0));
        let keep = drawn.len().div_ceil(steps - step);
        for &(_, place, token) in &drawn[..keep] {
            text.tokens[place] = token;
            text.mask[place] = false;
        }
    }
    Ok(text.tokens)
}
