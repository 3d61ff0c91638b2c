//! The page that compares results: one HTML file that needs nothing else. Every text of a file is
//! escaped (by `maud`) and cut to a length: files come from anywhere.
mod cases;
mod chart;
mod devices;
mod flags;
mod headline;
mod roofline;
mod rules;
mod words;

use crate::file::{Adapter, Case, CaseId, Measured, Outcome, Report};
use flags::Flags;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use std::collections::{BTreeSet, HashMap, HashSet};

/// What the page may load: nothing but its own style sheet.
const CONTENT: &str = "default-src 'none'; style-src 'unsafe-inline'";

/// One adapter of one file.
struct Device<'a> {
    /// A letter.
    key: String,
    pattern: usize,
    report: &'a Report,
    adapter: &'a Adapter,
    cases: HashMap<&'a CaseId, &'a Case>,
}

impl<'a> Device<'a> {
    fn outcome(&self, id: &CaseId) -> Option<&'a Outcome> {
        self.cases.get(id).map(|case| &case.outcome)
    }

    fn measured(&self, id: &CaseId) -> Option<&'a Measured> {
        self.outcome(id).and_then(Outcome::measured)
    }
}

fn devices_of(reports: &[Report]) -> Vec<Device<'_>> {
    let adapters = reports.iter().flat_map(|r| r.adapters.iter().map(move |a| (r, a)));
    adapters
        .enumerate()
        .map(|(i, (report, adapter))| Device {
            key: words::key(i),
            pattern: i % chart::PATTERNS,
            report,
            adapter,
            cases: adapter.cases.iter().map(|c| (&c.id, c)).collect(),
        })
        .collect()
}

/// The page of all adapters of all files.
pub fn page(reports: &[Report]) -> String {
    let devices = devices_of(reports);
    // In the order of the files, each once.
    let mut seen = HashSet::new();
    let all = devices.iter().flat_map(|d| &d.adapter.cases).map(|c| &c.id);
    let ids: Vec<&CaseId> = all.filter(|id| seen.insert(*id)).collect();
    let flags = Flags::of(&devices);
    let markup = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width,initial-scale=1";
                meta http-equiv="Content-Security-Policy" content=(CONTENT);
                title { "wgmoe-bench: mixture-of-experts layers on GPUs" }
                style { (PreEscaped(include_str!("page/style.css"))) }
            }
            body {
                (chart::patterns())
                main {
                    (opening(reports, devices.len()))
                    (headline::table(&devices, &ids, &flags))
                    (flags.list(&devices))
                    (devices::table(&devices, &flags))
                    (roofline::section(&devices))
                    (rules::section(&devices, &ids))
                    (cases::section(&devices, &ids))
                }
            }
        }
    };
    markup.into_string()
}

fn opening(reports: &[Report], devices: usize) -> Markup {
    let count = if devices == 1 { "1 device".into() } else { format!("{devices} devices") };
    let cases = reports.iter().flat_map(|r| &r.adapters).flat_map(|a| &a.cases);
    let types: BTreeSet<&str> = cases.map(|case| case.id.weights.as_str()).collect();
    let weights = types.into_iter().collect::<Vec<_>>().join(" or ");
    html! {
        h1 { "Mixture-of-experts layers, device by device" }
        p {
            "One layer of known models on " (count) ", with experts in " (weights) " and sums in f32. A \
             model has many such layers and more besides, so these are not the speeds of whole \
             models. Weights, inputs and router scores are synthetic. Every result was compared \
             with a computation on the CPU before it was timed."
        }
        @if reports.iter().any(|r| r.quick) {
            p { strong {
                "A quick run measures layers with few of their experts: it shows that a device \
                 works, not how fast a model would be."
            } }
        }
    }
}

fn swatch(device: &Device<'_>) -> Markup {
    html! {
        svg.key aria-hidden="true" {
            rect width="28" height="14" fill={ "url(#p" (device.pattern) ")" } {}
        }
        " " strong { (device.key) }
    }
}

fn name(device: &Device<'_>) -> String {
    words::clean(&format!("{} ({})", device.adapter.name, device.adapter.backend))
}

/// What may be wider than the screen, under the heading `id`.
fn scroll(id: &str, inside: Markup) -> Markup {
    html! { div.scroll tabindex="0" role="region" aria-labelledby=(id) { (inside) } }
}

/// Cases by layer (model and experts), and within it by load.
fn by_layer<'a>(ids: &[&'a CaseId]) -> Vec<Vec<Vec<&'a CaseId>>> {
    let mut layers: Vec<Vec<Vec<&CaseId>>> = vec![];
    for &id in ids {
        let same = |other: &CaseId| {
            (&other.model, other.experts, &other.weights) == (&id.model, id.experts, &id.weights)
        };
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
    fn the_first_table_compares_with_the_first_device() {
        let of = |ms| report("a GPU", vec![case("original", measured(ms))]);
        let page = page(&[of(2.0), of(3.0)]);
        let table = page.split("<h2").find(|t| t.contains("Whole layers")).unwrap();
        // 1e6 bytes in 2 ms; the case is bound by memory, at a quarter of its peak.
        assert!(table.contains("2.00 ms") && table.contains("0.500 GB/s, 25 % of peak"), "{table}");
        assert!(table.contains("1.50 × A"), "{table}");
        assert!(!table.contains("1.00 × A"), "the first device is not compared with itself");
    }

    #[test]
    fn all_devices_have_one_scale() {
        let of = |ms| report("a GPU", vec![case("original", measured(ms))]);
        let page = page(&[of(2.0), of(200.0)]);
        // The bars of rules: one is a hundredth of the other.
        let rules = page.split("<h2").find(|t| t.contains("Routing rules")).unwrap();
        assert!(rules.contains("width=\"1%\"") && rules.contains("width=\"100%\""), "{rules}");
        // The axes of rooflines, from the drawing's beginning to the first line that is no grid's.
        let axes: Vec<&str> = page
            .split("class=\"plot\"")
            .skip(1)
            .map(|plot| plot.split("viewBox").nth(1).unwrap().split("<line class=\"r\"").next())
            .map(|axes| axes.unwrap())
            .collect();
        assert_eq!(axes.len(), 2);
        assert!(axes[0].matches("<text").count() > 4, "{}", axes[0]);
        assert_eq!(axes[0], axes[1]);
    }

    #[test]
    fn a_device_without_results_is_still_listed() {
        let mut none = report("a GPU", vec![]);
        none.adapters[0].failure = Some("no compute shaders".into());
        none.adapters[0].ceilings = None;
        let page = page(&[none]);
        assert!(page.contains("not measured to the end: </span>no compute shaders"), "{page}");
        assert!(page.contains("No roofline"));
    }
}
