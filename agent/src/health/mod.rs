//! What load balancers ask a node: whether it has endpoints of a Service (`healthCheckNodePort`), and whether its proxy works.
//!
//! Paths, status codes, headers and bodies are kube-proxy's (KEP-3836 and `pkg/proxy/healthcheck`), since cloud load balancers and
//! autoscalers are configured for them. [`plan`] says what a Service wants, a [`Book`] keeps the wishes of all and who
//! has which port, [`servers`] does the listening.

mod book;
mod proxy;
mod servers;

use std::collections::BTreeMap;
use std::sync::Arc;

use cluster_model::{ServiceKey, Snapshot};

pub use book::{Book, HealthCheck, HealthOp, plan};
pub use proxy::{HealthAnswer, ProxyHealth};
pub use servers::{Complaint, Servers, listen, serve_proxy};

/// The health checks of this node: wishes, servers, and what went wrong.
#[derive(Default)]
pub struct HealthChecks {
    book: Book,
    /// Absent where nothing can be served, as in tests of the loop.
    servers: Option<Servers>,
    /// Ports that cannot be had, by the Service that wants them.
    taken: BTreeMap<ServiceKey, (u16, String)>,
}

impl HealthChecks {
    pub fn serve(&mut self, servers: Servers) {
        self.servers = Some(servers);
    }

    /// Plans the health check of one Service anew.
    pub fn replan(&mut self, snapshot: &Snapshot, key: &ServiceKey, node: &Arc<str>) {
        let wish = plan(snapshot, key, node);
        if wish.is_none_or(|wish| {
            self.taken
                .get(key)
                .is_some_and(|(port, _)| *port != wish.port)
        }) {
            self.taken.remove(key);
        }
        self.book.set(key, wish);
    }

    /// Brings the servers to what is planned.
    pub fn settle(&mut self) {
        let ops = self.book.diff();
        if let Some(servers) = &mut self.servers {
            for op in ops {
                servers.apply(op);
            }
        }
    }

    /// A server cannot listen, or can again.
    pub fn complaint(&mut self, complaint: Complaint) {
        match complaint.error {
            // A complaint that comes late may be of a port that is not wished any more.
            Some(error)
                if self
                    .book
                    .wish(&complaint.service)
                    .is_some_and(|wish| wish.port == complaint.port) =>
            {
                self.taken
                    .insert(complaint.service, (complaint.port, error));
            }
            _ => drop(self.taken.remove(&complaint.service)),
        }
    }

    /// Why a Service has no health check though it wants one.
    pub fn refusal(&self, key: &ServiceKey) -> Option<String> {
        if let Some((port, winner)) = self.book.refused(key) {
            return Some(format!("healthCheckNodePort {port} belongs to {winner}"));
        }
        let (port, why) = self.taken.get(key)?;
        Some(format!(
            "healthCheckNodePort {port} cannot be listened on: {why}"
        ))
    }
}
