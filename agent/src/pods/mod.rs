//! The pods of this node: what the CNI plugin asks for, and what became of it.
//!
//! Decisions are taken in the event loop; netlink that takes milliseconds, as making and removing interfaces does, runs
//! on threads that report back by an event. What is decided is on disk before anything is made or answered: one write serves all of a
//! turn of the loop.

mod add;
mod background;
mod check;
mod collect;
mod delete;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant, SystemTime};

use cluster_model::ServiceKey;
use ipnetwork::IpNetwork;
use keelway_cni::protocol::{Request, Response, Wish};
use keelway_cni::{Attachment, Mac};
use nix::errno::Errno;

use crate::addresses::{AddressFile, Allocation, Pool, is_host_interface};
use crate::config::Config;
use crate::dataplane::{self, FilterHooks, LocalPod, Op};
use crate::event::{Event, Reply};
use crate::net::{Kernel, Link, PodWire};
use crate::node::{Node, NodeError};
use crate::plan::{ServicePlan, host_ports_key, plan_host_ports};
use crate::report::Report;

/// Parts that something may be wrong with: what is written down of pods,
const ADDRESSES: &str = "addresses";
/// deletions that wait in the spool,
const DELETIONS: &str = "deletions";
/// interfaces of pods that are there,
const INTERFACES: &str = "interfaces";
/// and those of pods that are gone.
const BURYING: &str = "interfaces of deleted pods";

/// The pods of this node and their addresses.
pub struct Pods {
    pool: Pool,
    file: AddressFile,
    spool: std::path::PathBuf,
    events: Sender<Event>,
    /// What hangs on pods' interfaces; known once the node is set up.
    hooks: Option<Arc<FilterHooks>>,
    /// Interfaces that are to get them with [`Pods::hang`].
    bare: Vec<u32>,
    /// ADDs that wait for their addresses to be on disk, or for an interface to go.
    to_wire: Vec<ToWire>,
    /// ADDs whose interfaces are being made, by the host's interface.
    wiring: HashMap<String, Wiring>,
    /// DELs that wait to be on disk.
    deletions: Vec<Deletion>,
    /// Interfaces that are being removed.
    burying: HashSet<String>,
    /// Indexes of the host's interfaces.
    indexes: HashMap<String, u32>,
    /// Interfaces of pods whose ports of the node are to be planned again.
    host_ports: BTreeSet<String>,
    /// Pods that no runtime has a sandbox of, by the host's interface, and since when.
    orphans: HashMap<String, Instant>,
    collect_after: Duration,
    /// The pool changed since it was written.
    unsaved: bool,
    /// What is wrong now, by the part that is concerned.
    problems: BTreeMap<&'static str, String>,
    requests: BTreeMap<String, u64>,
    add_last_us: u64,
}

struct ToWire {
    wish: Wish,
    wire: PodWire,
    netns: Arc<OwnedFd>,
    reply: Reply<Response>,
    began: Instant,
    /// Its name was taken in the pod while interfaces were being removed.
    again: bool,
}

struct Wiring {
    one: ToWire,
    /// DELs that came meanwhile.
    deletions: Vec<Reply<Response>>,
}

struct Deletion {
    attachment: Attachment,
    reply: Option<Reply<Response>>,
}

impl Pods {
    /// The pods that an earlier agent wrote down.
    pub fn load(config: &Config, events: Sender<Event>) -> Self {
        let file = AddressFile::new(&config.state_dir);
        let mut problems = BTreeMap::new();
        let pool = file.load().unwrap_or_else(|error| {
            // The interfaces of this node say the same; only names of pods are lost.
            let aside = file
                .set_aside()
                .map(|path| format!("; it is kept as {}", path.display()))
                .unwrap_or_default();
            problems.insert(ADDRESSES, format!("{error}{aside}"));
            Pool::default()
        });
        Self {
            pool,
            file,
            spool: config.spool.clone(),
            events,
            hooks: None,
            bare: Vec::new(),
            to_wire: Vec::new(),
            wiring: HashMap::new(),
            deletions: Vec::new(),
            burying: HashSet::new(),
            indexes: HashMap::new(),
            host_ports: BTreeSet::new(),
            orphans: HashMap::new(),
            collect_after: config.collect_after,
            unsaved: false,
            problems,
            requests: BTreeMap::new(),
            add_last_us: 0,
        }
    }

