//! What is removed without a DEL: by the runtime's GC, by deletions that waited, and because it is gone already.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::time::Instant;

use keelway_cni::protocol::Response;
use keelway_cni::{Attachment, CniError, Code, spool};

use super::{BURYING, DELETIONS, INTERFACES, Pods, now, pod_links, remove_pod};
use crate::event::Reply;
use crate::net::{Kernel, Link};
use crate::node::{Node, NodeError};
use crate::worker::reason;

impl Pods {
    /// GC: removes every attachment of the network that the runtime does not name. Other networks' are other lists' business, and
    /// one that is being made is too young for the runtime's list.
    pub(super) fn collect(
        &mut self,
        network: &str,
        valid: &[Attachment],
        reply: &Reply<Response>,
        kernel: &mut Kernel,
        mut node: Option<&mut Node>,
    ) {
        let valid: HashSet<&Attachment> = valid.iter().collect();
        let gone: Vec<Attachment> = self
            .pool
            .allocations()
            .filter(|one| !self.wiring.contains_key(&one.host_interface))
            .filter(|one| {
                !self
                    .to_wire
                    .iter()
                    .any(|wait| wait.wire.host_interface == one.host_interface)
            })
            .filter(|one| one.network.as_deref() == Some(network))
            .filter_map(|one| one.attachment.as_ref())
            .filter(|attachment| !valid.contains(attachment))
            .cloned()
            .collect();
        let before = self.deletions.len();
        let count = gone.len();
        for attachment in gone {
            tracing::info!(%attachment, "no runtime names it any more");
            self.delete(attachment, None, kernel, node.as_deref_mut());
        }
        let response = if self.deletions.len() - before == count {
            Response::Done
        } else {
            let left = count - (self.deletions.len() - before);
            Response::Error(CniError::new(
                Code::Failed,
                format!("{left} of {count} stale attachments could not be removed"),
            ))
        };
        self.respond("GC", reply, response);
    }

    /// Deletes pods that no runtime has had a sandbox of for a while: one that died while it made them, and forgot them. Pods that no
    /// runtime of Kubernetes made are not its business, and without a runtime's word everybody lives.
    pub fn compare(
        &mut self,
        sandboxes: Option<&HashSet<String>>,
        kernel: &mut Kernel,
        mut node: Option<&mut Node>,
    ) {
        let Some(sandboxes) = sandboxes else {
            // Time in which the runtime could not be asked is no time in which it had no such sandbox.
            self.orphans.clear();
            return;
        };
        let missing: HashMap<String, Attachment> = self
            .pool
            .allocations()
            .filter(|one| one.pod.is_some())
            .filter_map(|one| Some((one.host_interface.clone(), one.attachment.clone()?)))
            .filter(|(_, attachment)| !sandboxes.contains(&attachment.container_id))
            .collect();
        self.orphans.retain(|name, _| missing.contains_key(name));
        let now = Instant::now();
        for (name, attachment) in missing {
            let since = *self.orphans.entry(name.clone()).or_insert(now);
            if now.duration_since(since) < self.collect_after {
                continue;
            }
            tracing::warn!(%attachment, "no container runtime has its sandbox: collecting it");
            self.orphans.remove(&name);
            self.delete(attachment, None, kernel, node.as_deref_mut());
        }
    }

    /// Does deletions that wait, and forgets pods whose interface went with their network namespace.
    pub fn upkeep(&mut self, kernel: &mut Kernel, mut node: Option<&mut Node>) {
        match spool::list(&self.spool) {
            Ok(waiting) => {
                self.problems.remove(DELETIONS);
                for attachment in waiting {
                    tracing::info!(%attachment, "doing a deletion that waited");
                    self.delete(attachment, None, kernel, node.as_deref_mut());
                }
            }
            Err(error) => {
                let why = format!("{}: {error}", self.spool.display());
                self.problems.insert(DELETIONS, why);
            }
        }
        if self.problems.contains_key(BURYING) {
            self.start_burying(true);
        }
        let Some(node) = node else { return };
        let compared = kernel.links().map_err(NodeError::from).and_then(|links| {
            let links_of_pods = pod_links(&links);
            let gone = self.forget_gone(&links_of_pods);
            node.apply(&remove_pod(&gone))?;
            self.keep_routes(&links_of_pods, kernel, node)
        });
        match compared {
            Ok(()) => drop(self.problems.remove(INTERFACES)),
            Err(error) => drop(self.problems.insert(INTERFACES, reason(&error))),
        }
    }

    /// Puts back what leads the host to its pods: programs that keep the host's network take away what they did not make.
    fn keep_routes(
        &self,
        links: &HashMap<&str, &Link>,
        kernel: &mut Kernel,
        node: &Node,
    ) -> Result<(), NodeError> {
        let routes: HashSet<(u32, IpAddr)> = kernel.pod_routes()?.into_iter().collect();
        for allocation in self.pool.allocations() {
            // One that is being made has its routes when it is done.
            if self.wiring.contains_key(&allocation.host_interface) {
                continue;
            }
            let Some(link) = links.get(allocation.host_interface.as_str()) else {
                continue;
            };
            let led = |ip: &IpAddr| routes.contains(&(link.index, *ip));
            if link.up && allocation.addresses.iter().all(led) {
                continue;
            }
            tracing::warn!(
                interface = link.name,
                "what leads to a pod was taken away; it is back"
            );
            kernel.set_up(link.index)?;
            kernel.connect_pod(
                link.index,
                &allocation.addresses,
                allocation.mac(),
                &node.uplink.addresses,
            )?;
        }
        Ok(())
    }

    /// Writes off the pods that have no interface any more, and returns the addresses that they had.
    pub(super) fn forget_gone(&mut self, links: &HashMap<&str, &Link>) -> Vec<IpAddr> {
        let waiting: HashSet<&str> = self
            .to_wire
            .iter()
            .map(|one| one.wire.host_interface.as_str())
            .collect();
        let gone: Vec<String> = self
            .pool
            .allocations()
            .map(|one| &one.host_interface)
            .filter(|name| {
                !links.contains_key(name.as_str())
                    && !self.wiring.contains_key(*name)
                    && !waiting.contains(name.as_str())
            })
            .cloned()
            .collect();
        self.unsaved |= !gone.is_empty();
        let mut addresses = Vec::new();
        for name in gone {
            if let Some(gone) = self.pool.bury(&name) {
                if !gone.port_mappings.is_empty() {
                    self.host_ports.insert(name.clone());
                }
                tracing::info!(addresses = ?gone.addresses, pod = gone.pod, "a pod went without a word");
                addresses.extend(gone.addresses);
            }
            self.pool.buried(&name, now());
            self.indexes.remove(&name);
        }
        addresses
    }
}
