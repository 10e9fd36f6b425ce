//! The event loop that owns the agent's state.
//!
//! Events come in one at a time and are taken many at a time; a turn of the loop plans what became dirty, once, and applies it
//! as one batch. So a burst of ten thousand changes is one batch, and the loop works at its own pace.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use cluster_model::watch::Report as WatchReport;
use cluster_model::{Change, Dirty, Kind, ObjectRef, Rejected, ServiceKey, Snapshot};
use dataplane_abi::Class;
use keelway_cni::protocol::{Request, Response};
use keelway_cni::{CniError, Code};

use crate::announce::Announcements;
use crate::config::Config;
use crate::dataplane;
use crate::event::Event;
use crate::health::{Complaint, HealthChecks, ProxyHealth, Servers};
use crate::inspect::View;
use crate::inspect::service::Books;
use crate::install;
use crate::metrics::{Extent, Measures};
use crate::monitor::Hub;
use crate::net::{Kernel, Netlink, NetlinkError};
use crate::node::{Identity, IdentityFile, Node, NodeError};
use crate::plan::{Here, Refusal, check, plan, plan_unmasqueraded};
use crate::pods::Pods;
use crate::progress::Progress;
use crate::record::{Happening, Notes, chosen};
use crate::report::{Counter, Report};
use crate::routing::Routes;
use crate::source::KINDS;
use crate::surroundings::{earlier_configurations, foreign_interfaces};

/// Events taken in one turn at most, so that requests do not wait behind an endless stream of changes.
const TURN_EVENTS_MAX: usize = 20_000;
/// The pause between rounds of upkeep: collecting flows, looking for pods that went without a word, trying again.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(10);
/// How long after its last failure a watch counts as well again: longer than its pauses, and than a server takes to refuse.
const WATCH_DOUBT: Duration = Duration::from_secs(30);
/// Refusals of one batch whose Services are told: more come of one mistake.
const NOTES_MAX: usize = 100;
/// The pause between attempts to set the node up.
const SETUP_INTERVAL: Duration = Duration::from_secs(1);

/// Why the worker ends: another one may fare better.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error("this node's addresses or ranges changed from {0} to {1}: starting over")]
    IdentityChanged(Identity, Identity),
    #[error("the pins are gone, and with them what they held: starting over")]
    PinsGone(#[source] NodeError),
}

