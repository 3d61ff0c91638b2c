//! All of it on the CPU twins, where there is no GPU driver.
use crate::data::{BLOCK, Data, flops, mean_of_blocks};
use crate::on_gpu::OUTPUT;
use crate::report::{Report, RuleReport, finite, kernel_times};
use crate::{Options, Subject, describe, replay};
use std::time::Instant;
use testkit::compare::{Checks, largest};
use testkit::program::Progress;
use testkit::rules::every_rule;
use wgmoe::layer::{HostBatch, HostRouting, HostSequences, LayerConfig, cpu_routing};
use wgmoe::ops::{combine, expert_union, scores};
use wgmoe::plan::{HostPlan, bits};
use wgmoe::routing::Routing;
use wgmoe::weights::Projection;
use wgmoe::{Error, PlanShape};

/// The CPU twins alone: recorded layers, and each rule on a narrow layer, whose experts run token
/// by token and, through the plan, expert by expert.
pub(super) fn on_cpu(
    options: &Options,
    subject: &Subject,
    progress: &Progress,
) -> Result<Report, String> {
    let config = subject.config;
    let mut notes = vec![];
    let golden = replay(progress, None, &mut notes)?;
    // A stored layer is as wide as it is.
    let narrow = match subject.stored {
        Some(_) => config,
        None => {
            let mut config = config;
            config.hidden = config.hidden.min(128);
            config.intermediate = config.intermediate.min(32);
            config
        }
    };
    let tokens = options.tokens.min(if subject.stored.is_some() { 8 } else { 128 });
    let data = Data::new(narrow, tokens, subject.source(options.weights), options.seed);
    let weight_type = data.expert(0, Projection::Gate).weight_type();
    notes.push(format!("{}; {tokens} tokens", describe(subject, &narrow, weight_type.into())));
    notes.push(format!(
        "checked: tokens of each expert and experts of each token by the rule; experts token by token against expert by expert, within {OUTPUT:e} of a token's largest value"
    ));
    notes.push(
        "kernel times: of the CPU twins, which are written to be read, not to be fast".into(),
    );
    let reports = every_rule(config.routing, config.experts)
        .into_iter()
        .map(|(name, routing)| {
            progress.say(format!("{name} on the CPU twins"));
            rule_on_cpu(&data, &name, routing, progress).map_err(|e| e.to_string())
        })
        .collect::<Result<_, _>>()?;
    Ok(Report {
        adapter: "none (CPU twins)".into(),
        driver: "none".into(),
        backend: "none".into(),
        golden,
        rules: reports,
        notes,
    })
}

pub(super) fn rule_on_cpu(
    data: &Data<'_>,
    name: &str,
    routing: Routing,
    progress: &Progress,
) -> Result<RuleReport, Error> {
    let config = data.config.with_routing(routing);
    let (tokens, e, d) = (data.tokens(), config.experts as usize, config.hidden as usize);
    let mut checks = Checks::new(name, progress);
    let mut kernels = vec![];
    let mut last = Instant::now();
    let mut lap = |name: &str| {
        let now = Instant::now();
        kernels.push((name.to_string(), now.duration_since(last).as_secs_f64() * 1e3));
        last = now;
    };
    let (score, from_logits) = (routing.score(), routing.by_logits());
    let logits = wgmoe::ops::logits::cpu(&data.x, &data.router, d);
    lap("logits");
    let (s, r) = scores::cpu(&logits, e, score, from_logits, data.bias.as_deref());
    lap("scores");
    let capacity = data.capacity(routing);
    let sequences = capacity.as_ref().map(|capacity| HostSequences {
        offsets: &data.offsets,
        lengths: None,
        capacity: Some(capacity),
    });
    let routed = cpu_routing(
        &config,
        &data.host_router(),
        HostBatch { sequences, ..HostBatch::default() },
        [&logits, &s, &r],
    );
    lap("choice");
    let slots: u32 = routed.assigned.iter().map(|w| w.count_ones()).sum();
    check_counts(&mut checks, data, &config, &routed, slots);
    let shape = PlanShape::on_host(tokens as u32, config.experts, slots)
        .with_item_rows(16, 8)
        .with_shared_experts(config.shared_experts);
    shape.sections()?;
    let plan = HostPlan::cpu(&shape, &routed.assigned, &routed.gates);
    lap("plan");
    let mut y = vec![];
    for (e, span) in (0..).zip(plan.expert_offsets.windows(2)) {
        let [gate, up, down] = Projection::ALL.map(|p| data.expert(e, p));
        for &t in &plan.token_of[span[0] as usize..span[1] as usize] {
            y.extend(wgmoe::ops::grouped_matmul::cpu_expert(
                data.row(t as usize),
                config.intermediate as usize,
                config.activation,
                [&|i| gate.get(i), &|i| up.get(i), &|i| down.get(i)],
            ));
        }
    }
    lap("experts");
    let got = combine::cpu(&plan, &y, d, None);
    lap("combine");
    let wall_ms: f64 = kernels.iter().map(|(_, ms)| ms).sum();

    let all: Vec<usize> = (0..tokens).collect();
    let mut max_error = 0f32;
    for (t, want) in data.twin(&config, &routed.assigned, &routed.gates, &all).iter().enumerate() {
        let what = format!("token {t}: output");
        max_error = max_error.max(checks.close(
            &what,
            &got[t * d..][..d],
            want,
            OUTPUT * largest(want),
            OUTPUT,
        ));
    }
    let offsets: Vec<u32> =
        (0..tokens as u32).step_by(BLOCK as usize).chain(std::iter::once(tokens as u32)).collect();
    let (_, counts, _) = expert_union::cpu(&routed.assigned, tokens, e, &offsets, 0);
    Ok(RuleReport {
        rule: name.into(),
        tokens: tokens as u32,
        experts: config.experts,
        slots,
        unique_experts_per_block: mean_of_blocks(&counts, tokens as u32),
        wall_ms,
        gflops: flops(&config, tokens as u32, slots) / (wall_ms * 1e6),
        max_error: finite(max_error.into()),
        ok: checks.ok,
        kernels: kernel_times(kernels),
        dropped: routed.dropped.iter().sum(),
    })
}

/// How many tokens and experts a choice must join, by the rule alone.
pub(super) fn check_counts(
    checks: &mut Checks<'_>,
    data: &Data<'_>,
    config: &LayerConfig,
    routed: &HostRouting,
    slots: u32,
) {
    let tokens = data.tokens();
    let mut of_expert = (0..config.experts as usize)
        .map(|e| bits::tokens_of(&routed.assigned, tokens, e).len() as u32);
    let all = tokens as u32 * config.routing.experts_per_token();
    match config.routing {
        Routing::TokenChoice(rule) => {
            let dropped: u32 = routed.dropped.iter().sum();
            // A token may find fewer than K experts in its block's coreset.
            let fits = if rule.coreset.is_some() {
                slots + dropped <= all
            } else {
                slots + dropped == all
            };
            checks.same("slots and dropped", &[fits], &[true]);
            let most = rule.capacity(tokens as u32, config.experts).unwrap_or(u32::MAX);
            checks.same("experts over capacity", &[of_expert.any(|n| n > most)], &[false]);
        }
        Routing::ExpertChoice(_) => {
            let each: u32 = data.capacity(config.routing).unwrap_or_default().iter().sum();
            checks.same("tokens of an expert", &[of_expert.all(|n| n == each)], &[true]);
        }
        // What differs between tokens adds up.
        _ => checks.same("slots", &[slots], &[all]),
    }
}
