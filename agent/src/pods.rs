//! The pods of this node: what the CNI plugin asks for, and what became of it.
//!
//! Decisions are taken in the event loop; netlink that takes milliseconds, as making and removing interfaces does, runs
//! on threads that report back by an event. While one works on an attachment, that attachment is busy.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Instant;

use ipnetwork::Ipv4Network;
use keelway_cni::protocol::{Request, Response, Wish};
use keelway_cni::{AddResult, Attachment, CniError, Code, Interface, IpConfig, Route, spool};

use crate::addresses::{AddressFile, Pool, host_interface, is_host_interface};
use crate::config::Config;
use crate::dataplane::{LocalPod, Op};
use crate::event::{Event, Reply};
use crate::net::{
    self, Kernel, Link, Netlink, NetlinkError, POD_GATEWAY, PodWire, check_pod, pod_mac, wire_pod,
};
use crate::node::{Node, NodeError};
use crate::report::Report;
use crate::worker::reason;

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

    fn add(
        &mut self,
        wish: Wish,
        netns: Option<OwnedFd>,
        reply: &Reply<Response>,
        node: Option<&Node>,
        began: Instant,
    ) -> Result<(), CniError> {
        if node.is_none() {
            return Err(CniError::new(
                Code::TryAgain,
                "the Keelway agent is not ready: the node is not set up yet",
            ));
        }
        let netns = netns.ok_or_else(|| {
            CniError::new(Code::InvalidEnvironment, "no network namespace was passed")
        })?;
        let host_interface = host_interface(&wish.attachment);
        let waits = |one: &ToWire| one.host_interface == host_interface;
        if self.busy.contains_key(&host_interface) || self.to_wire.iter().any(waits) {
            return Err(CniError::new(
                Code::TryAgain,
                format!("{} is being worked on", wish.attachment),
            ));
        }
        // An ADD overtakes a deletion of its own past that still waits.
        if let Err(error) = spool::remove(&self.spool, &wish.attachment) {
            return Err(CniError::new(Code::Io, "the spool of deletions").with_details(error));
        }
        let pod = match (
            wish.args.get("K8S_POD_NAMESPACE"),
            wish.args.get("K8S_POD_NAME"),
        ) {
            (Some(namespace), Some(name)) => Some(format!("{namespace}/{name}")),
            _ => None,
        };
        let allocation = self.pool.allocate(&wish.attachment, pod).map_err(|error| {
            CniError::new(Code::TryAgain, "no address for the pod").with_details(error)
        })?;
        self.unsaved = true;
        self.to_wire.push(ToWire {
            wish,
            netns,
            reply: reply.clone(),
            address: allocation.address,
            host_interface,
            began,
        });
        Ok(())
    }

    /// Writes the pool, if it changed, and begins the ADDs that waited for that.
    pub fn start_wiring(&mut self, node: Option<&Node>) {
        let saved = self.save();
        for one in std::mem::take(&mut self.to_wire) {
            let (Some(node), Ok(())) = (node, &saved) else {
                self.pool.release(&one.host_interface);
                self.unsaved = true;
                let error = CniError::new(Code::Io, "the pod's address cannot be written down")
                    .with_details(self.problem.as_deref().unwrap_or_default());
                self.respond("ADD", &one.reply, Response::Error(error));
                continue;
            };
            let wire = PodWire {
                host_interface: one.host_interface.clone(),
                interface: one.wish.attachment.ifname.clone(),
                address: one.address,
                mtu: node.uplink.link.mtu,
                node_address: Some(node.uplink.address),
            };
            let (events, attachment, netns, wish) = (
                self.events.clone(),
                one.wish.attachment.clone(),
                one.netns,
                wire.clone(),
            );
            self.busy.insert(
                one.host_interface,
                Busy::Wiring {
                    wish: one.wish,
                    wire,
                    reply: one.reply,
                    began: one.began,
                },
            );
            let work = move || {
                let mut kernel = Kernel::new(Netlink::open()?);
                wire_pod(&mut kernel, netns.as_fd(), &wish)
            };
            in_background("wire", &events, work, |made| Event::Wired {
                attachment,
                made,
            });
        }
    }

    /// A pod's interfaces are there, or could not be made: attaches the programs and answers.
    pub fn wired(
        &mut self,
        attachment: &Attachment,
        made: Result<Link, NetlinkError>,
        kernel: &mut Kernel,
        node: Option<&mut Node>,
    ) {
        let host_interface = host_interface(attachment);
        let Some(Busy::Wiring {
            wish,
            wire,
            reply,
            began,
        }) = self.busy.remove(&host_interface)
        else {
            return;
        };
        let attached = made.map_err(NodeError::from).and_then(|link| match node {
            None => Ok(link),
            Some(node) => {
                node.dataplane.attach_pod(link.index)?;
                let pod = LocalPod {
                    ifindex: link.index,
                    mac: pod_mac(wire.address),
                };
                node.apply(&[Op::SetPod {
                    addr: wire.address.into(),
                    pod,
                }])?;
                Ok(link)
            }
        });
        let response = match attached {
            Ok(link) => {
                self.add_last_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
                tracing::info!(%attachment, address = %wire.address, took_us = self.add_last_us, "pod added");
                Response::Added(result_of(&wish, &wire, &link))
            }
            Err(error) => {
                let why = reason(&error);
                tracing::warn!(%attachment, why, "pod could not be added");
                if let Err(error) = kernel.delete_link(&host_interface) {
                    tracing::warn!(%attachment, %error, "its interface is left");
                }
                self.pool.release(&host_interface);
                self.unsaved = true;
                Response::Error(
                    CniError::new(Code::Failed, "the pod's network cannot be made")
                        .with_details(why),
                )
            }
        };
        self.respond("ADD", &reply, response);
    }

    fn check(
        &mut self,
        wish: Wish,
        netns: Option<OwnedFd>,
        reply: Reply<Response>,
        node: Option<&Node>,
    ) {
        let host_interface = host_interface(&wish.attachment);
        let refused = match (self.pool.get(&host_interface), netns, node) {
            (None, ..) => CniError::new(
                Code::UnknownContainer,
                format!("{} is not known here", wish.attachment),
            ),
            (_, None, _) => {
                CniError::new(Code::InvalidEnvironment, "no network namespace was passed")
            }
            (.., None) => CniError::new(Code::TryAgain, "the Keelway agent is not ready"),
            (Some(allocation), Some(netns), Some(node)) => {
                let address = allocation.address;
                if !wish
                    .addresses
                    .iter()
                    .any(|text| text.split('/').next() == Some(&address.to_string()))
                {
                    CniError::new(
                        Code::Failed,
                        format!("the pod has {address}, which prevResult does not name"),
                    )
                } else {
                    let wire = PodWire {
                        host_interface,
                        interface: wish.attachment.ifname.clone(),
                        address,
                        mtu: node.uplink.link.mtu,
                        node_address: Some(node.uplink.address),
                    };
                    self.count("CHECK", "served");
                    let checking = thread::Builder::new().name("check".into()).spawn(move || {
                        let found = Netlink::open().and_then(|netlink| {
                            check_pod(&mut Kernel::new(netlink), netns.as_fd(), &wire)
                        });
                        let failed = |why: String| {
                            Response::Error(
                                CniError::new(Code::Failed, "the pod's network is not as made")
                                    .with_details(why),
                            )
                        };
                        let _ = reply.send(match found {
                            Ok(None) => Response::Done,
                            Ok(Some(why)) => failed(why),
                            Err(error) => failed(error.to_string()),
                        });
                    });
                    if let Err(error) = checking {
                        // Nothing is held up by it but the requester, who is told in time.
                        tracing::error!(%error, "no thread for a CHECK");
                    }
                    return;
                }
            }
        };
        self.respond("CHECK", &reply, Response::Error(refused));
    }

    /// Takes a pod's network away. Without a reply it is a deletion that the plugin wrote down.
    fn delete(
        &mut self,
        attachment: Attachment,
        reply: Option<Reply<Response>>,
        kernel: &mut Kernel,
        node: Option<&mut Node>,
    ) {
        let host_interface = host_interface(&attachment);
        if self
            .to_wire
            .iter()
            .any(|one| one.host_interface == host_interface)
            || matches!(self.busy.get(&host_interface), Some(Busy::Wiring { .. }))
        {
            // The plugin writes it down, and it is done when the ADD has ended.
            if let Some(reply) = reply {
                let error = CniError::new(Code::TryAgain, format!("{attachment} is being made"));
                self.respond("DEL", &reply, Response::Error(error));
            }
            return;
        }
        self.unwire(host_interface, Some(attachment), reply, kernel, node);
    }

    fn unwire(
        &mut self,
        host_interface: String,
        attachment: Option<Attachment>,
        reply: Option<Reply<Response>>,
        kernel: &mut Kernel,
        node: Option<&mut Node>,
    ) {
        if let Some(Busy::Unwiring { replies, .. }) = self.busy.get_mut(&host_interface) {
            replies.extend(reply);
            return;
        }
        if let Some(node) = node
            && let Err(error) = self.unplug(&host_interface, kernel, node)
        {
            tracing::warn!(
                host_interface,
                error = reason(&error),
                "the data plane still names a pod that goes"
            );
        }
        let replies = reply.into_iter().collect();
        self.busy.insert(
            host_interface.clone(),
            Busy::Unwiring {
                attachment,
                replies,
            },
        );
        let events = self.events.clone();
        let name = host_interface.clone();
        let work = move || Kernel::new(Netlink::open()?).delete_link(&name);
        in_background("unwire", &events, work, |removed| Event::Unwired {
            host_interface,
            removed,
        });
    }

    /// Takes a pod out of the maps and lets go of its programs, before its interface goes.
    fn unplug(
        &self,
        host_interface: &str,
        kernel: &mut Kernel,
        node: &mut Node,
    ) -> Result<(), NodeError> {
        if let Some(allocation) = self.pool.get(host_interface) {
            node.apply(&[Op::RemovePod {
                addr: allocation.address.into(),
            }])?;
        }
        if let Some(link) = kernel.link(host_interface)? {
            node.dataplane.detach_pod(link.index)?;
        }
        Ok(())
    }

    /// A pod's interfaces are gone, or could not be removed.
    pub fn unwired(&mut self, host_interface: &str, removed: Result<bool, NetlinkError>) {
        let Some(Busy::Unwiring {
            attachment,
            replies,
        }) = self.busy.remove(host_interface)
        else {
            return;
        };
        let response = match removed {
            Ok(_) => {
                if let Some(gone) = self.pool.release(host_interface) {
                    self.unsaved = true;
                    tracing::info!(host_interface, address = %gone.address, pod = gone.pod, "pod removed");
                }
                if let Some(attachment) = attachment
                    && let Err(error) = spool::remove(&self.spool, &attachment)
                {
                    self.problem = Some(format!("{}: {error}", self.spool.display()));
                }
                // The address is given again only after it is on disk that it is free; losing that costs nothing.
                let _ = self.save();
                Response::Done
            }
            Err(error) => Response::Error(
                CniError::new(Code::Failed, "the pod's network cannot be removed")
                    .with_details(error),
            ),
        };
        for reply in replies {
            self.respond("DEL", &reply, response.clone());
        }
    }

    /// GC: removes every attachment of ours that the runtime does not name.
    fn collect(
        &mut self,
        valid: &[Attachment],
        reply: &Reply<Response>,
        kernel: &mut Kernel,
        mut node: Option<&mut Node>,
    ) {
        let valid: HashSet<&Attachment> = valid.iter().collect();
        let stale = |attachment: &&Attachment| !valid.contains(attachment);
        let gone: Vec<Attachment> = self
            .pool
            .allocations()
            .filter_map(|one| one.attachment.as_ref())
            .filter(stale)
            .cloned()
            .collect();
        for attachment in gone {
            self.delete(attachment, None, kernel, node.as_deref_mut());
        }
        self.respond("GC", reply, Response::Done);
    }

    /// Does deletions that wait, and forgets pods whose interface went with their network namespace.
    pub fn upkeep(&mut self, kernel: &mut Kernel, mut node: Option<&mut Node>) {
        match spool::list(&self.spool) {
            Ok(waiting) => {
                for attachment in waiting {
                    tracing::info!(%attachment, "doing a deletion that waited");
                    self.delete(attachment, None, kernel, node.as_deref_mut());
                }
            }
            Err(error) => self.problem = Some(format!("{}: {error}", self.spool.display())),
        }
        let Some(node) = node else { return };
        match pod_links(kernel) {
            Ok(links) => {
                let gone = self.forget_gone(&links);
                if let Err(error) = let_go(&gone, &links, node) {
                    self.problem = Some(reason(&error));
                }
            }
            Err(error) => self.problem = Some(error.to_string()),
        }
        let _ = self.save();
    }

    /// Releases the addresses of pods that have no interface any more, and returns them.
    fn forget_gone(&mut self, links: &HashMap<String, Link>) -> Vec<Ipv4Addr> {
        let waiting: HashSet<&str> = self
            .to_wire
            .iter()
            .map(|one| one.host_interface.as_str())
            .collect();
        let gone: Vec<String> = self
            .pool
            .allocations()
            .map(|one| &one.host_interface)
            .filter(|name| {
                !links.contains_key(*name)
                    && !self.busy.contains_key(*name)
                    && !waiting.contains(name.as_str())
            })
            .cloned()
            .collect();
        self.unsaved |= !gone.is_empty();
        gone.iter()
            .filter_map(|name| self.pool.release(name))
            .inspect(|one| tracing::info!(address = %one.address, pod = one.pod, "a pod went without a word"))
            .map(|one| one.address)
            .collect()
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

/// Takes pods that are gone out of the maps, and lets go of hooks on interfaces that are.
fn let_go(
    gone: &[Ipv4Addr],
    links: &HashMap<String, Link>,
    node: &mut Node,
) -> Result<(), NodeError> {
    let ops: Vec<Op> = gone
        .iter()
        .map(|addr| Op::RemovePod {
            addr: (*addr).into(),
        })
        .collect();
    node.apply(&ops)?;
    let there: HashSet<u32> = links.values().map(|link| link.index).collect();
    for index in node.dataplane.attached_pods()? {
        if !there.contains(&index) {
            node.dataplane.detach_pod(index)?;
        }
    }
    Ok(())
}

fn result_of(wish: &Wish, wire: &PodWire, host: &Link) -> AddResult {
    let text = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    AddResult {
        interfaces: vec![
            Interface {
                name: wire.host_interface.clone(),
                mac: text(host.mac.unwrap_or_default()),
                mtu: wire.mtu,
                sandbox: None,
            },
            Interface {
                name: wire.interface.clone(),
                mac: text(pod_mac(wire.address)),
                mtu: wire.mtu,
                sandbox: Some(wish.netns.clone()),
            },
        ],
        ips: vec![IpConfig {
            address: Ipv4Network::from(wire.address).into(),
            gateway: POD_GATEWAY.into(),
            interface: 1,
        }],
        routes: vec![Route {
            dst: net::EVERYTHING.into(),
            gw: Some(POD_GATEWAY.into()),
        }],
    }
}

/// Does netlink on a thread of its own, and sends what came of it. Something is sent whatever happens: the attachment would
/// stay busy else.
fn in_background<T: 'static>(
    name: &str,
    events: &Sender<Event>,
    work: impl FnOnce() -> Result<T, NetlinkError> + Send + 'static,
    event: impl FnOnce(Result<T, NetlinkError>) -> Event + Clone + Send + 'static,
) {
    let (tell, of) = (events.clone(), event.clone());
    let working = thread::Builder::new().name(name.into()).spawn(move || {
        let outcome = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
            Err(NetlinkError::new(
                "work on an interface",
                io::Error::other("the thread panicked"),
            ))
        });
        // The loop has ended when this fails, and the next agent finds what was made.
        let _ = tell.send(of(outcome));
    });
    if let Err(error) = working {
        let _ = events.send(event(Err(NetlinkError::new("start a thread", error))));
    }
}
