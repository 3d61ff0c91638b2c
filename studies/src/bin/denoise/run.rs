//! The batch over its steps, and the rules it is routed by.
use crate::Options;
use rand::{Rng, rngs::StdRng};
use rand_distr::StandardNormal;
use wgmoe::Error;
use wgmoe::routing::GateRule;
use wgmoe::routing::schedule::{CostShape, Ratios, Schedule, ScheduleKind, mask_ratio};
use wgmoe::routing::{ExpertChoice, Routing, TokenChoice};

/// A routing rule to run.
pub(super) struct Rule {
    pub(super) name: String,
    pub(super) routing: Routing,
    /// Of expert choice.
    pub(super) schedule: Option<Schedule>,
    /// What it costs, in words.
    pub(super) cost: String,
}

/// Token choice without and with capacities, and expert choice under each schedule, all at the cost of k experts per token.
pub(super) fn rules(options: &Options, run: &Run) -> Result<Vec<Rule>, Error> {
    let token_choice = |capacity_factor| {
        Routing::TokenChoice({
            let mut rule = TokenChoice::new(options.k).with_gate(GateRule::Softmax);
            rule.capacity_factor = capacity_factor;
            rule
        })
    };
    let mut rules = vec![];
    for factor in [None, Some(1.0), Some(1.25), Some(1.5)] {
        let name = factor.map_or("dropless".into(), |f| format!("capacity {f:.2}"));
        rules.push(Rule {
            name: format!("token choice, {name}"),
            routing: token_choice(factor),
            schedule: None,
            cost: format!("{}", options.k),
        });
    }
    for kind in ScheduleKind::ALL {
        let schedule = run.equal_cost(kind, options)?;
        let Schedule { k_min, k_max, .. } = schedule;
        let share = run.expected(&schedule)? / run.expected(&Schedule::fixed(options.k))?;
        let cost = match kind {
            ScheduleKind::Static => format!("{k_max}"),
            _ => format!("{k_min}..{k_max} ({:+.1} %)", 100.0 * (share - 1.0)),
        };
        rules.push(Rule {
            name: format!("expert choice, {}", kind.name()),
            routing: Routing::ExpertChoice(ExpertChoice::new(k_max)),
            schedule: Some(schedule),
            cost,
        });
    }
    for rule in &rules {
        rule.routing.check(options.experts)?;
    }
    Ok(rules)
}

/// What the model around the layer brings to one denoising step.
pub(super) struct DenoisingStep {
    /// `[T, D]`.
    pub(super) hidden: Vec<f32>,
    /// Masked tokens of each sequence.
    pub(super) masked: Vec<u32>,
}

/// A batch being denoised: the same for every rule.
pub(super) struct Run {
    pub(super) offsets: Vec<u32>,
    pub(super) lengths: Vec<u32>,
    pub(super) steps: Vec<DenoisingStep>,
    pub(super) shape: CostShape,
}

impl Run {
    /// Unmasks the batch step by step. A hidden state is a mixture of a vector of the sequence, one of the token that changes
    /// a little every step, and one that all masked tokens share or the token has to itself once it is unmasked.
    pub(super) fn new(options: &Options, rng: &mut StdRng) -> Self {
        let d = options.hidden as usize;
        let normals =
            |rng: &mut StdRng| -> Vec<f32> { (0..d).map(|_| rng.sample(StandardNormal)).collect() };
        let shorter = |rng: &mut StdRng| rng.random_range(0..=options.length / 8);
        let lengths: Vec<u32> = (0..options.sequences)
            .map(|b| options.length - if b == 0 { 0 } else { shorter(rng) })
            .collect();
        let mut offsets = vec![0];
        offsets.extend(lengths.iter().scan(0, |sum, n| {
            *sum += n;
            Some(*sum)
        }));
        let mask = normals(rng);
        let mut tokens: Vec<Token> = vec![];
        let mut of_sequence = vec![];
        let mut pace = vec![];
        for (b, &n) in lengths.iter().enumerate() {
            of_sequence.push(normals(rng));
            pace.push(rng.random_range(0.7..1.4));
            tokens.extend((0..n).map(|_| Token { sequence: b, own: normals(rng), unmasked: None }));
        }
        let mut steps = vec![];
        for step in 0..options.steps {
            let done = f64::from(step) / f64::from(options.steps);
            let mut masked = vec![];
            for (b, &n) in lengths.iter().enumerate() {
                let share = options.unmask.masked(done).powf(pace[b]);
                let keep = ((f64::from(n) * share).ceil() as usize).clamp(1, n as usize);
                // The tokens that the model would be surest of.
                let mut open: Vec<(f32, usize)> = (offsets[b] as usize..offsets[b + 1] as usize)
                    .filter(|&t| tokens[t].unmasked.is_none())
                    .map(|t| (rng.random(), t))
                    .collect();
                open.sort_by(|a, b| a.0.total_cmp(&b.0));
                for (_, t) in open.drain(keep.min(open.len())..) {
                    tokens[t].unmasked = Some(normals(rng));
                }
                masked.push(open.len() as u32);
            }
            let mut hidden = Vec::with_capacity(tokens.len() * d);
            for token in &mut tokens {
                let row = hidden.len();
                let state = token.unmasked.as_ref().unwrap_or(&mask);
                for (i, own) in token.own.iter_mut().enumerate() {
                    let fresh: f32 = rng.sample(StandardNormal);
                    *own = 0.95f32.sqrt() * *own + 0.05f32.sqrt() * fresh;
                    let sequence = of_sequence[token.sequence][i];
                    hidden.push(
                        0.2f32.sqrt() * sequence + 0.6f32.sqrt() * *own + 0.2f32.sqrt() * state[i],
                    );
                }
                hidden[row] = 1.0; // what the router reads an expert's popularity with
            }
            steps.push(DenoisingStep { hidden, masked });
        }
        let shape = CostShape {
            length: options.length,
            experts: options.experts,
            hidden: options.hidden,
            intermediate: options.intermediate,
        };
        Self { offsets, lengths, steps, shape }
    }

