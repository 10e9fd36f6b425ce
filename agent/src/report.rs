//! What the agent knows of itself: for `status`, for metrics, for whoever debugs.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use serde::{Deserialize, Serialize};

use crate::addresses::Allocation;
use crate::metrics::Measures;
use crate::routing::PathReport;

/// The state of one agent.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub version: String,
    pub node: String,
    /// Pods can be served.
    pub ready: bool,
    /// What is missing or has failed, in words.
    pub problems: Vec<String>,
    /// What else is on the node that may be in the way, in words.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Workers of this agent that ended before this one.
    #[serde(default)]
    pub restarts: u32,
    /// How the last of them ended, in words.
    #[serde(default)]
    pub last_end: Option<String>,
    /// Programs that somebody took off and that were hung on again since this worker began, and the last of them.
    #[serde(default)]
    pub rehung: u64,
    #[serde(default)]
    pub last_rehung: Vec<String>,
    /// Kinds of which a complete list has arrived.
    pub synced: Vec<String>,
    pub socket_lb: bool,
    pub packet_lb: bool,
    /// By what programs hang on interfaces that are no pods': `tcx`, or `filter` where the kernel has none. Pods' are filters.
    #[serde(default)]
    pub hung_by: String,
    /// The interfaces by which other machines are reached, the one with the node's address first.
    #[serde(default)]
    pub uplinks: Vec<String>,
    /// Where packets of the first uplink are looked at first: its driver (`native`), the kernel's stand-in for one (`generic`), or `tc`.
    #[serde(default)]
    pub xdp: String,
    /// Why it is tc, where something else was wished for.
    #[serde(default)]
    pub xdp_why_not: Option<String>,
    pub services: usize,
    pub endpoint_slices: usize,
    pub nodes: usize,
    /// Objects of the API that were refused as malformed, each time.
    pub rejected_objects: u64,
    /// Those that are malformed now, in words.
    pub malformed: Vec<String>,
    pub service_ports: usize,
    pub frontends: usize,
    pub backends: usize,
    /// Frontends that more than one Service wants, and the like.
    pub refusals: u64,
    /// Node ports that a process of the node listens on too.
    #[serde(default)]
    pub node_ports_shared: usize,
    pub batches: u64,
    pub batches_failed: u64,
    pub last_batch_operations: usize,
    pub last_batch_us: u64,
    pub routes: usize,
    /// The ways to other nodes' pods.
    #[serde(default)]
    pub paths: Vec<PathReport>,
    /// Addresses of load balancers that this node answers for on its link.
    #[serde(default)]
    pub announced: Vec<std::net::IpAddr>,
    /// Agents that live on the link, this one included; empty while no pools are configured.
    #[serde(default)]
    pub link_nodes: Vec<String>,
    pub addresses_capacity: u64,
    /// How full the ranges of each family are, in words.
    #[serde(default)]
    pub address_ranges: Vec<String>,
    pub allocations: Vec<Allocation>,
    /// Interfaces of deleted pods that are not gone yet.
    #[serde(default)]
    pub interfaces_to_remove: usize,
    /// Requests of the CNI plugin, by command and outcome.
    pub cni_requests: BTreeMap<String, u64>,
    pub cni_add_last_us: u64,
    /// Counters of the data plane, by the name of their reason.
    pub counters: Vec<Counter>,
    /// Names that are answered at pods' interfaces, and Services for whose names there is no room.
    #[serde(default)]
    pub dns_names: usize,
    #[serde(default)]
    pub dns_left_out: usize,
    /// Questions for the cluster DNS at pods' interfaces, by what became of them.
    #[serde(default)]
    pub dns: BTreeMap<String, u64>,
    /// How full the maps are.
    pub maps: Vec<Fill>,
    /// For metrics only.
    #[serde(skip)]
    pub measures: Measures,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fill {
    pub map: String,
    pub entries: u32,
    pub limit: u32,
}

