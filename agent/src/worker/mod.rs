//! The event loop that owns the agent's state.
//!
//! It hears ([`hear`]), brings the node to what is known ([`settle`]), and tells ([`tell`]).
//!
//! Events come in one at a time and are taken many at a time; a turn of the loop plans what became dirty, once, and applies it
//! as one batch. So a burst of ten thousand changes is one batch, and the loop works at its own pace.

mod hear;
mod host_ports;
mod node_addresses;
mod settle;
mod tell;

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use self::node_addresses::NodeAddresses;
use cluster_model::{Dirty, ObjectRef, Rejected, ServiceKey, Snapshot};
use ipnetwork::IpNetwork;
use jiff::Timestamp;

use crate::announce::Announcements;
use crate::clock::Clock;
use crate::config::Config;
use crate::dataplane::Preparation;
use crate::event::Event;
use crate::health::{Complaint, HealthChecks, ProxyHealth, Servers};
use crate::metrics::Measures;
use crate::monitor::Hub;
use crate::names::KernelNames;
use crate::net::{Kernel, Netlink, NetlinkError};
use crate::node::{Identity, IdentityFile, Node, NodeError};
use crate::node_ports::NodePorts;
use crate::offers::Offers;
use crate::plan::Here;
use crate::pods::Pods;
use crate::progress::Progress;
use crate::record::Notes;
use crate::report::Report;
use crate::routing::Routes;
use crate::share::Shares;
use crate::supervisor::Predecessors;
use crate::surroundings;

/// Events taken in one turn at most, so that requests do not wait behind an endless stream of changes.
const TURN_EVENTS_MAX: usize = 20_000;
/// The pause between rounds of upkeep: collecting flows, looking for pods that went without a word, trying again.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(10);
/// How long after its last failure a watch counts as well again: longer than its pauses, and than a server takes to refuse.
const WATCH_DOUBT: Duration = Duration::from_secs(30);
/// The pause between attempts to set the node up.
const SETUP_INTERVAL: Duration = Duration::from_secs(1);

/// Why the worker ends: another one may fare better.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error("this node's addresses or ranges changed from {0} to {1}: starting over")]
    IdentityChanged(Identity, Identity),
    #[error(
        "the API server refuses the credentials that this worker began with, and they are others by now: starting over"
    )]
    CredentialsReplaced,
    #[error("what programs hang on is gone: starting over")]
    Gone(#[source] NodeError),
}

