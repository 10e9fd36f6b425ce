//! ADD: an address, then the interfaces, then the programs, then the answer.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use ipnetwork::Ipv4Network;
use keelway_cni::protocol::{Response, Wish};
use keelway_cni::{AddResult, Attachment, CniError, Code, Interface, IpConfig, Route, spool};

use super::background::in_background;
use super::{Busy, Pods, ToWire};
use crate::addresses::host_interface;
use crate::dataplane::{LocalPod, Op};
use crate::event::{Event, Reply};
use crate::net::{
    self, Kernel, Link, Netlink, NetlinkError, POD_GATEWAY, PodWire, pod_mac, wire_pod,
};
use crate::node::{Node, NodeError};
use crate::worker::reason;

impl Pods {
    pub(super) fn add(
        &mut self,
        wish: Wish,
        netns: Option<OwnedFd>,
        reply: &Reply<Response>,
        node: Option<&Node>,
        began: Instant,
    ) -> Result<(), CniError> {
        if node.is_none() {
            return Err(CniError::new(
                Code::TryAgain,
                "the Keelway agent is not ready: the node is not set up yet",
            ));
        }
        let netns = netns.ok_or_else(|| {
            CniError::new(Code::InvalidEnvironment, "no network namespace was passed")
        })?;
        let host_interface = host_interface(&wish.attachment);
        let waits = |one: &ToWire| one.host_interface == host_interface;
        if self.busy.contains_key(&host_interface) || self.to_wire.iter().any(waits) {
            return Err(CniError::new(
                Code::TryAgain,
                format!("{} is being worked on", wish.attachment),
            ));
        }
        // An ADD overtakes a deletion of its own past that still waits.
        if let Err(error) = spool::remove(&self.spool, &wish.attachment) {
            return Err(CniError::new(Code::Io, "the spool of deletions").with_details(error));
        }
        let pod = match (
            wish.args.get("K8S_POD_NAMESPACE"),
            wish.args.get("K8S_POD_NAME"),
        ) {
            (Some(namespace), Some(name)) => Some(format!("{namespace}/{name}")),
            _ => None,
        };
        let allocation = self.pool.allocate(&wish.attachment, pod).map_err(|error| {
            CniError::new(Code::TryAgain, "no address for the pod").with_details(error)
        })?;
        self.unsaved = true;
        self.to_wire.push(ToWire {
            wish,
            netns,
            reply: reply.clone(),
            address: allocation.address,
            host_interface,
            began,
        });
        Ok(())
    }

    /// Writes the pool, if it changed, and begins the ADDs that waited for that.
    pub fn start_wiring(&mut self, node: Option<&Node>) {
        let saved = self.save();
        for one in std::mem::take(&mut self.to_wire) {
            let (Some(node), Ok(())) = (node, &saved) else {
                self.pool.release(&one.host_interface);
                self.unsaved = true;
                let error = CniError::new(Code::Io, "the pod's address cannot be written down")
                    .with_details(self.problem.as_deref().unwrap_or_default());
                self.respond("ADD", &one.reply, Response::Error(error));
                continue;
            };
            let wire = PodWire {
                host_interface: one.host_interface.clone(),
                interface: one.wish.attachment.ifname.clone(),
                address: one.address,
                mtu: node.uplink.link.mtu,
                node_address: Some(node.uplink.address),
            };
            let (events, attachment, netns, wish) = (
                self.events.clone(),
                one.wish.attachment.clone(),
                one.netns,
                wire.clone(),
            );
            self.busy.insert(
                one.host_interface,
                Busy::Wiring {
                    wish: one.wish,
                    wire,
                    reply: one.reply,
                    began: one.began,
                },
            );
            let work = move || {
                let mut kernel = Kernel::new(Netlink::open()?);
                wire_pod(&mut kernel, netns.as_fd(), &wish)
            };
            in_background("wire", &events, work, |made| Event::Wired {
                attachment,
                made,
            });
        }
    }

    /// A pod's interfaces are there, or could not be made: attaches the programs and answers.
    pub fn wired(
        &mut self,
        attachment: &Attachment,
        made: Result<Link, NetlinkError>,
        kernel: &mut Kernel,
        node: Option<&mut Node>,
    ) {
        let host_interface = host_interface(attachment);
        let Some(Busy::Wiring {
            wish,
            wire,
            reply,
            began,
        }) = self.busy.remove(&host_interface)
        else {
            return;
        };
        let attached = made.map_err(NodeError::from).and_then(|link| match node {
            None => Ok(link),
            Some(node) => {
                node.dataplane.attach_pod(link.index)?;
                let pod = LocalPod {
                    ifindex: link.index,
                    mac: pod_mac(wire.address),
                };
                node.apply(&[Op::SetPod {
                    addr: wire.address.into(),
                    pod,
                }])?;
                Ok(link)
            }
        });
        let response = match attached {
            Ok(link) => {
                self.add_last_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
                tracing::info!(%attachment, address = %wire.address, took_us = self.add_last_us, "pod added");
                Response::Added(result_of(&wish, &wire, &link))
            }
            Err(error) => {
                let why = reason(&error);
                tracing::warn!(%attachment, why, "pod could not be added");
                if let Err(error) = kernel.delete_link(&host_interface) {
                    tracing::warn!(%attachment, %error, "its interface is left");
                }
                self.pool.release(&host_interface);
                self.unsaved = true;
                Response::Error(
                    CniError::new(Code::Failed, "the pod's network cannot be made")
                        .with_details(why),
                )
            }
        };
        self.respond("ADD", &reply, response);
    }
}

fn result_of(wish: &Wish, wire: &PodWire, host: &Link) -> AddResult {
    let text = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    AddResult {
        interfaces: vec![
            Interface {
                name: wire.host_interface.clone(),
                mac: text(host.mac.unwrap_or_default()),
                mtu: wire.mtu,
                sandbox: None,
            },
            Interface {
                name: wire.interface.clone(),
                mac: text(pod_mac(wire.address)),
                mtu: wire.mtu,
                sandbox: Some(wish.netns.clone()),
            },
        ],
        ips: vec![IpConfig {
            address: Ipv4Network::from(wire.address).into(),
            gateway: POD_GATEWAY.into(),
            interface: 1,
        }],
        routes: vec![Route {
            dst: net::EVERYTHING.into(),
            gw: Some(POD_GATEWAY.into()),
        }],
    }
}
