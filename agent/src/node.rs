//! This node: who it is, and its data plane once that is known.

mod service_ranges;
mod uplinks;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use cluster_model as model;
use dataplane_abi::{limits, map};
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::addresses::Reserved;
use crate::config::Config;
use crate::dataplane::{
    self, Dataplane, EarlyUplink, Frontend, Op, Peers, Preparation, Protocol, ServiceVeth, State,
    Xdp, XdpMode,
};
use crate::net::{self, Kernel, Link, NetlinkError, Uplink};
use crate::plan::{Batch, Dsr, Ledger, Routing, is_reachable};
use crate::report::Fill;
use crate::worker::reason;

/// What a node must know of itself before pods can have a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Its own addresses, the first of each family, in the Node's order.
    pub addresses: Vec<IpAddr>,
    pub ranges: Vec<IpNetwork>,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} with {:?}", self.addresses, self.ranges)
    }
}

impl Identity {
    /// Reads it from the Node object; says what is missing.
    pub fn of(node: &model::Node) -> Result<Self, String> {
        let first = |ipv4: bool| node.internal_ips.iter().position(|ip| ip.is_ipv4() == ipv4);
        let mut firsts: Vec<usize> = [first(true), first(false)].into_iter().flatten().collect();
        firsts.sort_unstable();
        if firsts.is_empty() {
            return Err(format!(
                "Node {:?} has no address of type InternalIP",
                node.name
            ));
        }
        if node.pod_cidrs.is_empty() {
            return Err(format!(
                "Node {:?} has no range in spec.podCIDRs yet; if the cluster's controller manager gives none, --cluster-cidr does",
                node.name
            ));
        }
        Ok(Self {
            addresses: firsts.into_iter().map(|at| node.internal_ips[at]).collect(),
            ranges: node.pod_cidrs.clone(),
        })
    }
}

/// Where the identity is kept, so that an agent that restarts serves pods before the API server answers.
pub struct IdentityFile {
    path: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct IdentityContent {
    node: String,
    identity: Identity,
}

impl IdentityFile {
    pub fn new(state_dir: &Path) -> Self {
        Self {
            path: state_dir.join("node.json"),
        }
    }

    /// The identity that the node of this name had, if it is known. A file that cannot be read is no identity.
    pub fn load(&self, node: &str) -> Option<Identity> {
        let content: IdentityContent = serde_json::from_slice(&fs::read(&self.path).ok()?).ok()?;
        (content.node == node).then_some(content.identity)
    }

    pub fn save(&self, node: &str, identity: &Identity) -> io::Result<()> {
        if let Some(dir) = self.path.parent() {
            fs::create_dir_all(dir)?;
        }
        let content = IdentityContent {
            node: node.into(),
            identity: identity.clone(),
        };
        let partial = self.path.with_extension("json.new");
        fs::write(&partial, serde_json::to_vec_pretty(&content)?)?;
        fs::rename(&partial, &self.path)
    }
}

/// Why the node could not be set up, or kept.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    #[error("no interface of this machine has the node's address {0:?}")]
    NoUplink(Vec<IpAddr>),
    #[error("cannot switch {} on", path.display())]
    Sysctl { path: PathBuf, source: io::Error },
    #[error("the pair of interfaces {} was removed, and is made anew", net::OUTER)]
    ServiceVeth,
    #[error("the interface {0} is not the one that it was")]
    Remade(String),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error(transparent)]
    Dataplane(Box<dataplane::Error>),
}

impl From<dataplane::Error> for NodeError {
    fn from(error: dataplane::Error) -> Self {
        Self::Dataplane(Box::new(error))
    }
}

impl NodeError {
    /// Whether another worker has to make anew what is gone: the BPF file system lost what was pinned (somebody unmounted it, or removed
    /// the directory), or an interface that programs hang on was removed.
    pub fn asks_for_another_worker(&self) -> bool {
        match self {
            Self::Dataplane(error) => matches!(**error, dataplane::Error::Pins { .. }),
            Self::ServiceVeth | Self::Remade(_) => true,
            _ => false,
        }
    }

    /// Whether a map has no room: what fits is there all the same.
    pub fn is_limit(&self) -> bool {
        matches!(self, Self::Dataplane(error) if error.is_limit())
    }
}

/// What became of a batch.
pub struct Brought {
    pub outcome: Result<(), NodeError>,
    /// Whether the ledger knows what the maps hold now.
    pub known: bool,
}

