//! What is known of a request that failed: which endpoint it was sent to and what became of that, and what nodes dropped of it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use keelway_tests::agents::AgentNode;
use keelway_tests::process::Running;
use serde_json::Value;

use crate::asking::Failure;

/// How much later than it happened a drop is heard of, at most: what changes in between comes first.
const LATE: Duration = Duration::from_secs(10);

/// What is written down of the cluster and by it.
#[derive(Default)]
pub struct Record {
    /// What changed, with the time before it.
    pub log: Vec<String>,
    /// The address by which the log names each pod.
    named: BTreeMap<IpAddr, Ipv4Addr>,
    /// A monitor of each node.
    monitors: BTreeMap<&'static str, Running>,
    drops: Vec<Dropped>,
}

/// A packet that a node dropped or rejected, as its monitor tells of it.
struct Dropped {
    node: &'static str,
    /// When it was heard of, since the beginning.
    when: Duration,
    told: Value,
}

impl Record {
    /// Writes down what happened so long after the beginning.
    pub fn say(&mut self, when: Duration, what: &str) {
        self.log.push(format!("{:8.3} {what}", when.as_secs_f64()));
    }

    /// Takes the addresses of a pod, whose first one the log has.
    pub fn name(&mut self, addresses: &[IpAddr], first: Ipv4Addr) {
        self.named.extend(addresses.iter().map(|one| (*one, first)));
    }

    /// Whether an address is, or was, a pod's.
    pub fn is_pod(&self, address: &IpAddr) -> bool {
        self.named.contains_key(address)
    }

    /// Hears what the nodes' monitors have told since the last time. A monitor ends with its worker, and another one begins.
    pub fn hear(&mut self, nodes: &[AgentNode], began: Instant) {
        for node in nodes {
            let monitor = self.monitors.get_mut(node.name);
            let told = monitor.iter().flat_map(|monitor| monitor.lines());
            let told: Vec<Value> = told
                .filter_map(|line| serde_json::from_str(&line).ok())
                .collect();
            self.drops.extend(told.into_iter().map(|told| Dropped {
                node: node.name,
                when: began.elapsed(),
                told,
            }));
            if monitor.is_none_or(Running::has_ended)
                && let Ok(another) = node.watch(&["monitor", "--drops", "--output", "json"])
            {
                self.monitors.insert(node.name, another);
            }
        }
    }

    /// What is known of a failure, in lines.
    pub fn explain(&self, failure: &Failure) -> Vec<String> {
        let Some(way) = &failure.way else {
            return Vec::new();
        };
        let mut lines = vec![format!("from {} to {}", way.from, way.to)];
        if let Some(name) = self.named.get(&way.to.ip()) {
            let name = name.to_string();
            let is_of = |line: &&String| line.split(' ').any(|word| word == name);
            lines.extend(self.log.iter().filter(is_of).cloned());
        }
        let client = way.from.to_string();
        let times = failure.when.saturating_sub(LATE)..failure.when + failure.took + LATE;
        for Dropped { node, when, told } in &self.drops {
            let is_end = |end: &str| told[end] == *client;
            if times.contains(when) && (is_end("source") || is_end("destination")) {
                let when = when.as_secs_f64();
                lines.push(format!("{when:8.3} {node} dropped {told}"));
            }
        }
        lines
    }
}
