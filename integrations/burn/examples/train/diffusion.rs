//! Masked diffusion as EC-DLM trains it (arXiv 2604.01622): what is masked, the loss, and sampling by unmasking.
use crate::Outcome;
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

    /// Logits `[tokens, classes]`; `see` is given what goes into each block's layer.
    pub fn logits(
        &self,
        model: &Model,
        routing: &Routing,
        device: &Device,
        see: &mut dyn FnMut(Tensor<2>),
    ) -> Tensor<2> {
        let shape = [self.sequences(), self.length];
        let capacity = routing.schedule.map(|s| self.capacity(&s, routing.experts));
        let inputs = ints(self.inputs(), shape, device);
        let logits = model.forward(inputs, capacity.as_deref(), routing.apart, see);
        logits.reshape([self.tokens.len(), CLASSES])
    }

    /// `-log p` of every token, `[tokens]`.
    pub fn surprise(&self, model: &Model, routing: &Routing, device: &Device) -> Tensor<1> {
        let count = self.tokens.len();
        let log = log_softmax(self.logits(model, routing, device, &mut |_| {}), 1);
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

/// What is sampled.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Texts, all at once.
    pub count: usize,
    pub length: usize,
    pub steps: usize,
    pub temperature: f64,
}

impl Sampling {
    /// Texts from nothing but masks: at each step the places of a text that the model is surest of are filled, each by a
    /// draw. `see` is given the step and what goes into each block's layer.
    pub fn run(
        &self,
        model: &Model,
        routing: &Routing,
        device: &Device,
        rng: &mut StdRng,
        see: &mut dyn FnMut(usize, Tensor<2>),
    ) -> Outcome<Vec<Vec<u8>>> {
        let Self { count, length, steps, temperature } = *self;
        let mut text =
            Masked { tokens: vec![0; count * length], mask: vec![true; count * length], length };
        for step in 0..steps {
            let logits = text.logits(model, routing, device, &mut |x| see(step, x));
            let shares = softmax(logits / temperature.max(1e-3), 1);
            let shares: Vec<f32> = shares.try_into_vec_as()?;
            for (i, shares) in shares.chunks(length * CLASSES).enumerate() {
                text.unmask(i, shares, steps - step, rng);
            }
        }
        Ok(text.tokens.chunks(length).map(<[u8]>::to_vec).collect())
    }
}

impl Masked {
    /// Fills the surest of what is masked in a sequence, so that all is filled in the steps that are left.
    fn unmask(&mut self, sequence: usize, shares: &[f32], steps_left: usize, rng: &mut StdRng) {
        let first = sequence * self.length;
        let mut drawn: Vec<(f32, usize, u8)> = vec![];
        for (i, row) in shares.chunks(CLASSES).enumerate().filter(|(i, _)| self.mask[first + i]) {
            let mut left: f32 = rng.random::<f32>() * row.iter().sum::<f32>();
            let found = row.iter().position(|&share| {
                left -= share;
                left <= 0.0
            });
            let token = found.unwrap_or(CLASSES - 1);
            drawn.push((row[token], first + i, token as u8));
        }
        drawn.sort_by(|a, b| b.0.total_cmp(&a.0));
        let fill = drawn.len().div_ceil(steps_left);
        for &(_, place, token) in &drawn[..fill] {
            self.tokens[place] = token;
            self.mask[place] = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn every_sequence_has_a_mask_and_times_are_kept() {
        let mut rng = StdRng::seed_from_u64(1);
        let none = Masked::at(vec![7; 640], 64, &mut rng, |_| 0.0);
        assert_eq!(none.masked(), vec![1; 10]);
        let all = Masked::at(vec![7; 640], 64, &mut rng, |_| 1.0);
        assert_eq!(all.masked(), vec![64; 10]);
        let half = Masked::at(vec![7; 6400], 64, &mut rng, |_| 0.5);
        let mean = half.masked().iter().sum::<u32>() as f64 / 100.0;
        assert!((mean - 32.0).abs() < 1.5, "{mean}");
        assert_eq!(none.inputs().iter().filter(|&&t| t == MASK).count(), 10);
    }

    #[test]
    fn unmasking_takes_the_surest_and_fills_all() {
        let mut text = Masked { tokens: vec![0; 4], mask: vec![true; 4], length: 4 };
        let mut shares = vec![0f32; 4 * CLASSES];
        for (place, share) in [0.6, 1.0, 0.7, 0.9].into_iter().enumerate() {
            shares[place * CLASSES + 65 + place] = share;
        }
        let mut rng = StdRng::seed_from_u64(1);
        text.unmask(0, &shares, 2, &mut rng);
        assert_eq!(text.mask, [true, false, true, false]);
        assert_eq!(text.tokens, [0, 66, 0, 68]);
        text.unmask(0, &shares, 1, &mut rng);
        assert_eq!(text.tokens, [65, 66, 67, 68]);
        assert_eq!(text.mask, [false; 4]);
    }
}
