//! What a process costs, as the kernel counts it, and what it says of itself by its metrics.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use keelway_tests::sandbox::Network;

/// Memory and CPU time of a process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    pub resident_bytes: f64,
    pub peak_bytes: f64,
    pub cpu_seconds: f64,
}

/// Kernel ticks per second of /proc/PID/stat: 100 on every Linux.
const TICKS: f64 = 100.0;

/// What a process has cost so far.
pub fn cost(pid: u32) -> Result<Cost> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let bytes = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name));
        let kb: Option<f64> = line
            .and_then(|line| line.split_whitespace().nth(1))
            .and_then(|kb| kb.parse().ok());
        kb.map(|kb| kb * 1024.0)
            .with_context(|| format!("{name} of process {pid}"))
    };
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name before may hold anything.
    let rest = stat.rsplit_once(')').context("a process's stat")?.1;
    let ticks: f64 = rest
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|ticks| ticks.parse::<f64>().ok())
        .sum();
    Ok(Cost {
        resident_bytes: bytes("VmRSS")?,
        peak_bytes: bytes("VmHWM")?,
        cpu_seconds: ticks / TICKS,
    })
}

/// Bytes that the kernel holds for the BPF maps that a process has open.
pub fn map_bytes(pid: u32) -> Result<f64> {
    let mut total = 0.0;
    let mut seen = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // Descriptors come and go while they are listed.
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_whitespace().nth(1))
                .and_then(|value| value.parse::<f64>().ok())
        };
        if let (Some(id), Some(bytes)) = (field("map_id:"), field("memlock:"))
            && !seen.contains(&id.to_bits())
        {
            seen.push(id.to_bits());
            total += bytes;
        }
    }
    Ok(total)
}

/// The children of a process.
pub fn children(pid: u32) -> Result<Vec<u32>> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    Ok(text
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect())
}

/// What a process in a namespace serves at `/metrics`.
pub struct Metrics(String);

impl Metrics {
    /// # Errors
    /// While it does not serve them.
    pub fn ask(node: &Network, at: SocketAddr) -> Result<Self> {
        node.run(|| {
            let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(1))?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            write!(
                stream,
                "GET /metrics HTTP/1.0\r\nHost: localhost\r\nAccept: text/plain\r\nConnection: close\r\n\r\n"
            )?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            ensure!(text.starts_with("HTTP/1.") && text.contains(" 200 "), "no metrics");
            Ok(Self(text))
        })
    }

    /// The value of a metric, the sum over all labels.
    pub fn value(&self, name: &str) -> Option<f64> {
        self.values(name).reduce(|sum, value| sum + value)
    }

    /// The greatest value of a metric over all labels: of a time, the last one.
    pub fn latest(&self, name: &str) -> Option<f64> {
        self.values(name).reduce(f64::max)
    }

    fn values(&self, name: &str) -> impl Iterator<Item = f64> {
        self.0.lines().filter_map(move |line| {
            let rest = line.strip_prefix(name)?;
            let rest = match rest.strip_prefix('{') {
                Some(labels) => labels.split_once('}')?.1,
                None => rest,
            };
            rest.strip_prefix(' ')?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_with_and_without_labels() {
        let metrics =
            Metrics("HTTP/1.0 200 OK\r\n\r\na 1\na_count 7\nb{x=\"1\"} 2\nb{x=\"2\"} 3.5\n".into());
        assert_eq!(metrics.value("a"), Some(1.0));
        assert_eq!(metrics.value("b"), Some(5.5));
        assert_eq!(metrics.latest("b"), Some(3.5));
        assert_eq!(metrics.value("c"), None);
    }

    #[test]
    fn this_process_has_cost_something() {
        let cost = cost(std::process::id()).expect("our own");
        assert!(
            cost.peak_bytes >= cost.resident_bytes && cost.resident_bytes > 1e5,
            "{cost:?}"
        );
    }
}
