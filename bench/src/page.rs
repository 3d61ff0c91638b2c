//! The page that compares results: one HTML file that needs nothing else. Every text of a file is escaped (by `maud`) and cut
//! to a length: files come from anywhere.
mod chart;

use crate::ceilings::bandwidth;
use crate::file::{Adapter, BoundBy, Case, CaseId, Ceilings, Load, Outcome, Part, Report};
use chart::{Axis, Bar, PATTERNS, Point, digits, time};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use std::collections::HashMap;

/// One adapter of one file.
struct Device<'a> {
    /// A letter.
    key: String,
    pattern: usize,
    report: &'a Report,
    adapter: &'a Adapter,
    cases: HashMap<&'a CaseId, &'a Case>,
}

/// The page of all adapters of all files.
pub(crate) fn page(reports: &[Report]) -> String {
    let adapters = reports.iter().flat_map(|r| r.adapters.iter().map(move |a| (r, a)));
    let devices: Vec<Device<'_>> = adapters
        .enumerate()
        .map(|(i, (report, adapter))| Device {
            key: key(i),
            pattern: i % PATTERNS,
            report,
            adapter,
            cases: adapter.cases.iter().map(|c| (&c.id, c)).collect(),
        })
        .collect();
    // In the order of the files, each once.
    let mut seen = std::collections::HashSet::new();
    let all = devices.iter().flat_map(|d| &d.adapter.cases).map(|c| &c.id);
    let ids: Vec<&CaseId> = all.filter(|id| seen.insert(*id)).collect();
    let quick = reports.iter().any(|r| r.quick);
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width,initial-scale=1";
                meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'";
                title { "wgmoe-bench: mixture-of-experts layers on GPUs" }
                style { (PreEscaped(include_str!("page/style.css"))) }
            }
            body {
                (chart::patterns())
                main {
                    h1 { "Mixture-of-experts layers, device by device" }
                    p {
                        "Parts of one layer of known models, bf16 experts, f32 sums, on " (devices.len())
                        (if devices.len() == 1 { " device" } else { " devices" }) ". Router scores are synthetic. Every result was compared with a CPU before it was timed. Times are medians, on the GPU's own clock where it has one that can be believed, and on the host's, from encoding to the end. A share is that of the least time which the device's own ceilings allow; more than 100 % means that caches held what a ceiling of memory does not count on."
                    }
                    @if quick {
                        p { strong { "Quick runs measure layers with few experts: they show that a device works, not how fast a model would be." } }
                    }
                    (table(&devices))
                    (rooflines(&devices))
                    (rules(&devices, &ids))
                    (all_cases(&devices, &ids))
                }
            }
        }
    };
    markup.into_string()
}

/// A, B, ... Z, AA, AB, ...
fn key(i: usize) -> String {
    let letter = char::from(b'A' + (i % 26) as u8);
    if i < 26 { letter.into() } else { key(i / 26 - 1) + &letter.to_string() }
}

/// A text of a file: no control characters, nothing that turns the direction of writing, and not too long.
fn clean(text: &str) -> String {
    let turns = |c: char| matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let mut kept: String =
        text.chars().filter(|c| !c.is_control() && !turns(*c)).take(200).collect();
    if text.chars().count() > 200 {
        kept.push('…');
    }
    kept
}

fn swatch(device: &Device<'_>) -> Markup {
    html! {
        svg.key aria-hidden="true" { rect width="28" height="14" fill={ "url(#p" (device.pattern) ")" } {} }
        " " strong { (device.key) }
    }
}

fn name(device: &Device<'_>) -> String {
    clean(&format!("{} ({})", device.adapter.name, device.adapter.backend))
}

