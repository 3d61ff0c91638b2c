//! Which models are trained.
use super::{Arguments, base};
use crate::Outcome;
use crate::options::{Options, Rule};
use wgmoe_burn::wgmoe::routing::schedule::{CostShape, Ratios, Schedule};

/// A model to train, or to look at.
pub(super) struct Job {
    pub(super) claim: char,
    pub(super) name: String,
    pub(super) options: Options,
    /// Whether it begins with the token-choice model of its seed.
    pub(super) goes_on: bool,
    pub(super) routers_alone: bool,
    /// Whether others begin with it.
    pub(super) keep: bool,
}

/// What a's rules are called.
pub(super) const RULES: [(&str, &str); 4] = [
    ("expert-choice", "expert choice"),
    ("token-choice", "token choice, Switch loss"),
    ("loss-free", "token choice, loss-free"),
    ("capacity", "token choice, Switch loss, capacity 1.0"),
];

/// Schedules of b; the static one is a's expert choice.
pub(super) const SCHEDULES: [(&str, &str); 4] = [
    ("expert-choice", "static"),
    ("linear", "linear"),
    ("linear-reverse", "linear_reverse"),
    ("cosine-reverse", "cosine_reverse"),
];

/// Models of c that go on.
pub(super) const RETROFITS: [(&str, &str); 7] = [
    ("on-token-choice", "token choice, goes on"),
    ("as-static", "expert choice, as it is"),
    ("as-dynamic", "expert choice by linear_reverse, as it is"),
    ("on-static", "expert choice, goes on"),
    ("on-dynamic", "expert choice by linear_reverse, goes on"),
    ("on-static-routers", "expert choice, only routers learn on"),
    ("on-dynamic-routers", "expert choice by linear_reverse, only routers learn on"),
];

/// Shares of votes of d, and whether a model learns on with it.
pub(super) const MASSES: [(f32, bool); 8] = [
    (0.3, true),
    (0.4, false),
    (0.5, true),
    (0.6, false),
    (0.7, true),
    (0.8, false),
    (0.9, false),
    (1.0, false),
];

/// What d's models are called.
pub(super) fn mass_name(p: f32, tuned: bool) -> String {
    format!("{}mass-{p:.1}", if tuned { "on-" } else { "as-" })
}

/// All of a seed, in order.
pub(super) fn all(arguments: &Arguments, seed: u64) -> Outcome<Vec<Job>> {
    let tokens = base(arguments, seed);
    let experts = Options { rule: Rule::ExpertChoice, ..tokens.clone() };
    let job = |claim, name: &str, options: &Options| Job {
        claim,
        name: name.into(),
        options: options.clone(),
        goes_on: false,
        routers_alone: false,
        keep: false,
    };
    let mut jobs = vec![
        job('a', "expert-choice", &experts),
        Job { keep: true, ..job('a', "token-choice", &tokens) },
        job('a', "loss-free", &Options { rule: Rule::LossFree, ..tokens.clone() }),
        job('a', "capacity", &Options { capacity_factor: Some(1.0), ..tokens.clone() }),
    ];
    for (name, schedule) in &SCHEDULES[1..] {
        let options = Options { schedule: (*schedule).into(), ..experts.clone() };
        equal_cost(&options)?;
        jobs.push(job('b', name, &options));
    }
    // Those that go on have a rate of their own.
    let on = |claim, name: &str, options: &Options, steps| Job {
        goes_on: true,
        options: Options {
            steps,
            rate: arguments.more_rate,
            warm_up: (steps / 10).max(1),
            validate: steps.max(1),
            ..options.clone()
        },
        ..job(claim, name, options)
    };
    let dynamic = Options { schedule: "linear_reverse".into(), ..experts.clone() };
    for (name, _) in RETROFITS {
        let steps = if name.starts_with("as-") { 0 } else { arguments.more_steps };
        let options = match name {
            "on-token-choice" => &tokens,
            name if name.contains("dynamic") => &dynamic,
            _ => &experts,
        };
        let routers_alone = name.ends_with("-routers");
        jobs.push(Job { routers_alone, ..on('c', name, options, steps) });
    }
    for (p, tuned) in MASSES {
        let options = Options { mass: Some(p), ..tokens.clone() };
        jobs.push(on('d', &mass_name(p, false), &options, 0));
        if tuned {
            jobs.push(on('d', &mass_name(p, true), &options, arguments.more_steps));
        }
    }
    Ok(jobs)
}

/// Fails where a schedule does not cost what the static one does.
fn equal_cost(options: &Options) -> Outcome<()> {
    let (_, routing) = options.sizes()?;
    let shape = CostShape {
        length: options.length as u32,
        experts: options.experts,
        hidden: options.hidden,
        intermediate: options.intermediate,
    };
    let Some(schedule) = routing.schedule else { return Ok(()) };
    let own = schedule.expected(Ratios::Uniform, &shape)?;
    let fixed = Schedule::fixed(options.experts_per_token).expected(Ratios::Uniform, &shape)?;
    let Options { schedule, experts_per_token, k_min, k_max, .. } = options;
    if (own.flops / fixed.flops - 1.0).abs() > 0.01 {
        return Err(format!(
            "{schedule} from {k_min} to {k_max} costs {:.3} of static {experts_per_token}: claims are compared at equal cost",
            own.flops / fixed.flops
        )
        .into());
    }
    Ok(())
}