/// A node whose data plane is up.
pub struct Node {
    pub dataplane: Dataplane,
    pub ledger: Ledger,
    /// The interface that has the node's address: other nodes' overlays lead to it.
    pub uplink: Uplink,
    /// All by which other machines are reached, that one first.
    uplinks: Vec<Link>,
    /// Answers of the node's own processes are looked at as they leave: clients outside keep, or kept, their addresses there.
    answers: bool,
    /// Which they are to be beside the first, unless that is found out.
    named_uplinks: Vec<String>,
    /// What the maps held of pods when the node was set up; taken by whoever knows the pods.
    pub found: State,
    /// The overlay's interface, unless all routes are direct.
    pub overlay: Option<Link>,
    /// The node's own addresses in its pod ranges, of each family.
    reserved: Vec<Reserved>,
    host_addresses: BTreeSet<IpAddr>,
    unmasqueraded: BTreeSet<IpNetwork>,
    peers: Peers,
    /// Entries of answered flows that the last collection left.
    flows: u32,
    /// The node has IPv6 pods.
    ipv6: bool,
    /// Whose sockets are translated, if any are.
    cgroup: Option<PathBuf>,
    early: EarlyUplink,
    xdp_mode: XdpMode,
    /// What of it is so.
    xdp: Xdp,
    hangs: bool,
    /// At the last upkeep the overlay had been set down, and was set up again.
    pub overlay_was_down: bool,
    service_veth: ServiceVeth,
    service_ranges: Vec<IpNetwork>,
    /// No other range is routed there any more.
    others_are_gone: bool,
    routing: Routing,
}

impl Node {
    /// Brings the data plane's maps up over what an earlier agent left. Its programs hang nowhere before [`Node::hang`]; `verified` is
    /// called when that has not to wait for them.
    pub fn set_up(
        config: &Config,
        identity: &Identity,
        kernel: &mut Kernel,
        preparation: Preparation,
        verified: impl FnOnce() + Send + 'static,
    ) -> Result<Self, NodeError> {
        let uplink = kernel
            .uplink(&identity.addresses)?
            .ok_or_else(|| NodeError::NoUplink(identity.addresses.clone()))?;
        let ipv6 = identity.ranges.iter().any(IpNetwork::is_ipv6);
        if identity.ranges.iter().any(IpNetwork::is_ipv4) {
            switch_on(Path::new("/proc/sys/net/ipv4/ip_forward"))?;
        }
        let uplinks = uplinks::survey(kernel, &uplink, &config.uplinks)?;
        if ipv6 {
            switch_on(Path::new("/proc/sys/net/ipv6/conf/all/forwarding"))?;
        }
        let pair = net::make_service_veth(
            kernel,
            &config.service_ranges,
            &uplink.addresses,
            pod_mtu(config.routing, &uplink),
        )?;
        let reserved: Vec<Reserved> = [true, false]
            .into_iter()
            .filter_map(|ipv4| identity.ranges.iter().find(|range| range.is_ipv4() == ipv4))
            .filter_map(|range| Reserved::of(*range))
            .collect();
        for own in &reserved {
            kernel.add_own_address(pair.outer, own.host)?;
            kernel.add_own_address(pair.outer, own.probe)?;
        }
        let overlay = make_overlay(config.routing, &uplink, kernel)?;
        uplinks::prepare(&uplinks, ipv6, overlay.is_some())?;
        let early = EarlyUplink {
            ifindex: uplink.link.index,
            is_veth: kernel.is_veth(&uplink.link.name)?,
        };
        let wished = dataplane::Config {
            pin_root: config.pin_root.clone(),
            socket_lb: config.socket_lb,
            packet_lb: config.packet_lb,
            service_veth: Some(pair),
            node_v4: uplink.addresses.iter().find_map(|ip| match ip {
                IpAddr::V4(v4) => Some(*v4),
                IpAddr::V6(_) => None,
            }),
            node_v6: uplink.addresses.iter().find_map(|ip| match ip {
                IpAddr::V4(_) => None,
                IpAddr::V6(v6) => Some(*v6),
            }),
            masquerade: config.masquerade,
            uplink: Some(uplink.link.index),
            uplink_mac: uplink.link.mac,
            overlay: overlay
                .as_ref()
                .filter(|_| config.balancing.dsr != Dsr::Off)
                .map(|overlay| overlay.index),
            overlay_link: overlay.as_ref().map(|overlay| overlay.index),
            kernel_dns: config.kernel_dns,
            early: early.is_asked(config.xdp),
        };
        let dataplane = Dataplane::begin(&wished, preparation, verified)?;
        let found = dataplane.state()?;
        let mut ledger = Ledger::waiting(found.clone());
        ledger.inherit(dataplane.inherited().clone());
        let mut node = Self {
            ledger,
            host_addresses: found.host_addresses.clone(),
            unmasqueraded: found.unmasqueraded.clone(),
            peers: found.peers.clone(),
            dataplane,
            uplink,
            uplinks,
            named_uplinks: config.uplinks.clone(),
            answers: false,
            found,
            overlay,
            reserved,
            flows: 0,
            ipv6,
            cgroup: config.socket_lb.then(|| config.cgroup.clone()),
            early,
            xdp_mode: config.xdp,
            xdp: Xdp::Off,
            hangs: false,
            overlay_was_down: false,
            service_veth: pair,
            service_ranges: config.service_ranges.clone(),
            others_are_gone: false,
            routing: config.routing,
        };
        // What programs judge packets by is there before they see one.
        node.settle_host_addresses(kernel)?;
        Ok(node)
    }