    pub fn set_ranges(&mut self, ranges: Vec<IpNetwork>) {
        self.pool.set_ranges(ranges);
    }

    /// Makes pool, interfaces and maps agree after a restart: what exists stays, what went is forgotten, what was to go goes.
    pub fn adopt(&mut self, kernel: &mut Kernel, node: &mut Node) -> Result<(), NodeError> {
        let links = kernel.links()?;
        let pods = pod_links(&links);
        let mut routes: HashMap<u32, Vec<IpAddr>> = HashMap::new();
        for (index, address) in kernel.pod_routes()? {
            routes.entry(index).or_default().push(address);
        }
        let neighbours = kernel.permanent_neighbours()?;
        let limited = kernel.limited_links().unwrap_or_else(|error| {
            tracing::warn!(%error, "no limits of pods' rates are known");
            BTreeSet::new()
        });
        for link in pods.values() {
            if self.pool.get(&link.name).is_some() || self.pool.is_dying(&link.name) {
                continue;
            }
            let addresses = routes.get(&link.index).map_or(&[][..], Vec::as_slice);
            let mac = addresses
                .first()
                .and_then(|first| neighbours.get(&(link.index, *first)))
                .map(|mac| Mac(*mac));
            if self.pool.adopt(&link.name, addresses, mac) {
                tracing::info!(
                    interface = link.name,
                    ?addresses,
                    "found a pod that no file names"
                );
            } else {
                tracing::info!(
                    interface = link.name,
                    "an interface that was left half made goes"
                );
                self.pool.bury(&link.name);
            }
            self.unsaved = true;
        }
        self.forget_gone(&pods);

        let (mut ops, mut found) = (Vec::new(), Vec::new());
        let mut wanted = HashSet::new();
        for allocation in self.pool.allocations() {
            let Some(link) = pods.get(allocation.host_interface.as_str()) else {
                continue;
            };
            found.push(link.index);
            self.indexes.insert(link.name.clone(), link.index);
            wanted.extend(allocation.addresses.iter().copied());
            if !allocation.port_mappings.is_empty() {
                self.host_ports.insert(link.name.clone());
            }
            let held = routes.get(&link.index).map_or(&[][..], Vec::as_slice);
            if allocation.addresses.iter().any(|ip| !held.contains(ip)) {
                kernel.connect_pod(
                    link.index,
                    &allocation.addresses,
                    allocation.mac(),
                    &node.uplink.addresses,
                )?;
            }
            // By what is there: a file that was lost takes no limit away.
            let queued = limited.contains(&link.index);
            let wrong = set_pod(allocation, link.index, queued).into_iter().filter(|op| {
                !matches!(op, Op::SetPod { addr, pod } if node.found.pods.get(addr) == Some(pod))
            });
            ops.extend(wrong);
        }
        let gone = node.found.pods.keys().filter(|addr| !wanted.contains(addr));
        ops.extend(gone.map(|addr| Op::RemovePod { addr: *addr }));
        // First the addresses: a program that does not know them takes what a pod sends for somebody else's.
        node.apply(&ops)?;
        self.bare = found;
        self.hooks = None;
        Ok(())
    }

    /// Hangs the programs on the interfaces of pods that were there before; ADDs begin from then on.
    pub fn hang(&mut self, node: &mut Node) -> Result<(), NodeError> {
        for index in std::mem::take(&mut self.bare) {
            match node.dataplane.attach_pod(index) {
                // It has gone since it was found, and its pod goes with the next look.
                Err(dataplane::Error::Filters { source, .. })
                    if source.errno() == Some(Errno::ENODEV) => {}
                attached => attached?,
            }
        }
        self.hooks = Some(Arc::new(node.dataplane.pod_hooks()?));
        Ok(())
    }

    /// Takes a request of the plugin.
    pub fn request(
        &mut self,
        request: Request,
        netns: Option<OwnedFd>,
        reply: Reply<Response>,
        kernel: &mut Kernel,
        node: Option<&mut Node>,
    ) {
        match request {
            Request::Add(wish) => {
                let began = Instant::now();
                if let Err(error) = self.add(wish, netns, &reply, node.as_deref(), began) {
                    self.respond("ADD", &reply, Response::Error(error));
                }
            }
            Request::Check(wish) => self.check(wish, netns, reply, node.as_deref()),
            Request::Del { attachment } => self.delete(attachment, Some(reply), kernel, node),
            Request::Gc { network, valid } => self.collect(&network, &valid, &reply, kernel, node),
            Request::Status | Request::Report | Request::Inspect { .. } => {}
        }
    }