/// The state of the agent.
pub struct Worker {
    config: Config,
    kernel: Kernel,
    snapshot: Snapshot,
    dirty: Dirty,
    /// Of all nodes of the cluster.
    node_addresses: NodeAddresses,
    here: Here,
    identity_file: IdentityFile,
    identity: Option<Identity>,
    /// For the node; begun before it is known.
    preparation: Option<Preparation>,
    /// The kernel has verified the programs of the node, or refused one, and that has not been looked at.
    verified: bool,
    /// There once the data plane's maps are; its programs hang a moment later.
    node: Option<Node>,
    pods: Pods,
    routes: Routes,
    /// The ways to other nodes are to be looked at.
    routes_due: bool,
    /// Of the cluster's ServiceCIDRs; nothing while they are not known.
    told_ranges: Option<Vec<IpNetwork>>,
    /// The node's own addresses and its uplinks are to be looked at.
    addresses_due: bool,
    /// Services have been planned and applied at least once since this process began.
    services_applied: bool,
    /// The last batch failed: what the maps lack is tried again with the next upkeep.
    retry: bool,
    /// Sockets of the host may have backends that are gone, and could not be looked at.
    datagrams_due: bool,
    /// When the cluster could last not be watched.
    watch_failed: Option<Instant>,
    monitor: Hub,
    announcements: Announcements,
    shares: Shares,
    offers: Offers,
    /// What is answered at pods' interfaces, since a DNS server has said by what rules.
    names: Option<KernelNames>,
    /// Where owners of Services are told what they cannot have; absent without an API server.
    notes: Option<Notes>,
    progress: Progress,
    /// For threads of its own.
    events: Sender<Event>,
    health_checks: HealthChecks,
    node_ports: NodePorts,
    /// What of Services is not served, as reasons and notes of events.
    left_out: BTreeMap<ServiceKey, Vec<(&'static str, String)>>,
    /// Objects that are malformed now: they count as absent.
    rejected: BTreeMap<ObjectRef, Rejected>,
    clock: Clock,
    /// What is wrong now, by the part that is concerned.
    problems: BTreeMap<&'static str, String>,
    report: Report,
}

impl Worker {
    /// A worker that has touched nothing yet. `events` is where its own helpers send what they did.
    pub fn new(config: Config, events: Sender<Event>) -> Result<Self, WorkerError> {
        let identity_file = IdentityFile::new(&config.state_dir);
        let identity = identity_file.load(&config.node_name);
        let routes = Routes::new(config.routing, events.clone());
        let mut pods = Pods::load(&config, events.clone());
        if let Some(identity) = &identity {
            pods.set_ranges(identity.ranges.clone());
        }
        Ok(Self {
            kernel: Kernel::new(Netlink::open()?),
            snapshot: Snapshot::default(),
            dirty: Dirty::default(),
            node_addresses: NodeAddresses::default(),
            here: Here {
                node: config.node_name.as_str().into(),
                zone: None,
                balancing: config.balancing,
            },
            identity_file,
            identity,
            preparation: Some(Preparation::begin()),
            verified: false,
            node: None,
            pods,
            routes,
            routes_due: false,
            told_ranges: None,
            addresses_due: false,
            services_applied: false,
            retry: false,
            datagrams_due: false,
            watch_failed: None,
            monitor: Hub::new(&config.pin_root),
            notes: None,
            shares: Shares::default(),
            offers: Offers::default(),
            names: None,
            announcements: Announcements::new(&config.node_name, events.clone()),
            events,
            progress: Progress::default(),
            health_checks: HealthChecks::default(),
            node_ports: NodePorts::default(),
            left_out: BTreeMap::new(),
            rejected: BTreeMap::new(),
            clock: Clock::new(Timestamp::now(), Instant::now()),
            problems: BTreeMap::new(),
            report: Report {
                version: env!("CARGO_PKG_VERSION").into(),
                node: config.node_name.clone(),
                socket_lb: config.socket_lb,
                packet_lb: config.packet_lb,
                ..Report::default()
            },
            config,
        })
    }

    /// Runs until it is told to stop.
    pub fn run(mut self, events: &Receiver<Event>) -> Result<(), WorkerError> {
        let mut upkeep_due = Instant::now();
        loop {
            let first =
                match events.recv_timeout(upkeep_due.saturating_duration_since(Instant::now())) {
                    Ok(event) => Some(event),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                };
            for event in first
                .into_iter()
                .chain(events.try_iter())
                .take(TURN_EVENTS_MAX)
            {
                match event {
                    Event::Stop => return Ok(()),
                    Event::CredentialsReplaced => return Err(WorkerError::CredentialsReplaced),
                    _ => {}
                }
                self.take(event);
            }
            // What is taken up to here is in the batch; what comes in from now on waits for the next.
            let taken = Instant::now();
            self.settle_node()?;
            self.settle_host_addresses();
            self.settle_services(taken, false);
            if std::mem::take(&mut self.verified) {
                self.hang();
            }
            self.settle_node_ports(false);
            self.settle_announcements();
            self.settle_names(false);
            self.pods.settle();
            if Instant::now() >= upkeep_due {
                self.upkeep()?;
                let pause = if self.node.is_some() {
                    UPKEEP_INTERVAL
                } else {
                    SETUP_INTERVAL
                };
                upkeep_due = Instant::now() + pause;
            }
        }
    }

    /// Whether this node's proxy works.
    pub fn health(&self) -> Arc<ProxyHealth> {
        self.progress.health.clone()
    }

    /// Owners of Services are told by these from now on.
    pub fn set_notes(&mut self, notes: Notes) {
        self.notes = Some(notes);
    }

    /// Tells from now on of the workers before this one, and in what words the last one ended, if it left any.
    pub fn follow(&mut self, predecessors: Predecessors, last_words: Option<String>) {
        self.report.restarts = predecessors.count;
        // Words that were left before the node itself began anew are of no worker before this one.
        let last_end = predecessors.last_end;
        self.report.last_end = last_end.map(|status| last_words.unwrap_or(status));
    }

    pub fn measures(&self) -> Measures {
        self.progress.measures.clone()
    }

