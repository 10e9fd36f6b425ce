//! What most suites of agents begin with: two nodes with agents, and pods on both.

use std::net::Ipv4Addr;

use serde_json::json;

use crate::agents::{AgentNode, ClusterFile, Pod, Service, two_nodes};
use crate::sandbox::{Sandbox, is_root};

/// The address of [`Topology::web`].
pub const WEB: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 7);

/// Two nodes with agents; pods a and b on the first, c on the second. Goes with the value.
pub struct Topology {
    pub cluster: ClusterFile,
    pub nodes: [AgentNode; 2],
    pub a: Pod,
    pub b: Pod,
    pub c: Pod,
    /// Last, so that it is there until the agents have ended.
    _dir: tempfile::TempDir,
    _sandbox: Sandbox,
}

impl Topology {
    /// Starts it for a test, `flags` being more flags for the agents; None, with a word about it, without root.
    pub fn start(test: &str, flags: &[&str]) -> Option<Self> {
        if !is_root(test) {
            return None;
        }
        let sandbox = Sandbox::enter().expect("a sandbox");
        let dir = tempfile::tempdir().expect("a folder");
        let (cluster, mut nodes) = two_nodes(&sandbox, dir.path(), flags).expect("two nodes");
        cluster.write(&[]).expect("the cluster's file");
        for node in &mut nodes {
            node.start().expect("an agent");
        }
        let [a, b] = ["a", "b"].map(|name| nodes[0].add_pod(name).expect("a pod"));
        let c = nodes[1].add_pod("c").expect("a pod");
        Some(Self {
            cluster,
            nodes,
            a,
            b,
            c,
            _dir: dir,
            _sandbox: sandbox,
        })
    }

    /// An endpoint on each node: pods a and c.
    pub fn both(&self) -> [(Ipv4Addr, &'static str); 2] {
        [(self.a.address, "node-1"), (self.c.address, "node-2")]
    }

    /// The Service `web`, which leads to both.
    pub fn web(&self) -> Service {
        web(&self.both())
    }
}

/// The Service `web`, with these endpoints.
pub fn web(endpoints: &[(Ipv4Addr, &'static str)]) -> Service {
    Service {
        name: "web",
        address: WEB,
        endpoints: endpoints.to_vec(),
        spec: json!({}),
        balanced: None,
    }
}
