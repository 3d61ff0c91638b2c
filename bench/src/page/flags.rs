//! Readings that contradict others, or that nobody should rely on: the page shows them, and says
//! so beside them.
use super::Device;
use super::words::{clean, digits, load_name, part_name, percent, span, time};
use crate::file::{Case, CaseId, Ceilings, Part};
use maud::{Markup, html};

/// Reading and copying, per byte moved, are usually within this factor of each other.
const RATES_APART: f64 = 3.0;
/// A part of a layer cannot take longer than the layer; clocks and caches explain this factor.
const PART_OVER_WHOLE: f64 = 1.25;
/// The host's clock adds encoding and submitting, which is little beside work of a millisecond.
const CLOCKS_APART: f64 = 2.0;
const CLOCKS_FROM_MS: f64 = 1.0;
/// Caches let small work pass the ceiling of memory, but not by this factor.
const PAST_CEILING: f64 = 1.5;
/// The quartiles of a quiet machine lie closer together.
const QUARTILES_APART: f64 = 1.5;

/// What is flagged.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum About<'a> {
    /// The two rates of memory.
    Memory,
    /// A whole layer under its own rule.
    Layer(&'a CaseId),
}

/// What is wrong with it.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Rates,
    PartOverWhole,
    Clocks,
    PastCeiling,
    Quartiles,
    Unsettled,
}

impl Kind {
    /// What is wrong, and what follows from it.
    fn words(self) -> (String, &'static str) {
        match self {
            Self::Rates => (
                format!("reading and copying are more than {RATES_APART} times apart"),
                "The slower one says little about the memory; shares of the peak go by the faster.",
            ),
            Self::PartOverWhole => (
                format!("a part took over {PART_OVER_WHOLE} times as long as the whole layer"),
                "The layer contains the part: one of the two was disturbed.",
            ),
            Self::Clocks => (
                format!("the host's clock says over {CLOCKS_APART} times what the GPU's says"),
                "Submitting and waiting took longer than the work.",
            ),
            Self::PastCeiling => (
                format!("over {PAST_CEILING} times the peak that was measured on the device"),
                "Caches explain less than that: the peak was measured too low.",
            ),
            Self::Quartiles => (
                format!("the middle half of the times spreads over {QUARTILES_APART} times"),
                "Something else kept the device busy.",
            ),
            Self::Unsettled => (
                "times still moved when the warm-up ended".into(),
                "A longer run, or a quiet machine, gives a steadier figure.",
            ),
        }
    }
}

/// Readings of one device with one thing wrong, and the figures of each.
struct Flag<'a> {
    /// Index of the device.
    device: usize,
    kind: Kind,
    readings: Vec<(About<'a>, String)>,
}

/// The flags of all devices, in the order of their numbers.
pub(super) struct Flags<'a>(Vec<Flag<'a>>);

