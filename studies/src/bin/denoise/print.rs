//! The report as text, and its picture.
use crate::run::{Rule, Run};
use crate::{Options, RuleReport, StepReport, Unmask};
use plotters::prelude as plot;
use std::fmt::Write;
use wgmoe::Error;

/// What the run is, in lines.
pub(super) fn describe(
    options: &Options,
    run: &Run,
    rules: &[Rule],
    on: &str,
) -> Result<String, Error> {
    let mut text = format!(
        "{on}\n{} sequences of {} to {} tokens, {} in all, {} steps, {} unmasking; E {}, D {}, F {}, bf16 weights, synthetic\n",
        run.lengths.len(),
        run.lengths.iter().min().unwrap_or(&0),
        options.length,
        run.tokens(),
        options.steps,
        match options.unmask {
            Unmask::Linear => "linear",
            Unmask::Cosine => "cosine",
        },
        options.experts,
        options.hidden,
        options.intermediate
    );
    let ratios = run.steps.iter().map(|s| {
        let masked: u32 = s.masked.iter().sum();
        format!("{:.2}", f64::from(masked) / f64::from(run.tokens()))
    });
    let _ = writeln!(text, "mask ratio by step: {}", ratios.collect::<Vec<_>>().join(" "));
    for rule in rules {
        if let Some(schedule) = &rule.schedule {
            let k = run.matched(schedule)?;
            if k != options.k {
                let _ =
                    writeln!(text, "{}: costs nearer to k {k} than to k {}", rule.name, options.k);
            }
        }
    }
    Ok(text)
}

pub(super) fn tables(rules: &[RuleReport]) -> String {
    let mut text = String::new();
    let width = rules.iter().map(|r| r.rule.len()).max().unwrap_or(0);
    let devices: Vec<u32> =
        rules.first().map_or(vec![], |r| r.devices.iter().map(|d| d.devices).collect());
    let _ = writeln!(
        text,
        "\nslots: pairs computed; padded: rows of a padded batched matmul; imbalance: largest load over the mean;\n\
         untouched: tokens without an expert; slowest of R: slots of the slowest of R devices over the mean\n"
    );
    let _ = write!(
        text,
        "{:<width$} {:>15} {:>8} {:>8} {:>8} {:>9} {:>9} {:>9} {:>9}",
        "rule",
        "k (cost)",
        "slots",
        "padded",
        "dropped",
        "imbalance",
        "untouched",
        "ms",
        "tokens/s"
    );
    for n in &devices {
        let _ = write!(text, " {:>12}", format!("slowest of {n}"));
    }
    text += "  check\n";
    for r in rules {
        let _ = write!(
            text,
            "{:<width$} {:>15} {:>8} {:>8} {:>8} {:>9.3} {:>9} {:>9.2} {:>9.0}",
            r.rule,
            r.cost,
            r.slots,
            r.padded,
            r.dropped,
            r.imbalance,
            r.untouched,
            r.ms,
            r.tokens_per_s
        );
        for d in &r.devices {
            let _ = write!(text, " {:>12.3}", d.slowest);
        }
        let _ = writeln!(text, "  {}", if r.ok { "ok" } else { "WRONG" });
    }
    let _ = write!(text, "\n{:<width$}", "k / capacity / ms by step");
    for i in 0..rules.first().map_or(0, |r| r.steps.len()) {
        let _ = write!(text, " {:>19}", i + 1);
    }
    text.push('\n');
    for r in rules {
        let _ = write!(text, "{:<width$}", r.rule);
        for s in &r.steps {
            let _ = write!(text, " {:>5.2} {:>6.1} {:>6.2}", s.k, s.capacity, s.ms);
        }
        text.push('\n');
    }
    text
}

/// A quantity of a step, to draw.
pub(super) type Series = fn(&StepReport) -> f64;

/// k over the steps, and under it the time of each step.
pub(super) fn draw(rules: &[RuleReport]) -> Result<String, Box<dyn std::error::Error>> {
    use plot::{ChartBuilder, Color, IntoDrawingArea, LineSeries, PathElement, SVGBackend};
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (960, 900)).into_drawing_area();
        root.fill(&plot::WHITE)?;
        let charts: [(&str, Series); 2] =
            [("experts per token (k)", |s| s.k), ("time of the step, ms", |s| s.ms)];
        let last = rules.first().map_or(0, |r| r.steps.len()) as f64;
        for (area, (title, value)) in root.split_evenly((2, 1)).iter().zip(charts) {
            let values = rules.iter().flat_map(|r| r.steps.iter().map(value));
            let most = values.fold(0.0, f64::max);
            let mut chart = ChartBuilder::on(area)
                .caption(title, ("sans-serif", 18))
                .margin(10)
                .margin_right(240)
                .x_label_area_size(40)
                .y_label_area_size(50)
                .build_cartesian_2d(0.5..last + 0.5, 0.0..1.1 * most.max(1e-9))?;
            chart
                .configure_mesh()
                .x_desc("step")
                .x_label_formatter(&|x| format!("{x:.0}"))
                .light_line_style(plot::WHITE)
                .draw()?;
            for (i, rule) in rules.iter().enumerate() {
                // Token choice in greys.
                let place = i as f64 / rules.len() as f64;
                let colour = if rule.rule.starts_with("token") {
                    plot::HSLColor(0.0, 0.0, 2.0 * place)
                } else {
                    plot::HSLColor((1.4 * place).fract(), 0.9, 0.4)
                };
                let points = rule.steps.iter().enumerate().map(|(x, s)| (x as f64 + 1.0, value(s)));
                chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
                let y = 30 + 20 * i as i32;
                area.draw(&PathElement::new([(735, y + 5), (755, y + 5)], colour.stroke_width(2)))?;
                area.draw(&plot::Text::new(rule.rule.clone(), (760, y), ("sans-serif", 13)))?;
            }
        }
        root.present()?;
    }
    Ok(svg)
}
