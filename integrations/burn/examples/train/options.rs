//! What is learned, by which rule, and how.
use crate::Outcome;
use crate::diffusion::Routing;
use crate::language;
use crate::model::Sizes;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use wgmoe_burn::wgmoe::layer::LayerConfig;
use wgmoe_burn::wgmoe::ops::router_loss::Coefficients;
use wgmoe_burn::wgmoe::routing::schedule::{Schedule, ScheduleKind};
use wgmoe_burn::wgmoe::routing::{self, BlockRule, ExpertChoice, GateRule, TokenChoice};

/// How experts and tokens find each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// Each expert takes its best tokens of each sequence.
    ExpertChoice,
    /// Each token takes its best experts; Switch's loss balances them.
    TokenChoice,
    /// Each token takes its best experts by logits and a bias, which balances them; gates are softmax scores as they are.
    LossFree,
}

/// Sizes, rule and recipe of a run.
#[derive(Clone, Debug, Args, Serialize, Deserialize)]
pub struct Options {
    /// Text to learn, any bytes; a synthetic language by default.
    #[arg(long)]
    pub text: Option<PathBuf>,
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    #[arg(long, default_value_t = 300)]
    pub steps: usize,
    /// Sequences of a batch.
    #[arg(long, default_value_t = 8)]
    pub batch: usize,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 64)]
    pub length: usize,
    #[arg(long, default_value_t = 4)]
    pub layers: usize,
    #[arg(long, default_value_t = 4)]
    pub heads: usize,
    /// D.
    #[arg(long, default_value_t = 128)]
    pub hidden: u32,
    /// F.
    #[arg(long, default_value_t = 96)]
    pub intermediate: u32,
    /// E.
    #[arg(long, default_value_t = 32)]
    pub experts: u32,
    #[arg(long, default_value_t = 2)]
    pub shared_experts: u32,
    #[arg(long, value_enum, default_value = "expert-choice")]
    pub rule: Rule,
    /// K: experts that a token takes, or has on average.
    #[arg(long, default_value_t = 3)]
    pub experts_per_token: u32,
    /// Capacity of expert choice by the share of masked tokens: static, linear, linear_reverse, cosine, cosine_reverse, ...
    #[arg(long, default_value = "static")]
    pub schedule: String,
    /// Fewest experts per token of a schedule that is not static.
    #[arg(long, default_value_t = 1)]
    pub k_min: u32,
    /// Most of them.
    #[arg(long, default_value_t = 5)]
    pub k_max: u32,
    /// Token choice: an expert drops what is more than so many times its share of tokens.
    #[arg(long)]
    pub capacity_factor: Option<f32>,
    /// Token choice: each block of 32 tokens elects the experts that hold this share of its votes (dMoE).
    #[arg(long)]
    pub mass: Option<f32>,
    /// Coefficient of the router z-loss.
    #[arg(long, default_value_t = 1e-3)]
    pub router_z: f32,
    /// Coefficient of the balance loss; 0.01 under token choice by default, else 0.
    #[arg(long)]
    pub balance: Option<f32>,
    /// How far a step moves the bias of a loss-free run.
    #[arg(long, default_value_t = 0.01)]
    pub bias_rate: f32,
    /// Highest learning rate.
    #[arg(long, default_value_t = 3e-3)]
    pub rate: f64,
    /// Steps until the learning rate is highest.
    #[arg(long, default_value_t = 30)]
    pub warm_up: usize,
    /// Most that the norm of all gradients together may be.
    #[arg(long, default_value_t = 1.0)]
    pub clip: f32,
    /// Steps from one validation to the next.
    #[arg(long, default_value_t = 50)]
    pub validate: usize,
    /// Steps of unmasking of sampled texts; 0 samples none.
    #[arg(long, default_value_t = 32)]
    pub sample: usize,
    #[arg(long, default_value_t = 0.7)]
    pub temperature: f64,
}

impl Options {
    pub fn sizes(&self) -> Outcome<(Sizes, Routing)> {
        let kind: ScheduleKind = self.schedule.parse()?;
        let dynamic = kind != ScheduleKind::Static;
        let schedule = Schedule::new(kind, self.k_min, self.k_max);
        if dynamic {
            schedule.validate()?;
        }
        let apart = self.rule == Rule::ExpertChoice;
        if dynamic && !apart {
            return Err("only expert choice has a schedule".into());
        }
        if apart && (self.capacity_factor.is_some() || self.mass.is_some()) {
            return Err("only token choice has a capacity factor, or elects experts".into());
        }
        if self.heads == 0 || !(self.hidden as usize).is_multiple_of(2 * self.heads) {
            return Err("the hidden size must be twice the heads, or a multiple of that".into());
        }
        if self.batch == 0 || self.length == 0 || self.layers == 0 {
            return Err("batch, length and layers must not be 0".into());
        }
        let rule = self.routing(dynamic);
        rule.check(self.experts)?;
        let layer = LayerConfig::new(self.hidden, self.intermediate, self.experts, rule)
            .with_shared_experts(self.shared_experts);
        let has_bias = self.rule == Rule::LossFree;
        let Self { layers, heads, length, .. } = *self;
        let sizes = Sizes { layers, heads, length, has_bias, layer };
        let routing =
            Routing { apart, schedule: dynamic.then_some(schedule), experts: self.experts };
        Ok((sizes, routing))
    }

    fn routing(&self, dynamic: bool) -> routing::Routing {
        let k = self.experts_per_token;
        let mut rule = match self.rule {
            Rule::ExpertChoice => {
                let most = if dynamic { k.max(self.k_max) } else { k };
                return ExpertChoice::new(k).with_max(most).into();
            }
            Rule::TokenChoice => TokenChoice::new(k),
            // As EC-DLM has it: neither divided by their sum nor scaled.
            Rule::LossFree => {
                TokenChoice::new(k).with_gate(GateRule::Unnormalised).with_choice_by_logits()
            }
        };
        if let Some(factor) = self.capacity_factor {
            rule = rule.with_capacity_factor(factor);
        }
        if let Some(p) = self.mass {
            // Every token finds its K.
            rule = rule.with_coreset(BlockRule::mass(p).with_floor(k));
        }
        rule.into()
    }

    pub fn losses(&self) -> Coefficients {
        let default = if self.rule == Rule::TokenChoice { 0.01 } else { 0.0 };
        Coefficients { router_z: self.router_z, balance: self.balance.unwrap_or(default) }
    }

    /// What is learned, and what is not seen: the last tenth of a file, or sentences of another seed.
    pub fn texts(&self) -> Outcome<[Vec<u8>; 2]> {
        let Some(path) = &self.text else {
            return Ok([self.seed, !self.seed].map(|seed| language::synthetic(seed, 1 << 18)));
        };
        let mut text = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let held_out = text.split_off(text.len() / 10 * 9);
        if held_out.len() < self.length {
            return Err(format!("{}: a tenth is shorter than a sequence", path.display()).into());
        }
        Ok([text, held_out])
    }

    /// Up to the highest rate in a straight line, then down to a tenth of it along a cosine.
    pub fn rate_at(&self, step: usize) -> f64 {
        if step < self.warm_up {
            return self.rate * (step + 1) as f64 / self.warm_up as f64;
        }
        let left = self.steps.saturating_sub(self.warm_up).max(1);
        let share = (step - self.warm_up) as f64 / left as f64;
        self.rate * (0.1 + 0.45 * (1.0 + (std::f64::consts::PI * share).cos()))
    }
}