    /// Ends a turn: writes the pool, if it changed, and does what waited for that.
    pub fn settle(&mut self) {
        let saved = self.save();
        self.answer_deletions(saved);
        if saved {
            self.start_burying(false);
            self.start_wiring();
        } else {
            self.refuse_waiting();
        }
    }

    /// Has the plan of a pod's ports of the node taken once more.
    pub fn put_back_host_ports(&mut self, key: &ServiceKey) {
        self.host_ports.insert(key.name.to_string());
    }

    /// The plans of ports of the node that changed since they were last taken; the empty one for a pod that is gone.
    pub fn take_host_ports(&mut self) -> Vec<(ServiceKey, ServicePlan)> {
        let names = std::mem::take(&mut self.host_ports);
        let plan = |name: String| {
            let plan = self
                .pool
                .get(&name)
                .map(|pod| plan_host_ports(&name, &pod.addresses, &pod.port_mappings));
            (host_ports_key(&name), plan.unwrap_or_default())
        };
        names.into_iter().map(plan).collect()
    }

    /// Why no pod can be given an address, if so.
    pub fn exhausted(&self) -> Option<String> {
        let fill = self.pool.fill(now());
        fill.into_iter()
            .find(|fill| fill.used + fill.resting >= fill.capacity)
            .map(|fill| fill.to_string())
    }

    /// The host's sides of pods' interfaces, by index.
    pub fn interfaces(&self) -> Vec<u32> {
        self.indexes.values().copied().collect()
    }

    /// How many pods there are.
    pub fn count(&self) -> usize {
        self.pool.allocations().count()
    }

    fn save(&mut self) -> bool {
        if !self.unsaved {
            return true;
        }
        match self.file.save(&self.pool) {
            Ok(()) => {
                self.unsaved = false;
                self.problems.remove(ADDRESSES);
                true
            }
            Err(error) => {
                tracing::error!(%error, "addresses cannot be written down");
                self.problems.insert(ADDRESSES, error.to_string());
                false
            }
        }
    }

    fn respond(&mut self, command: &str, reply: &Reply<Response>, response: Response) {
        self.note(
            command,
            if matches!(response, Response::Error(_)) {
                "refused"
            } else {
                "served"
            },
        );
        // The plugin has given up when this fails, and its runtime deletes what it asked for.
        let _ = reply.send(response);
    }

    fn note(&mut self, command: &str, outcome: &str) {
        *self
            .requests
            .entry(format!("{command} {outcome}"))
            .or_default() += 1;
    }

    /// Adds what is known of pods to a report.
    pub fn fill(&self, report: &mut Report) {
        let fill = self.pool.fill(now());
        report.addresses_capacity = fill
            .iter()
            .map(|one| one.capacity)
            .fold(0, u64::saturating_add);
        report.address_ranges = fill.iter().map(ToString::to_string).collect();
        report.allocations = self.pool.allocations().cloned().collect();
        report.interfaces_to_remove = self.pool.dying_interfaces().count();
        report.cni_requests.clone_from(&self.requests);
        report.cni_add_last_us = self.add_last_us;
        let problems = self.problems.iter();
        report
            .problems
            .extend(problems.map(|(part, why)| format!("{part}: {why}")));
    }
}

/// Seconds since 1970. A clock before that counts as then.
fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// The host's sides of pod veths, by name.
fn pod_links(links: &[Link]) -> HashMap<&str, &Link> {
    let links = links.iter().filter(|link| is_host_interface(&link.name));
    links.map(|link| (link.name.as_str(), link)).collect()
}

fn set_pod(allocation: &Allocation, ifindex: u32, queued: bool) -> Vec<Op> {
    let pod = LocalPod {
        ifindex,
        mac: allocation.mac(),
        queued,
    };
    let set = |addr: &IpAddr| Op::SetPod { addr: *addr, pod };
    allocation.addresses.iter().map(set).collect()
}

fn remove_pod(addresses: &[IpAddr]) -> Vec<Op> {
    let remove = |addr: &IpAddr| Op::RemovePod { addr: *addr };
    addresses.iter().map(remove).collect()
}
