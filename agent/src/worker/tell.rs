//! What the loop tells of itself: to operators, to the CNI plugin, to metrics.

use cluster_model::Kind;
use dataplane_abi::{Class, DnsCount};
use keelway_cni::protocol::Response;
use keelway_cni::{CniError, Code};

use super::{Worker, reason};
use crate::inspect::View;
use crate::inspect::service::Books;
use crate::report::{Counter, Report};
use crate::source::KINDS;

impl Worker {
    pub(super) fn books(&self) -> Books<'_> {
        Books {
            snapshot: &self.snapshot,
            ledger: self.node.as_ref().map(|node| &node.ledger),
            here: &self.here,
            rejected: &self.rejected,
            health_checks: &self.health_checks,
            node_ports: &self.node_ports,
        }
    }

    pub(super) fn view(&self) -> View {
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

    /// Whether an ADD would be served, as CNI's STATUS asks.
    pub(super) fn status(&self) -> Response {
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

    pub(super) fn current_report(&self) -> Report {
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
        report.node_ports_shared = self.node_ports.count();
        report.services = self.snapshot.count(Kind::Service);
        report.endpoint_slices = self.snapshot.count(Kind::EndpointSlice);
        report.nodes = self.snapshot.count(Kind::Node);
        if let Some(names) = &self.names {
            report.dns_names = names.count();
            report.dns_left_out = names.left_out();
            match names.counts() {
                Ok(counts) => {
                    let outcomes = DnsCount::ALL.iter().map(|count| count.name().to_owned());
                    report.dns = outcomes.zip(counts).collect();
                }
                Err(error) => report.problems.push(format!("dns: {}", reason(&error))),
            }
        }
        if let Some(node) = &self.node {
            let held = node.ledger.held();
            report.service_ports = held.services.len();
            report.frontends = held.frontends.len();
            report.backends = held
                .services
                .values()
                .map(|one| one.active.len() + one.terminating.len())
                .sum();
            let has_tcx = node.dataplane.has_tcx();
            report.hung_by = if has_tcx { "tcx" } else { "filter" }.into();
            report.uplinks = node.uplink_names().map(str::to_owned).collect();
            let xdp = node.xdp();
            report.xdp = xdp.name().into();
            report.xdp_why_not = xdp.why_not().map(str::to_owned);
            report.maps = node.fills();
            let refused = node.dataplane.maglev().refused;
            if refused > 0 {
                report.problems.push(format!(
                    "maglev: {refused} service ports choose their backends at random, there being no room for their tables"
                ));
            }
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
