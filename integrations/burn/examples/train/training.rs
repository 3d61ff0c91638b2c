//! Steps and validations.
use crate::Outcome;
use crate::diffusion::{Masked, Routing};
use crate::evaluate::{self, Validation};
use crate::language;
use crate::model::Model;
use crate::optimise;
use crate::options::Options;
use burn::module::Module;
use burn::optim::ModuleOptimizer;
use burn::tensor::Device;
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};
use std::time::Instant;
use wgmoe_burn::wgmoe::plan::Stats;

/// A validation on the way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Point {
    pub step: usize,
    /// Of training steps alone, since this run began.
    pub seconds: f64,
    /// Mean training loss since the last one.
    pub training: f64,
    pub validation: Validation,
    /// Tokens of the fullest expert over the mean, the mean over layers, since the last one.
    pub fullest: f64,
    /// Pairs of a token and an expert that were dropped, of those chosen.
    pub dropped: f64,
}

/// What learns, and how far it is.
pub struct Learner {
    pub model: Model,
    pub optimizer: ModuleOptimizer,
    /// Steps that are done.
    pub step: usize,
}

/// A run.
pub struct Run<'a> {
    pub options: &'a Options,
    pub routing: Routing,
    pub device: &'a Device,
    pub training: &'a [u8],
    pub held_out: &'a [u8],
    /// Number of the first step's batch: one that goes on with a trained model sees others.
    pub batches_from: usize,
}

/// Sequences of a validation on the way, times evenly from 0 to 1.
pub const ON_THE_WAY: usize = 32;

impl Run<'_> {
    /// One step, and its loss.
    pub fn step(&self, mut learner: Learner) -> Outcome<(Learner, f64)> {
        let Options { batch, length, clip, seed, .. } = *self.options;
        // Of each step's own, so that a run that is resumed sees what it would have seen.
        let mut rng = StdRng::seed_from_u64(seed << 32 | (self.batches_from + learner.step) as u64);
        let text = language::windows(self.training, &mut rng, batch, length);
        let masked = Masked::new(text, length, &mut rng);
        let loss = masked.loss(&learner.model, &self.routing, self.device);
        let value = optimise::number(&loss)?;
        let rate = self.options.rate_at(learner.step);
        learner.model = optimise::step(&mut learner.optimizer, learner.model, &loss, rate, clip);
        learner.step += 1;
        Ok((learner, value))
    }

    /// All steps that are left.
    pub fn train(&self, mut learner: Learner) -> Outcome<(Learner, Vec<Point>)> {
        let Options { steps, validate, bias_rate, .. } = *self.options;
        let bar = ProgressBar::new(steps as u64).with_position(learner.step as u64);
        let style = "{bar:30} {pos}/{len} {elapsed} of about {duration}, {msg}";
        bar.set_style(ProgressStyle::with_template(style)?);
        let (mut points, mut recent, mut seconds) = (vec![], vec![], 0.0);
        let mut loads = vec![];
        while learner.step < steps {
            let start = Instant::now();
            let (next, value) = self.step(learner)?;
            learner = next;
            loads.push(learner.model.balance(bias_rate)?);
            seconds += start.elapsed().as_secs_f64();
            recent.push(value);
            bar.set_message(format!("loss {value:.3}"));
            bar.inc(1);
            let step = learner.step;
            if step.is_multiple_of(validate.max(1)) || step == steps {
                let validation = self.validate(&learner.model.valid(), ON_THE_WAY)?;
                let training = recent.iter().sum::<f64>() / recent.len() as f64;
                let [fullest, dropped] = balance_of(&loads);
                let point = Point { step, seconds, training, validation, fullest, dropped };
                let [z, balance] = learner.model.router_losses()?;
                bar.suspend(|| {
                    eprintln!("{}, router z {z:.2e}, balance {balance:.2e}", say(&point))
                });
                points.push(point);
                recent.clear();
                loads.clear();
            }
        }
        bar.finish_and_clear();
        Ok((learner, points))
    }

    /// The loss on text that is not learned, the same each time.
    pub fn validate(&self, model: &Model, sequences: usize) -> Outcome<Validation> {
        let Options { batch, length, seed, .. } = *self.options;
        let mut rng = StdRng::seed_from_u64(!seed);
        let batches = sequences.div_ceil(batch);
        let total = (batches * batch) as f64;
        let mut times = 0;
        let mut seen = evaluate::Seen::default();
        for _ in 0..batches {
            let text = language::windows(self.held_out, &mut rng, batch, length);
            // Times evenly over 0 to 1, in every batch some of all.
            let masked = Masked::at(text, length, &mut rng, |_| {
                let (batch_now, sequence) = (times / batch, times % batch);
                times += 1;
                ((sequence * batches + batch_now) as f64 + 0.5) / total
            });
            let surprise = masked.surprise(model, &self.routing, self.device);
            let surprise: Vec<f32> = surprise.try_into_vec_as()?;
            seen.add(&masked, &surprise);
        }
        Ok(seen.result())
    }
}

/// The fullest expert's tokens over the mean, and the share that was dropped.
fn balance_of(steps: &[Vec<Stats>]) -> [f64; 2] {
    let all: Vec<&Stats> = steps.iter().flatten().collect();
    let fullest = |stats: &&Stats| {
        let most = stats.tokens_per_expert.iter().max().copied().unwrap_or(0);
        f64::from(most) * stats.tokens_per_expert.len() as f64 / f64::from(stats.slots.max(1))
    };
    let fullest = all.iter().map(fullest).sum::<f64>() / all.len().max(1) as f64;
    let sum = |of: fn(&Stats) -> u32| all.iter().map(|s| f64::from(of(s))).sum::<f64>();
    let dropped = sum(|s| s.dropped);
    [fullest, dropped / (sum(|s| s.slots) + dropped).max(1.0)]
}

fn say(point: &Point) -> String {
    let Point { step, training, validation, fullest, dropped, .. } = point;
    let Validation { loss, by_ratio } = validation;
    format!(
        "step {step}: training {training:.3}, validation {loss:.3}, by masked share {by_ratio:.2?}, fullest expert {fullest:.2}, dropped {dropped:.3}"
    )
}
