//! The first table: what each device takes for the whole layer of each model, in each phase.
use super::flags::{About, Flags};
use super::words::{digits, layer_name, load_name, percent, time};
use super::{Device, by_layer, scroll, swatch};
use crate::file::{BoundBy, CaseId, Measured, Outcome};
use maud::{Markup, html};

pub(super) fn table(devices: &[Device<'_>], ids: &[&CaseId], flags: &Flags<'_>) -> Markup {
    let ids: Vec<&CaseId> = ids.iter().filter(|id| id.is_headline()).copied().collect();
    let table = html! {
        table.headline {
            thead { tr {
                th scope="col" { "one layer" }
                @for d in devices { th scope="col" { (swatch(d)) br; (super::name(d)) } }
            } }
            @for layer in by_layer(&ids) {
                tbody {
                    tr { th.group scope="rowgroup" colspan=(devices.len() + 1) {
                        span.stay { (layer_name(layer[0][0])) }
                    } }
                    @for id in layer.iter().flatten() {
                        tr {
                            th scope="row" { (load_name(id)) }
                            @for (i, d) in devices.iter().enumerate() {
                                td {
                                    (cell(devices, d, id))
                                    (flags.marks(i, About::Layer(id)))
                                }
                            }
                        }
                    }
                }
            }
        }
    };
    html! {
        section aria-labelledby="headline" {
            h2 id="headline" { "Whole layers" }
            p {
                "Median time of one whole layer under the model's own routing rule; lower is \
                 better. Below it, the rate reached: of memory (GB/s) or of arithmetic (GFLOP/s), \
                 whichever limits the layer on that device, and its share of the peak that the \
                 device itself was measured to reach. A share over 100 % means that caches served \
                 what counts as moved."
                @if devices.len() > 1 {
                    " The figure beside a time, such as 2.5 × A, is that time as a multiple of \
                     device A's: below 1 is faster."
                }
            }
            @if ids.is_empty() {
                p.none { "No whole layer in these files." }
            } @else {
                (scroll("headline", table))
            }
        }
    }
}

fn cell(devices: &[Device<'_>], device: &Device<'_>, id: &CaseId) -> Markup {
    let measured = match device.outcome(id) {
        Some(Outcome::Measured(m)) => m,
        Some(Outcome::Failed { .. }) => return html! { span.fail { "failed" } },
        Some(Outcome::Skipped { .. }) => return html! { span.soft { "skipped" } },
        None => return html! { span.soft { "not in its file" } },
    };
    let ms = measured.times().median_ms;
    let first = &devices[0];
    let first_ms = first.measured(id).map(|m| m.times().median_ms);
    let ratio = first_ms.filter(|_| first.key != device.key).map(|first| ms / first);
    html! {
        strong { (time(ms)) }
        @if let Some(ratio) = ratio { " " span.ratio { (digits(ratio)) " × " (first.key) } }
        span.line { (reached(measured)) }
    }
}

/// The rate of what limits the layer, and its share of the device's ceiling.
fn reached(m: &Measured) -> String {
    let giga = |amount: f64| digits(amount / m.times().median_ms / 1e6);
    let (bytes, flops) = (giga(m.work.bytes), giga(m.work.flops));
    // Without ceilings nothing says which of the two limits it.
    let Some(bound) = &m.bound else { return format!("{bytes} GB/s, {flops} GFLOP/s") };
    let share = percent(bound.share);
    match bound.by {
        BoundBy::Memory => format!("{bytes} GB/s, {share} of peak"),
        BoundBy::Compute => format!("{flops} GFLOP/s, {share} of peak"),
        BoundBy::Matrix => format!("{flops} GFLOP/s, {share} of the matrix units' peak"),
        BoundBy::Dispatch => format!("{bytes} GB/s; dispatches are {share} of the time"),
    }
}
