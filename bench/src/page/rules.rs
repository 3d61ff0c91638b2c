//! What each routing rule costs: time of a whole layer beside the experts that it reads.
use super::words::{clean, digits, layer_name, load_name, time};
use super::{Device, by_layer, chart, scroll, swatch};
use crate::file::{CaseId, Load, Part};
use maud::{Markup, html};

/// Tokens of a block.
const BLOCK: f64 = 32.0;

pub(super) fn section(devices: &[Device<'_>], ids: &[&CaseId]) -> Markup {
    let compared = |id: &&&CaseId| id.part == Part::Layer && id.load != Load::Prefill;
    let ids: Vec<&CaseId> = ids.iter().filter(compared).copied().collect();
    html! {
        section aria-labelledby="rules" {
            h2 id="rules" { "Routing rules" }
            p {
                "Time of the whole layer for each block of 32 tokens, and how many different \
                 experts the tokens of a block use. The model was trained with the rule marked as \
                 its own. A rule that reads fewer experts saves time where memory is the limit. \
                 All bars of a table have one scale. The quality of a rule is not measured here."
            }
            @for (i, layer) in by_layer(&ids).iter().enumerate() {
                details open[i == 0] {
                    summary { (layer_name(layer[0][0])) }
                    @for (j, load) in layer.iter().enumerate() {
                        (table(devices, load, &format!("rules-{i}-{j}")))
                    }
                }
            }
        }
    }
}

/// The rules under one load, those with the fewest experts first.
fn table(devices: &[Device<'_>], ids: &[&CaseId], id: &str) -> Markup {
    let mut rows: Vec<(f64, &CaseId)> = ids
        .iter()
        .filter_map(|&id| {
            let any = devices.iter().find_map(|d| d.measured(id))?;
            Some((any.work.experts_per_block, id))
        })
        .collect();
    rows.sort_by(|a, b| a.0.total_cmp(&b.0));
    let per_block = |d: &Device<'_>, id: &CaseId| {
        let ms = d.measured(id)?.times().median_ms;
        Some(ms / f64::from(id.tokens.max(1)) * BLOCK)
    };
    let all = rows.iter().flat_map(|(_, id)| devices.iter().filter_map(|d| per_block(d, id)));
    let most = all.fold(f64::MIN_POSITIVE, f64::max);
    let table = html! {
        // Columns of one width, so that the bars of all devices have one scale.
        table.bars style=(format!("min-width:{}em", 12 + 5 * devices.len())) {
            thead { tr {
                th scope="col" { "rule" }
                th scope="col" { "experts used" }
                @for d in devices { th scope="col" { (swatch(d)) } }
            } }
            tbody {
                @for (experts, id) in &rows {
                    tr {
                        th scope="row" { (clean(&id.rule)) @if id.own_rule { " (own)" } }
                        td { (digits(*experts)) }
                        @for d in devices {
                            td.bar {
                                @match per_block(d, id) {
                                    Some(ms) => { (time(ms)) (chart::bar(d.pattern, ms / most)) }
                                    None => span.soft title="not measured" { "–" }
                                }
                            }
                        }
                    }
                }
            }
        }
    };
    html! {
        h3 id=(id) { (load_name(ids[0])) }
        @if rows.is_empty() { p.none { "Not measured." } } @else { (scroll(id, table)) }
    }
}
