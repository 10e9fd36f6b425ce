//! dnsperf, where it is installed: a generator that is not ours, and by which others publish their figures.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

/// What came of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    pub answered: u64,
    pub lost: u64,
    pub per_second: f64,
}

pub fn is_installed() -> bool {
    Command::new("dnsperf")
        .arg("-h")
        .output()
        .is_ok_and(|output| !output.stdout.is_empty() || !output.stderr.is_empty())
}

/// Has sixteen clients ask for names, in turn, by A.
pub fn run(server: SocketAddr, names: &[String], duration: Duration) -> Result<Sample> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("questions");
    let mut text = String::new();
    for name in names {
        writeln!(text, "{name} A")?;
    }
    std::fs::write(&file, text)?;
    let output = Command::new("dnsperf")
        .args(["-s", &server.ip().to_string()])
        .args(["-p", &server.port().to_string()])
        .arg("-d")
        .arg(&file)
        .args(["-c", "16", "-q", "256", "-T", "1"])
        .args(["-l", &duration.as_secs_f64().to_string()])
        .output()
        .context("starting dnsperf")?;
    let told = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "dnsperf: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    read(&told).with_context(|| format!("dnsperf says something else: {told}"))
}

fn read(told: &str) -> Option<Sample> {
    let number = |title: &str| {
        let line = told
            .lines()
            .find_map(|line| line.trim().strip_prefix(title))?;
        line.split_whitespace().next()?.parse::<f64>().ok()
    };
    Some(Sample {
        answered: number("Queries completed:")? as u64,
        lost: number("Queries lost:")? as u64,
        per_second: number("Queries per second:")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_statistics_are_read() {
        let told = "Statistics:\n\n  Queries sent:         1000\n  Queries completed:    998 (99.80%)\n  Queries lost:         2 (0.20%)\n\n  \
                    Run time (s):         2.0\n  Queries per second:   499.000000\n";
        let expected = Sample {
            answered: 998,
            lost: 2,
            per_second: 499.0,
        };
        assert_eq!(read(told), Some(expected));
        assert_eq!(read("nothing of the kind"), None);
    }
}
