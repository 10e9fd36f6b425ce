//! `keelway status --connectivity`: how each node reaches the pods of each other one, as the agents' probes have it.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::status::NodeStatus;

/// The agent's socket in a node.
const SOCKET: &str = "run/keelway/agent.sock";
/// An agent that has not answered by then counts as silent.
const PATIENCE: Duration = Duration::from_secs(5);

/// One node's way to another one's pods of one family.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Pair {
    pub from: String,
    pub to: String,
    pub family: &'static str,
    /// `direct` or `vxlan`.
    pub way: String,
    /// Round trip; none while no probe is answered.
    pub latency_us: Option<u64>,
}

/// All pairs of a cluster, and the nodes whose agent says nothing.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Connectivity {
    pub pairs: Vec<Pair>,
    pub silent: Vec<(String, String)>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Path {
    node: String,
    ipv4: bool,
    way: String,
    latency_us: Option<u64>,
}

impl Connectivity {
    /// Asks the agent of every worker that runs.
    pub fn of(nodes: &[NodeStatus]) -> Self {
        let mut all = Self::default();
        for node in nodes.iter().filter(|node| !node.control_plane) {
            match node
                .pid
                .ok_or_else(|| "the node is down".to_owned())
                .and_then(paths)
            {
                Ok(paths) => all.pairs.extend(paths.into_iter().map(|path| Pair {
                    from: node.name.clone(),
                    to: path.node,
                    family: if path.ipv4 { "IPv4" } else { "IPv6" },
                    way: path.way,
                    latency_us: path.latency_us,
                })),
                Err(why) => all.silent.push((node.name.clone(), why)),
            }
        }
        all
    }

    /// Whether every agent answers and every pair of nodes reaches each other.
    pub fn is_whole(&self) -> bool {
        self.silent.is_empty() && self.pairs.iter().all(|pair| pair.latency_us.is_some())
    }
}

/// The ways that the agent of the node under this PID 1 knows.
fn paths(init: u32) -> Result<Vec<Path>, String> {
    let socket = PathBuf::from(format!("/proc/{init}/root")).join(SOCKET);
    let ask = || -> io::Result<Vec<u8>> {
        let mut stream = UnixStream::connect(&socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(br#"{"command":"REPORT"}"#)?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    };
    let answer = ask().map_err(|error| format!("its agent does not answer: {error}"))?;
    read_paths(&answer)
}

fn read_paths(answer: &[u8]) -> Result<Vec<Path>, String> {
    let unreadable =
        |error: serde_json::Error| format!("its agent's answer cannot be read: {error}");
    let mut answer: Value = serde_json::from_slice(answer).map_err(unreadable)?;
    match answer.pointer_mut("/report/paths") {
        Some(paths) => serde_json::from_value(paths.take()).map_err(unreadable),
        None => Err(format!("its agent says: {answer}")),
    }
}

impl fmt::Display for Connectivity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (node, why) in &self.silent {
            writeln!(f, "  {node:<13}  {why}")?;
        }
        for pair in &self.pairs {
            let latency = pair
                .latency_us
                .map_or_else(|| "NO ANSWER".into(), |us| format!("{us} us"));
            writeln!(
                f,
                "  {:<13}  -> {:<13} {} {:<6} {latency:>10}",
                pair.from, pair.to, pair.family, pair.way
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agents_report_becomes_pairs_and_anything_else_is_told() {
        let report = br#"{"report": {"node": "node-1", "paths": [
            {"node": "node-2", "ipv4": true, "range": "10.244.2.0/24", "way": "direct", "proven": true, "latencyUs": 97, "unanswered": 0},
            {"node": "node-3", "ipv4": true, "range": "10.244.3.0/24", "way": "vxlan", "proven": false, "latencyUs": null, "unanswered": 4}
        ]}}"#;
        let paths = read_paths(report).expect("paths");
        assert_eq!(
            (paths.len(), paths[0].latency_us, paths[1].latency_us),
            (2, Some(97), None)
        );
        let error = |answer: &[u8]| read_paths(answer).err().expect("refused");
        assert!(error(br#"{"error": {"code": 11, "msg": "stopping"}}"#).contains("stopping"));
        assert!(error(b"").contains("cannot be read"));
    }

    #[test]
    fn a_pair_without_an_answer_is_not_whole() {
        let pair = |latency_us| Pair {
            from: "node-1".into(),
            to: "node-2".into(),
            family: "IPv4",
            way: "direct".into(),
            latency_us,
        };
        let of = |pairs: Vec<Pair>| Connectivity {
            pairs,
            silent: Vec::new(),
        };
        assert!(of(vec![pair(Some(90))]).is_whole());
        let broken = of(vec![pair(Some(90)), pair(None)]);
        assert!(
            !broken.is_whole() && broken.to_string().contains("NO ANSWER"),
            "{broken}"
        );
    }
}
