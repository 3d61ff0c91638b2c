//! Means, spreads and tables.
use std::fmt;

/// Of a quantity over seeds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Over {
    pub(super) mean: f64,
    /// Standard deviation; 0 of a single seed.
    pub(super) deviation: f64,
    pub(super) count: usize,
}

impl Over {
    /// None of no values.
    pub(super) fn of(values: &[f64]) -> Option<Self> {
        let count = values.len();
        if count == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / count as f64;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        let deviation = (squares / (count.max(2) - 1) as f64).sqrt();
        Some(Self { mean, deviation, count })
    }

    /// With a sign, as a difference is said.
    pub(super) fn signed(self) -> String {
        let Self { mean, deviation, count } = self;
        let digits = 3;
        if count < 2 {
            format!("{mean:+.digits$}")
        } else {
            format!("{mean:+.digits$} ± {deviation:.digits$}")
        }
    }
}

impl fmt::Display for Over {
    /// With as many digits as the format says.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(3);
        write!(f, "{:.digits$}", self.mean)?;
        if self.count > 1 { write!(f, " ± {:.digits$}", self.deviation) } else { Ok(()) }
    }
}

/// A quantity with some digits, or a dash.
pub(super) fn said(value: Option<Over>, digits: usize) -> String {
    value.map_or("-".into(), |v| format!("{v:.digits$}"))
}

/// A table in Markdown.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let head: Vec<String> = head.iter().map(|cell| cell.to_string()).collect();
    let rule = format!("|{}\n", "---|".repeat(head.len()));
    let rows: String = rows.iter().map(|row| line(row)).collect();
    format!("{}{rule}{rows}", line(&head))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_and_spreads() {
        assert_eq!(Over::of(&[]), None);
        assert_eq!(Over::of(&[2.0]).unwrap().to_string(), "2.000");
        let three = Over::of(&[1.0, 2.0, 3.0]).unwrap();
        assert_eq!(format!("{three:.1}"), "2.0 ± 1.0");
        assert_eq!(three.signed(), "+2.000 ± 1.000");
        assert_eq!(
            table(&["a", "b"], &[vec!["1".into(), "2".into()]]),
            "| a | b |\n|---|---|\n| 1 | 2 |\n"
        );
    }
}
