//! DEL: out of the maps, then the interfaces, then the address is free.

use keelway_cni::protocol::Response;
use keelway_cni::{Attachment, CniError, Code, spool};

use super::background::in_background;
use super::{Busy, Pods};
use crate::addresses::host_interface;
use crate::dataplane::Op;
use crate::event::{Event, Reply};
use crate::net::{Kernel, Netlink, NetlinkError};
use crate::node::{Node, NodeError};
use crate::worker::reason;

impl Pods {
    /// Takes a pod's network away. Without a reply it is a deletion that the plugin wrote down.
    pub(super) fn delete(
        &mut self,
        attachment: Attachment,
        reply: Option<Reply<Response>>,
        kernel: &mut Kernel,
        node: Option<&mut Node>,
    ) {
        let host_interface = host_interface(&attachment);
        if self
            .to_wire
            .iter()
            .any(|one| one.host_interface == host_interface)
            || matches!(self.busy.get(&host_interface), Some(Busy::Wiring { .. }))
        {
            // The plugin writes it down, and it is done when the ADD has ended.
            if let Some(reply) = reply {
                let error = CniError::new(Code::TryAgain, format!("{attachment} is being made"));
                self.respond("DEL", &reply, Response::Error(error));
            }
            return;
        }
        self.unwire(host_interface, Some(attachment), reply, kernel, node);
    }

    fn unwire(
        &mut self,
        host_interface: String,
        attachment: Option<Attachment>,
        reply: Option<Reply<Response>>,
        kernel: &mut Kernel,
        node: Option<&mut Node>,
    ) {
        if let Some(Busy::Unwiring { replies, .. }) = self.busy.get_mut(&host_interface) {
            replies.extend(reply);
            return;
        }
        if let Some(node) = node
            && let Err(error) = self.unplug(&host_interface, kernel, node)
        {
            tracing::warn!(
                host_interface,
                error = reason(&error),
                "the data plane still names a pod that goes"
            );
        }
        let replies = reply.into_iter().collect();
        self.busy.insert(
            host_interface.clone(),
            Busy::Unwiring {
                attachment,
                replies,
            },
        );
        let events = self.events.clone();
        let name = host_interface.clone();
        let work = move || Kernel::new(Netlink::open()?).delete_link(&name);
        in_background("unwire", &events, work, |removed| Event::Unwired {
            host_interface,
            removed,
        });
    }

    /// Takes a pod out of the maps and lets go of its programs, before its interface goes.
    fn unplug(
        &self,
        host_interface: &str,
        kernel: &mut Kernel,
        node: &mut Node,
    ) -> Result<(), NodeError> {
        if let Some(allocation) = self.pool.get(host_interface) {
            node.apply(&[Op::RemovePod {
                addr: allocation.address.into(),
            }])?;
        }
        if let Some(link) = kernel.link(host_interface)? {
            node.dataplane.detach_pod(link.index)?;
        }
        Ok(())
    }

    /// A pod's interfaces are gone, or could not be removed.
    pub fn unwired(&mut self, host_interface: &str, removed: Result<bool, NetlinkError>) {
        let Some(Busy::Unwiring {
            attachment,
            replies,
        }) = self.busy.remove(host_interface)
        else {
            return;
        };
        let response = match removed {
            Ok(_) => {
                if let Some(gone) = self.pool.release(host_interface) {
                    self.unsaved = true;
                    tracing::info!(host_interface, address = %gone.address, pod = gone.pod, "pod removed");
                }
                if let Some(attachment) = attachment
                    && let Err(error) = spool::remove(&self.spool, &attachment)
                {
                    self.problem = Some(format!("{}: {error}", self.spool.display()));
                }
                // The address is given again only after it is on disk that it is free; losing that costs nothing.
                let _ = self.save();
                Response::Done
            }
            Err(error) => Response::Error(
                CniError::new(Code::Failed, "the pod's network cannot be removed")
                    .with_details(error),
            ),
        };
        for reply in replies {
            self.respond("DEL", &reply, response.clone());
        }
    }
}