fn table(devices: &[Device<'_>]) -> Markup {
    let ceiling = |d: &Device<'_>, get: fn(&Ceilings) -> Option<f64>, unit: &str| {
        let value = d.adapter.ceilings.as_ref().and_then(get);
        value.map_or("–".into(), |v| format!("{} {unit}", digits(v)))
    };
    let count = |d: &Device<'_>, is: fn(&Outcome) -> bool| {
        d.adapter.cases.iter().filter(|c| is(&c.outcome)).count()
    };
    type Cell<'a> = Box<dyn Fn(&Device<'_>) -> String + 'a>;
    let rows: Vec<(&str, Cell<'_>)> = vec![
        ("backend", Box::new(|d| d.adapter.backend.clone())),
        ("type", Box::new(|d| d.adapter.kind.clone())),
        ("driver", Box::new(|d| d.adapter.driver.clone())),
        ("system", Box::new(|d| format!("{} {}", d.report.os, d.report.arch))),
        ("features", Box::new(|d| d.adapter.features.join(", "))),
        ("largest binding", Box::new(|d| format!("{} MiB", d.adapter.max_binding_bytes >> 20))),
        ("reading", Box::new(move |d| ceiling(d, |c| c.read_gb_s, "GB/s"))),
        ("copying", Box::new(move |d| ceiling(d, |c| c.copy_gb_s, "GB/s"))),
        ("f32 multiply-adds", Box::new(move |d| ceiling(d, |c| c.multiply_add_gflop_s, "GFLOP/s"))),
        ("one more dispatch", Box::new(move |d| ceiling(d, |c| c.dispatch_us, "µs"))),
        ("submit and wait", Box::new(move |d| ceiling(d, |c| c.submit_us, "µs"))),
        (
            "cases",
            Box::new(move |d| {
                format!(
                    "{} measured, {} failed, {} skipped",
                    count(d, |o| matches!(o, Outcome::Measured(_))),
                    count(d, |o| matches!(o, Outcome::Failed { .. })),
                    count(d, |o| matches!(o, Outcome::Skipped { .. }))
                )
            }),
        ),
        (
            "run",
            Box::new(|d| {
                let stopped = if d.report.interrupted { ", stopped early" } else { "" };
                format!("{}{stopped}", if d.report.quick { "quick" } else { "full" })
            }),
        ),
        (
            "wgmoe",
            Box::new(|d| {
                let program = &d.report.program;
                let commit = program.commit.as_ref().map_or(String::new(), |c| format!(" ({c})"));
                format!("{}{commit}", program.version)
            }),
        ),
    ];
    html! {
        section aria-labelledby="devices" {
            h2 id="devices" { "Devices" }
            div.scroll tabindex="0" role="region" aria-labelledby="devices" {
                table {
                    caption { "The best of several runs; submit and wait: the median." }
                    thead { tr {
                        th scope="col" { "device" }
                        @for d in devices { th scope="col" { (swatch(d)) br; (clean(&d.adapter.name)) } }
                    } }
                    tbody {
                        @for (what, cell) in &rows {
                            tr { th scope="row" { (what) } @for d in devices { td { (clean(&cell(d))) } } }
                        }
                    }
                }
            }
            @for d in devices {
                @if let Some(why) = &d.adapter.failure {
                    p { span.fail { (d.key) ", not measured to the end: " } (clean(why)) }
                }
                @for note in d.adapter.ceilings.iter().flat_map(|c| &c.notes) {
                    p { span.fail { (d.key) ", a ceiling is missing: " } (clean(note)) }
                }
            }
        }
    }
}

/// Models by number, where there is no room for names.
fn models<'a>(devices: &[Device<'a>]) -> Vec<&'a str> {
    let mut names: Vec<&str> = vec![];
    for case in devices.iter().flat_map(|d| &d.adapter.cases) {
        if case.outcome.measured().is_some() && !names.contains(&case.id.model.as_str()) {
            names.push(&case.id.model);
        }
    }
    names
}

