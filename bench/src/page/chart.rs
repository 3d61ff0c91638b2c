//! Charts as SVG. Not by plotters or the `svg` crate: plotters writes fixed colours and sizes,
//! while these follow the reader's light or dark scheme through the page's style sheet, hatch
//! the bars so that devices can be told apart without colour, and say each mark's values where
//! one points at it; the `svg` crate would build the same elements that `maud` builds.
use maud::{Markup, html};

/// A number as an attribute wants it.
fn n(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").unwrap_or(&text).into()
}

fn percent(value: f64) -> String {
    n(value) + "%"
}

/// A bar alone: `share` of the width there is.
pub(super) fn bar(pattern: usize, share: f64) -> Markup {
    html! {
        svg aria-hidden="true" height="9" {
            rect width=(percent(share * 100.0)) height="9" fill={ "url(#p" (pattern) ")" } {}
        }
    }
}

/// A row of a bar chart: what stands above the bar, left and right, and below it, and its value.
pub(super) struct Bar {
    /// Index of the pattern.
    pub(super) pattern: usize,
    pub(super) left: String,
    pub(super) right: String,
    pub(super) below: String,
    /// Quartile, median, quartile.
    pub(super) value: [f64; 3],
}

const ROW: f64 = 48.0;

/// Horizontal bars on one scale from 0. Places across are shares of the width, so that a narrow
/// screen makes the bars shorter and not their text smaller.
pub(super) fn bars(title: &str, rows: &[Bar]) -> Markup {
    let most = rows.iter().flat_map(|r| r.value).fold(f64::MIN_POSITIVE, f64::max);
    let share = |v: f64| percent(v / most * 100.0);
    html! {
        svg role="img" aria-label=(title) height=(n(ROW * rows.len() as f64)) {
            @for (i, row) in rows.iter().enumerate() {
                @let y = ROW * i as f64;
                @let [q1, median, q3] = row.value;
                text.b y=(n(y + 13.0)) { (row.left) }
                text.s.e x="100%" y=(n(y + 13.0)) { (row.right) }
                rect y=(n(y + 18.0)) width=(share(median)) height="9"
                    fill={ "url(#p" (row.pattern) ")" } {}
                line.w x1=(share(q1)) x2=(share(q3)) y1=(n(y + 22.5)) y2=(n(y + 22.5)) {}
                text.s.t y=(n(y + 39.0)) { (row.below) }
            }
        }
    }
}

/// A logarithmic axis from `low` to `high`, both more than 0.
#[derive(Clone, Copy)]
pub(super) struct Axis<'a> {
    pub(super) name: &'a str,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Axis<'_> {
    /// 0 to 1 within the axis.
    fn place(&self, value: f64) -> f64 {
        ((value / self.low).log10() / (self.high / self.low).log10()).clamp(0.0, 1.0)
    }

    fn ticks(&self) -> Vec<f64> {
        let (first, last) = (self.low.log10().floor() as i32, self.high.log10().floor() as i32);
        let parts: &[f64] = if last - first > 2 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let step = ((last - first) / 6 + 1).max(1) as usize;
        let all =
            (first..=last).step_by(step).flat_map(|e| parts.iter().map(move |p| p * 10f64.powi(e)));
        all.filter(|v| (self.low..=self.high).contains(v)).collect()
    }
}

fn tick(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.0}M", v / 1e6),
        v if v >= 1e4 => format!("{:.0}k", v / 1e3),
        v if v >= 10.0 || v.fract() == 0.0 => format!("{v:.0}"),
        v if v >= 1e-4 => {
            let text = format!("{v:.4}");
            text.trim_end_matches('0').trim_end_matches('.').into()
        }
        v => format!("{v:.0e}"),
    }
}

/// A point, its shape (0 circle, 1 square, 2 diamond) and what stands beside it.
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) shape: usize,
    pub(super) label: String,
    /// Said where one points at it.
    pub(super) title: String,
}

/// Points, and straight lines from one place (x, y) to another.
pub(super) struct Plot<'a> {
    pub(super) title: &'a str,
    pub(super) x: Axis<'a>,
    pub(super) y: Axis<'a>,
    pub(super) lines: &'a [[f64; 4]],
    pub(super) points: &'a [Point],
    pub(super) colour: usize,
}

/// The drawing and the plot within it. It is drawn to scale as a whole, so labels that do not
/// touch here do not touch on any screen.
const SIZE: [f64; 2] = [360.0, 262.0];
const LEFT: f64 = 40.0;
const RIGHT: f64 = 352.0;
const TOP: f64 = 20.0;
const FOOT: f64 = 226.0;

