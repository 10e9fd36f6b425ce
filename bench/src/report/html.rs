//! A report as one page that needs nothing beside it: plots are drawn here as SVG, nothing is fetched, and no script runs.
//!
//! The last label of a figure is what is compared in a plot (the path, the subject); the labels before it tell plots apart. A label
//! `services` becomes the axis of a second plot where there are several.

use std::fmt::Write as _;

use super::plot::{Bar, Line, bars, escaped, lines};
use super::table::{sections, shown};
use super::{Figure, Report};

const STYLE: &str = "
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1080px;padding:0 1rem;color:#1d2330;background:#fff}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #d9dde5}
p.machine{color:#5b6472;margin-top:0}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(500px,1fr));gap:1.2rem}
figure{margin:0}figcaption{font-weight:600;font-size:.9rem}
svg{width:100%;height:auto;font:12px system-ui,sans-serif}
table{border-collapse:collapse;font-size:.85rem;width:100%}
td,th{padding:.15rem .6rem;text-align:left;border-bottom:1px solid #eceff4}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
.ok{color:#18794e}.miss{color:#b42318;font-weight:600}
details{margin-top:.8rem}summary{cursor:pointer;color:#3b5bdb}
";

/// Labels that say how large a cluster is.
const SIZE: [&str; 2] = ["services", "endpoints"];

/// The page.
pub(super) fn page(report: &Report) -> String {
    let title = format!("Keelway: bench {}", escaped(&report.bench));
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>{STYLE}</style></head><body>\n\
         <h1>{title}</h1>\n<p class=\"machine\">version {}; {}</p>\n",
        escaped(&report.version),
        escaped(&report.machine.to_string())
    );
    let settings: Vec<String> = report
        .settings
        .iter()
        .map(|(name, value)| format!("{} {}", escaped(name), escaped(value)))
        .collect();
    let _ = writeln!(
        page,
        "<p>Medians of rounds; whiskers are the 95 % interval of the median, dots are rounds. Ratios are taken within the run: 1 is as \
         good as what is compared with, more is better. Settings: {}.</p>",
        settings.join(", ")
    );
    held(&mut page, report);
    for section in sections(&report.figures) {
        let figures: Vec<&Figure> = report
            .figures
            .iter()
            .filter(|figure| figure.section == section)
            .collect();
        let _ = writeln!(page, "<h2>{}</h2>\n<div class=\"plots\">", escaped(section));
        for plot in plots(&figures) {
            page.push_str(&plot);
        }
        page.push_str("</div>\n");
        table(&mut page, &figures);
    }
    if !report.growth.is_empty() {
        page.push_str("<h2>How cost grows with the cluster</h2>\n<table><tr><th>of</th><th class=\"number\">exponent (0 flat, 1 proportional)</th></tr>\n");
        for growth in &report.growth {
            let _ = writeln!(
                page,
                "<tr><td>{}</td><td class=\"number\">{:+.2}</td></tr>",
                escaped(&growth.of),
                growth.exponent
            );
        }
        page.push_str("</table>\n");
    }
    if !report.notes.is_empty() {
        page.push_str("<h2>Left out</h2>\n<ul>\n");
        for note in &report.notes {
            let _ = writeln!(page, "<li>{}</li>", escaped(note));
        }
        page.push_str("</ul>\n");
    }
    page.push_str("</body></html>\n");
    page
}

fn held(page: &mut String, report: &Report) {
    let met = report.held.iter().filter(|held| held.ok).count();
    let _ = writeln!(
        page,
        "<h2>What the project is held to: {met} of {} met</h2>\n<table><tr><th>figure</th><th class=\"number\">target</th>\
         <th class=\"number\">is</th><th class=\"number\">interval</th><th></th></tr>",
        report.held.len()
    );
    for held in &report.held {
        let interval = held.spread.map_or_else(String::new, |spread| {
            format!("{:.3} to {:.3}", spread.low, spread.high)
        });
        let (class, verdict) = if held.ok {
            ("ok", "ok")
        } else {
            ("miss", "MISS")
        };
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td class=\"number\">{}</td><td class=\"number\">{:.3}</td><td class=\"number\">{interval}</td>\
             <td class=\"{class}\">{verdict}</td></tr>",
            escaped(&held.name),
            escaped(&held.target),
            held.figure
        );
    }
    page.push_str("</table>\n");
}

/// The plots of a section: one of bars per quantity and group, one of lines where groups differ by the number of Services alone.
fn plots(figures: &[&Figure]) -> Vec<String> {
    let any_relative = figures.iter().any(|figure| figure.relative.is_some());
    let chosen: Vec<&Figure> = figures
        .iter()
        .filter(|figure| !any_relative || is_compared(figure, figures))
        .copied()
        .collect();
    let mut subjects: Vec<&str> = figures.iter().map(|figure| subject(figure)).collect();
    subjects.sort_unstable();
    subjects.dedup();
    let colour = |name: &str| subjects.binary_search(&name).unwrap_or_default();
    let mut found = Vec::new();
    let mut done: Vec<String> = Vec::new();
    for figure in &chosen {
        let caption = group(figure, &[]);
        if done.contains(&caption) {
            continue;
        }
        let own: Vec<&Figure> = chosen
            .iter()
            .filter(|other| group(other, &[]) == caption)
            .copied()
            .collect();
        done.push(caption.clone());
        let rows: Vec<Bar> = own
            .iter()
            .map(|figure| Bar {
                name: subject(figure).into(),
                colour: colour(subject(figure)),
                spread: figure.spread,
                rounds: figure.rounds.clone(),
                text: beside(figure),
            })
            .collect();
        found.push(framed(&caption, &bars(&rows)));
    }
    let mut done: Vec<String> = Vec::new();
    for figure in &chosen {
        let caption = group(figure, &SIZE);
        if done.contains(&caption) {
            continue;
        }
        done.push(caption.clone());
        let own = chosen.iter().filter(|other| group(other, &SIZE) == caption);
        let mut series: Vec<Line> = Vec::new();
        for figure in own {
            let Some(size) = figure.label("services").and_then(|size| size.parse().ok()) else {
                continue;
            };
            let point = (size, figure.spread);
            match series.iter_mut().find(|line| line.name == subject(figure)) {
                Some(line) => line.points.push(point),
                None => series.push(Line {
                    name: subject(figure).into(),
                    colour: colour(subject(figure)),
                    points: vec![point],
                }),
            }
        }
        series.retain(|line| line.points.len() > 1);
        if !series.is_empty() {
            let caption = format!("{caption}, by number of Services");
            found.push(framed(&caption, &lines(&series)));
        }
    }
    found
}

fn framed(caption: &str, plot: &str) -> String {
    format!(
        "<figure><figcaption>{}</figcaption>{plot}</figure>\n",
        escaped(caption)
    )
}

/// Whether the figure, or another of its kind, is compared with something: the others are in the table.
fn is_compared(figure: &Figure, all: &[&Figure]) -> bool {
    figure.relative.is_some()
        || !all
            .iter()
            .any(|other| other.labels == figure.labels && other.relative.is_some())
}

fn subject(figure: &Figure) -> &str {
    figure.labels.last().map_or("", |(_, value)| value.as_str())
}

/// What the figures of a plot have in common.
fn group(figure: &Figure, without: &[&str]) -> String {
    let before = figure.labels.len().saturating_sub(1);
    let mut words: Vec<String> = figure.labels[..before]
        .iter()
        .filter(|(key, _)| !without.contains(&key.as_str()))
        .map(|(key, value)| {
            if SIZE.contains(&key.as_str()) {
                format!("{value} {key}")
            } else {
                value.clone()
            }
        })
        .collect();
    words.push(format!("{} ({})", figure.quantity, figure.unit));
    words.join(", ")
}

fn beside(figure: &Figure) -> String {
    let value = shown(figure.spread.median, &figure.unit);
    match &figure.relative {
        Some(other) => format!("{value}, {:.3} of {}", other.spread.median, other.to),
        None => value,
    }
}

fn table(page: &mut String, figures: &[&Figure]) {
    page.push_str("<details><summary>All figures</summary>\n<table><tr><th>case</th><th>quantity</th><th class=\"number\">median</th>\
        <th class=\"number\">interval</th><th class=\"number\">ratio</th></tr>\n");
    for figure in figures {
        let case: Vec<&str> = figure
            .labels
            .iter()
            .map(|(_, value)| value.as_str())
            .collect();
        let ratio = figure.relative.as_ref().map_or_else(String::new, |other| {
            format!(
                "{:.3} ({:.3} to {:.3}) of {}",
                other.spread.median,
                other.spread.low,
                other.spread.high,
                escaped(&other.to)
            )
        });
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td>{}</td><td class=\"number\">{}</td><td class=\"number\">{} to {}</td><td class=\"number\">{ratio}</td></tr>",
            escaped(&case.join(", ")),
            escaped(&figure.quantity),
            escaped(&shown(figure.spread.median, &figure.unit)),
            escaped(&shown(figure.spread.low, &figure.unit)),
            escaped(&shown(figure.spread.high, &figure.unit)),
        );
    }
    page.push_str("</table></details>\n");
}