    /// Whether the programs hang where they should.
    pub fn hangs(&self) -> bool {
        self.hangs
    }

    /// Hangs the programs, once the kernel has verified them, on what is not a pod's.
    pub fn hang(&mut self) -> Result<(), NodeError> {
        self.dataplane.finish()?;
        let held = self.ledger.held().services.values();
        let asked = self.ask_answers(held);
        self.answers |= asked || self.dataplane.has_answers()?;
        self.attach()?;
        self.hangs = true;
        Ok(())
    }

    /// Hangs the programs on what is not a pod's. Idempotent.
    fn attach(&mut self) -> Result<(), NodeError> {
        if let Some(cgroup) = &self.cgroup {
            self.dataplane.attach_cgroup(cgroup)?;
        }
        self.dataplane.attach_service_veth()?;
        self.attach_uplinks()?;
        let xdp = self.dataplane.attach_early(&self.early, self.xdp_mode)?;
        if xdp != self.xdp {
            tracing::info!(
                uplink = self.uplink.link.name,
                at = xdp.name(),
                why_not = xdp.why_not(),
                "where packets of the uplink are looked at first"
            );
            self.xdp = xdp;
        }
        Ok(())
    }

    /// Whether the uplink's driver translates.
    pub fn xdp(&self) -> &Xdp {
        &self.xdp
    }

    /// The MTU of pods' interfaces: what fits every way that their packets may take.
    pub fn pod_mtu(&self) -> u32 {
        match &self.overlay {
            Some(overlay) => overlay.mtu.min(self.uplink.link.mtu),
            None => self.uplink.link.mtu,
        }
    }

    /// The node's own addresses in its pod range of this family.
    pub fn reserved_like(&self, ip: IpAddr) -> Option<Reserved> {
        self.reserved
            .iter()
            .copied()
            .find(|own| own.host.is_ipv4() == ip.is_ipv4())
    }