impl<'a> Flags<'a> {
    pub(super) fn of(devices: &[Device<'a>]) -> Self {
        let mut flags = Self(vec![]);
        for (i, device) in devices.iter().enumerate() {
            let adapter = device.adapter;
            if let Some(figures) = adapter.ceilings.as_ref().and_then(rates) {
                flags.add(i, Kind::Rates, About::Memory, figures);
            }
            for case in adapter.cases.iter().filter(|c| c.id.is_headline()) {
                for (kind, figures) in layer(device, case) {
                    flags.add(i, kind, About::Layer(&case.id), figures);
                }
            }
        }
        flags
    }

    fn add(&mut self, device: usize, kind: Kind, about: About<'a>, figures: String) {
        let reading = (about, figures);
        match self.0.iter_mut().find(|f| f.device == device && f.kind == kind) {
            Some(flag) => flag.readings.push(reading),
            None => self.0.push(Flag { device, kind, readings: vec![reading] }),
        }
    }

    /// The marks beside a flagged reading.
    pub(super) fn marks(&self, device: usize, about: About<'_>) -> Markup {
        let is = |f: &Flag<'_>| f.device == device && f.readings.iter().any(|(a, _)| *a == about);
        let here = self.0.iter().enumerate().filter(|(_, f)| is(f));
        html! { @for (i, _) in here { " " span.flag { "flag " (i + 1) } } }
    }

    /// What each number stands for.
    pub(super) fn list(&self, devices: &[Device<'_>]) -> Markup {
        html! {
            @if !self.0.is_empty() {
                section aria-labelledby="flags" {
                    h2 id="flags" { "Flagged readings" }
                    p {
                        "These figures contradict others, or moved while they were taken. Do not \
                         rely on them until that is explained."
                    }
                    @for (i, flag) in self.0.iter().enumerate() {
                        (explain(i + 1, flag, &devices[flag.device].key))
                    }
                }
            }
        }
    }
}

fn explain(number: usize, flag: &Flag<'_>, device: &str) -> Markup {
    let (what, so) = flag.kind.words();
    html! {
        p.flagged { span.flag { "flag " (number) } " " strong { (device) } ": " (what) ". " (so) }
        ul {
            @for (about, figures) in &flag.readings {
                li {
                    @if let About::Layer(id) = about {
                        (clean(&id.model)) ", " (load_name(id)) ": "
                    }
                    (figures)
                }
            }
        }
    }
}

/// The figures, where the two rates contradict each other.
fn rates(ceilings: &Ceilings) -> Option<String> {
    let (read, copy) = (ceilings.read_gb_s?, ceilings.copy_gb_s?);
    let apart = (read / copy).max(copy / read);
    let figures = || format!("reading {} GB/s, copying {} GB/s", digits(read), digits(copy));
    (apart > RATES_APART).then(figures)
}

/// What is odd about a layer, and the figures that show it.
fn layer(device: &Device<'_>, case: &Case) -> Vec<(Kind, String)> {
    let Some(m) = case.outcome.measured() else { return vec![] };
    let mut odd = vec![];
    let t = m.times();
    for part in [Part::Routing, Part::Plan, Part::Experts] {
        let id = CaseId { part, ..case.id.clone() };
        let Some(part_ms) = device.measured(&id).map(|m| m.times().median_ms) else { continue };
        if part_ms > PART_OVER_WHOLE * t.median_ms {
            let name = part_name(part).to_lowercase();
            let figures = format!("{name} {}, layer {}", time(part_ms), time(t.median_ms));
            odd.push((Kind::PartOverWhole, figures));
        }
    }
    if let Some(gpu) = &m.gpu {
        let (gpu, host) = (gpu.median_ms, m.wall.median_ms);
        if gpu >= CLOCKS_FROM_MS && host > CLOCKS_APART * gpu {
            odd.push((Kind::Clocks, format!("host {}, GPU {}", time(host), time(gpu))));
        }
    }
    if let Some(bound) = m.bound.as_ref().filter(|b| b.share > PAST_CEILING) {
        odd.push((Kind::PastCeiling, percent(bound.share)));
    }
    if t.q3_ms > QUARTILES_APART * t.q1_ms {
        odd.push((Kind::Quartiles, span(t.q1_ms, t.q3_ms)));
    }
    if !m.settled {
        odd.push((Kind::Unsettled, time(t.median_ms)));
    }
    odd
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::tests::{case, measured, report};
    use crate::file::{Bound, BoundBy, Measured, Outcome, Times};
    use crate::page::devices_of;

    /// What the flags of a device with this layer, these further cases and this reading say.
    fn said(layer: Outcome, parts: &[(Part, f64)], read_gb_s: f64) -> Vec<String> {
        let mut cases = vec![case("original", layer)];
        for &(part, ms) in parts {
            let mut further = case("original", measured(ms));
            further.id.part = part;
            cases.push(further);
        }
        let mut report = report("a GPU", cases);
        report.adapters[0].ceilings.as_mut().unwrap().read_gb_s = Some(read_gb_s);
        let reports = [report];
        let devices = devices_of(&reports);
        let words = |f: Flag<'_>| format!("{} {}", f.kind.words().0, f.readings[0].1);
        Flags::of(&devices).0.into_iter().map(words).collect()
    }

    fn changed(change: fn(&mut Measured)) -> Outcome {
        let Outcome::Measured(mut m) = measured(2.0) else { unreachable!() };
        m.wall.median_ms = 2.1;
        change(&mut m);
        Outcome::Measured(m)
    }

    #[test]
    fn readings_that_fit_have_no_flag() {
        let steady = |m: &mut Measured| {
            let times = Times { q1_ms: 1.9, q3_ms: 2.1, ..m.wall.clone() };
            m.gpu = Some(Times { median_ms: 2.0, ..times });
        };
        let parts = [(Part::Experts, 1.9), (Part::Routing, 2.2)];
        assert_eq!(said(changed(steady), &parts, 500.0), [""; 0]);
    }

    #[test]
    fn each_contradiction_has_its_words() {
        let steady = |m: &mut Measured| {
            let times = Times { median_ms: 2.0, q1_ms: 1.9, q3_ms: 2.1, ..m.wall.clone() };
            m.gpu = Some(times);
        };
        type Odd<'a> = (Outcome, &'a [(Part, f64)], f64, &'a str);
        let all: [Odd<'_>; 6] = [
            (changed(steady), &[], 0.93, "reading 0.930 GB/s, copying 400 GB/s"),
            (
                changed(steady),
                &[(Part::Experts, 3.0)],
                500.0,
                "expert matmuls 3.00 ms, layer 2.00 ms",
            ),
            (changed(|m| m.wall.median_ms = 9.0), &[], 500.0, "host 9.00 ms, GPU 2.00 ms"),
            (
                changed(|m| {
                    m.bound = Some(Bound { by: BoundBy::Memory, least_ms: 4.0, share: 2.0 });
                }),
                &[],
                500.0,
                "200 %",
            ),
            (changed(|_| {}), &[], 500.0, "1.50 to 2.50 ms"),
            (changed(|m| m.settled = false), &[], 500.0, "still moved"),
        ];
        for (layer, parts, read, words) in all {
            let said = said(layer, parts, read).join("\n");
            assert!(said.contains(words), "{said:?} should say {words:?}");
        }
    }
}