fn rooflines(devices: &[Device<'_>]) -> Markup {
    let models = models(devices);
    html! {
        section aria-labelledby="rooflines" {
            h2 id="rooflines" { "Rooflines" }
            p {
                "Whole layers under each model's own rule: operations a second over operations per byte that must move. The lines are the device's ceilings of memory and of multiply-adds. Circles: one block; squares: several blocks; diamonds: prefill. Numbers: "
                @for (i, model) in models.iter().enumerate() { (if i > 0 { ", " } else { "" }) (i + 1) " " (clean(model)) }
                "."
            }
            div.grid { @for d in devices { (roofline(d, &models)) } }
        }
    }
}

fn roofline(device: &Device<'_>, models: &[&str]) -> Markup {
    let points: Vec<Point> = device
        .adapter
        .cases
        .iter()
        .filter(|c| c.id.own_rule && c.id.part == Part::Layer)
        .filter_map(|case| {
            let m = case.outcome.measured()?;
            let (x, y) = (m.work.flops / m.work.bytes, m.work.flops / m.times().median_ms / 1e6);
            let number = models.iter().position(|n| *n == case.id.model)? + 1;
            let shape = match case.id.load {
                Load::Block => 0,
                Load::Batch => 1,
                Load::Prefill => 2,
            };
            let title = format!(
                "{}, {}: {} GFLOP/s at {} FLOP a byte",
                clean(&case.id.model),
                case.id.load_name(),
                digits(y),
                digits(x)
            );
            let usable = x.is_finite() && x > 0.0 && y.is_finite() && y > 0.0;
            usable.then(|| Point { x, y, shape, label: number.to_string(), title })
        })
        .collect();
    let ceilings = device.adapter.ceilings.as_ref();
    let roof = ceilings.and_then(|c| Some((bandwidth(c)?, c.multiply_add_gflop_s?)));
    let title = format!("Roofline of {}", name(device));
    html! {
        figure {
            figcaption { (swatch(device)) " " (name(device)) }
            @match roof {
                Some((rate, flops)) if !points.is_empty() => {
                    @let ridge = flops / rate;
                    @let xs = points.iter().map(|p| p.x).chain([ridge]);
                    @let ys = points.iter().map(|p| p.y).chain([flops]);
                    @let (low, high) = range(xs);
                    @let (bottom, top) = range(ys);
                    // Where the line of memory meets the chart's foot or its left side.
                    @let start = low.max(bottom / rate);
                    @let lines = [[start, start * rate, ridge, flops], [ridge, flops, high, flops]];
                    @let x = Axis { name: "operations per byte; up: GFLOP/s", low, high, log: true };
                    @let y = Axis { name: "", low: bottom, high: top, log: true };
                    (chart::plot(&title, [x, y], &lines, &points, device.pattern))
                }
                _ => p.none { "no roofline: no layer or no ceilings measured" }
            }
        }
    }
}

/// The values with room around them, for a logarithmic axis.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::MAX, 0f64), |(low, high), v| (low.min(v), high.max(v)));
    (low / 2.5, high * 2.5)
}

/// Cases by layer (model and experts), and within it by load.
fn by_layer<'a>(ids: &[&'a CaseId]) -> Vec<Vec<Vec<&'a CaseId>>> {
    let mut layers: Vec<Vec<Vec<&CaseId>>> = vec![];
    for &id in ids {
        let same = |other: &CaseId| (&other.model, other.experts) == (&id.model, id.experts);
        let layer = match layers.iter().position(|l| same(l[0][0])) {
            Some(i) => &mut layers[i],
            None => {
                layers.push(vec![]);
                layers.last_mut().expect("pushed")
            }
        };
        match layer.iter_mut().find(|l| l[0].tokens == id.tokens && l[0].load == id.load) {
            Some(load) => load.push(id),
            None => layer.push(vec![id]),
        }
    }
    layers
}

fn layer_name(id: &CaseId) -> String {
    let whole = id.experts == id.experts_of_model;
    let experts = if whole {
        format!("{} experts", id.experts)
    } else {
        format!("{} of {} experts", id.experts, id.experts_of_model)
    };
    clean(&format!("{}, {experts}, {}", id.model, id.weights))
}

