//! The table of devices: what they are, and the ceilings that were measured on them.
use super::flags::{About, Flags};
use super::words::{clean, digits, kind_name};
use super::{Device, scroll, swatch};
use crate::file::{Ceilings, Outcome};
use maud::{Markup, html};

/// A row: what it says, and the text of a device.
type Row = (&'static str, fn(&Device<'_>) -> String);

const ABOUT: [Row; 7] = [
    ("backend", |d| d.adapter.backend.clone()),
    ("type", |d| kind_name(&d.adapter.kind).into()),
    ("driver", |d| d.adapter.driver.clone()),
    ("system", |d| format!("{} {}", d.report.os, d.report.arch)),
    ("features", |d| d.adapter.features.join(", ")),
    ("matrix units", |d| match d.adapter.matrix_units.as_str() {
        "" => "not asked for".into(),
        units => units.into(),
    }),
    ("largest binding", |d| format!("{} MiB", d.adapter.max_binding_bytes >> 20)),
];

const READING: Row = ("reading", |d| ceiling(d, |c| c.read_gb_s, "GB/s"));

const CEILINGS: [Row; 5] = [
    ("copying", |d| ceiling(d, |c| c.copy_gb_s, "GB/s")),
    ("f32 multiply-adds", |d| ceiling(d, |c| c.multiply_add_gflop_s, "GFLOP/s")),
    ("products on matrix units", |d| ceiling(d, |c| c.matrix_gflop_s, "GFLOP/s")),
    ("one more dispatch", |d| ceiling(d, |c| c.dispatch_us, "µs")),
    ("submit and wait", |d| ceiling(d, |c| c.submit_us, "µs")),
];

const RUN: [Row; 3] = [
    ("cases", |d| {
        let count =
            |is: fn(&Outcome) -> bool| d.adapter.cases.iter().filter(|c| is(&c.outcome)).count();
        format!(
            "{} measured, {} failed, {} skipped",
            count(|o| matches!(o, Outcome::Measured(_))),
            count(|o| matches!(o, Outcome::Failed { .. })),
            count(|o| matches!(o, Outcome::Skipped { .. }))
        )
    }),
    ("run", |d| {
        let stopped = if d.report.interrupted { ", stopped early" } else { "" };
        format!("{}{stopped}", if d.report.quick { "quick" } else { "full" })
    }),
    ("wgmoe", |d| {
        let program = &d.report.program;
        let commit = program.commit.as_ref().map_or(String::new(), |c| format!(" ({c})"));
        format!("{}{commit}", program.version)
    }),
];

fn ceiling(d: &Device<'_>, get: fn(&Ceilings) -> Option<f64>, unit: &str) -> String {
    let value = d.adapter.ceilings.as_ref().and_then(get);
    value.map_or("–".into(), |v| format!("{} {unit}", digits(v)))
}

pub(super) fn table(devices: &[Device<'_>], flags: &Flags<'_>) -> Markup {
    let row = |(what, text): &Row| {
        html! { tr { th scope="row" { (what) } @for d in devices { td { (clean(&text(d))) } } } }
    };
    let table = html! {
        table {
            caption {
                "Rates and times are the best of several runs; submit and wait is the median."
            }
            thead { tr {
                th scope="col" { "device" }
                @for d in devices { th scope="col" { (swatch(d)) br; (clean(&d.adapter.name)) } }
            } }
            tbody {
                @for about in &ABOUT { (row(about)) }
                tr {
                    th scope="row" { (READING.0) }
                    @for (i, d) in devices.iter().enumerate() {
                        td {
                            (READING.1(d)) (flags.marks(i, About::Memory))
                        }
                    }
                }
                @for ceiling in &CEILINGS { (row(ceiling)) }
                @for run in &RUN { (row(run)) }
            }
        }
    };
    html! {
        section aria-labelledby="devices" {
            h2 id="devices" { "Devices" }
            (scroll("devices", table))
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