    /// Lets health checks be served by a runtime. `complain` is told of ports that cannot be had.
    pub fn serve_health(
        &mut self,
        runtime: tokio::runtime::Handle,
        complain: impl Fn(Complaint) + Send + Sync + 'static,
    ) {
        let servers = Servers::new(runtime, self.health(), complain);
        self.health_checks.serve(servers);
    }

    fn upkeep(&mut self) -> Result<(), WorkerError> {
        self.shares.alive();
        if self.clock.look(Timestamp::now(), Instant::now()) {
            tracing::warn!(note = self.clock.note(), "the clock was set");
        }
        // A watch that goes on where it broke off does not say so while nothing happens; one that fails says so again.
        if self
            .watch_failed
            .is_some_and(|when| when.elapsed() > WATCH_DOUBT)
        {
            self.watch_failed = None;
            self.problems.remove("watch");
        }
        if self.node.is_none() {
            self.set_up();
        }
        if let Some(node) = self.node.as_mut().filter(|node| node.hangs()) {
            match node.upkeep(&mut self.kernel, &self.pods.interfaces()) {
                Ok(repaired) => {
                    self.problems.remove("upkeep");
                    if !repaired.is_empty() {
                        tracing::warn!(?repaired, "programs that somebody took off hang again");
                        self.report.rehung += repaired.len() as u64;
                        self.report.last_rehung = repaired;
                    }
                }
                Err(error) if error.asks_for_another_worker() => {
                    return Err(WorkerError::Gone(error));
                }
                Err(error) => {
                    let why = reason(&error);
                    self.problem("upkeep", why);
                }
            }
        }
        if self.node.as_ref().is_some_and(|node| node.overlay_was_down) {
            // Told for as long as it goes on.
            self.routes.forget_peers();
            let why = "somebody sets it down; it is set up again";
            self.problem("overlay", why.into());
        } else {
            self.problems.remove("overlay");
        }
        self.pods.upkeep(&mut self.kernel, self.node.as_mut());
        if let Ok(links) = self.kernel.links() {
            let proc = Path::new("/proc");
            self.report.notes = surroundings::look(&links, &self.config.cni_conf_dir, proc);
            let outside = self.unrouted_service();
            self.report.notes.extend(outside);
            let missing = self.node.as_ref().map(Node::missing_uplinks);
            self.report.notes.extend(missing.into_iter().flatten());
            self.report.notes.extend(self.clock.note());
        }
        self.settle_routes(true);
        let is_short = |node: &Node| node.ledger.is_short_of_room();
        let again = self.retry || self.node.as_ref().is_some_and(is_short);
        self.settle_services(Instant::now(), again);
        self.keep_settled();
        self.settle_node_ports(true);
        self.settle_names(true);
        Ok(())
    }

    /// Follows the node's own addresses, each of which has its node ports, and the interfaces that they come by.
    fn settle_host_addresses(&mut self) {
        if !std::mem::take(&mut self.addresses_due) {
            return;
        }
        // A node that is yet to be set up finds them then.
        let Some(node) = self.node.as_mut() else {
            return;
        };
        let settled = node.settle_host_addresses(&mut self.kernel);
        let settled = settled.and_then(|()| node.settle_uplinks(&mut self.kernel));
        if let Err(error) = settled {
            // The next upkeep tries again.
            self.problem("upkeep", reason(&error));
        }
    }

    fn problem(&mut self, part: &'static str, why: String) {
        if self.problems.get(part) != Some(&why) {
            tracing::warn!(part, why, "problem");
            self.problems.insert(part, why);
        }
    }
}

/// Where a worker that gives up leaves the reason, for the next one to tell: an exit status says too little.
pub struct LastWords {
    path: PathBuf,
}

impl LastWords {
    pub fn new(state_dir: &Path) -> Self {
        Self {
            path: state_dir.join("last-words"),
        }
    }

    pub fn leave(&self, words: &str) {
        if let Err(error) = std::fs::write(&self.path, words) {
            tracing::warn!(path = %self.path.display(), %error, "the reason cannot be left");
        }
    }

    /// What the last worker left. Told once.
    pub fn take(&self) -> Option<String> {
        let words = std::fs::read_to_string(&self.path).ok()?;
        // Left again, it would be told of another worker, which is no harm.
        let _ = std::fs::remove_file(&self.path);
        Some(words)
    }
}

/// An error with everything that caused it, on one line.
pub fn reason(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
