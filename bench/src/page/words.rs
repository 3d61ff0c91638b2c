//! Numbers, names and texts of files as the page writes them.
use crate::file::{CaseId, Load, Part};

/// Milliseconds of one of the units that times are written in.
#[derive(Clone, Copy)]
struct Unit {
    ms: f64,
    name: &'static str,
}

/// The unit in which this time has one to three digits before the point.
fn unit(ms: f64) -> Unit {
    match ms {
        v if v < 0.9995 => Unit { ms: 1e-3, name: "µs" },
        v if v < 999.5 => Unit { ms: 1.0, name: "ms" },
        _ => Unit { ms: 1e3, name: "s" },
    }
}

/// A time, three digits.
pub(super) fn time(ms: f64) -> String {
    let unit = unit(ms);
    format!("{} {}", digits(ms / unit.ms), unit.name)
}

/// Two times in one unit, that of the longer.
pub(super) fn span(from_ms: f64, to_ms: f64) -> String {
    let unit = unit(from_ms.max(to_ms));
    format!("{} to {} {}", digits(from_ms / unit.ms), digits(to_ms / unit.ms), unit.name)
}

/// Three digits.
pub(super) fn digits(value: f64) -> String {
    match value {
        v if v >= 99.95 => grouped(v),
        v if v >= 9.995 => format!("{v:.1}"),
        v if v >= 0.9995 || v == 0.0 => format!("{v:.2}"),
        v if v >= 0.09995 => format!("{v:.3}"),
        v if v >= 0.009995 => format!("{v:.4}"),
        v => format!("{v:.2e}"),
    }
}

/// A share of 1 in words.
pub(super) fn percent(share: f64) -> String {
    match 100.0 * share {
        v if v >= 9.95 => format!("{v:.0} %"),
        v => format!("{v:.1} %"),
    }
}

/// A whole number, its digits in groups of three from 10,000 on.
fn grouped(value: f64) -> String {
    let text = format!("{value:.0}");
    if text.len() < 5 {
        return text;
    }
    let mut parts: Vec<&str> = vec![];
    let mut rest = text.as_str();
    while rest.len() > 3 {
        let (head, tail) = rest.split_at(rest.len() - 3);
        parts.push(tail);
        rest = head;
    }
    parts.push(rest);
    parts.reverse();
    parts.join(",")
}

/// A text of a file: no control characters, nothing that turns the direction of writing, and not
/// too long.
pub(super) fn clean(text: &str) -> String {
    let turns = |c: char| {
        matches!(c,
            '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut kept: String =
        text.chars().filter(|c| !c.is_control() && !turns(*c)).take(200).collect();
    if text.chars().count() > 200 {
        kept.push('…');
    }
    kept
}

/// A, B, ... Z, AA, AB, ...
pub(super) fn key(i: usize) -> String {
    let letter = char::from(b'A' + (i % 26) as u8);
    if i < 26 { letter.into() } else { key(i / 26 - 1) + &letter.to_string() }
}

/// A model, its experts and how they are stored.
pub(super) fn layer_name(id: &CaseId) -> String {
    let whole = id.experts == id.experts_of_model;
    let experts = if whole {
        format!("{} experts", id.experts)
    } else {
        format!("{} of {} experts", id.experts, id.experts_of_model)
    };
    clean(&format!("{}, {experts}, {}", id.model, id.weights))
}

/// What the tokens are.
pub(super) fn load_name(id: &CaseId) -> String {
    match id.load {
        Load::Block => format!("1 block, {} tokens", id.tokens),
        Load::Batch => format!("{} blocks, {} tokens", id.tokens / 32, id.tokens),
        Load::Prefill => format!("prefill, {} tokens", id.tokens),
    }
}

pub(super) fn part_name(part: Part) -> &'static str {
    match part {
        Part::Routing => "Routing",
        Part::Plan => "Plan",
        Part::Gather => "Gather",
        Part::Experts => "Expert matmuls",
        Part::Layer => "Whole layer",
    }
}

/// The type of an adapter, which files give as wgpu names it.
pub(super) fn kind_name(kind: &str) -> &str {
    match kind {
        "DiscreteGpu" => "discrete GPU",
        "IntegratedGpu" => "integrated GPU",
        "VirtualGpu" => "virtual GPU",
        "Cpu" => "CPU (software driver)",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(
            [0.0123, 0.1041, 0.9999, 4.5678, 99.96, 1234.0].map(time),
            ["12.3 µs", "104 µs", "1.00 ms", "4.57 ms", "100 ms", "1.23 s"]
        );
        assert_eq!(
            [0.0, 0.123, 0.0123, 1234.5, 60123.0, 1234567.0].map(digits),
            ["0.00", "0.123", "0.0123", "1234", "60,123", "1,234,567"]
        );
    }

    #[test]
    fn shares_are_whole_from_ten_percent_on() {
        assert_eq!([0.0042, 0.0998, 0.597, 1.0].map(percent), ["0.4 %", "10 %", "60 %", "100 %"]);
    }

    #[test]
    fn both_ends_of_a_span_have_one_unit() {
        assert_eq!(span(0.0971, 0.1049), "97.1 to 105 µs");
        assert_eq!(span(0.95, 1.05), "0.950 to 1.05 ms");
    }

    #[test]
    fn keys_go_on_after_z() {
        assert_eq!([0, 25, 26, 27, 52].map(key), ["A", "Z", "AA", "AB", "BA"]);
    }
}
