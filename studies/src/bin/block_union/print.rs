//! The report as text, and its picture.
use crate::rules::{BLOCK, BY_SIZE};
use crate::{Report, Row};
use std::fmt::Write;
use svg::node::element::{Group, Rectangle, Style, Text};

/// `part` of `whole`, less 1, in percent.
pub(super) fn off(part: f64, whole: f64) -> String {
    format!("{:+.1} %", (part / whole - 1.0) * 100.0)
}

/// The report as text.
pub(super) fn tables(report: &Report) -> String {
    let mut text = String::new();
    for line in &report.head {
        let _ = writeln!(text, "{line}");
    }
    let width = report.rules.iter().map(|r| r.rule.len()).max().unwrap_or(0);
    let _ = writeln!(
        text,
        "\n{:<width$} {:>5} {:>9} {:>7} {:>8} {:>8} {:>7} {:>7} {:>8}  check",
        "rule", "block", "published", "kept", "measured", "off", "coreset", "MB", "cut"
    );
    // Every block size comes with the original.
    let original = |block| report.rules.iter().find(|r| r.block == block && r.rule == "original");
    for r in &report.rules {
        let published = r.published.map_or("-".into(), |p| format!("{p:.1}"));
        let kept = r.kept.map_or("-".into(), |k| format!("{k:.2} %"));
        let apart = r.published.map_or("-".into(), |p| off(r.measured, p));
        let cut = match original(r.block) {
            Some(original) if original.rule != r.rule => off(r.bytes, original.bytes),
            _ => "-".into(),
        };
        let _ = writeln!(
            text,
            "{:<width$} {:>5} {published:>9} {kept:>7} {:>8.1} {apart:>8} {:>7.1} {:>7.1} {cut:>8}  {}",
            r.rule,
            r.block,
            r.measured,
            r.coreset,
            r.bytes / 1e6,
            if r.ok { "ok" } else { "WRONG" }
        );
    }
    let Some(layer) = &report.layer else { return text };
    let _ = writeln!(
        text,
        "\n{layer}\n{:<width$} {:>12} {:>10} {:>8} {:>8} {:>9}",
        "rule", "experts used", "routing ms", "FFN ms", "layer ms", "layer"
    );
    let first = report.rules.iter().find_map(|r| r.layer_ms);
    for r in &report.rules {
        let (Some(times), Some(first)) = (&r.times, first) else { continue };
        let _ = writeln!(
            text,
            "{:<width$} {:>12} {:>10.2} {:>8.1} {:>8.1} {:>9}",
            r.rule,
            times.used,
            times.routing,
            times.ffn,
            times.layer,
            off(times.layer, first)
        );
    }
    text
}

/// The experts of a block, published and measured side by side: all rules for 32 tokens, then by
/// block size.
pub(super) fn picture(rows: &[Row]) -> svg::Document {
    const WIDTH: f64 = 720.0;
    const LEFT: f64 = 150.0;
    const BAR: f64 = 11.0;
    let most =
        rows.iter().flat_map(|r| [r.measured, r.published.unwrap_or(0.0)]).fold(1.0, f64::max);
    let scale = (WIDTH - LEFT - 60.0) / most;
    let mut drawn = Group::new();
    let mut y = 34.0;
    let text = |class, x: f64, y: f64, content: String| {
        Text::new(content).set("class", class).set("x", x).set("y", y)
    };
    let bar = |class, y: f64, value: f64| {
        let bar = Rectangle::new()
            .set("class", class)
            .set("x", LEFT)
            .set("y", y)
            .set("width", (value * scale * 10.0).round() / 10.0)
            .set("height", BAR);
        let at = (LEFT + value * scale + 5.0).round();
        Group::new().add(bar).add(text("number", at, y + BAR - 1.5, format!("{value:.1}")))
    };
    let title = "Experts that a block of tokens uses together, LLaDA2.0-mini";
    drawn = drawn.add(text("title", 16.0, y, title.into()));
    y += 22.0;
    for (class, x, label) in [
        ("published", 16.0, "published"),
        ("measured", 106.0, "measured here, synthetic router scores"),
    ] {
        let key = Rectangle::new().set("class", class).set("x", x).set("y", y - 10.0);
        drawn = drawn.add(key.set("width", BAR).set("height", BAR)).add(text(
            "label",
            x + 17.0,
            y,
            label.into(),
        ));
    }
    let by_rule: Vec<&Row> =
        rows.iter().filter(|r| r.block == BLOCK && r.published.is_some()).collect();
    let mut by_size: Vec<&Row> =
        rows.iter().filter(|r| rows.iter().any(|o| o.rule == r.rule && o.block != BLOCK)).collect();
    by_size.sort_by_key(|r| (r.rule == BY_SIZE, r.block)); // stable
    let parts = [("Blocks of 32 tokens", by_rule, false), ("By tokens of a block", by_size, true)];
    for (heading, part, sizes) in parts {
        y += 32.0;
        drawn = drawn.add(text("heading", 16.0, y, heading.into()));
        y += 10.0;
        for row in part {
            let label =
                if sizes { format!("{}: {}", row.rule, row.block) } else { row.rule.into() };
            drawn = drawn.add(text("label", 16.0, y + BAR + 4.0, label));
            if let Some(published) = row.published {
                drawn = drawn.add(bar("published", y, published));
            }
            drawn = drawn.add(bar("measured", y + BAR + 1.0, row.measured));
            y += 2.0 * BAR + 9.0;
        }
    }
    y += 12.0;
    for note in [
        "original: LLaDA2.0-mini's own rule, 8 experts a token, from 4 of 8 groups.",
        "dMoE (arXiv 2605.30876): v1 elects at least 12 experts, v2 at least 16.",
        "With p 0.6, v1 keeps 99.11 % of the accuracy, and v2 99.55 %.",
    ] {
        drawn = drawn.add(text("note", 16.0, y, note.into()));
        y += 16.0;
    }
    let style = Style::new(
        "text{font-family:system-ui,sans-serif;font-size:12px;fill:#1f2328}\
         .title{font-size:15px;font-weight:600}.heading{font-weight:600}.number,.note{font-size:11px}\
         .ground{fill:#ffffff}.published{fill:#8c959f}.measured{fill:#0969da}\
         @media(prefers-color-scheme:dark){text{fill:#e6edf3}.ground{fill:#0d1117}\
         .published{fill:#6e7681}.measured{fill:#4493f8}}",
    );
    let height = y;
    svg::Document::new()
        .set("viewBox", (0, 0, WIDTH, height))
        .set("width", WIDTH)
        .set("height", height)
        .set("role", "img")
        .add(svg::node::element::Title::new(title))
        .add(style)
        .add(Rectangle::new().set("class", "ground").set("width", "100%").set("height", "100%"))
        .add(drawn)
}
