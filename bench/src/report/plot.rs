//! Bars and lines as SVG.

use std::fmt::Write as _;

use crate::stats::Spread;

/// A bar with its interval, its rounds as dots, and a text at its end.
pub(super) struct Bar {
    pub name: String,
    /// Number of its colour: what is compared has the same one in all plots.
    pub colour: usize,
    pub spread: Spread,
    pub rounds: Vec<f64>,
    pub text: String,
}

/// A line over sizes, which are spread by their logarithm.
pub(super) struct Line {
    pub name: String,
    pub colour: usize,
    pub points: Vec<(f64, Spread)>,
}

const WIDTH: f64 = 560.0;
const NAME_WIDTH: f64 = 130.0;
const TEXT_WIDTH: f64 = 190.0;
const ROW_HEIGHT: f64 = 24.0;
/// Told apart by people who see few colours too (Okabe and Ito).
const COLOURS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a8d00",
];

/// Horizontal bars, one below the other, from 0.
pub(super) fn bars(rows: &[Bar]) -> String {
    let most = rows
        .iter()
        .flat_map(|row| row.rounds.iter().copied().chain([row.spread.high]))
        .fold(0.0_f64, f64::max);
    let scale = (WIDTH - NAME_WIDTH - TEXT_WIDTH) / most.max(f64::MIN_POSITIVE);
    let height = ROW_HEIGHT * rows.len() as f64 + 6.0;
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\">");
    for (number, row) in rows.iter().enumerate() {
        let top = ROW_HEIGHT * number as f64 + 4.0;
        let middle = top + ROW_HEIGHT / 2.0 - 2.0;
        let colour = COLOURS[row.colour % COLOURS.len()];
        let at = |value: f64| NAME_WIDTH + value * scale;
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{NAME_WIDTH}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\" fill-opacity=\".55\"/>",
            NAME_WIDTH - 6.0,
            middle + 4.0,
            escaped(&row.name),
            row.spread.median * scale,
            ROW_HEIGHT - 6.0,
        );
        for round in &row.rounds {
            let _ = write!(
                svg,
                "<circle cx=\"{:.1}\" cy=\"{middle:.1}\" r=\"2\" fill=\"{colour}\"/>",
                at(*round)
            );
        }
        let _ = write!(
            svg,
            "<path d=\"M{low:.1} {middle:.1}H{high:.1}M{low:.1} {up:.1}V{down:.1}M{high:.1} {up:.1}V{down:.1}\" stroke=\"#1d2330\" fill=\"none\"/>\
             <text x=\"{end:.1}\" y=\"{base:.1}\" fill=\"#5b6472\">{text}</text>",
            low = at(row.spread.low),
            high = at(row.spread.high),
            up = middle - 4.0,
            down = middle + 4.0,
            end = at(most) + 8.0,
            base = middle + 4.0,
            text = escaped(&row.text),
        );
    }
    svg.push_str("</svg>");
    svg
}

/// Lines from 0 up, with the interval of each point.
pub(super) fn lines(series: &[Line]) -> String {
    const HEIGHT: f64 = 260.0;
    const LEFT: f64 = 60.0;
    const RIGHT: f64 = 130.0;
    const BOTTOM: f64 = 30.0;
    let points = || series.iter().flat_map(|line| &line.points);
    let most = points().map(|(_, spread)| spread.high).fold(0.0, f64::max);
    let first = points()
        .map(|(size, _)| *size)
        .fold(f64::INFINITY, f64::min);
    let last = points().map(|(size, _)| *size).fold(0.0, f64::max);
    let decades = (last / first).log10().max(f64::MIN_POSITIVE);
    let across = |size: f64| LEFT + (size / first).log10() / decades * (WIDTH - LEFT - RIGHT);
    let up =
        |value: f64| 10.0 + (1.0 - value / most.max(f64::MIN_POSITIVE)) * (HEIGHT - BOTTOM - 10.0);
    let mut svg = format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">");
    for share in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let value = most * share;
        let _ = write!(
            svg,
            "<path d=\"M{LEFT} {y:.1}H{:.1}\" stroke=\"#e3e7ee\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#5b6472\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            up(value) + 4.0,
            short(value),
            y = up(value),
        );
    }
    let mut sizes: Vec<f64> = points().map(|(size, _)| *size).collect();
    sizes.sort_by(f64::total_cmp);
    sizes.dedup();
    for size in sizes {
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#5b6472\">{}</text>",
            across(size),
            HEIGHT - 8.0,
            short(size)
        );
    }
    for (number, line) in series.iter().enumerate() {
        let colour = COLOURS[line.colour % COLOURS.len()];
        let path: Vec<String> = line
            .points
            .iter()
            .map(|(size, spread)| format!("{:.1} {:.1}", across(*size), up(spread.median)))
            .collect();
        let _ = write!(
            svg,
            "<path d=\"M{}\" stroke=\"{colour}\" stroke-width=\"2\" fill=\"none\"/>",
            path.join("L")
        );
        for (size, spread) in &line.points {
            let x = across(*size);
            let _ = write!(
                svg,
                "<path d=\"M{x:.1} {:.1}V{:.1}\" stroke=\"{colour}\"/><circle cx=\"{x:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>",
                up(spread.low),
                up(spread.high),
                up(spread.median)
            );
        }
        let legend = 16.0 + 18.0 * number as f64;
        let _ = write!(
            svg,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            WIDTH - RIGHT + 12.0,
            legend - 9.0,
            WIDTH - RIGHT + 27.0,
            legend,
            escaped(&line.name)
        );
    }
    svg.push_str("</svg>");
    svg
}

fn short(value: f64) -> String {
    match value {
        big if big >= 1e9 => format!("{:.1}G", big / 1e9),
        big if big >= 1e6 => format!("{:.1}M", big / 1e6),
        big if big >= 1e4 => format!("{:.0}k", big / 1e3),
        big if big >= 100.0 => format!("{big:.0}"),
        small => format!("{small:.2}")
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_owned(),
    }
}

/// Text that is no markup.
pub(super) fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            other => safe.push(other),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_never_markup_and_every_round_is_a_dot() {
        let bar = Bar {
            name: "<script>".into(),
            colour: 0,
            spread: Spread {
                median: 2.0,
                low: 1.0,
                high: 3.0,
            },
            rounds: vec![1.0, 2.0, 3.0],
            text: "a & b".into(),
        };
        let svg = bars(&[bar]);
        assert!(
            svg.contains("&lt;script&gt;") && svg.contains("a &amp; b"),
            "{svg}"
        );
        assert_eq!(svg.matches("<circle").count(), 3);
    }

    #[test]
    fn a_line_stays_inside_its_plot() {
        let spread = |median: f64| Spread {
            median,
            low: median * 0.9,
            high: median * 1.1,
        };
        let points = vec![
            (10.0, spread(5.0)),
            (1000.0, spread(5.0)),
            (100_000.0, spread(50.0)),
        ];
        let svg = lines(&[Line {
            name: "a".into(),
            colour: 9,
            points,
        }]);
        assert!(svg.contains("M60.0 ") && svg.contains("100k"), "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
