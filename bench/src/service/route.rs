//! Everything that is measured, and in which order.

use std::net::{Ipv4Addr, SocketAddr};

use serde::Serialize;

use super::cluster::node_port;
use super::rules::Rules;
use crate::load::Metric;
use crate::sync::node::KUBE_PROXIES;

/// Where the two ends are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Ends {
    SameNode,
    AcrossNodes,
    /// The client is no pod, but another machine on the node's link.
    Outside,
    /// So it is, and the server is not on the node that is asked: that sends on what comes, and what is answered.
    Forwarded,
    /// As that, and the client is neither of the nodes: what is answered need not come by the one that was asked.
    Switched,
}

impl Ends {
    pub const fn name(self) -> &'static str {
        match self {
            Ends::SameNode => "same-node",
            Ends::AcrossNodes => "across",
            Ends::Outside => "outside",
            Ends::Forwarded => "forwarded",
            Ends::Switched => "switched",
        }
    }
}

/// How a client's packets get to the server.
#[derive(Clone, Debug)]
pub struct Route {
    /// `direct`, `socket`, `packet`, `node-port` and `node-port-xdp` are Keelway's; the others name what serves them.
    pub path: String,
    pub ends: Ends,
    /// Which client takes it.
    pub client: usize,
    pub address: Ipv4Addr,
    /// By a port of the node, not by the server's own.
    pub by_node_port: bool,
    /// It does not depend on the number of Services.
    pub is_constant: bool,
}

/// The path that the others are compared with.
pub const DIRECT: &str = "direct";
/// As that, by a client whose calls pass socket hooks that do nothing: what hooks cost, whatever they do.
pub const EMPTY_HOOKS: &str = "empty-hooks";
/// And by one whose calls pass ours, which look for a Service and find none.
pub const OWN_HOOKS: &str = "own-hooks";
/// A port of the node, as the hook at tc serves it; and as the uplink's driver does.
pub const NODE_PORT: &str = "node-port";
pub const NODE_PORT_XDP: &str = "node-port-xdp";
/// As the server's node answers it, and not the one that was asked (DSR).
pub const NODE_PORT_DSR: &str = "node-port-dsr";
/// As the hook at tc serves it beneath a driver's program that lets everything pass: what such a program costs, whatever it does.
pub const NODE_PORT_PASSED: &str = "node-port-passed";

/// Two namespaces on one veth pair, and the kernel's own routing between pods.
pub const VETH: &str = "veth";
pub const ROUTED: &str = "routed";

/// Whether a path is there for ours to be compared with: what becomes of it is no doing of ours.
pub fn is_theirs(path: &str) -> bool {
    let plain = [VETH, ROUTED, EMPTY_HOOKS, NODE_PORT_PASSED];
    plain.contains(&path) || rivals().any(|rival| rival == path)
}

/// Others that serve Services: rules of the bench's, and kube-proxy.
pub fn rivals() -> impl Iterator<Item = &'static str> {
    let rules = Rules::ALL.into_iter().map(Rules::name);
    rules.chain(KUBE_PROXIES)
}

/// What a path is compared with: those through a Service with the direct one, that with what somebody else does, and the same for
/// what goes by way of another node, where nothing goes directly.
pub fn reference(ends: Ends, path: &str) -> (Ends, &'static str) {
    match (ends, path) {
        (Ends::SameNode | Ends::AcrossNodes | Ends::Outside, DIRECT) => (ends, ROUTED),
        (Ends::SameNode | Ends::AcrossNodes | Ends::Outside, _) => (ends, DIRECT),
        (Ends::Forwarded | Ends::Switched, NODE_PORT) => (Ends::Outside, ROUTED),
        (Ends::Forwarded | Ends::Switched, _) => (ends, NODE_PORT),
    }
}

impl Route {
    pub fn target(&self, metric: Metric) -> SocketAddr {
        let port = if self.by_node_port {
            let is_far = matches!(self.ends, Ends::Forwarded | Ends::Switched);
            node_port(usize::from(is_far), metric)
        } else {
            metric.port()
        };
        SocketAddr::from((self.address, port))
    }
}

/// Whether both ends run on one CPU. With two, waking the other one hides the path, and shows what a machine with idle CPUs has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cpus {
    One,
    Two,
}

/// What is measured of a route.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Task {
    pub metric: Metric,
    pub cpus: Cpus,
    /// Share of the direct path's rate that comes in, whatever becomes of it.
    pub open: Option<f64>,
}

impl Task {
    pub const fn closed(metric: Metric, cpus: Cpus) -> Self {
        Self {
            metric,
            cpus,
            open: None,
        }
    }
}

/// What is measured of a route at a number of Services: everything at the first, what may depend on it at the others.
pub fn tasks(route: &Route, is_first: bool, cpus: usize) -> Vec<Task> {
    if !is_first {
        let once = [Metric::RoundTrip, Metric::Connect];
        // Without the other one, nobody would see the direct path become slower with the number of Services.
        let is_reference = [DIRECT, ROUTED].contains(&route.path.as_str());
        let depends = !route.is_constant || is_reference;
        return once
            .into_iter()
            .filter(|_| depends && route.ends == Ends::SameNode)
            .map(|metric| Task::closed(metric, Cpus::One))
            .collect();
    }
    // Hooks are called per call and connection, not for what is sent on one.
    let hooks_alone = [EMPTY_HOOKS, OWN_HOOKS].contains(&route.path.as_str());
    let left_out: &[Metric] = match route.ends {
        Ends::SameNode if hooks_alone => &[Metric::Throughput, Metric::Http],
        Ends::Forwarded | Ends::Switched => &[Metric::Http],
        Ends::SameNode | Ends::AcrossNodes | Ends::Outside => &[],
    };
    let mut tasks: Vec<Task> = Metric::ALL
        .into_iter()
        .filter(|metric| !left_out.contains(metric))
        .map(|metric| Task::closed(metric, Cpus::One))
        .collect();
    if route.ends == Ends::SameNode && !hooks_alone {
        tasks.push(Task {
            metric: Metric::Http,
            cpus: Cpus::One,
            open: Some(OPEN_SHARE),
        });
        if cpus > 1 {
            let metrics = [Metric::RoundTrip, Metric::Throughput];
            tasks.extend(metrics.map(|metric| Task::closed(metric, Cpus::Two)));
        }
    }
    tasks
}

/// Half of what the direct path can do: queues are short, so the latency is the path's and not the queue's.
const OPEN_SHARE: f64 = 0.5;