pub(super) fn plot(plot: &Plot<'_>) -> Markup {
    let Plot { x, y, .. } = plot;
    let across = |v: f64| LEFT + (RIGHT - LEFT) * x.place(v);
    let down = |v: f64| FOOT - (FOOT - TOP) * y.place(v);
    let marks: Vec<[f64; 2]> = plot.points.iter().map(|p| [across(p.x), down(p.y)]).collect();
    let texts: Vec<&str> = plot.points.iter().map(|p| p.label.as_str()).collect();
    html! {
        svg.plot role="img" aria-label=(plot.title) viewBox={ "0 0 " (SIZE[0]) " " (SIZE[1]) } {
            @for v in x.ticks() {
                line.g x1=(n(across(v))) x2=(n(across(v))) y1=(n(TOP)) y2=(n(FOOT)) {}
                text.s.m x=(n(across(v))) y=(n(FOOT + 15.0)) { (tick(v)) }
            }
            @for v in y.ticks() {
                line.g x1=(n(LEFT)) x2=(n(RIGHT)) y1=(n(down(v))) y2=(n(down(v))) {}
                text.s.e x=(n(LEFT - 5.0)) y=(n(down(v) + 4.0)) { (tick(v)) }
            }
            text.s y="11" { (y.name) }
            text.s.m x=(n((LEFT + RIGHT) / 2.0)) y=(n(FOOT + 32.0)) { (x.name) }
            @for [x1, y1, x2, y2] in plot.lines {
                line.r x1=(n(across(*x1))) x2=(n(across(*x2)))
                    y1=(n(down(*y1))) y2=(n(down(*y2))) {}
            }
            @for (point, [left, top]) in plot.points.iter().zip(&marks) {
                g transform={ "translate(" (n(*left)) " " (n(*top)) ")" } {
                    title { (point.title) }
                    path.p fill={ "var(--c" (plot.colour % PATTERNS) ")" }
                        d=(SHAPES[point.shape % SHAPES.len()]) {}
                }
            }
            @for (point, place) in plot.points.iter().zip(labels(&marks, &texts)) {
                @if let Some([left, foot]) = place {
                    text.l x=(n(left)) y=(n(foot)) { (point.label) }
                }
            }
        }
    }
}

/// About the points themselves.
const SHAPES: [&str; 3] =
    ["M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "M-4.5-4.5h9v9h-9z", "M0-6.5L6.5 0L0 6.5L-6.5 0z"];

/// Left, top, right, bottom.
type Box = [f64; 4];

fn touch(a: &Box, b: &Box) -> bool {
    a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]
}

/// Where each label's base line begins: beside its mark, free of all marks and other labels. None
/// where no place is free.
fn labels(marks: &[[f64; 2]], texts: &[&str]) -> Vec<Option<[f64; 2]>> {
    // Half a mark; a digit's width and a line's height.
    const MARK: f64 = 6.5;
    const WIDE: f64 = 7.0;
    const HIGH: f64 = 11.0;
    let mut taken: Vec<Box> =
        marks.iter().map(|[x, y]| [x - MARK, y - MARK, x + MARK, y + MARK]).collect();
    let place = |([x, y], text): (&[f64; 2], &&str)| {
        let wide = WIDE * text.chars().count() as f64;
        let (middle, right, left) = (x - wide / 2.0, x + MARK + 1.0, x - MARK - 1.0 - wide);
        let (level, above, below) = (y - HIGH / 2.0, y - MARK - HIGH, y + MARK);
        let places = [
            [right, level],
            [left, level],
            [middle, above],
            [middle, below],
            [right, above],
            [right, below],
            [left, above],
            [left, below],
        ];
        let free = places.into_iter().find_map(|[left, top]| {
            let text: Box = [left, top, left + wide, top + HIGH];
            let inside = left >= LEFT && left + wide <= SIZE[0] && top >= 0.0 && top + HIGH <= FOOT;
            (inside && !taken.iter().any(|other| touch(&text, other))).then_some(text)
        })?;
        taken.push(free);
        Some([free[0], free[3] - 1.5])
    };
    marks.iter().zip(texts).map(place).collect()
}

/// Patterns there are; more devices share them.
pub(super) const PATTERNS: usize = 6;

/// The patterns of the devices' bars, to be told apart without colour.
pub(super) fn patterns() -> Markup {
    let marks = ["", "M0 8L8 0", "M4 0V8", "M0 4H8", "M0 0L8 8M0 8L8 0", "M4 3v2"];
    html! {
        svg.hidden width="0" height="0" aria-hidden="true" {
            defs {
                @for (i, mark) in marks.iter().enumerate() {
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
    fn places_stay_within_their_axis() {
        let axis = Axis { name: "", low: 1.0, high: 100.0 };
        assert_eq!([1.0, 10.0, 100.0, 1e9, 1e-9].map(|v| axis.place(v)), [0.0, 0.5, 1.0, 1.0, 0.0]);
        assert_eq!(axis.ticks(), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        let long = Axis { name: "", low: 0.5, high: 2e4 };
        assert_eq!(long.ticks(), [1.0, 10.0, 100.0, 1e3, 1e4]);
        assert_eq!(["0.5", "1", "20k", "3M"], [0.5, 1.0, 2e4, 3e6].map(tick)[..]);
    }

    #[test]
    fn labels_touch_neither_each_other_nor_a_mark() {
        // Marks that lie close together: not all of their labels find a place.
        let marks: Vec<[f64; 2]> =
            (0..30).map(|i| [150.0 + 7.0 * (i % 6) as f64, 100.0 + 5.0 * (i / 6) as f64]).collect();
        let texts = vec!["12"; marks.len()];
        let placed = labels(&marks, &texts);
        let boxes: Vec<Box> =
            placed.iter().flatten().map(|[x, y]| [*x, y - 9.5, x + 14.0, y + 1.5]).collect();
        assert!(boxes.len() > 4 && boxes.len() < marks.len(), "{}", boxes.len());
        for (i, a) in boxes.iter().enumerate() {
            assert!(boxes[..i].iter().all(|b| !touch(a, b)), "{a:?} touches a label");
            let inside =
                |m: &&[f64; 2]| touch(a, &[m[0] - 6.0, m[1] - 6.0, m[0] + 6.0, m[1] + 6.0]);
            assert!(marks.iter().find(inside).is_none(), "{a:?} touches a mark");
        }
        // One that stands alone is right of its mark, unless the drawing ends there.
        assert!(labels(&[[100.0, 100.0]], &["1"])[0].is_some_and(|at| at[0] > 100.0));
        assert!(labels(&[[350.0, 100.0]], &["123"])[0].is_some_and(|at| at[0] < 350.0));
    }
}
