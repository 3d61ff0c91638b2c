//! The curves.
use crate::Point;
use svg::Document;
use svg::node::element::{Group, Line, Polyline, Rectangle, Text};

/// Size of the plot itself, and where it begins.
const PLOT: [f64; 2] = [520.0, 340.0];
const CORNER: [f64; 2] = [48.0, 28.0];

/// Losses against steps, and `-log p` by the share of masked tokens, as SVG.
pub fn draw(points: &[Point]) -> String {
    let curve = |value: &dyn Fn(&Point) -> f64| -> Vec<[f64; 2]> {
        points.iter().map(|p| [p.step as f64, value(p)]).collect()
    };
    let mut curves = vec![
        ("training".to_owned(), curve(&|p| p.training)),
        ("validation".to_owned(), curve(&|p| p.validation)),
    ];
    for quarter in 0..4 {
        let name = format!("masked {} to {} %", 25 * quarter, 25 * quarter + 25);
        curves.push((name, curve(&|p| p.by_ratio[quarter])));
    }
    let most = curves.iter().flat_map(|(_, c)| c).fold(0.1, |m: f64, [_, y]| m.max(*y)) * 1.05;
    let last = points.last().map_or(1.0, |p| p.step as f64);
    let place =
        |[x, y]: [f64; 2]| [CORNER[0] + PLOT[0] * x / last, CORNER[1] + PLOT[1] * (1.0 - y / most)];
    let words = |text: String, [x, y]: [f64; 2], anchor: &'static str| {
        Text::new(text).set("x", x).set("y", y).set("text-anchor", anchor)
    };
    let mut group = Group::new().set("font-family", "sans-serif").set("font-size", 12);
    group = group.add(words("nats a masked token".to_owned(), [CORNER[0], 18.0], "start"));
    for tenth in (0..=10).step_by(2) {
        let (x, y) = (last * f64::from(tenth) / 10.0, most * f64::from(tenth) / 10.0);
        let ([_, height], [across, bottom]) = (place([0.0, y]), place([x, 0.0]));
        let line = Line::new().set("x1", CORNER[0]).set("x2", CORNER[0] + PLOT[0]);
        group = group
            .add(line.set("y1", height).set("y2", height).set("stroke", "#ddd"))
            .add(words(format!("{y:.1}"), [CORNER[0] - 6.0, height + 4.0], "end"))
            .add(words(format!("{x:.0}"), [across, bottom + 18.0], "middle"));
    }
    let end = place([last, 0.0]);
    group = group.add(words("steps".to_owned(), [end[0], end[1] + 34.0], "end"));
    for (i, (name, points)) in curves.into_iter().enumerate() {
        let colour = format!("hsl({}, 80%, 40%)", 210 + 61 * i);
        let width = if i < 2 { 2.5 } else { 1.0 };
        let all: Vec<String> = points
            .into_iter()
            .map(|point| {
                let [x, y] = place(point);
                format!("{x:.1},{y:.1}")
            })
            .collect();
        let [x, y] = [CORNER[0] + PLOT[0] + 14.0, CORNER[1] + 12.0 + 20.0 * i as f64];
        let key = Line::new().set("x1", x).set("x2", x + 18.0).set("y1", y).set("y2", y);
        group = group
            .add(
                Polyline::new()
                    .set("points", all.join(" "))
                    .set("fill", "none")
                    .set("stroke", colour.clone())
                    .set("stroke-width", width),
            )
            .add(key.set("stroke", colour).set("stroke-width", width))
            .add(words(name, [x + 24.0, y + 4.0], "start"));
    }
    let paper = Rectangle::new().set("width", "100%").set("height", "100%").set("fill", "white");
    Document::new().set("viewBox", (0, 0, 760, 420)).add(paper).add(group).to_string()
}
