//! Charts as SVG whose width is the page's: places across are shares of the width, so that a narrow screen makes a chart
//! narrower and not its text smaller.
use maud::{Markup, html};

/// A number as an attribute wants it.
fn n(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").unwrap_or(&text).into()
}

fn percent(value: f64) -> String {
    n(value) + "%"
}

/// Milliseconds in words, three digits.
pub(crate) fn time(ms: f64) -> String {
    let (value, unit) = match ms {
        v if v < 0.1 => (v * 1e3, "µs"),
        v if v < 1e3 => (v, "ms"),
        v => (v / 1e3, "s"),
    };
    format!("{} {unit}", digits(value))
}

/// Three digits.
pub(crate) fn digits(value: f64) -> String {
    match value {
        v if v >= 99.95 => format!("{v:.0}"),
        v if v >= 9.995 => format!("{v:.1}"),
        v if v >= 0.0995 || v == 0.0 => format!("{v:.2}"),
        v => format!("{v:.2e}"),
    }
}

/// A row of a bar chart: what stands above the bar, left and right, and below it, and its value with quartiles.
pub(crate) struct Bar {
    /// Index of the pattern.
    pub(crate) pattern: usize,
    pub(crate) left: String,
    pub(crate) right: String,
    pub(crate) below: String,
    /// Quartile, median, quartile.
    pub(crate) value: [f64; 3],
}

const ROW: f64 = 48.0;

/// Horizontal bars on one scale from 0.
pub(crate) fn bars(title: &str, rows: &[Bar]) -> Markup {
    let most = rows.iter().flat_map(|r| r.value).fold(f64::MIN_POSITIVE, f64::max);
    let share = |v: f64| percent(v / most * 100.0);
    html! {
        svg role="img" aria-label=(title) height=(n(ROW * rows.len() as f64)) {
            @for (i, row) in rows.iter().enumerate() {
                @let y = ROW * i as f64;
                @let [q1, median, q3] = row.value;
                text.b y=(n(y + 13.0)) { (row.left) }
                text.s.e x="100%" y=(n(y + 13.0)) { (row.right) }
                rect y=(n(y + 18.0)) width=(share(median)) height="9" fill={ "url(#p" (row.pattern) ")" } {}
                line.w x1=(share(q1)) x2=(share(q3)) y1=(n(y + 22.5)) y2=(n(y + 22.5)) {}
                text.s.t y=(n(y + 39.0)) { (row.below) }
            }
        }
    }
}

/// An axis: from `low` to `high`, both more than 0 where it is logarithmic.
#[derive(Clone, Copy)]
pub(crate) struct Axis<'a> {
    pub(crate) name: &'a str,
    pub(crate) low: f64,
    pub(crate) high: f64,
    pub(crate) log: bool,
}

impl Axis<'_> {
    /// 0 to 1 within the axis.
    fn place(&self, value: f64) -> f64 {
        let scale = |v: f64| if self.log { v.log10() } else { v };
        ((scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))).clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let (first, last) = (self.low.log10().floor() as i32, self.high.log10().floor() as i32);
            let parts: &[f64] = if last - first > 2 { &[1.0] } else { &[1.0, 2.0, 5.0] };
            let step = ((last - first) / 6 + 1).max(1) as usize;
            let all = (first..=last)
                .step_by(step)
                .flat_map(|e| parts.iter().map(move |p| p * 10f64.powi(e)));
            return all.filter(|v| (self.low..=self.high).contains(v)).collect();
        }
        let rough = (self.high - self.low) / 4.0;
        let unit = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * unit).into_iter().find(|s| *s >= rough);
        let step = step.unwrap_or(10.0 * unit);
        let first = (self.low / step).ceil() as i64;
        (0..8).map(|i| (first + i) as f64 * step).take_while(|v| *v <= self.high).collect()
    }
}

fn tick(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.0}M", v / 1e6),
        v if v >= 1e4 => format!("{:.0}k", v / 1e3),
        v if v >= 10.0 || v == 0.0 || v.fract() == 0.0 => format!("{v:.0}"),
        v if v >= 1e-4 => {
            let text = format!("{v:.4}");
            text.trim_end_matches('0').trim_end_matches('.').into()
        }
        v => format!("{v:.0e}"),
    }
}

/// A point, its shape (0 circle, 1 square, 2 diamond) and what stands beside it.
pub(crate) struct Point {
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) shape: usize,
    pub(crate) label: String,
    pub(crate) title: String,
}

/// The plot within the chart: shares of the width, and pixels of the height.
const LEFT: f64 = 14.0;
const WIDE: f64 = 83.0;
const TOP: f64 = 10.0;
const HIGH: f64 = 210.0;