/// One counter of the data plane.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Counter {
    pub reason: String,
    /// `event`, `drop` or `reject`.
    pub class: String,
    pub packets: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = |on| if on { "on" } else { "off" };
        writeln!(
            f,
            "Keelway agent {} on {}: {}",
            self.version,
            self.node,
            if self.ready { "ready" } else { "not ready" }
        )?;
        for problem in &self.problems {
            writeln!(f, "  problem: {problem}")?;
        }
        for note in &self.notes {
            writeln!(f, "  note: {note}")?;
        }
        if let Some(end) = &self.last_end {
            let count = self.restarts;
            writeln!(
                f,
                "  note: worker {} of this agent; the one before: {end}",
                count + 1
            )?;
        }
        if !self.last_rehung.is_empty() {
            let last = self.last_rehung.join(", ");
            writeln!(
                f,
                "  note: somebody took programs off; they hang again: {last}"
            )?;
        }
        for object in &self.malformed {
            writeln!(f, "  malformed: {object}")?;
        }
        writeln!(
            f,
            "Synced:    {}",
            if self.synced.is_empty() {
                "nothing".into()
            } else {
                self.synced.join(", ")
            }
        )?;
        writeln!(
            f,
            "Hooks:     socket {}, packet {}{}",
            on(self.socket_lb),
            on(self.packet_lb),
            match self.hung_by.as_str() {
                "" => "",
                "tcx" => " (tcx links; filters at pods)",
                _ => " (filters, this kernel having no tcx)",
            }
        )?;
        if !self.xdp.is_empty() {
            let why_not = self.xdp_why_not.as_deref();
            let why_not = why_not.map_or(String::new(), |why| format!(", not XDP: {why}"));
            let (first, others) = self.uplinks.split_first().unzip();
            let first = first.map_or("", String::as_str);
            write!(f, "Uplinks:   {first} ({}{why_not})", self.xdp)?;
            for other in others.into_iter().flatten() {
                write!(f, ", {other} (tc)")?;
            }
            writeln!(f)?;
        }
        writeln!(
            f,
            "Services:  {} ({} ports, {} frontends, {} backends), {} slices",
            self.services, self.service_ports, self.frontends, self.backends, self.endpoint_slices
        )?;
        if self.node_ports_shared > 0 {
            writeln!(
                f,
                "           {} node ports are also a process's: see `keelway-agent service show`",
                self.node_ports_shared
            )?;
        }
        writeln!(f, "Nodes:     {} ({} routes)", self.nodes, self.routes)?;
        if !self.dns.is_empty() {
            let counts = self
                .dns
                .iter()
                .map(|(what, count)| format!("{what} {count}"));
            let counts: Vec<String> = counts.collect();
            let (names, counts) = (self.dns_names, counts.join(", "));
            writeln!(
                f,
                "DNS:       {names} names answered at pods' interfaces ({counts})"
            )?;
        }
        writeln!(
            f,
            "Batches:   {} ({} failed), the last one {} operations in {} us",
            self.batches, self.batches_failed, self.last_batch_operations, self.last_batch_us
        )?;
        writeln!(
            f,
            "Addresses: {}",
            if self.address_ranges.is_empty() {
                "no range".into()
            } else {
                self.address_ranges.join("; ")
            }
        )?;
        for one in &self.allocations {
            let addresses: Vec<String> = one.addresses.iter().map(ToString::to_string).collect();
            writeln!(
                f,
                "  {:<15} {} {}",
                addresses.join(" "),
                one.host_interface,
                one.pod.as_deref().unwrap_or("-")
            )?;
        }
        if !self.link_nodes.is_empty() {
            let announced: Vec<String> = self.announced.iter().map(ToString::to_string).collect();
            writeln!(
                f,
                "Announces: {} (nodes on the link: {})",
                if announced.is_empty() {
                    "nothing".into()
                } else {
                    announced.join(", ")
                },
                self.link_nodes.join(", ")
            )?;
        }
        write!(f, "Maps:     ")?;
        for fill in &self.maps {
            let percent = u64::from(fill.entries) * 100 / u64::from(fill.limit.max(1));
            write!(f, " {} {} ({percent} %)", fill.map, fill.entries)?;
        }
        writeln!(f, "\nPackets:")?;
        for counter in self.counters.iter().filter(|counter| counter.packets > 0) {
            writeln!(
                f,
                "  {:<26} {:<7} {}",
                counter.reason, counter.class, counter.packets
            )?;
        }
        f.write_char('\n')
    }
}