fn rules(devices: &[Device<'_>], ids: &[&CaseId]) -> Markup {
    let compared = |id: &&&CaseId| id.part == Part::Layer && id.load != Load::Prefill;
    let ids: Vec<&CaseId> = ids.iter().filter(compared).copied().collect();
    html! {
        section aria-labelledby="rules" {
            h2 id="rules" { "Routing rules" }
            p { "Time of the whole layer per block of 32 tokens, over the distinct experts that a block's tokens use. What a rule saves in experts read, it saves in time where memory is the bound. Quality is not measured here." }
            @for (i, layer) in by_layer(&ids).iter().enumerate() {
                details open[i == 0] {
                    summary { (layer_name(layer[0][0])) }
                    @for load in layer {
                        h3 { (load[0].load_name()) }
                        div.grid { @for d in devices { (rules_of(d, load)) } }
                    }
                }
            }
        }
    }
}

fn rules_of(device: &Device<'_>, ids: &[&CaseId]) -> Markup {
    let points: Vec<Point> = ids
        .iter()
        .filter_map(|id| {
            let m = device.cases.get(id)?.outcome.measured()?;
            let y = m.times().median_ms / f64::from(id.tokens.max(1)) * 32.0;
            let x = m.work.experts_per_block;
            let rule = clean(&id.rule);
            let own = if id.own_rule { " (its own)" } else { "" };
            let title = format!("{rule}: {} a block, {} experts", time(y), digits(x));
            Some(Point { x, y, shape: usize::from(id.own_rule), label: rule + own, title })
        })
        .collect();
    let most = |of: fn(&Point) -> f64| points.iter().map(of).fold(f64::MIN_POSITIVE, f64::max);
    let title = format!("Time per block over experts, {}, {}", ids[0].load_name(), name(device));
    html! {
        figure {
            figcaption { (swatch(device)) " " (name(device)) }
            @if points.is_empty() {
                p.none { "not measured" }
            } @else {
                @let x = Axis { name: "experts per block; up: ms per block", low: 0.0, high: most(|p| p.x) * 1.1, log: false };
                @let y = Axis { name: "", low: 0.0, high: most(|p| p.y) * 1.15, log: false };
                (chart::plot(&title, [x, y], &[], &points, device.pattern))
            }
        }
    }
}

fn all_cases(devices: &[Device<'_>], ids: &[&CaseId]) -> Markup {
    html! {
        section aria-labelledby="cases" {
            h2 id="cases" { "All cases" }
            p { "Bars: medians, each case on a scale of its own; across a bar's end, the quartiles. Above: the median by the GPU's clock, or by the host's where the GPU has none, and the share of the ceiling that bounds the case. Below: which clock, quartiles, and the median by the host's clock. Unsettled: the time still moved when warm-up ended." }
            p { @for d in devices { span style="margin-right:1.5em" { (swatch(d)) " " (name(d)) } } }
            @for layer in by_layer(ids) {
                details {
                    summary { (layer_name(layer[0][0])) }
                    @for why in reduced(devices, layer[0][0]) { p.none { "Fewer experts on " (why) } }
                    @for load in &layer {
                        h3 { (load[0].load_name()) }
                        div.grid.cases { @for id in load { (case(devices, id)) } }
                    }
                }
            }
        }
    }
}

/// Why a layer has fewer experts than its model, device by device.
fn reduced(devices: &[Device<'_>], id: &CaseId) -> Vec<String> {
    let of = |d: &Device<'_>| {
        let why = d.cases.get(id)?.reduced.as_ref()?;
        Some(clean(&format!("{}: {why}", d.key)))
    };
    devices.iter().filter_map(of).collect()
}

fn case(devices: &[Device<'_>], id: &CaseId) -> Markup {
    let own = if id.own_rule { " (its own rule)" } else { "" };
    let title = clean(&format!("{}, {}{own}", part_name(id.part), id.rule));
    let mut bars = vec![];
    // Reasons, and the devices that have each.
    let mut gaps: Vec<(String, String)> = vec![];
    for d in devices {
        let gap = match d.cases.get(id) {
            None => "not in its file".into(),
            Some(case) => match &case.outcome {
                Outcome::Measured(m) => {
                    let t = m.times();
                    let clock = if m.gpu.is_some() { "GPU" } else { "host" };
                    let spread = format!("{clock} clock, {} to {}", time(t.q1_ms), time(t.q3_ms));
                    let host =
                        m.gpu.as_ref().map(|_| format!("; host's {}", time(m.wall.median_ms)));
                    let unsettled = if m.settled { "" } else { "; unsettled" };
                    let right = m.bound.as_ref().map_or(String::new(), |b| {
                        format!("{} % {}", digits(b.share * 100.0), bound_name(b.by))
                    });
                    bars.push(Bar {
                        pattern: d.pattern,
                        left: format!("{} {}", d.key, time(t.median_ms)),
                        right,
                        below: format!("{spread}{}{unsettled}", host.unwrap_or_default()),
                        value: [t.q1_ms, t.median_ms, t.q3_ms],
                    });
                    continue;
                }
                Outcome::Failed { reason } => format!("failed: {}", clean(reason)),
                Outcome::Skipped { reason } => format!("skipped: {}", clean(reason)),
            },
        };
        match gaps.iter_mut().find(|(_, why)| *why == gap) {
            Some((keys, _)) => *keys += &format!(", {}", d.key),
            None => gaps.push((d.key.clone(), gap)),
        }
    }
    html! {
        div {
            h4 { (title) }
            @if !bars.is_empty() { (chart::bars(&title, &bars)) }
            @for (keys, why) in gaps { p.none { strong { (keys) } " no value: " (why) } }
        }
    }
}

fn part_name(part: Part) -> &'static str {
    match part {
        Part::Routing => "Routing",
        Part::Plan => "Plan",
        Part::Gather => "Gather",
        Part::Experts => "Expert matmuls",
        Part::Layer => "Whole layer",
    }
}

fn bound_name(by: BoundBy) -> &'static str {
    match by {
        BoundBy::Memory => "memory",
        BoundBy::Compute => "compute",
        BoundBy::Dispatch => "dispatch",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::tests::{case, measured, report};

    #[test]
    fn texts_of_files_stay_texts() {
        let evil = "<script>alert(1)</script>\" onload=\"x\u{202e}\u{7}' <b>&amp;";
        let mut bad = report(evil, vec![case(evil, measured(1.0))]);
        let adapter = &mut bad.adapters[0];
        adapter.failure = Some(evil.into());
        adapter.driver = "long ".repeat(1000);
        adapter.features = vec![evil.into()];
        adapter.cases[0].reduced = Some(evil.into());
        adapter.cases[0].id.model = evil.into();
        adapter.ceilings.as_mut().unwrap().notes.push(evil.into());
        bad.program.commit = Some(evil.into());
        bad.os = evil.into();
        let page = page(&[bad]);
        assert!(page.contains("&lt;script&gt;alert(1)"));
        for wrong in ["<script", "<b>", "onload=\"", "\u{202e}", "\u{7}"] {
            assert!(!page.contains(wrong), "{wrong:?} is in the page");
        }
        assert!(page.len() < 40_000, "{} bytes", page.len());
    }

    #[test]
    fn a_case_that_one_file_lacks_is_a_gap() {
        let both = || case("original", measured(2.0));
        let skipped = Outcome::Skipped { reason: "no time was left".into() };
        let first = report(
            "one GPU",
            vec![both(), case("vote(38)", measured(1.0)), case("union(2)", skipped)],
        );
        let second = report("another GPU", vec![both(), case("union(2)", measured(0.0123))]);
        let page = page(&[first, second]);
        assert_eq!(page.matches("not in its file").count(), 1);
        assert_eq!(page.matches("skipped: no time was left").count(), 1);
        assert!(page.contains("12.3 µs") && page.contains("another GPU"));
        // Nothing is fetched, nothing runs.
        for outside in ["http:", "https:", "src=", "<script", "@import", "href="] {
            assert!(!page.contains(outside), "{outside:?} is in the page");
        }
    }

    #[test]
    fn a_device_without_results_is_still_listed() {
        let mut none = report("a GPU", vec![]);
        none.adapters[0].failure = Some("no compute shaders".into());
        none.adapters[0].ceilings = None;
        let page = page(&[none]);
        assert!(page.contains("not measured to the end: </span>no compute shaders"), "{page}");
        assert!(page.contains("no roofline"));
    }

    #[test]
    fn keys_go_on_after_z() {
        assert_eq!([0, 25, 26, 27, 52].map(key), ["A", "Z", "AA", "AB", "BA"]);
    }
}
