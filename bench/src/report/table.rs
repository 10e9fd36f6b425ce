//! Reports as text: a table per section, a row per case, a column per label and per quantity.

use std::fmt::{self, Write as _};

use super::{Better, Figure, Report};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.machine)?;
        let settings: Vec<String> = self
            .settings
            .iter()
            .map(|(name, value)| format!("{name} {value}"))
            .collect();
        writeln!(f, "{}", settings.join(", "))?;
        writeln!(
            f,
            "Medians of rounds; ratios are within the run, above 1 is better, +- half of the 95 % interval."
        )?;
        for section in sections(&self.figures) {
            let figures: Vec<&Figure> = self
                .figures
                .iter()
                .filter(|figure| figure.section == section)
                .collect();
            write!(f, "\n{section}\n{}", table(&figures))?;
        }
        if !self.growth.is_empty() {
            writeln!(
                f,
                "\ngrowth with the cluster (exponent: 0 is flat, 1 proportional)"
            )?;
            for growth in &self.growth {
                writeln!(f, "{:+.2}  {}", growth.exponent, growth.of)?;
            }
        }
        if !self.notes.is_empty() {
            writeln!(f, "\nleft out")?;
            for note in &self.notes {
                writeln!(f, "  {note}")?;
            }
        }
        writeln!(f)?;
        self.held.iter().try_for_each(|held| writeln!(f, "{held}"))
    }
}

/// The sections of figures, in the order of their first one.
pub(super) fn sections(figures: &[Figure]) -> Vec<&str> {
    let mut found = Vec::new();
    for figure in figures {
        if !found.contains(&figure.section.as_str()) {
            found.push(&figure.section);
        }
    }
    found
}

/// A number in a unit that keeps it short.
pub(super) fn shown(value: f64, unit: &str) -> String {
    let (value, unit) = match unit {
        "B/s" => (value * 8.0 / 1e9, "Gbit/s"),
        "s" if value < 0.001 => (value * 1e6, "us"),
        "s" if value < 1.0 => (value * 1e3, "ms"),
        "B" if value >= 1e6 => (value / 1e6, "MB"),
        unit => (value, unit),
    };
    let digits = match value.abs() {
        big if big >= 1000.0 => 0,
        middle if middle >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$} {unit}")
}

fn table(figures: &[&Figure]) -> String {
    let mut labels: Vec<&str> = Vec::new();
    let mut quantities: Vec<&str> = Vec::new();
    let mut cases: Vec<&[(String, String)]> = Vec::new();
    let mut relative: Vec<&str> = Vec::new();
    for figure in figures {
        for (key, _) in &figure.labels {
            if !labels.contains(&key.as_str()) {
                labels.push(key);
            }
        }
        if !quantities.contains(&figure.quantity.as_str()) {
            quantities.push(&figure.quantity);
        }
        if !cases.contains(&figure.labels.as_slice()) {
            cases.push(&figure.labels);
        }
        if let Some(other) = &figure.relative
            && !relative.contains(&other.to.as_str())
        {
            relative.push(&other.to);
        }
    }
    let mut head: Vec<String> = labels
        .iter()
        .chain(&quantities)
        .map(ToString::to_string)
        .collect();
    head.extend(relative.iter().map(|to| format!("to {to}")));
    let mut rows = vec![head];
    for case in cases {
        let of = |quantity: &str| {
            let mut own = figures.iter().filter(|figure| figure.labels == case);
            own.find(|figure| figure.quantity == quantity)
        };
        let mut row: Vec<String> = labels
            .iter()
            .map(|label| {
                let mut own = case.iter();
                own.find(|(key, _)| key == label)
                    .map_or_else(String::new, |(_, value)| value.clone())
            })
            .collect();
        row.extend(quantities.iter().map(|quantity| {
            of(quantity).map_or_else(String::new, |figure| {
                shown(figure.spread.median, &figure.unit)
            })
        }));
        row.extend(relative.iter().map(|to| {
            // Latencies before rates: a stall of the machine moves a mean, and hardly a median.
            let mut own: Vec<_> = figures
                .iter()
                .filter(|figure| figure.labels == case)
                .filter_map(|figure| Some((figure, figure.relative.as_ref()?)))
                .filter(|(_, other)| other.to == *to)
                .collect();
            own.sort_by_key(|(figure, _)| figure.better == Better::Higher);
            own.first().map_or_else(String::new, |(_, other)| {
                format!(
                    "{:.3} +-{:.1}%",
                    other.spread.median,
                    other.spread.relative_width() * 50.0
                )
            })
        }));
        rows.push(row);
    }
    aligned(&rows)
}

fn aligned(rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Machine;

    #[test]
    fn a_report_survives_json_and_prints_a_row_per_case() {
        let machine = Machine {
            kernel: "6.1".into(),
            cpu: "x".into(),
            cpus: 2,
            memory_mb: 1000,
            is_virtual: true,
            load_before: 0.1,
        };
        let mut report = Report::new("service", machine);
        for (path, us) in [("direct", 16.0), ("socket", 16.1)] {
            let labels = [("path", path.to_owned())];
            for (quantity, unit, better, value) in [
                ("rate", "/s", Better::Higher, 1e6 / us),
                ("p50", "us", Better::Lower, us),
            ] {
                report.figures.extend(
                    Figure::new("traffic", &labels, (quantity, unit, better), vec![value; 3]).map(
                        |figure| match (quantity, path) {
                            ("p50", "socket") => figure.beside("direct", &[16.0; 3]),
                            _ => figure,
                        },
                    ),
                );
            }
        }
        let text = serde_json::to_string(&report).expect("a report is JSON");
        let back: Report = serde_json::from_str(&text).expect("and comes back");
        assert_eq!(back.to_string(), report.to_string());
        let printed = back.to_string();
        assert!(
            printed.contains("path    rate      p50      to direct"),
            "{printed}"
        );
        assert!(
            printed.contains("socket  62112 /s  16.1 us  0.994 +-0.0%"),
            "{printed}"
        );
    }
}
