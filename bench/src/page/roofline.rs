//! Rooflines: how near whole layers come to what the device can do. One scale for all devices.
use super::chart::{self, Axis, Plot, Point};
use super::words::{clean, digits, load_name};
use super::{Device, name, swatch};
use crate::ceilings::{arithmetic_of, bandwidth};
use crate::file::Load;
use maud::{Markup, html};

/// A device's two ceilings.
#[derive(Clone, Copy)]
struct Roof {
    /// 10^9 bytes a second.
    memory: f64,
    /// 10^9 operations a second.
    arithmetic: f64,
}

impl Roof {
    fn of(device: &Device<'_>) -> Option<Self> {
        let c = device.adapter.ceilings.as_ref()?;
        Some(Self { memory: bandwidth(c)?, arithmetic: arithmetic_of(c)?.1 })
    }

    /// Operations per byte at which the two meet.
    fn ridge(self) -> f64 {
        self.arithmetic / self.memory
    }
}

pub(super) fn section(devices: &[Device<'_>]) -> Markup {
    let models = models(devices);
    let charts: Vec<(&Device<'_>, Option<Roof>, Vec<Point>)> =
        devices.iter().map(|d| (d, Roof::of(d), points(d, &models))).collect();
    let drawn = charts.iter().filter(|(_, roof, points)| roof.is_some() && !points.is_empty());
    let drawn: Vec<_> = drawn.collect();
    let points_of = || drawn.iter().flat_map(|(_, _, points)| points);
    let roofs = || drawn.iter().filter_map(|(_, roof, _)| *roof);
    let (low, high) = around(points_of().map(|p| p.x).chain(roofs().map(Roof::ridge)));
    let (bottom, top) = around(points_of().map(|p| p.y).chain(roofs().map(|r| r.arithmetic)));
    let x = Axis { name: "operations per byte", low, high };
    let y = Axis { name: "GFLOP/s", low: bottom, high: top };
    html! {
        section aria-labelledby="rooflines" {
            h2 id="rooflines" { "Rooflines" }
            p {
                "Each mark is a whole layer under its model's own rule. Its height is the \
                 arithmetic rate reached; its place across is the arithmetic it does for each \
                 byte that must move. The line is the most the device was measured to reach: on \
                 the slope memory is the limit, on the flat part arithmetic. All charts have one \
                 scale. Circles: one block; squares: several blocks; diamonds: prefill. Where \
                 marks lie close together some have no number; the table above has all of them. "
                @for (i, model) in models.iter().enumerate() {
                    (if i > 0 { ", " } else { "" }) (i + 1) ": " (clean(model))
                }
            }
            div.grid {
                @for (d, roof, points) in &charts {
                    figure {
                        figcaption { (swatch(d)) " " (name(d)) }
                        @match roof {
                            Some(roof) if !points.is_empty() => {
                                // Where the line of memory meets the chart's foot or left side.
                                @let start = low.max(bottom / roof.memory);
                                @let ridge = roof.ridge();
                                @let lines = [
                                    [start, start * roof.memory, ridge, roof.arithmetic],
                                    [ridge, roof.arithmetic, high, roof.arithmetic],
                                ];
                                @let title = format!("Roofline of {}", name(d));
                                @let colour = d.pattern;
                                @let title = title.as_str();
                                @let lines = lines.as_slice();
                                (chart::plot(&Plot { title, x, y, lines, points, colour }))
                            }
                            _ => p.none { "No roofline: no layer or no ceilings measured." }
                        }
                    }
                }
            }
        }
    }
}

/// Models by number, as there is no room for names.
fn models<'a>(devices: &[Device<'a>]) -> Vec<&'a str> {
    let mut names: Vec<&str> = vec![];
    for case in devices.iter().flat_map(|d| &d.adapter.cases) {
        if case.outcome.measured().is_some() && !names.contains(&case.id.model.as_str()) {
            names.push(&case.id.model);
        }
    }
    names
}

fn points(device: &Device<'_>, models: &[&str]) -> Vec<Point> {
    let headline = device.adapter.cases.iter().filter(|c| c.id.is_headline());
    let points = headline.filter_map(|case| {
        let m = case.outcome.measured()?;
        let (x, y) = (m.work.flops / m.work.bytes, m.work.flops / m.times().median_ms / 1e6);
        let number = models.iter().position(|n| *n == case.id.model)? + 1;
        let shape = match case.id.load {
            Load::Block => 0,
            Load::Batch => 1,
            Load::Prefill => 2,
        };
        let title = format!(
            "{}, {}: {} GFLOP/s at {} operations a byte",
            clean(&case.id.model),
            load_name(&case.id),
            digits(y),
            digits(x)
        );
        let usable = x.is_finite() && x > 0.0 && y.is_finite() && y > 0.0;
        usable.then(|| Point { x, y, shape, label: number.to_string(), title })
    });
    points.collect()
}

/// The values with room around them, for a logarithmic axis.
fn around(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values.fold((f64::MAX, 0f64), |(low, high), v| (low.min(v), high.max(v)));
    (low / 2.0, high * 2.0)
}
