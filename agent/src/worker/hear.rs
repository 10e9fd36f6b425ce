//! What the loop does with each event: it answers, or notes what has become dirty.

use std::sync::Arc;
use std::time::Instant;

use cluster_model::watch::Report as WatchReport;
use cluster_model::{Change, Kind, ServiceKey};
use keelway_cni::protocol::{Request, Response};
use keelway_cni::{CniError, Code};

use super::Worker;
use crate::event::Event;
use crate::record::{Happening, chosen};

impl Worker {
    pub(super) fn take(&mut self, event: Event) {
        match event {
            Event::Cluster { reports, seen } => {
                for report in reports {
                    self.hear(report, seen);
                }
            }
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
            Event::Buried { outcome } => self.pods.buried(outcome),
            Event::Sandboxes(sandboxes) => {
                let known = sandboxes.ok().flatten();
                self.pods
                    .compare(known.as_ref(), &mut self.kernel, self.node.as_mut());
            }
            Event::Verified => self.verified = true,
            Event::PathsChanged => self.routes_due = true,
            Event::AddressesChanged => self.addresses_due = true,
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
            Event::Share { reply } => {
                // Whoever waited has left when this fails, and with the answer goes what it was to be told by.
                let _ = reply.send(self.shares.add(&self.snapshot));
            }
            Event::Offer { listener, offer } => match offer {
                Some(offer) => self.offers.say(listener, offer),
                None => self.offers.leave(listener, Instant::now()),
            },
            Event::ServiceRanges(ranges) => {
                self.told_ranges = Some(ranges);
                self.routes_due = true;
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
            Event::CredentialsReplaced | Event::Stop => {}
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
                self.shares.change(&change);
                self.snapshot.apply(change, &mut self.dirty);
            }
            WatchReport::Reached { kind, version } => self.shares.reached(kind, version),
            WatchReport::Rejected(rejected) => {
                tracing::warn!(%rejected, "an object counts as absent");
                self.report.rejected_objects += 1;
                if rejected.object.kind == Kind::Service {
                    let note = format!("It is not served: {}: {}", rejected.field, rejected.reason);
                    self.note(&rejected.object.key, "MalformedService", note, true);
                }
                self.rejected.insert(rejected.object.clone(), rejected);
            }
            WatchReport::Refused => {}
            WatchReport::Failed { kind, error } => {
                self.watch_failed = Some(Instant::now());
                self.shares.failed(kind, &error);
                self.problem("watch", format!("{kind}s cannot be watched: {error}"));
            }
        }
    }

    /// Tells the owner of a Service what it cannot have. What every node sees, one of them tells.
    pub(super) fn note(
        &self,
        service: &ServiceKey,
        reason: &'static str,
        note: String,
        everywhere: bool,
    ) {
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
}
