//! What is printed, as tables or as JSON.
use serde::Serialize;
use std::fmt::Write;
use testkit::{golden, program};

/// What `--json` prints.
#[derive(Serialize)]
pub(super) struct Report {
    pub(super) adapter: String,
    pub(super) driver: String,
    pub(super) backend: String,
    pub(super) golden: Vec<Golden>,
    pub(super) rules: Vec<RuleReport>,
    /// What the table says of the layer and of the checks.
    #[serde(skip)]
    pub(super) notes: Vec<String>,
}

#[derive(Serialize)]
pub(super) struct Golden {
    pub(super) case: String,
    pub(super) max_error: f64,
    pub(super) ok: bool,
}

#[derive(Serialize)]
pub(super) struct RuleReport {
    pub(super) rule: String,
    pub(super) tokens: u32,
    pub(super) experts: u32,
    pub(super) slots: u32,
    pub(super) unique_experts_per_block: f64,
    pub(super) wall_ms: f64,
    pub(super) gflops: f64,
    pub(super) max_error: f64,
    pub(super) ok: bool,
    pub(super) kernels: Vec<KernelTime>,
    #[serde(skip)]
    pub(super) dropped: u32,
}

#[derive(Serialize)]
pub(super) struct KernelTime {
    pub(super) name: String,
    pub(super) ms: f64,
}

/// JSON has no infinities.
pub(super) fn finite(value: f64) -> f64 {
    if value.is_finite() { value } else { f64::MAX }
}

/// Times of dispatches by name.
pub(super) fn kernel_times(times: impl IntoIterator<Item = (String, f64)>) -> Vec<KernelTime> {
    program::sum_up(times).into_iter().map(|(name, ms)| KernelTime { name, ms }).collect()
}

/// The report as text.
pub(super) fn tables(report: &Report) -> String {
    let mut text = String::new();
    let ok = |ok: bool| if ok { "ok" } else { "WRONG" };
    let _ = writeln!(
        text,
        "adapter  {}\ndriver   {}\nbackend  {}\n",
        report.adapter, report.driver, report.backend
    );
    if !report.golden.is_empty() {
        let (atol, rtol) = (golden::ATOL, golden::RTOL);
        let _ = writeln!(
            text,
            "recorded layers of LLaDA2, f32 weights (tolerance {atol:e} + {rtol:e} |y|)"
        );
        for case in &report.golden {
            let _ = writeln!(
                text,
                "  {:<24} max error {:<9.1e} {}",
                case.case,
                case.max_error,
                ok(case.ok)
            );
        }
        text.push('\n');
    }
    for note in &report.notes {
        let _ = writeln!(text, "{note}");
    }
    let width = report.rules.iter().map(|r| r.rule.len()).max().unwrap_or(0);
    let _ = writeln!(
        text,
        "\n{:<width$} {:>8} {:>8} {:>13} {:>10} {:>10} {:>9} {:>10}  check",
        "rule", "slots", "dropped", "experts/block", "step ms", "tokens/s", "GFLOP/s", "max error"
    );
    for r in &report.rules {
        let _ = writeln!(
            text,
            "{:<width$} {:>8} {:>8} {:>13.1} {:>10.2} {:>10.0} {:>9.2} {:>10.1e}  {}",
            r.rule,
            r.slots,
            r.dropped,
            r.unique_experts_per_block,
            r.wall_ms,
            f64::from(r.tokens) / (r.wall_ms / 1e3),
            r.gflops,
            r.max_error,
            ok(r.ok)
        );
    }
    // Kernels down, rules across.
    let mut names: Vec<&str> = vec![];
    for kernel in report.rules.iter().flat_map(|r| &r.kernels) {
        if !names.contains(&kernel.name.as_str()) {
            names.push(&kernel.name);
        }
    }
    let first = names.iter().map(|n| n.len()).max().unwrap_or(0).max("kernel, ms".len());
    let _ = write!(text, "\n{:<first$}", "kernel, ms");
    for r in &report.rules {
        let _ = write!(text, "  {:>12}", r.rule);
    }
    text.push('\n');
    for name in names {
        let _ = write!(text, "{name:<first$}");
        for r in &report.rules {
            let width = r.rule.len().max(12);
            match r.kernels.iter().find(|k| k.name == name) {
                Some(kernel) => write!(text, "  {:>width$.3}", kernel.ms),
                None => write!(text, "  {:>width$}", "-"),
            }
            .unwrap_or_default();
        }
        text.push('\n');
    }
    text
}
