//! Every case of every device, folded away until one is looked for.
use super::words::{clean, layer_name, load_name, part_name, percent, span, time};
use super::{Device, by_layer, chart, name, swatch};
use crate::file::{BoundBy, CaseId, Measured, Outcome};
use chart::Bar;
use maud::{Markup, html};

pub(super) fn section(devices: &[Device<'_>], ids: &[&CaseId]) -> Markup {
    html! {
        section aria-labelledby="cases" {
            h2 id="cases" { "All cases" }
            p {
                "The bars of a case have one scale; other cases have others. A bar is the median \
                 time, and the line across its end covers the middle half of all times. Above a \
                 bar: the median, by the GPU's clock where it has one that can be believed, else \
                 by the host's; and the share of the ceiling that limits the case. Below: the \
                 clock, the middle half, and what the host's clock says from encoding to the end. \
                 \"Unsettled\" means that times still moved when the warm-up ended."
            }
            p { @for d in devices { span.device { (swatch(d)) " " (name(d)) } " " } }
            @for layer in by_layer(ids) {
                details {
                    summary { (layer_name(layer[0][0])) }
                    @for why in reduced(devices, layer[0][0]) {
                        p.none { "Fewer experts on " (why) }
                    }
                    @for load in &layer {
                        h3 { (load_name(load[0])) }
                        div.grid.top { @for id in load { (case(devices, id)) } }
                        @for (why, cases) in gaps(devices, load) {
                            p.none { strong { (why) } ": " (cases.join("; ")) }
                        }
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

fn title(id: &CaseId) -> String {
    let own = if id.own_rule { " (own)" } else { "" };
    clean(&format!("{}, {}{own}", part_name(id.part), id.rule))
}

fn case(devices: &[Device<'_>], id: &CaseId) -> Markup {
    let measured = |d: &Device<'_>| Some(bar(d, d.measured(id)?));
    let bars: Vec<Bar> = devices.iter().filter_map(measured).collect();
    html! {
        @if !bars.is_empty() {
            div { h4 { (title(id)) } (chart::bars(&title(id), &bars)) }
        }
    }
}

fn bar(device: &Device<'_>, m: &Measured) -> Bar {
    let t = m.times();
    let clock = if m.gpu.is_some() { "GPU" } else { "host" };
    let host = m.gpu.as_ref().map(|_| format!("; host {}", time(m.wall.median_ms)));
    let unsettled = if m.settled { "" } else { "; unsettled" };
    let share = m.bound.as_ref().map(|b| format!("{} of {}", percent(b.share), limit(b.by)));
    Bar {
        pattern: device.pattern,
        left: format!("{} {}", device.key, time(t.median_ms)),
        right: share.unwrap_or_default(),
        below: format!("{clock} {}{}{unsettled}", span(t.q1_ms, t.q3_ms), host.unwrap_or_default()),
        value: [t.q1_ms, t.median_ms, t.q3_ms],
    }
}

fn limit(by: BoundBy) -> &'static str {
    match by {
        BoundBy::Memory => "memory",
        BoundBy::Compute => "arithmetic",
        BoundBy::Matrix => "matrix units",
        BoundBy::Dispatch => "dispatch",
    }
}

/// Cases without a value by device and reason, so that a reason that many share stands once.
fn gaps(devices: &[Device<'_>], ids: &[&CaseId]) -> Vec<(String, Vec<String>)> {
    let mut gaps: Vec<(String, Vec<String>)> = vec![];
    for d in devices {
        for id in ids {
            let why = match d.outcome(id) {
                Some(Outcome::Measured(_)) => continue,
                Some(Outcome::Failed { reason }) => format!("failed: {reason}"),
                Some(Outcome::Skipped { reason }) => format!("skipped: {reason}"),
                None => "not in its file".into(),
            };
            let why = clean(&format!("{}, {why}", d.key));
            match gaps.iter_mut().find(|(other, _)| *other == why) {
                Some((_, cases)) => cases.push(title(id)),
                None => gaps.push((why, vec![title(id)])),
            }
        }
    }
    gaps
}
