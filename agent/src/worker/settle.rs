//! Bringing the node to what is known: who it is, its routes, its Services, and what it answers for on the link.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use cluster_model::{BALANCING_ANNOTATION, DSR_ANNOTATION, Kind, ServiceKey, Snapshot};
use ipnetwork::IpNetwork;

use super::{Worker, WorkerError, reason};
use crate::dataplane::{self, Frontend, Preparation};
use crate::event::Event;
use crate::install;
use crate::metrics::Extent;
use crate::names::KernelNames;
use crate::node::{Brought, Identity, Node, NodeError};
use crate::node_ports::{NodePort, listeners};
use crate::plan::{
    Dsr, Refusal, ServicePlan, check, held_lifeline, is_lifeline, keep_backends, lifeline, plan,
    plan_peers, plan_unmasqueraded,
};
use crate::service_ranges::{choose, unrouted};

/// Refusals of one batch whose Services are told: more come of one mistake.
const NOTES_MAX: usize = 100;
/// Complaints about the endpoints of one Service: an event has room for a thousand bytes.
const UNUSABLE_MAX: usize = 5;

impl Worker {
    /// Learns who this node is, sets it up once that is known, and keeps its routes.
    pub(super) fn settle_node(&mut self) -> Result<(), WorkerError> {
        let dirty: Vec<Arc<str>> = std::mem::take(&mut self.dirty.nodes).into_iter().collect();
        if self.node_addresses.take(&self.snapshot, &dirty) {
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

    pub(super) fn set_up(&mut self) {
        let Some(identity) = &self.identity else {
            return;
        };
        let began = Instant::now();
        let preparation = self.preparation.take();
        let preparation = preparation.unwrap_or_else(Preparation::begin);
        let events = self.events.clone();
        // The loop has ended already when this fails.
        let verified = move || drop(events.send(Event::Verified));
        let set_up = Node::set_up(
            &self.config,
            identity,
            &mut self.kernel,
            preparation,
            verified,
        )
        .and_then(|mut node| self.pods.adopt(&mut self.kernel, &mut node).map(|()| node));
        match set_up {
            Ok(node) => {
                tracing::info!(addresses = ?identity.addresses, took_ms = began.elapsed().as_millis(), "the data plane's maps are there");
                self.problems.remove("setup");
                // Whoever listened to an earlier worker is gone.
                if let Err(error) = dataplane::quiet(&self.config.pin_root) {
                    tracing::warn!(error = reason(&error), "the monitor cannot be reset");
                }
                self.node = Some(node);
                self.names = None;
                // Routes were left alone until now.
                self.settle_routes(true);
            }
            Err(error) => self.problem("setup", reason(&error)),
        }
    }

    /// Hangs the programs where they belong. What the cluster's Services are need not be known, but where it is, the maps have it first.
    pub(super) fn hang(&mut self) {
        let Some(node) = self.node.as_mut().filter(|node| !node.hangs()) else {
            return;
        };
        let hung = node.hang().and_then(|()| self.pods.hang(node));
        match hung {
            Ok(()) => tracing::info!("the data plane is up"),
            Err(error) => {
                self.problem("setup", reason(&error));
                // All is begun anew with the next upkeep.
                self.node = None;
                self.services_applied = false;
                let all = self.snapshot.services().map(|service| service.key.clone());
                self.dirty.services.extend(all);
            }
        }
    }

    /// Answers on the link for what the pools, the Services and the nodes that live say. Not before it is known what they are: others
    /// leave addresses to a node that says that it lives, and one that hears nobody, for not knowing who there is, would take them all.
    pub(super) fn settle_announcements(&mut self) {
        let Some(node) = self
            .node
            .as_ref()
            .filter(|_| self.services_applied && self.snapshot.synced(Kind::Node))
        else {
            return;
        };
        match self.announcements.settle(&node.uplink, &self.snapshot) {
            Ok(()) => drop(self.problems.remove("announce")),
            Err(error) => self.problem("announce", error.to_string()),
        }
    }

    /// Answers pods' questions for cluster names as the node's DNS server says that it would. `again` tries also what has failed.
    pub(super) fn settle_names(&mut self, again: bool) {
        // Not before all is known: what is missing would be denied by nobody, but what is old would be told.
        let Some(node) = self
            .node
            .as_mut()
            .filter(|_| self.services_applied && self.config.kernel_dns)
            .filter(|_| again || !self.problems.contains_key("dns"))
        else {
            return;
        };
        let terms = self.offers.terms(Instant::now());
        let names = match &mut self.names {
            Some(names) => names,
            None if terms.is_none() => return,
            none => match node.dataplane.load_names() {
                Ok(tables) => none.insert(KernelNames::new(tables)),
                Err(error) => return self.problem("dns", reason(&error)),
            },
        };
        match names.settle(&self.snapshot, terms) {
            Ok(()) => drop(self.problems.remove("dns")),
            Err(error) => self.problem("dns", reason(&error)),
        }
    }

    /// Routes the ranges of Services. What ServiceCIDRs name is judged by where nodes and pods are, so those are known first.
    fn settle_service_ranges(&mut self) {
        let (Some(node), Some(told)) = (
            self.node
                .as_mut()
                .filter(|_| self.snapshot.synced(Kind::Node)),
            &self.told_ranges,
        ) else {
            return;
        };
        let has_family = |range: &IpNetwork| node.has_family_of(range);
        let configured = &self.config.service_ranges;
        let chosen = choose(configured, told, has_family, &self.snapshot);
        match node.settle_service_ranges(&mut self.kernel, &chosen.ranges) {
            Err(error) => self.problem("service ranges", reason(&error)),
            Ok(()) if !chosen.refused.is_empty() => {
                self.problem("service ranges", chosen.refused.join("; "));
            }
            Ok(()) => drop(self.problems.remove("service ranges")),
        }
    }

    /// A Service that the host's own packets do not find.
    pub(super) fn unrouted_service(&self) -> Option<String> {
        let ranges = self.node.as_ref()?.service_ranges();
        let (key, ip) = unrouted(ranges, &self.snapshot)?;
        let routed: Vec<String> = ranges.iter().map(ToString::to_string).collect();
        Some(format!(
            "Service {key} has the address {ip}, and Services are in {}: name every range of Services, by ServiceCIDRs or --service-cidr",
            routed.join(", ")
        ))
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
        let routed = node.service_ranges().to_vec();
        let configured = configured.copied().chain(routed);
        match node.settle_unmasqueraded(plan_unmasqueraded(&self.snapshot, configured)) {
            Ok(()) => drop(self.problems.remove("masquerade")),
            Err(error) => self.problem("masquerade", reason(&error)),
        }
    }

    /// Other nodes' addresses, where clients outside may be answered from there.
    fn settle_peers(&mut self) {
        let dsr = self.config.balancing.dsr != Dsr::Off;
        let Some(node) = self
            .node
            .as_mut()
            .filter(|_| dsr && self.snapshot.synced(Kind::Node))
        else {
            return;
        };
        match node.settle_peers(plan_peers(&self.snapshot, &self.here.node)) {
            Ok(()) => drop(self.problems.remove("dsr")),
            Err(error) => self.problem("dsr", reason(&error)),
        }
    }

    /// `again` compares the kernel's table also when the plan is what it was.
    pub(super) fn settle_routes(&mut self, again: bool) {
        self.settle_service_ranges();
        self.settle_unmasqueraded();
        self.settle_peers();
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

    /// Looks whether processes of the node listen on node ports. `again` looks also when no node port is new.
    pub(super) fn settle_node_ports(&mut self, again: bool) {
        if !self.node_ports.take_due(again) {
            return;
        }
        let Some(node) = &self.node else { return };
        let listeners = match listeners(Path::new("/proc/self/net")) {
            Ok(listeners) => listeners,
            Err(error) => {
                self.problem("node ports", format!("/proc/self/net: {error}"));
                return;
            }
        };
        self.problems.remove("node ports");
        for (service, port) in self.node_ports.compare(&listeners, &node.ledger) {
            let NodePort { protocol, port, .. } = port;
            let note = format!(
                "Node {}: a process listens on {protocol} node port {port}, and is hidden by this Service",
                self.here.node
            );
            tracing::warn!(%service, note, "a node port is a process's too");
            self.note(&service, "NodePortInUse", note, false);
        }
    }

    /// Plans the Services that became dirty and brings the maps to it. `again` is for what failed, and for what there was no room for:
    /// that is not tried with every event.
    pub(super) fn settle_services(&mut self, taken: Instant, again: bool) {
        if !(self.snapshot.synced(Kind::Service) && self.snapshot.synced(Kind::EndpointSlice)) {
            return self.settle_host_ports();
        }
        let Some(node) = self.node.as_mut() else {
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
        let mut left_out = Vec::new();
        for key in std::mem::take(&mut self.dirty.services) {
            self.health_checks
                .replan(&self.snapshot, &key, &self.here.node);
            self.announcements.replan(&self.snapshot, &key);
            if let Some(names) = &mut self.names {
                names.replan(&self.snapshot, &key);
            }
            let mut wish = plan(&self.snapshot, &key, &self.here);
            if is_lifeline(&key) {
                let known = node.ledger.service(&key).is_some();
                let gone = wish == ServicePlan::default() && known;
                if gone || keep_backends(&mut wish, node.ledger.held()) {
                    let why = "has no endpoint; pods are led to its last ones";
                    self.problems.insert("default/kubernetes", why.into());
                } else {
                    self.problems.remove("default/kubernetes");
                }
                if gone {
                    continue;
                }
            }
            let complaints = complaints(&self.snapshot, &key, &wish);
            let before = match complaints.is_empty() {
                true => self.left_out.remove(&key),
                false => self.left_out.insert(key.clone(), complaints.clone()),
            };
            let before = before.unwrap_or_default();
            let new = complaints.into_iter().filter(|one| !before.contains(one));
            left_out.extend(new.map(|(reason, words)| (key.clone(), reason, words)));
            if is_sound(&key, &wish) {
                self.node_ports.replan(&key, &wish);
                node.ledger.set(&key, wish);
            }
        }
        if first
            && let Some((key, wish)) =
                lifeline_of_the_maps(&self.snapshot, node, &self.config.service_ranges)
        {
            let why = "is gone; pods are led to its last endpoints";
            self.problems.insert("default/kubernetes", why.into());
            node.ledger.set(&key, wish);
        }
        for (key, wish) in host_ports {
            if is_sound(&key, &wish) {
                node.ledger.set(&key, wish);
            }
        }
        self.health_checks.settle();
        self.problems.remove("host ports");
        node.ledger.judge_all();
        if again || first {
            node.ledger.resume();
        }
        let batch = node.ledger.diff();
        for refusal in &batch.refusals {
            tracing::warn!(%refusal, "a Service cannot have what it wants");
        }
        self.report.refusals += (batch.refusals.len() + left_out.len()) as u64;
        self.report.batches += 1;
        self.retry = false;
        // Judged by what clients have now; of a batch that fails, part may be in the maps.
        let loses_backends = first || self.datagrams_due || node.ledger.loses_backends(&batch);
        let Brought { outcome, known } = node.bring(&batch);
        self.retry |= !known;
        let ended = loses_backends.then(|| node.end_stale_datagrams());
        // What fits is served; who waits for room does so for its own sake only.
        let applied = outcome.as_ref().err().is_none_or(NodeError::is_limit);
        let is_short = node.ledger.is_short_of_room();
        match outcome {
            Ok(()) if is_short && !again => {}
            Ok(()) => drop(self.problems.remove("services")),
            Err(error) => {
                self.retry |= !applied;
                self.report.batches_failed += 1;
                self.problem("services", reason(&error));
            }
        }
        match ended {
            Some(Ok(())) => {
                self.datagrams_due = false;
                self.problems.remove("datagram sockets");
            }
            Some(Err(error)) => {
                self.datagrams_due = true;
                self.retry = true;
                self.problem("datagram sockets", reason(&error));
            }
            None => {}
        }
        if applied {
            self.hang();
            if self.node.is_some() {
                self.services_applied = true;
                let extent = if first { Extent::Full } else { Extent::Partial };
                self.progress.synced(extent, began);
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
        for (service, reason, words) in left_out.into_iter().take(NOTES_MAX) {
            tracing::warn!(%service, reason, words, "a Service is not served whole");
            self.note(&service, reason, words, true);
        }
        self.report.last_batch_operations = batch.ops.len();
        self.report.last_batch_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        if first && self.services_applied {
            self.take_over();
            tracing::info!(
                operations = batch.ops.len(),
                took_us = self.report.last_batch_us,
                "all Services are in the maps"
            );
            self.invite_pods();
        }
    }

    /// Takes over from other versions, all Services being in our maps.
    fn take_over(&mut self) {
        match self.node.as_mut().map(Node::take_over) {
            Some(Err(error)) => self.problem("other versions", reason(&error)),
            _ => drop(self.problems.remove("other versions")),
        }
    }

    /// Tells runtimes that pods can be wired here.
    fn invite_pods(&mut self) {
        match install::write_conf_list(&self.config) {
            Ok(()) => drop(self.problems.remove("cni configuration")),
            Err(error) => self.problem("cni configuration", error.to_string()),
        }
    }

    /// Does again what was not done once all Services were in the maps, or what somebody undid.
    pub(super) fn keep_settled(&mut self) {
        if !self.services_applied {
            return;
        }
        if self.problems.contains_key("other versions") {
            self.take_over();
        }
        self.invite_pods();
    }
}

/// Whether a plan may be applied. One that may not is a fault of ours.
pub(super) fn is_sound(key: &ServiceKey, wish: &ServicePlan) -> bool {
    check(wish)
        .inspect_err(
            |violation| tracing::error!(%key, %violation, "a plan is unsound and is not applied"),
        )
        .is_ok()
}

/// The Service of the API server as an earlier worker left it, if the cluster has none.
fn lifeline_of_the_maps(
    snapshot: &Snapshot,
    node: &Node,
    service_ranges: &[IpNetwork],
) -> Option<(ServiceKey, ServicePlan)> {
    let key = lifeline();
    let is_known = snapshot.service(&key).is_some() || node.ledger.service(&key).is_some();
    // In another range the first address may be an ordinary Service's.
    let is_free = |frontend: &Frontend| node.ledger.winner(frontend).is_none();
    let kept = (!is_known).then(|| held_lifeline(node.ledger.held(), service_ranges, is_free))?;
    (kept != ServicePlan::default()).then_some((key, kept))
}

/// What of a Service is not served, as reasons and notes of events.
fn complaints(
    snapshot: &Snapshot,
    key: &ServiceKey,
    wish: &ServicePlan,
) -> Vec<(&'static str, String)> {
    let ports = wish.ports.iter().filter(|(_, port)| port.left_out > 0);
    let ports = ports.map(|(key, port)| {
        format!(
            "{key}: {} are left out, being of no use to others, or more than a port can have",
            port.left_out
        )
    });
    let slices = snapshot.slices(key).iter();
    let slices = slices.flat_map(|slice| {
        let named = move |bad: &String| format!("EndpointSlice {}: {bad}", slice.key.name);
        slice.refused.iter().map(named)
    });
    let endpoints: Vec<String> = ports.chain(slices).take(UNUSABLE_MAX).collect();
    let service = snapshot.service(key);
    let said = |name: &str, word: Option<&str>, may: [&str; 2]| -> Vec<String> {
        let wrong = word.filter(|word| !may.contains(word));
        let wrong = wrong.map(|word| {
            format!(
                "annotation {name}: {word:?} is not {} or {}",
                may[0], may[1]
            )
        });
        wrong.into_iter().collect()
    };
    let addresses = service.map(|service| service.refused.iter().take(UNUSABLE_MAX).cloned());
    let addresses = addresses.into_iter().flatten().collect();
    let balancing = service.and_then(|service| service.balancing.as_deref());
    let dsr = service.and_then(|service| service.dsr.as_deref());
    let all = [
        ("AddressesLeftOut", addresses),
        ("EndpointsLeftOut", endpoints),
        (
            "UnknownBalancing",
            said(BALANCING_ANNOTATION, balancing, ["maglev", "random"]),
        ),
        ("UnknownDsr", said(DSR_ANNOTATION, dsr, ["on", "off"])),
    ];
    all.into_iter()
        .filter(|(_, words)| !words.is_empty())
        .map(|(reason, words)| (reason, words.join("; ")))
        .collect()
}
