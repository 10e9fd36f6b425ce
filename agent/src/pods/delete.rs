//! DEL: out of the maps, addresses written off, the answer; the interfaces go behind it.
//!
//! Removing an interface makes the kernel wait for every CPU several times, tens of milliseconds in all, and nobody needs to wait
//! with it: nothing leads to the pod any more, and its addresses rest. What is to be removed is written down before the answer, so
//! that an agent that is killed meanwhile is followed by one that removes it.

use keelway_cni::protocol::Response;
use keelway_cni::{Attachment, CniError, Code, spool};

use super::background::in_background;
use super::{ADDRESSES, BURYING, DELETIONS, Deletion, Pods, now};
use crate::addresses::host_interface;
use crate::event::{Event, Reply};
use crate::net::{Kernel, Netlink};
use crate::node::{Node, NodeError};
use crate::worker::reason;

impl Pods {
    /// Takes a pod's network away. Without a reply it is a deletion that the plugin wrote down, or a collection.
    pub(super) fn delete(
        &mut self,
        attachment: Attachment,
        reply: Option<Reply<Response>>,
        kernel: &mut Kernel,
        node: Option<&mut Node>,
    ) {
        let name = host_interface(&attachment);
        if let Some(wiring) = self.wiring.get_mut(&name) {
            // It is done when the ADD has ended. What the plugin wrote down stays written until then.
            wiring.deletions.extend(reply);
            return;
        }
        let waits = self
            .to_wire
            .iter()
            .position(|one| one.wire.host_interface == name);
        if let Some(position) = waits {
            let one = self.to_wire.remove(position);
            let error = CniError::new(Code::TryAgain, format!("{attachment} is deleted"));
            self.respond("ADD", &one.reply, Response::Error(error));
        }
        match self.bury(&name, kernel, node) {
            Ok(()) => self.deletions.push(Deletion { attachment, reply }),
            Err(error) => {
                let why = reason(&error);
                tracing::warn!(%attachment, why, "pod could not be deleted");
                if let Some(reply) = reply {
                    let error = CniError::new(Code::Failed, "the pod's network cannot be removed")
                        .with_details(why);
                    self.respond("DEL", &reply, Response::Error(error));
                }
            }
        }
    }

    /// Lets nothing lead to a pod any more, and marks its interface for removal.
    pub(super) fn bury(
        &mut self,
        name: &str,
        kernel: &mut Kernel,
        node: Option<&mut Node>,
    ) -> Result<(), NodeError> {
        if self.pool.is_dying(name) && self.pool.get(name).is_none() {
            return Ok(());
        }
        let known = match self.pool.get(name) {
            // Without a node the maps are compared with the pool when there is one.
            Some(allocation) => {
                if let Some(node) = node {
                    node.apply(&super::remove_pod(&allocation.addresses))?;
                }
                true
            }
            None => kernel.link(name)?.is_some(),
        };
        if known {
            if let Some(gone) = self.pool.bury(name) {
                if !gone.port_mappings.is_empty() {
                    self.host_ports.insert(name.into());
                }
                tracing::info!(name, addresses = ?gone.addresses, pod = gone.pod, "pod deleted");
            }
            self.unsaved = true;
        }
        Ok(())
    }

    /// Answers the deletions that are written down.
    pub(super) fn answer_deletions(&mut self, saved: bool) {
        for one in std::mem::take(&mut self.deletions) {
            let response = if saved {
                if let Err(error) = spool::remove(&self.spool, &one.attachment) {
                    let why = format!("{}: {error}", self.spool.display());
                    self.problems.insert(DELETIONS, why);
                }
                Response::Done
            } else {
                let why = self.problems.get(ADDRESSES).map_or("", String::as_str);
                Response::Error(
                    CniError::new(Code::Io, "the deletion cannot be written down")
                        .with_details(why),
                )
            };
            if let Some(reply) = one.reply {
                self.respond("DEL", &reply, response);
            }
        }
    }

    /// Begins to remove the interfaces of deleted pods, all that there are, unless some are being removed. Those that could not be
    /// removed are tried `again` with the upkeep.
    pub(super) fn start_burying(&mut self, again: bool) {
        if !self.burying.is_empty() || (!again && self.problems.contains_key(BURYING)) {
            return;
        }
        let names: Vec<String> = self.pool.dying_interfaces().map(str::to_owned).collect();
        if names.is_empty() {
            return;
        }
        self.burying.extend(names.iter().cloned());
        let work = move || -> Result<(), NodeError> {
            Ok(Kernel::new(Netlink::open()?).delete_links(&names)?)
        };
        in_background("bury", &self.events, work, |outcome| Event::Buried {
            outcome,
        });
    }

    /// The interfaces of deleted pods are gone, or could not be removed.
    pub fn buried(&mut self, outcome: Result<(), NodeError>) {
        let names = std::mem::take(&mut self.burying);
        match outcome {
            Ok(()) => {
                self.problems.remove(BURYING);
                for name in &names {
                    self.unsaved |= self.pool.buried(name, now());
                    self.indexes.remove(name);
                }
            }
            Err(error) => {
                let why = reason(&error);
                tracing::warn!(?names, why, "interfaces of deleted pods are left");
                self.problems.insert(BURYING, why);
            }
        }
    }
}
