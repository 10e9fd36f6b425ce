//! The pods of this node: what the CNI plugin asks for, and what became of it.
//!
//! Decisions are taken in the event loop; netlink that takes milliseconds, as making and removing interfaces does, runs
//! on threads that report back by an event. While one works on an attachment, that attachment is busy.

mod add;
mod background;
mod check;
mod collect;
mod delete;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::mpsc::Sender;
use std::time::Instant;

use ipnetwork::Ipv4Network;
use keelway_cni::Attachment;
use keelway_cni::protocol::{Request, Response, Wish};

use self::collect::let_go;
use crate::addresses::{AddressFile, Pool, is_host_interface};
use crate::config::Config;
use crate::dataplane::{LocalPod, Op};
use crate::event::{Event, Reply};
use crate::net::{Kernel, Link, NetlinkError, PodWire, pod_mac};
use crate::node::{Node, NodeError};
use crate::report::Report;

/// The pods of this node and their addresses.
pub struct Pods {
    pool: Pool,
    file: AddressFile,
    spool: std::path::PathBuf,
    events: Sender<Event>,
    /// By the host's interface.
    busy: HashMap<String, Busy>,
    /// ADDs that wait for their addresses to be on disk: one write serves all of a turn.
    to_wire: Vec<ToWire>,
    /// The pool changed since it was written.
    unsaved: bool,
    problem: Option<String>,
    requests: BTreeMap<String, u64>,
    add_last_us: u64,
}

/// What is being done to an attachment, and who waits for it.
enum Busy {
    Wiring {
        wish: Wish,
        wire: PodWire,
        reply: Reply<Response>,
        began: Instant,
    },
    Unwiring {
        attachment: Option<Attachment>,
        replies: Vec<Reply<Response>>,
    },
}

struct ToWire {
    wish: Wish,
    netns: OwnedFd,
    reply: Reply<Response>,
    address: Ipv4Addr,
    host_interface: String,
    began: Instant,
}

impl Pods {
    /// The pods that an earlier agent wrote down.
    pub fn load(config: &Config, events: Sender<Event>) -> Self {
        let file = AddressFile::new(&config.state_dir);
        let mut problem = None;
        let pool = file.load().unwrap_or_else(|error| {
            // The interfaces of this node say the same; only names of pods are lost.
            let aside = file
                .set_aside()
                .map(|path| format!("; it is kept as {}", path.display()))
                .unwrap_or_default();
            problem = Some(format!("{error}{aside}"));
            Pool::default()
        });
        Self {
            pool,
            file,
            spool: config.spool.clone(),
            events,
            busy: HashMap::new(),
            to_wire: Vec::new(),
            unsaved: false,
            problem,
            requests: BTreeMap::new(),
            add_last_us: 0,
        }
    }

    pub fn set_ranges(&mut self, ranges: Vec<Ipv4Network>) {
        self.pool.set_ranges(ranges);
    }

    /// Makes pool, interfaces and maps agree after a restart: what exists stays, what went is forgotten.
    pub fn adopt(&mut self, kernel: &mut Kernel, node: &mut Node) -> Result<(), NodeError> {
        let links = pod_links(kernel)?;
        let routes: HashMap<u32, Ipv4Addr> = kernel.pod_routes()?.into_iter().collect();
        for link in links.values() {
            let known = self.pool.get(&link.name).is_some();
            match routes.get(&link.index) {
                Some(address) if !known => {
                    let adopted = self.pool.adopt(&link.name, *address);
                    tracing::info!(interface = link.name, %address, adopted, "found a pod that no file names");
                    self.unsaved = true;
                }
                None if !known => {
                    tracing::info!(
                        interface = link.name,
                        "removing an interface that was left half made"
                    );
                    kernel.delete_link(&link.name)?;
                }
                _ => {}
            }
        }
        self.forget_gone(&links);

        let mut ops = Vec::new();
        let mut wanted = HashSet::new();
        for allocation in self.pool.allocations() {
            let Some(link) = links.get(&allocation.host_interface) else {
                continue;
            };
            let pod = LocalPod {
                ifindex: link.index,
                mac: pod_mac(allocation.address),
            };
            node.dataplane.attach_pod(link.index)?;
            wanted.insert(std::net::IpAddr::V4(allocation.address));
            if routes.get(&link.index) != Some(&allocation.address) {
                kernel.set_neighbour(link.index, allocation.address, pod.mac)?;
                kernel.route_to_link(
                    allocation.address.into(),
                    link.index,
                    Some(node.uplink.address),
                )?;
            }
            if node.found.pods.get(&allocation.address.into()) != Some(&pod) {
                ops.push(Op::SetPod {
                    addr: allocation.address.into(),
                    pod,
                });
            }
        }
        let gone = node.found.pods.keys().filter(|addr| !wanted.contains(addr));
        ops.extend(gone.map(|addr| Op::RemovePod { addr: *addr }));
        let_go(&[], &links, node)?;
        node.apply(&ops)
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
            Request::Gc { valid } => self.collect(&valid, &reply, kernel, node),
            Request::Status | Request::Report | Request::Inspect { .. } => {}
        }
    }

    fn save(&mut self) -> Result<(), ()> {
        if !self.unsaved {
            return Ok(());
        }
        match self.file.save(&self.pool) {
            Ok(()) => {
                self.unsaved = false;
                self.problem = None;
                Ok(())
            }
            Err(error) => {
                tracing::error!(%error, "addresses cannot be written down");
                self.problem = Some(error.to_string());
                Err(())
            }
        }
    }

    fn respond(&mut self, command: &str, reply: &Reply<Response>, response: Response) {
        self.count(
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

    fn count(&mut self, command: &str, outcome: &str) {
        *self
            .requests
            .entry(format!("{command} {outcome}"))
            .or_default() += 1;
    }

    /// Adds what is known of pods to a report.
    pub fn fill(&self, report: &mut Report) {
        report.addresses_capacity = self.pool.capacity();
        report.allocations = self.pool.allocations().cloned().collect();
        report.cni_requests.clone_from(&self.requests);
        report.cni_add_last_us = self.add_last_us;
        report
            .problems
            .extend(self.problem.iter().map(|why| format!("addresses: {why}")));
    }
}

/// The host's sides of pod veths, by name.
fn pod_links(kernel: &mut Kernel) -> Result<HashMap<String, Link>, NetlinkError> {
    let links = kernel
        .links()?
        .into_iter()
        .filter(|link| is_host_interface(&link.name));
    Ok(links.map(|link| (link.name.clone(), link)).collect())
}