    pub(super) fn tokens(&self) -> u32 {
        self.lengths.iter().sum()
    }

    /// Expected FLOPs of a step under a schedule: those of each sequence over its own mask ratios.
    pub(super) fn expected(&self, schedule: &Schedule) -> Result<f64, Error> {
        let mut flops = 0.0;
        for (b, &length) in self.lengths.iter().enumerate() {
            let ratios: Vec<f32> =
                self.steps.iter().map(|s| mask_ratio(s.masked[b], length)).collect();
            let shape = CostShape { length, ..self.shape };
            flops += schedule.expected(Ratios::Samples(&ratios), &shape)?.flops;
        }
        Ok(flops)
    }

    /// The range of k with which a shape's expected FLOPs are nearest to those of `--k` throughout.
    pub(super) fn equal_cost(
        &self,
        kind: ScheduleKind,
        options: &Options,
    ) -> Result<Schedule, Error> {
        let fixed = Schedule::fixed(options.k);
        if kind == ScheduleKind::Static {
            return Ok(fixed);
        }
        let want = self.expected(&fixed)?;
        let mut best: Option<(f64, Schedule)> = None;
        for narrower in 0..3 {
            let range = options.k_range.saturating_sub(narrower).max(1).min(options.experts - 1);
            // A mean lies within its range.
            for k_min in options.k.saturating_sub(range).max(1)..=options.k {
                let k_max = k_min.saturating_add(range);
                if k_max > options.experts {
                    continue;
                }
                let schedule = Schedule::new(kind, k_min, k_max);
                let distance = (self.expected(&schedule)? - want).abs();
                if best.is_none_or(|(least, _)| distance < least) {
                    best = Some((distance, schedule));
                }
            }
        }
        Ok(best.map_or(fixed, |(_, schedule)| schedule))
    }

    /// The static schedule that the library holds for as expensive, for the longest sequence.
    pub(super) fn matched(&self, schedule: &Schedule) -> Result<u32, Error> {
        let ratios: Vec<f32> =
            self.steps.iter().map(|s| mask_ratio(s.masked[0], self.lengths[0])).collect();
        Ok(schedule.matched(Ratios::Samples(&ratios), &self.shape)?.k_max)
    }

    /// Slots of one step under a schedule, counted here: `E clamp(floor(N k / E), 1, N)` a sequence.
    pub(super) fn scheduled(&self, schedule: &Schedule, step: &DenoisingStep) -> u64 {
        let experts = u64::from(self.shape.experts);
        let of = self.lengths.iter().zip(&step.masked).map(|(&n, &masked)| {
            let k = schedule.k(masked as f32 / n as f32);
            experts * (u64::from(n) * u64::from(k) / experts).max(1).min(u64::from(n))
        });
        of.sum()
    }
}

pub(super) struct Token {
    pub(super) sequence: usize,
    pub(super) own: Vec<f32>,
    /// Its own vector once it is unmasked.
    pub(super) unmasked: Option<Vec<f32>>,
}
