//! Curves as SVG.
use crate::Outcome;
use plotters::prelude as plot;
use plotters::prelude::{
    ChartBuilder, Color, IntoDrawingArea, LineSeries, PathElement, Polygon, SVGBackend,
};

/// A line, and the band around it.
pub struct Curve {
    pub name: String,
    pub points: Vec<(f64, f64)>,
    /// Least and most at each point; none for a line alone.
    pub band: Vec<[f64; 2]>,
}

impl Curve {
    /// A line alone.
    pub fn thin(name: String, points: Vec<(f64, f64)>) -> Self {
        Self { name, points, band: vec![] }
    }
}

/// Curves over one axis.
pub struct Chart {
    pub x: String,
    pub y: String,
    pub curves: Vec<Curve>,
    /// Whether the axis of values begins at 0.
    pub from_zero: bool,
}

impl Chart {
    /// As SVG.
    pub fn draw(&self) -> Outcome<String> {
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, (820, 440)).into_drawing_area();
            root.fill(&plot::WHITE)?;
            let [xs, ys] = self.ranges();
            let mut chart = ChartBuilder::on(&root)
                .margin(12)
                .margin_right(220)
                .x_label_area_size(40)
                .y_label_area_size(56)
                .build_cartesian_2d(xs[0]..xs[1], ys[0]..ys[1])?;
            chart.configure_mesh().x_desc(&self.x).y_desc(&self.y).max_light_lines(0).draw()?;
            for (i, curve) in self.curves.iter().enumerate() {
                let colour = plot::HSLColor((0.58 + 0.17 * i as f64).fract(), 0.8, 0.4);
                let band = || curve.points.iter().zip(&curve.band);
                let lower = band().map(|(&(x, _), b)| (x, b[0]));
                let upper = band().rev().map(|(&(x, _), b)| (x, b[1]));
                let outline: Vec<(f64, f64)> = lower.chain(upper).collect();
                if !outline.is_empty() {
                    chart.draw_series([Polygon::new(outline, colour.mix(0.15))])?;
                }
                let line = curve.points.iter().copied().filter(|(_, y)| y.is_finite());
                chart.draw_series(LineSeries::new(line, colour.stroke_width(2)))?;
                let y = 24 + 20 * i as i32;
                root.draw(&PathElement::new([(612, y + 6), (632, y + 6)], colour.stroke_width(2)))?;
                root.draw(&plot::Text::new(curve.name.clone(), (638, y), ("sans-serif", 13)))?;
            }
            root.present()?;
        }
        Ok(svg)
    }

    /// Least and most along both axes.
    fn ranges(&self) -> [[f64; 2]; 2] {
        let points = || self.curves.iter().flat_map(|c| &c.points);
        let bands = self.curves.iter().flat_map(|c| &c.band).flatten().copied();
        let xs = range(points().map(|p| p.0));
        let mut ys = range(points().map(|p| p.1).chain(bands));
        let room = 0.04 * (ys[1] - ys[0]).max(1e-6);
        ys = [ys[0] - room, ys[1] + room];
        if self.from_zero {
            ys[0] = 0.0;
        }
        [[xs[0], xs[1].max(xs[0] + 1e-6)], ys]
    }
}

fn range(values: impl Iterator<Item = f64>) -> [f64; 2] {
    let both =
        values.filter(|v| v.is_finite()).fold(None, |range: Option<[f64; 2]>, v| match range {
            None => Some([v, v]),
            Some([low, high]) => Some([f64::min(low, v), f64::max(high, v)]),
        });
    both.unwrap_or([0.0, 1.0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_is_an_svg_with_every_name() {
        let curve = |name: &str, y| Curve {
            name: name.into(),
            points: vec![(0.0, y), (1.0, f64::NAN), (2.0, y)],
            band: vec![[y - 1.0, y + 1.0]; 3],
        };
        let curves = vec![curve("one", 1.0), curve("two", 5.0)];
        let chart = Chart { x: "x".into(), y: "y".into(), curves, from_zero: false };
        assert_eq!(chart.ranges()[0], [0.0, 2.0]);
        assert!(chart.ranges()[1][0] < 0.0 && chart.ranges()[1][1] > 6.0);
        let svg = chart.draw().unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("one") && svg.contains("two"));
    }
}