/// The state of the agent.
pub struct Worker {
    config: Config,
    kernel: Kernel,
    snapshot: Snapshot,
    dirty: Dirty,
    here: Here,
    identity_file: IdentityFile,
    identity: Option<Identity>,
    /// There once the data plane is up.
    node: Option<Node>,
    pods: Pods,
    routes: Routes,
    /// The ways to other nodes are to be looked at.
    routes_due: bool,
    /// Services have been planned and applied at least once since this process began.
    services_applied: bool,
    /// The last batch failed: what the maps lack is tried again with the next upkeep.
    retry: bool,
    /// When the cluster could last not be watched.
    watch_failed: Option<Instant>,
    monitor: Hub,
    announcements: Announcements,
    /// Where owners of Services are told what they cannot have; absent without an API server.
    notes: Option<Notes>,
    progress: Progress,
    health_checks: HealthChecks,
    /// Objects that are malformed now: they count as absent.
    rejected: BTreeMap<ObjectRef, Rejected>,
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
            here: Here {
                node: config.node_name.as_str().into(),
                zone: None,
            },
            identity_file,
            identity,
            node: None,
            pods,
            routes,
            routes_due: false,
            services_applied: false,
            retry: false,
            watch_failed: None,
            monitor: Hub::new(&config.pin_root),
            notes: None,
            announcements: Announcements::new(&config.node_name, events),
            progress: Progress::default(),
            health_checks: HealthChecks::default(),
            rejected: BTreeMap::new(),
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
                if matches!(event, Event::Stop) {
                    return Ok(());
                }
                self.take(event);
            }
            // What is taken up to here is in the batch; what comes in from now on waits for the next.
            let taken = Instant::now();
            self.settle_node()?;
            self.settle_services(taken, false);
            self.settle_announcements();
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

    fn take(&mut self, event: Event) {
        match event {
            Event::Cluster { report, seen } => self.hear(report, seen),
            Event::Request {
                request,
                netns,
                reply,
            } => match request {
                Request::Report => {
                    let report = serde_json::to_value(self.current_report());
                    let response = report.map(Response::Report).unwrap_or_else(|error| {
                        Response::Error(CniError::new(Code::Failed, "report").with_details(error))
                    });
                    // Nobody waits any more when this fails.
                    let _ = reply.send(response);
                }
                Request::Status => {
                    let _ = reply.send(self.status());
                }
                other => {
                    self.pods
                        .request(other, netns, reply, &mut self.kernel, self.node.as_mut())
                }
            },
            Event::Wired { attachment, made } => {
                self.pods
                    .wired(&attachment, made, &mut self.kernel, self.node.as_mut());
            }
            Event::Buried { outcome } => self.pods.buried(outcome, self.node.as_mut()),
            Event::PathsChanged => self.routes_due = true,
            Event::Report { reply } => {
                let _ = reply.send(Box::new(self.current_report()));
            }
            Event::View { reply } => {
                let _ = reply.send(Box::new(self.view()));
            }
            Event::Services { keys, reply } => {
                let books = self.books();
                let found = keys.iter().filter_map(|key| books.service(key)).collect();
                let _ = reply.send(found);
            }
            Event::Pools(Ok(pools)) => {
                self.problems.remove("load balancer");
                self.announcements.set_pools(pools);
            }
            Event::Pools(Err(why)) => self.problem("load balancer", why),
            Event::Live(live) => self.announcements.set_live(live),
            Event::HealthPort(complaint) => {
                if let Some(why) = &complaint.error {
                    let note = format!(
                        "Node {} cannot listen on healthCheckNodePort {}: {why}",
                        self.here.node, complaint.port
                    );
                    self.note(
                        &complaint.service,
                        "FailedToStartServiceHealthcheck",
                        note,
                        false,
                    );
                    tracing::warn!(service = %complaint.service, port = complaint.port, why, "a health check cannot listen");
                }
                self.health_checks.complaint(complaint);
            }
            Event::Stop => {}
        }
    }

    /// Takes news of the cluster.
    fn hear(&mut self, report: WatchReport, seen: Instant) {
        match report {
            WatchReport::Change(change) => {
                self.problems.remove("watch");
                self.progress.change(&change, seen);
                // Whatever was wrong with an object is said anew after its change.
                match &change {
                    Change::Upsert(object) => drop(self.rejected.remove(&object.reference())),
                    Change::Remove(gone) => drop(self.rejected.remove(gone)),
                    Change::Replace(kind, _) => {
                        self.rejected.retain(|object, _| object.kind != *kind)
                    }
                }
                self.snapshot.apply(change, &mut self.dirty);
            }
            WatchReport::Rejected(rejected) => {
                tracing::warn!(%rejected, "an object counts as absent");
                self.report.rejected_objects += 1;
                if rejected.object.kind == Kind::Service {
                    let note = format!("It is not served: {}: {}", rejected.field, rejected.reason);
                    self.note(&rejected.object.key, "MalformedService", note, true);
                }
                self.rejected.insert(rejected.object.clone(), rejected);
            }
            WatchReport::Failed { kind, error } => {
                self.watch_failed = Some(Instant::now());
                self.problem("watch", format!("{kind}s cannot be watched: {error}"));
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

    /// Tells the owner of a Service what it cannot have. What every node sees, one of them tells.
    fn note(&self, service: &ServiceKey, reason: &'static str, note: String, everywhere: bool) {
        let Some(notes) = &self.notes else { return };
        let names: Vec<Arc<str>> = self
            .snapshot
            .nodes()
            .map(|node| node.name.clone())
            .collect();
        if everywhere && chosen(service, names.iter()) != Some(&self.here.node) {
            return;
        }
        notes.tell(Happening {
            service: service.clone(),
            reason,
            note,
        });
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

    fn books(&self) -> Books<'_> {
        Books {
            snapshot: &self.snapshot,
            ledger: self.node.as_ref().map(|node| &node.ledger),
            here: &self.here,
            rejected: &self.rejected,
            health_checks: &self.health_checks,
        }
    }

    fn view(&self) -> View {
        let owners = self.node.as_ref().map(|node| node.ledger.owners().clone());
        let mut report = Report::default();
        self.pods.fill(&mut report);
        View {
            node: self.here.node.clone(),
            snapshot: self.snapshot.clone(),
            allocations: report.allocations,
            owners: owners.unwrap_or_default(),
            services: self.books().services(),
            pin_root: self.config.pin_root.clone(),
            monitor: self.monitor.clone(),
        }
    }

    /// Learns who this node is, sets it up once that is known, and keeps its routes.
    fn settle_node(&mut self) -> Result<(), WorkerError> {
        let dirty: Vec<Arc<str>> = std::mem::take(&mut self.dirty.nodes).into_iter().collect();
        if !dirty.is_empty() {
            // Whether a balanced address is a Service's alone depends on the nodes' own.
            let balanced = self.snapshot.services();
            let balanced = balanced.filter(|service| !service.load_balancer_ips.is_empty());
            self.dirty
                .services
                .extend(balanced.map(|service| service.key.clone()));
        }
        if dirty.contains(&self.here.node)
            && let Some(object) = self.snapshot.node(&self.here.node).cloned()
        {
            if self.here.zone != object.zone {
                self.here.zone = object.zone.clone();
                self.dirty
                    .services
                    .extend(self.snapshot.services().map(|service| service.key.clone()));
            }
            self.progress.health.set_leaving(object.leaving);
            match Identity::of(&object) {
                Ok(identity) => self.take_identity(identity)?,
                Err(why) => self.problem("node", why),
            }
        } else if self.snapshot.synced(Kind::Node) && self.snapshot.node(&self.here.node).is_none()
        {
            self.problem(
                "node",
                format!("there is no Node {:?} in the cluster", self.here.node),
            );
        }
        if self.node.is_none() && self.identity.is_some() && !self.problems.contains_key("setup") {
            self.set_up();
        }
        if !dirty.is_empty() {
            self.announcements.nodes_changed();
        }
        if !dirty.is_empty() || std::mem::take(&mut self.routes_due) {
            self.settle_routes(self.problems.contains_key("routes"));
        }
        Ok(())
    }

    fn take_identity(&mut self, identity: Identity) -> Result<(), WorkerError> {
        self.problems.remove("node");
        if self.identity.as_ref() == Some(&identity) {
            return Ok(());
        }
        self.pods.set_ranges(identity.ranges.clone());
        if let Err(error) = self.identity_file.save(&self.config.node_name, &identity) {
            self.problem("identity", error.to_string());
        }
        let old = self.identity.replace(identity.clone());
        match (old, &self.node) {
            (Some(old), Some(_)) => Err(WorkerError::IdentityChanged(old, identity)),
            _ => {
                self.problems.remove("setup");
                Ok(())
            }
        }
    }

    fn set_up(&mut self) {
        let Some(identity) = &self.identity else {
            return;
        };
        let began = Instant::now();
        let set_up = Node::set_up(&self.config, identity, &mut self.kernel)
            .and_then(|mut node| self.pods.adopt(&mut self.kernel, &mut node).map(|()| node));
        match set_up {
            Ok(node) => {
                tracing::info!(addresses = ?identity.addresses, took_ms = began.elapsed().as_millis(), "the data plane is up");
                self.problems.remove("setup");
                // Whoever listened to an earlier worker is gone.
                if let Err(error) = dataplane::quiet(&self.config.pin_root) {
                    tracing::warn!(error = reason(&error), "the monitor cannot be reset");
                }
                self.node = Some(node);
                // Routes were left alone until now.
                self.settle_routes(true);
            }
            Err(error) => self.problem("setup", reason(&error)),
        }
    }

    /// Answers on the link for what the pools, the Services and the nodes that live say.
    fn settle_announcements(&mut self) {
        let Some(node) = &self.node else {
            return;
        };
        match self.announcements.settle(&node.uplink, &self.snapshot) {
            Ok(()) => drop(self.problems.remove("announce")),
            Err(error) => self.problem("announce", error.to_string()),
        }
    }

    fn settle_unmasqueraded(&mut self) {
        let Some(node) = self
            .node
            .as_mut()
            .filter(|_| self.config.masquerade && self.snapshot.synced(Kind::Node))
        else {
            return;
        };
        let configured = self.config.unmasqueraded.iter();
        let configured = configured.chain(&self.config.service_ranges).copied();
        match node.settle_unmasqueraded(plan_unmasqueraded(&self.snapshot, configured)) {
            Ok(()) => drop(self.problems.remove("masquerade")),
            Err(error) => self.problem("masquerade", reason(&error)),
        }
    }

    /// `again` compares the kernel's table also when the plan is what it was.
    fn settle_routes(&mut self, again: bool) {
        self.settle_unmasqueraded();
        let Some(node) = self
            .node
            .as_ref()
            .filter(|_| self.snapshot.synced(Kind::Node))
        else {
            return;
        };
        let settled = self.routes.settle(
            &self.snapshot,
            &self.here.node,
            node,
            &mut self.kernel,
            again,
        );
        self.report.routes = self.routes.count();
        let unreachable: Vec<String> = self
            .routes
            .problems()
            .iter()
            .map(|(node, why)| format!("{node}: {why}"))
            .collect();
        match settled {
            Err(error) => self.problem("routes", reason(&error)),
            Ok(()) if !unreachable.is_empty() => self.problem("routes", unreachable.join("; ")),
            Ok(()) => drop(self.problems.remove("routes")),
        }
    }

    /// Plans the Services that became dirty and brings the maps to it. `again` is for what failed: a full map is not tried with every
    /// event.
    fn settle_services(&mut self, taken: Instant, again: bool) {
        let synced =
            self.snapshot.synced(Kind::Service) && self.snapshot.synced(Kind::EndpointSlice);
        let Some(node) = self.node.as_mut().filter(|_| synced) else {
            return;
        };
        // What an earlier agent left is compared, and pruned, only now that everything is known.
        let first = !self.services_applied;
        let host_ports = self.pods.take_host_ports();
        if self.dirty.services.is_empty() && host_ports.is_empty() && !first && !again {
            if !self.retry {
                self.progress.nothing_to_do(taken);
            }
            return;
        }
        let began = taken;
        for key in std::mem::take(&mut self.dirty.services) {
            self.health_checks
                .replan(&self.snapshot, &key, &self.here.node);
            self.announcements.replan(&self.snapshot, &key);
            let wish = plan(&self.snapshot, &key, &self.here);
            match check(&wish) {
                Ok(()) => node.ledger.set(&key, wish),
                Err(violation) => {
                    tracing::error!(%key, %violation, "a plan is unsound and is not applied")
                }
            }
        }
        for (key, wish) in host_ports {
            match check(&wish) {
                Ok(()) => node.ledger.set(&key, wish),
                Err(violation) => {
                    tracing::error!(%key, %violation, "a plan is unsound and is not applied")
                }
            }
        }
        self.health_checks.settle();
        let batch = node.ledger.diff();
        for refusal in &batch.refusals {
            tracing::warn!(%refusal, "a Service cannot have what it wants");
        }
        self.report.refusals += batch.refusals.len() as u64;
        self.report.batches += 1;
        self.retry = false;
        match node.apply(&batch.ops) {
            Ok(()) => {
                node.ledger.applied(&batch);
                self.problems.remove("services");
                self.services_applied = true;
                let extent = if first { Extent::Full } else { Extent::Partial };
                self.progress.synced(extent, began);
            }
            Err(error) => {
                let why = reason(&error);
                self.retry = true;
                self.report.batches_failed += 1;
                match node.dataplane.state() {
                    Ok(held) => node.ledger.hold(held),
                    Err(error) => {
                        tracing::error!(error = reason(&error), "the maps cannot be read back")
                    }
                }
                self.problem("services", why);
            }
        }
        for refusal in batch.refusals.iter().take(NOTES_MAX) {
            let (service, note) = match refusal {
                Refusal::NoId(port) => (&port.service, refusal.to_string()),
                Refusal::Contested {
                    frontend,
                    winner,
                    loser,
                } => (loser, format!("{frontend} belongs to Service {winner}")),
            };
            self.note(service, "FrontendNotAvailable", note, true);
        }
        self.report.last_batch_operations = batch.ops.len();
        self.report.last_batch_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        if first && self.services_applied {
            tracing::info!(
                operations = batch.ops.len(),
                took_us = self.report.last_batch_us,
                "all Services are in the maps"
            );
            match install::write_conf_list(&self.config) {
                Ok(()) => drop(self.problems.remove("cni configuration")),
                Err(error) => self.problem("cni configuration", error.to_string()),
            }
        }
    }

    fn upkeep(&mut self) -> Result<(), WorkerError> {
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
        if let Some(node) = &mut self.node {
            match node.upkeep(&mut self.kernel) {
                Ok(()) => drop(self.problems.remove("upkeep")),
                Err(error) if error.pins_are_gone() => return Err(WorkerError::PinsGone(error)),
                Err(error) => {
                    let why = reason(&error);
                    self.problem("upkeep", why);
                }
            }
        }
        self.pods.upkeep(&mut self.kernel, self.node.as_mut());
        if let Ok(links) = self.kernel.links() {
            let names = links.iter().map(|link| link.name.as_str());
            self.report.notes = foreign_interfaces(names);
        }
        let earlier = earlier_configurations(&self.config.cni_conf_dir);
        self.report.notes.extend(earlier);
        self.settle_routes(true);
        self.settle_services(Instant::now(), self.retry);
        Ok(())
    }

    /// Whether an ADD would be served, as CNI's STATUS asks.
    fn status(&self) -> Response {
        let refuse = |code, what: &str, why: String| {
            Response::Error(CniError::new(code, what).with_details(why))
        };
        let what = "the Keelway agent is not ready";
        match (self.not_ready(), self.pods.exhausted()) {
            // What pods have goes on working; what they are to get does not come.
            (Some(why), _) if self.pods.count() > 0 => refuse(Code::LimitedConnectivity, what, why),
            (Some(why), _) => refuse(Code::NotAvailable, what, why),
            (None, Some(why)) => refuse(
                Code::NotAvailable,
                "no pod address of this node is free",
                why,
            ),
            (None, None) => Response::Done,
        }
    }

    /// Why pods cannot be served, if so.
    fn not_ready(&self) -> Option<String> {
        if let (Some(_), true) = (&self.node, self.services_applied) {
            return None;
        }
        let waiting = || {
            let missing = KINDS
                .into_iter()
                .filter(|kind| !self.snapshot.synced(*kind))
                .map(Kind::name);
            let missing: Vec<&str> = missing.collect();
            if missing.is_empty() {
                "setting up".into()
            } else {
                format!("waiting for {}", missing.join(", "))
            }
        };
        let problems: Vec<&str> = self.problems.values().map(String::as_str).collect();
        Some(if problems.is_empty() {
            waiting()
        } else {
            problems.join("; ")
        })
    }

    fn problem(&mut self, part: &'static str, why: String) {
        if self.problems.get(part) != Some(&why) {
            tracing::warn!(part, why, "problem");
            self.problems.insert(part, why);
        }
    }

    fn current_report(&self) -> Report {
        let mut report = self.report.clone();
        let not_ready = self.not_ready();
        report.ready = not_ready.is_none();
        report.problems = self
            .problems
            .iter()
            .map(|(part, why)| format!("{part}: {why}"))
            .collect();
        if report.problems.is_empty() {
            report.problems.extend(not_ready);
        }
        report.synced = KINDS
            .into_iter()
            .filter(|kind| self.snapshot.synced(*kind))
            .map(|kind| kind.to_string())
            .collect();
        report.malformed = self.rejected.values().map(ToString::to_string).collect();
        report.measures = self.measures();
        report.services = self.snapshot.count(Kind::Service);
        report.endpoint_slices = self.snapshot.count(Kind::EndpointSlice);
        report.nodes = self.snapshot.count(Kind::Node);
        if let Some(node) = &self.node {
            let held = node.ledger.held();
            report.service_ports = held.services.len();
            report.frontends = held.frontends.len();
            report.backends = held
                .services
                .values()
                .map(|one| one.active.len() + one.terminating.len())
                .sum();
            report.maps = node.fills();
            match node.dataplane.counters() {
                Ok(counters) => report.counters = counters.into_iter().map(counter).collect(),
                Err(error) => report
                    .problems
                    .push(format!("counters: {}", reason(&error))),
            }
        }
        report.paths = self.routes.report();
        self.pods.fill(&mut report);
        self.announcements.fill(&mut report);
        report
    }
}

fn counter((named, packets): (dataplane_abi::Reason, u64)) -> Counter {
    let class = match named.class() {
        Class::Event => "event",
        Class::Drop => "drop",
        Class::Reject => "reject",
    };
    Counter {
        reason: named.name().into(),
        class: class.into(),
        packets,
    }
}

/// An error with everything that caused it, on one line.
pub(crate) fn reason(error: &dyn StdError) -> String {
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