/// Points, and straight lines from one place to another.
pub(crate) fn plot(
    title: &str,
    [x, y]: [Axis<'_>; 2],
    lines: &[[f64; 4]],
    points: &[Point],
    colour: usize,
) -> Markup {
    let across = |v: f64| percent(LEFT + WIDE * x.place(v));
    let down = |v: f64| TOP + HIGH * (1.0 - y.place(v));
    let foot = TOP + HIGH;
    let labels = labels(&x, points, &down);
    html! {
        svg role="img" aria-label=(title) height=(n(foot + 38.0)) {
            @for v in x.ticks() {
                line.g x1=(across(v)) x2=(across(v)) y1=(n(TOP)) y2=(n(foot)) {}
                text.s.m x=(across(v)) y=(n(foot + 15.0)) { (tick(v)) }
            }
            @for v in y.ticks() {
                line.g x1=(percent(LEFT)) x2=(percent(LEFT + WIDE)) y1=(n(down(v))) y2=(n(down(v))) {}
                text.s.e x=(percent(LEFT)) dx="-5" y=(n(down(v) + 4.0)) { (tick(v)) }
            }
            text.s.m x=(percent(LEFT + WIDE / 2.0)) y=(n(foot + 33.0)) { (x.name) }
            @for [x1, y1, x2, y2] in lines {
                line.r x1=(across(*x1)) x2=(across(*x2)) y1=(n(down(*y1))) y2=(n(down(*y2))) {}
            }
            @for (point, (label_y, right)) in points.iter().zip(labels) {
                svg x=(across(point.x)) y=(n(down(point.y))) height="1" {
                    title { (point.title) }
                    path.p fill={ "var(--c" (colour % PATTERNS) ")" } d=(SHAPES[point.shape % SHAPES.len()]) {}
                }
                @if right {
                    text x=(across(point.x)) dx="8" y=(n(label_y)) { (point.label) }
                } @else {
                    text.e x=(across(point.x)) dx="-8" y=(n(label_y)) { (point.label) }
                }
            }
        }
    }
}

/// About the points themselves.
const SHAPES: [&str; 3] =
    ["M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "M-4.5-4.5h9v9h-9z", "M0-6.5L6.5 0L0 6.5L-6.5 0z"];

/// The base line of each label, and whether it stands right of its point: pushed down where it would cover another.
fn labels(x: &Axis<'_>, points: &[Point], down: &dyn Fn(f64) -> f64) -> Vec<(f64, bool)> {
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_by(|&a, &b| down(points[a].y).total_cmp(&down(points[b].y)));
    let mut placed: Vec<(f64, f64, f64)> = vec![];
    let mut places = vec![(0.0, true); points.len()];
    for i in order {
        let at = x.place(points[i].x);
        let right = at < 0.6;
        // About a character, as a share of the width of a narrow chart.
        let long = 0.024 * points[i].label.chars().count() as f64;
        let (from, to) = if right { (at, at + long) } else { (at - long, at) };
        let mut y = down(points[i].y) + 4.0;
        placed.sort_by(|a, b| a.2.total_cmp(&b.2));
        for &(a, b, other) in &placed {
            if from < b && a < to && (y - other).abs() < 12.0 {
                y = other + 12.0;
            }
        }
        placed.push((from, to, y));
        places[i] = (y, right);
    }
    places
}

/// Patterns there are; more devices share them.
pub(crate) const PATTERNS: usize = 6;

/// The patterns of the devices' bars, to be told apart without colour.
pub(crate) fn patterns() -> Markup {
    let voters = ["", "M0 8L8 0", "M4 0V8", "M0 4H8", "M0 0L8 8M0 8L8 0", "M4 3v2"];
    html! {
        svg width="0" height="0" style="position:absolute;width:0" aria-hidden="true" {
            defs {
                @for (i, mark) in voters.iter().enumerate() {
                    pattern id={ "p" (i) } width="8" height="8" patternUnits="userSpaceOnUse" {
                        rect width="8" height="8" fill={ "var(--c" (i) ")" } {}
                        path d=(mark) stroke="var(--bg)" stroke-width="2" fill="none" {}
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(
            [0.0123, 4.5678, 99.96, 1234.0].map(time),
            ["12.3 µs", "4.57 ms", "100 ms", "1.23 s"]
        );
        assert_eq!(["0", "0.5", "1", "20k", "3M"], [0.0, 0.5, 1.0, 2e4, 3e6].map(tick)[..]);
    }

    #[test]
    fn places_stay_within_their_axis() {
        let log = Axis { name: "", low: 1.0, high: 100.0, log: true };
        assert_eq!([1.0, 10.0, 100.0, 1e9, 1e-9].map(|v| log.place(v)), [0.0, 0.5, 1.0, 1.0, 0.0]);
        assert_eq!(log.ticks(), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        let long = Axis { name: "", low: 0.5, high: 2e4, log: true };
        assert_eq!(long.ticks(), [1.0, 10.0, 100.0, 1e3, 1e4]);
        let line = Axis { name: "", low: 0.0, high: 70.0, log: false };
        assert_eq!(line.ticks(), [0.0, 20.0, 40.0, 60.0]);
    }

    #[test]
    fn labels_of_one_place_do_not_cover_each_other() {
        let axis = Axis { name: "", low: 0.0, high: 1.0, log: false };
        let point =
            || Point { x: 0.1, y: 0.5, shape: 0, label: "a rule".into(), title: String::new() };
        let mut at: Vec<f64> =
            labels(&axis, &[point(), point(), point()], &|_| 100.0).iter().map(|l| l.0).collect();
        at.sort_by(f64::total_cmp);
        assert_eq!(at, [104.0, 116.0, 128.0]);
    }
}
