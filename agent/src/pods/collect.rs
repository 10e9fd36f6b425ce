//! What is removed without a DEL: by the runtime's GC, by deletions that waited, and because it is gone already.

use std::collections::{HashMap, HashSet};
use std::net::Ipv4Addr;

use keelway_cni::protocol::Response;
use keelway_cni::{Attachment, spool};

use super::{Pods, pod_links};
use crate::dataplane::Op;
use crate::event::Reply;
use crate::net::{Kernel, Link};
use crate::node::{Node, NodeError};
use crate::worker::reason;

impl Pods {
    /// GC: removes every attachment of ours that the runtime does not name.
    pub(super) fn collect(
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
    pub(super) fn forget_gone(&mut self, links: &HashMap<String, Link>) -> Vec<Ipv4Addr> {
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
}

/// Takes pods that are gone out of the maps, and lets go of hooks on interfaces that are.
pub(super) fn let_go(
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