    /// Applies a batch. A full map must not keep changes from the maps that are behind it in the batch: what can be
    /// done is done, and the first thing that could not is the error.
    pub fn apply(&mut self, ops: &[Op]) -> Result<(), NodeError> {
        if ops.is_empty() {
            return Ok(());
        }
        let error = match self.dataplane.apply(ops) {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        if error.is_limit() && ops.len() > 1 {
            // By halves: most of a large batch fits, and one call for each change would take long.
            let (first, rest) = ops.split_at(ops.len() / 2);
            for half in [first, rest] {
                match self.apply(half) {
                    Err(other) if !other.is_limit() => return Err(other),
                    _ => {}
                }
            }
        }
        Err(error.into())
    }

    /// Brings the maps to what the ledger wishes. A batch that failed may be in them in part: they are read back, and what found no
    /// room waits apart for some.
    pub fn bring(&mut self, batch: &Batch) -> Brought {
        // Before the first client comes.
        let outcome = self
            .settle_answers(batch)
            .and_then(|()| self.apply(&batch.ops));
        let mut known = true;
        match &outcome {
            Ok(()) => self.ledger.applied(batch),
            Err(failed) => match self.dataplane.state() {
                Ok(held) => {
                    self.ledger.hold(held);
                    if failed.is_limit() {
                        self.ledger.park();
                    }
                }
                Err(error) => {
                    known = false;
                    tracing::error!(error = reason(&error), "the maps cannot be read back");
                }
            },
        }
        Brought { outcome, known }
    }

    /// Gives service ports the tables for which there was no room when they were written.
    fn fill_tables(&mut self) -> Result<(), NodeError> {
        let fitting = self.dataplane.tables_with_room().into_iter();
        let ops: Vec<Op> = fitting.filter_map(|id| self.ledger.renewal(id)).collect();
        self.apply(&ops)
    }

    /// Hangs on again what somebody took off, collects flows whose time is up, and follows the machine's own addresses. Gives the
    /// names of what was hung on again.
    pub fn upkeep(&mut self, kernel: &mut Kernel, pods: &[u32]) -> Result<Vec<String>, NodeError> {
        self.stands_on_its_interfaces(kernel)?;
        let repaired = self.dataplane.repair(self.cgroup.as_deref(), pods)?;
        let collected = self.dataplane.collect_flows()?;
        tracing::debug!(?collected, "flows");
        self.flows = collected.left;
        self.keep_service_veth(kernel)?;
        if self.overlay.is_some() {
            for interface in [net::OVERLAY, net::OUTER] {
                loosen_reverse_path_filter(interface)?;
            }
        }
        self.settle_host_addresses(kernel)?;
        self.settle_uplinks(kernel)?;
        self.fill_tables()?;
        // A pin that somebody removed took its link along, and left nothing to be found.
        self.attach()?;
        Ok(repaired)
    }

    /// Fails when the uplink or the overlay was made anew, or the overlay is gone: programs, neighbours and routes went with it, and another
    /// worker makes all of them. An uplink that is away is waited for. An overlay that somebody has set down is set up, which brings back
    /// neither its neighbours nor its routes: [`Self::overlay_was_down`].
    fn stands_on_its_interfaces(&mut self, kernel: &mut Kernel) -> Result<(), NodeError> {
        let there = kernel.links()?;
        let now = |own: &Link| there.iter().find(|link| link.name == own.name);
        let is_another = |own: &Link, now: &Link| (now.index, now.mac) != (own.index, own.mac);
        if now(&self.uplink.link).is_some_and(|now| is_another(&self.uplink.link, now)) {
            return Err(NodeError::Remade(self.uplink.link.name.clone()));
        }
        if let Some(own) = &self.overlay
            && now(own).is_none_or(|now| is_another(own, now))
        {
            return Err(NodeError::Remade(own.name.clone()));
        }
        let is_down = |own: &&Link| now(own).is_some_and(|now| !now.up);
        let down = self.overlay.as_ref().filter(is_down);
        let down = down.map(|own| own.index);
        self.overlay_was_down = down.is_some();
        if let Some(index) = down {
            tracing::warn!("the overlay was set down; it is up again");
            kernel.set_up(index)?;
        }
        Ok(())
    }

    /// The destinations to which pods keep their own addresses.
    pub fn settle_unmasqueraded(&mut self, wished: BTreeSet<IpNetwork>) -> Result<(), NodeError> {
        if self.unmasqueraded != wished {
            self.apply(&[Op::SetUnmasqueraded {
                ranges: wished.clone(),
            }])?;
            self.unmasqueraded = wished;
        }
        Ok(())
    }

    /// Takes over from another version, now that all Services are in our maps.
    pub fn take_over(&mut self) -> Result<(), dataplane::Error> {
        self.dataplane.take_over()?;
        self.ledger.inherit(BTreeMap::new());
        Ok(())
    }

    /// Where addresses on other nodes are, for packets that are sent on as they came.
    pub fn settle_peers(&mut self, wished: Peers) -> Result<(), NodeError> {
        if self.peers != wished {
            self.apply(&[Op::SetPeers {
                peers: wished.clone(),
            }])?;
            self.peers = wished;
        }
        Ok(())
    }

    /// Ends the connections of the host's datagram sockets to backends that they should not have any more: no packet hook sees what
    /// they send.
    pub fn end_stale_datagrams(&self) -> Result<(), dataplane::Error> {
        if self.cgroup.is_none() {
            return Ok(());
        }
        let ended = self.dataplane.end_datagrams(|socket| {
            let frontend = Frontend {
                addr: socket.frontend.ip(),
                port: socket.frontend.port(),
                protocol: Protocol::Udp,
            };
            self.ledger.leads_to(&frontend, &socket.backend)
        })?;
        if ended > 0 {
            tracing::info!(ended, "datagram sockets had backends that are gone");
        }
        Ok(())
    }

    /// How full the maps are that a cluster or its traffic can fill.
    pub fn fills(&self) -> Vec<Fill> {
        let held = self.ledger.held();
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let frontends = held.frontends.len() + held.vips.len();
        let sources: usize = held.sources.values().map(BTreeSet::len).sum();
        let ranges = sources + self.unmasqueraded.len();
        [
            (
                map::SERVICES,
                count(held.services.len()),
                limits::SERVICES - 1,
            ),
            (map::FRONTENDS, count(frontends), limits::FRONTENDS),
            (map::BACKENDS, self.dataplane.cells_used(), limits::CELLS),
            (map::RANGES, count(ranges), limits::RANGES),
            (map::PEERS, count(self.peers.len()), limits::PEERS),
            (map::FLOWS, self.flows, self.dataplane.flows_max()),
            (
                map::MAGLEV,
                self.dataplane.maglev().blocks,
                limits::MAGLEV_BLOCKS,
            ),
        ]
        .into_iter()
        .map(|(map, entries, limit)| Fill {
            map: map.to_lowercase(),
            entries,
            limit,
        })
        .collect()
    }

    /// The node's own addresses: backends at them are processes of the host.
    pub fn settle_host_addresses(&mut self, kernel: &mut Kernel) -> Result<(), NodeError> {
        let ipv6 = self.ipv6;
        let own = |ip: &IpAddr| is_reachable(*ip) && (ipv6 || ip.is_ipv4());
        let now: BTreeSet<IpAddr> = kernel
            .addresses()?
            .into_iter()
            .map(|(_, ip, _)| ip)
            .filter(own)
            .collect();
        let set = now
            .difference(&self.host_addresses)
            .map(|addr| Op::SetHostAddress { addr: *addr });
        let gone = self
            .host_addresses
            .difference(&now)
            .map(|addr| Op::RemoveHostAddress { addr: *addr });
        let ops: Vec<Op> = set.chain(gone).collect();
        self.apply(&ops)?;
        let are_more = !now.is_subset(&self.host_addresses);
        self.host_addresses = now;
        if are_more && self.ask_answers(self.ledger.held().services.values()) {
            self.look_at_answers()?;
        }
        Ok(())
    }
}

/// What fits every way that packets of pods may take.
fn pod_mtu(routing: Routing, uplink: &Uplink) -> u32 {
    match uplink.addresses.first() {
        Some(underlay) if routing != Routing::Direct => {
            uplink.link.mtu.saturating_sub(net::overhead(*underlay))
        }
        _ => uplink.link.mtu,
    }
}

/// Makes the overlay's interface, unless the node shall have none: then one of an earlier agent goes.
fn make_overlay(
    routing: Routing,
    uplink: &Uplink,
    kernel: &mut Kernel,
) -> Result<Option<Link>, NodeError> {
    let Some(underlay) = uplink
        .addresses
        .first()
        .copied()
        .filter(|_| routing != Routing::Direct)
    else {
        kernel.delete_link(net::OVERLAY)?;
        return Ok(None);
    };
    let overlay = kernel.make_overlay(underlay, pod_mtu(routing, uplink))?;
    loosen_reverse_path_filter(net::OVERLAY)?;
    Ok(Some(overlay))
}

/// Makes a strict reverse path filter a loose one. The stricter of the interface's and the general setting would count, were strict not 1
/// and loose 2: the greater one counts.
fn loosen_reverse_path_filter(interface: &str) -> Result<(), NodeError> {
    let conf = Path::new("/proc/sys/net/ipv4/conf");
    let value = |of: &str| {
        fs::read_to_string(conf.join(of).join("rp_filter"))
            .ok()
            .and_then(|text| text.trim().parse::<u8>().ok())
            .unwrap_or(0)
    };
    if value(interface).max(value("all")) == 1 {
        let path = conf.join(interface).join("rp_filter");
        fs::write(&path, "2").map_err(|source| NodeError::Sysctl { path, source })?;
    }
    Ok(())
}

/// A host that forwards IPv6 takes no router advertisements any more, and would lose the default route that it has from one, unless
/// it is told to take them all the same.
fn keep_router_advertisements(interface: &str) -> Result<(), NodeError> {
    let path = Path::new("/proc/sys/net/ipv6/conf")
        .join(interface)
        .join("accept_ra");
    if fs::read_to_string(&path).is_ok_and(|value| value.trim() == "1") {
        fs::write(&path, "2").map_err(|source| NodeError::Sysctl { path, source })?;
    }
    Ok(())
}

/// Sets a sysctl of this network namespace to 1, unless it is: it may be read-only and right.
fn switch_on(path: &Path) -> Result<(), NodeError> {
    if fs::read_to_string(path).is_ok_and(|value| value.trim() == "1") {
        return Ok(());
    }
    fs::write(path, "1").map_err(|source| NodeError::Sysctl {
        path: path.into(),
        source,
    })
}
