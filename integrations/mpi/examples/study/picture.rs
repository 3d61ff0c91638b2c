//! The picture: balance by ranks, and the cluster beside what is published.
use crate::Run;
use crate::report::Modelled;
use plotters::prelude as plot;

type Failure = Box<dyn std::error::Error>;

/// A colour of each rule: token choice in greys, expert choice on one line.
fn colour(i: usize, rules: usize, rule: &str) -> plot::HSLColor {
    let place = i as f64 / rules as f64;
    if rule.starts_with("token") {
        plot::HSLColor(0.0, 0.0, 0.2 + 1.2 * place)
    } else {
        plot::HSLColor((0.35 + 1.4 * place).fract(), 0.8, 0.4)
    }
}

pub fn draw(runs: &[Run], cluster: &[Modelled]) -> Result<String, Failure> {
    use plot::{IntoDrawingArea, SVGBackend};
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (1080, 420)).into_drawing_area();
        root.fill(&plot::WHITE)?;
        let (left, right) = root.split_horizontally(620);
        balance(&left, runs)?;
        rates(&right, cluster)?;
        root.present()?;
    }
    Ok(svg)
}

type Area<'a> = plot::DrawingArea<plot::SVGBackend<'a>, plotters::coord::Shift>;

/// Slots of the slowest rank over the mean.
fn balance(area: &Area<'_>, runs: &[Run]) -> Result<(), Failure> {
    use plot::{ChartBuilder, Color, LineSeries, PathElement};
    let rules = runs.last().map(|run| &run.rules[..]).unwrap_or_default();
    let rows = runs.iter().flat_map(|run| &run.rules);
    let most = rows.map(|row| row.slowest_over_mean).fold(1.5, f64::max);
    let ranks = runs.iter().map(|run| run.ranks).max().unwrap_or(1) as f64;
    let mut chart = ChartBuilder::on(area)
        .caption("slots of the slowest rank over the mean", ("sans-serif", 15))
        .margin(8)
        .margin_right(200)
        .x_label_area_size(36)
        .y_label_area_size(44)
        .build_cartesian_2d(1.0..ranks.max(2.0), 0.9..most * 1.05)?;
    chart
        .configure_mesh()
        .x_desc("ranks")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.1}"))
        .light_line_style(plot::WHITE)
        .draw()?;
    for (i, rule) in rules.iter().enumerate() {
        let colour = colour(i, rules.len(), &rule.rule);
        let value = |run: &Run| {
            let row = run.rules.iter().find(|row| row.rule == rule.rule)?;
            Some((run.ranks as f64, row.slowest_over_mean))
        };
        let points = runs.iter().filter_map(value);
        chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
        let y = 40 + 20 * i as i32;
        area.draw(&PathElement::new([(430, y + 6), (448, y + 6)], colour.stroke_width(2)))?;
        area.draw(&plot::Text::new(rule.rule.clone(), (452, y), ("sans-serif", 12)))?;
    }
    Ok(())
}

/// Rates over that of dropless token choice: the model's bar, the published line.
fn rates(area: &Area<'_>, cluster: &[Modelled]) -> Result<(), Failure> {
    use plot::{ChartBuilder, Color, PathElement, Rectangle};
    let all = cluster.iter().flat_map(|m| [Some(m.ratio), m.published]).flatten();
    let most = all.fold(1.0, f64::max) * 1.1;
    let count = cluster.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .caption("rate over dropless token choice (red: published)", ("sans-serif", 13))
        .margin(8)
        .margin_left(170)
        .x_label_area_size(36)
        .build_cartesian_2d(0.0..most, count..0.0)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .x_label_formatter(&|x| format!("{x:.1}"))
        .light_line_style(plot::WHITE)
        .draw()?;
    for (i, m) in cluster.iter().enumerate() {
        let y = i as f64;
        let colour = colour(i, cluster.len(), &m.rule);
        let bar = Rectangle::new([(0.0, y + 0.2), (m.ratio, y + 0.8)], colour.filled());
        chart.draw_series([bar])?;
        if let Some(published) = m.published {
            let line = [(published, y + 0.1), (published, y + 0.9)];
            chart.draw_series([PathElement::new(line, plot::RED.stroke_width(3))])?;
        }
        let place = (4, 40 + (335.0 * (y + 0.3) / count) as i32);
        area.draw(&plot::Text::new(m.rule.clone(), place, ("sans-serif", 12)))?;
    }
    Ok(())
}
