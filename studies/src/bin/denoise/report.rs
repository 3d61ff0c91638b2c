//! What a rule did, summed up; and the twins alone.
use crate::run::{Rule, Run};
use crate::{Devices, RuleReport, StepReport, Weights};
use std::time::Instant;
use testkit::compare::Checks;
use testkit::layer::host_router;
use testkit::program::Progress;
use wgmoe::layer::{HostBatch, HostRouting, HostSequences, cpu_routing};
use wgmoe::ops::capacity::{self, HostSource};
use wgmoe::ops::logits;
use wgmoe::plan::Stats;
use wgmoe::plan::bits;
use wgmoe::report::Report;
use wgmoe::routing::Routing;

/// What a step did, as the device or the twin says.
pub(super) struct Done {
    pub(super) stats: Stats,
    /// Of each sequence, of expert choice.
    pub(super) capacities: Option<(Vec<u32>, Vec<u32>)>,
    pub(super) ms: f64,
}

/// Sums up the steps of a rule, and checks what can be known of them beforehand.
pub(super) fn sum_up(rule: &Rule, run: &Run, checks: &mut Checks<'_>, done: &[Done]) -> RuleReport {
    let (tokens, experts) = (run.tokens(), run.shape.experts);
    let mean = |v: &[u32]| v.iter().map(|&n| f64::from(n)).sum::<f64>() / v.len() as f64;
    let mut report = RuleReport {
        rule: rule.name.clone(),
        ok: true,
        ms: done.iter().map(|d| d.ms).sum(),
        tokens_per_s: 0.0,
        slots: 0,
        padded: 0,
        dropped: 0,
        imbalance: 0.0,
        untouched: 0,
        steps: vec![],
        devices: vec![],
        cost: rule.cost.clone(),
    };
    for (i, (step, Done { stats, capacities, ms })) in run.steps.iter().zip(done).enumerate() {
        let figures = Report::new(stats, tokens);
        let slots = u64::from(stats.slots);
        let (k, capacity, padded) = match (rule.routing, capacities, rule.schedule) {
            (Routing::TokenChoice(choice), ..) => {
                let most = choice.capacity(tokens, experts);
                let within = most.is_none_or(|most| figures.load.max <= most);
                checks.same(&format!("step {i}: loads within the capacity"), &[within], &[true]);
                let wanted = u64::from(tokens) * u64::from(choice.experts_per_token);
                let what = format!("step {i}: slots and drops");
                checks.same(&what, &[slots + u64::from(stats.dropped)], &[wanted]);
                let rows = most.unwrap_or(figures.load.max);
                (
                    f64::from(choice.experts_per_token),
                    f64::from(rows),
                    u64::from(rows) * u64::from(experts),
                )
            }
            (_, Some((capacities, k)), Some(schedule)) => {
                let scheduled = run.scheduled(&schedule, step);
                checks.same(&format!("step {i}: slots as scheduled"), &[slots], &[scheduled]);
                let balance = figures.load.imbalance();
                checks.same(&format!("step {i}: load imbalance"), &[balance], &[1.0]);
                checks.same(&format!("step {i}: drops"), &[stats.dropped], &[0]);
                let rows = capacities.iter().map(|&c| u64::from(c)).sum::<u64>();
                (mean(k), mean(capacities), rows * u64::from(experts))
            }
            _ => unreachable!("expert choice has a schedule"),
        };
        report.slots += slots;
        report.padded += padded;
        report.dropped += u64::from(stats.dropped);
        report.untouched += u64::from(stats.untouched);
        report.imbalance += figures.load.imbalance() * slots as f64;
        for (at, (devices, slowest)) in figures.devices.into_iter().enumerate() {
            if report.devices.len() == at {
                report.devices.push(Devices { devices, slowest: 0.0 });
            }
            report.devices[at].slowest += slowest * slots as f64;
        }
        report.steps.push(StepReport { k, capacity, ms: *ms });
    }
    let all = report.slots as f64;
    report.imbalance /= all;
    report.devices.iter_mut().for_each(|d| d.slowest /= all);
    let processed = f64::from(tokens) * run.steps.len() as f64;
    report.tokens_per_s = processed / (report.ms.max(1e-6) / 1e3);
    report.ok = checks.ok;
    report
}

/// The twin's routing of a step.
pub(super) fn twin(
    weights: &Weights,
    run: &Run,
    routing: Routing,
    capacity: Option<&[u32]>,
    selection: [&[f32]; 3],
) -> HostRouting {
    let config = weights.config.with_routing(routing);
    let router = host_router(&weights.router, None);
    let sequences =
        capacity.map(|_| HostSequences { offsets: &run.offsets, lengths: None, capacity });
    cpu_routing(&config, &router, HostBatch { sequences, ..HostBatch::default() }, selection)
}

/// Statistics of a routing, counted on the host.
pub(super) fn stats_of(assigned: &[u32], dropped: &[u32], tokens: usize, experts: usize) -> Stats {
    let loads: Vec<u32> =
        (0..experts).map(|e| bits::tokens_of(assigned, tokens, e).len() as u32).collect();
    let without = |&t: &usize| bits::experts_of(assigned, tokens, t).is_empty();
    Stats {
        slots: loads.iter().sum(),
        unique_experts: loads.iter().filter(|&&n| n > 0).count() as u32,
        dropped: dropped.iter().sum(),
        untouched: (0..tokens).filter(without).count() as u32,
        tokens_per_expert: loads,
        ..Stats::default()
    }
}

/// All rules by the twins alone.
pub(super) fn on_cpu(
    weights: &Weights,
    run: &Run,
    rules: &[Rule],
    progress: &Progress,
) -> Vec<RuleReport> {
    let (tokens, experts) = (run.tokens() as usize, run.shape.experts as usize);
    let d = run.shape.hidden as usize;
    progress.say("logits on the CPU");
    let logits: Vec<Vec<f32>> =
        run.steps.iter().map(|s| logits::cpu(&s.hidden, &weights.router, d)).collect();
    let mut reports = vec![];
    for rule in rules {
        progress.say(&rule.name);
        let mut checks = Checks::new(&rule.name, progress);
        let done: Vec<Done> = run
            .steps
            .iter()
            .zip(&logits)
            .map(|(step, logits)| {
                let start = Instant::now();
                let capacities = rule.schedule.as_ref().map(|schedule| {
                    let source = HostSource::Masked(schedule, &step.masked);
                    capacity::cpu(source, tokens, experts as u32, &run.offsets, None)
                });
                let of_sequences = capacities.as_ref().map(|(capacity, _)| &capacity[..]);
                let routing = twin(weights, run, rule.routing, of_sequences, [&logits[..]; 3]);
                let ms = start.elapsed().as_secs_f64() * 1e3;
                let stats = stats_of(&routing.assigned, &routing.dropped, tokens, experts);
                Done { stats, capacities, ms }
            })
            .collect();
        reports.push(sum_up(rule, run, &mut checks, &done));
    }
    reports
}
