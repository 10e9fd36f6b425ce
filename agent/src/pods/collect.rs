//! What is removed without a DEL: by the runtime's GC, by deletions that waited, and because it is gone already.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use keelway_cni::protocol::Response;
use keelway_cni::{Attachment, CniError, Code, spool};

use super::{Pods, now, pod_links, remove_pod};
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
        let compared = kernel.links().map_err(NodeError::from).and_then(|links| {
            let gone = self.forget_gone(&pod_links(&links));
            let_go(&gone, &links, node)
        });
        if let Err(error) = compared {
            self.problem = Some(reason(&error));
        }
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

/// Takes pods that are gone out of the maps, and lets go of hooks on interfaces that are.
pub(super) fn let_go(gone: &[IpAddr], links: &[Link], node: &mut Node) -> Result<(), NodeError> {
    node.apply(&remove_pod(gone))?;
    let there: HashSet<u32> = links.iter().map(|link| link.index).collect();
    for index in node.dataplane.attached_pods()? {
        if !there.contains(&index) {
            node.dataplane.detach_pod(index)?;
        }
    }
    Ok(())
}
