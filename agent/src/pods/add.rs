//! ADD: addresses, then the interfaces, then the maps, then the answer.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use ipnetwork::IpNetwork;
use keelway_cni::protocol::{Response, Wish};
use keelway_cni::{
    AddResult, Attachment, CniError, Code, Interface, IpConfig, Mac, PortMapping, Route, spool,
};
use nix::errno::Errno;

use super::background::in_background;
use super::{ADDRESSES, Pods, ToWire, Wiring, now};
use crate::addresses::{Ask, host_interface};
use crate::event::{Event, Reply};
use crate::net::{Kernel, Limits, Link, Netlink, PodWire, everything, pod_gateway, wire_pod};
use crate::node::{Node, NodeError};
use crate::plan::collide;
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
        let Some(node) = node else {
            return Err(CniError::new(
                Code::TryAgain,
                "the Keelway agent is not ready: the node is not set up yet",
            ));
        };
        let netns = netns.ok_or_else(|| {
            CniError::new(Code::InvalidEnvironment, "no network namespace was passed")
        })?;
        let host_interface = host_interface(&wish.attachment);
        let waits = |one: &ToWire| one.wire.host_interface == host_interface;
        if self.wiring.contains_key(&host_interface) || self.to_wire.iter().any(waits) {
            return Err(CniError::new(
                Code::TryAgain,
                format!("{} is being worked on", wish.attachment),
            ));
        }
        if let Some((port, pod)) =
            self.taken_port(&host_interface, &wish.capabilities.port_mappings)
        {
            return Err(CniError::new(
                Code::Failed,
                format!("hostPort {port} of this node is {pod}'s"),
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
        let ask = Ask {
            attachment: wish.attachment.clone(),
            network: Some(wish.network.clone()).filter(|name| !name.is_empty()),
            pod,
            addresses: wish.capabilities.ips.clone(),
            mac: wish.capabilities.mac,
            port_mappings: wish.capabilities.port_mappings.clone(),
            bandwidth: wish.capabilities.bandwidth,
        };
        let allocation = self.pool.allocate(&ask, now()).map_err(|error| {
            CniError::new(Code::TryAgain, "no address for the pod").with_details(error)
        })?;
        self.unsaved = true;
        let mac = allocation.mac();
        self.to_wire.push(ToWire {
            wire: PodWire {
                host_interface,
                interface: wish.attachment.ifname.clone(),
                addresses: allocation.addresses,
                mac,
                mtu: node.pod_mtu(),
                node_addresses: node.uplink.addresses.clone(),
                limits: Limits::of(allocation.bandwidth, node.pod_mtu()),
            },
            wish,
            netns: Arc::new(netns),
            reply: reply.clone(),
            began,
            again: false,
        });
        Ok(())
    }

    /// A port of the node that another pod has, and whose it is.
    fn taken_port(&self, host_interface: &str, wished: &[PortMapping]) -> Option<(u16, String)> {
        let others = self
            .pool
            .allocations()
            .filter(|one| one.host_interface != host_interface);
        for other in others {
            let both =
                |wish: &&PortMapping| other.port_mappings.iter().any(|had| collide(wish, had));
            if let Some(wish) = wished.iter().find(both) {
                let pod = other
                    .pod
                    .clone()
                    .unwrap_or_else(|| other.host_interface.clone());
                return Some((wish.host_port, pod));
            }
        }
        None
    }

    /// Refuses ADDs that wait for their addresses to be on disk.
    pub(super) fn refuse_waiting(&mut self) {
        for one in std::mem::take(&mut self.to_wire) {
            self.pool.release(&one.wire.host_interface);
            self.unsaved = true;
            let error = CniError::new(Code::Io, "the pod's address cannot be written down")
                .with_details(self.problems.get(ADDRESSES).map_or("", String::as_str));
            self.respond("ADD", &one.reply, Response::Error(error));
        }
    }

    /// Begins the ADDs whose addresses are on disk. One whose interface is still being removed for its past waits for that.
    pub(super) fn start_wiring(&mut self) {
        let Some(hooks) = &self.hooks else { return };
        let mut waiting = Vec::new();
        for one in std::mem::take(&mut self.to_wire) {
            let name = one.wire.host_interface.clone();
            if self.pool.is_dying(&name) || (one.again && !self.burying.is_empty()) {
                waiting.push(one);
                continue;
            }
            let attachment = one.wish.attachment.clone();
            let (netns, wire) = (Arc::clone(&one.netns), one.wire.clone());
            let hooks = Arc::clone(hooks);
            let work = move || -> Result<Link, NodeError> {
                let mut kernel = Kernel::new(Netlink::open()?);
                Ok(wire_pod(
                    &mut kernel,
                    netns.as_fd(),
                    &wire,
                    &hooks.filters(),
                )?)
            };
            self.wiring.insert(
                name,
                Wiring {
                    one,
                    deletions: Vec::new(),
                },
            );
            in_background("wire", &self.events, work, |made| Event::Wired {
                attachment,
                made,
            });
        }
        self.to_wire = waiting;
    }

    /// A pod's interfaces are there, or could not be made: lets the maps lead to it and answers.
    pub fn wired(
        &mut self,
        attachment: &Attachment,
        made: Result<Link, NodeError>,
        kernel: &mut Kernel,
        mut node: Option<&mut Node>,
    ) {
        let host_interface = host_interface(attachment);
        let Some(Wiring { mut one, deletions }) = self.wiring.remove(&host_interface) else {
            return;
        };
        // The pod's namespace may still have the interface of a deleted attachment under that name.
        let taken =
            matches!(&made, Err(NodeError::Netlink(error)) if error.errno() == Some(Errno::EEXIST));
        if taken && !one.again && !self.burying.is_empty() && deletions.is_empty() {
            one.again = true;
            self.to_wire.push(one);
            return;
        }
        let attached = made.and_then(|link| {
            let allocation = self.pool.get(&host_interface).cloned();
            if let (Some(node), Some(allocation)) = (node.as_deref_mut(), allocation) {
                let queued = one.wire.limits.ingress.is_some();
                node.apply(&super::set_pod(&allocation, link.index, queued))?;
            }
            Ok(link)
        });
        let response = match attached {
            Ok(link) => {
                self.indexes.insert(host_interface.clone(), link.index);
                if !one.wish.capabilities.port_mappings.is_empty() {
                    self.host_ports.insert(host_interface.clone());
                }
                Response::Added(result_of(&one.wish, &one.wire, &link))
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
        let is_added = matches!(response, Response::Added(_));
        self.respond("ADD", &one.reply, response);
        if is_added {
            self.add_last_us = u64::try_from(one.began.elapsed().as_micros()).unwrap_or(u64::MAX);
            tracing::info!(%attachment, addresses = ?one.wire.addresses, took_us = self.add_last_us, "pod added");
        }
        // It was deleted while it was made.
        for reply in deletions {
            self.delete(attachment.clone(), Some(reply), kernel, node.as_deref_mut());
        }
    }
}

fn result_of(wish: &Wish, wire: &PodWire, host: &Link) -> AddResult {
    AddResult {
        interfaces: vec![
            Interface {
                name: wire.host_interface.clone(),
                mac: Mac(host.mac.unwrap_or_default()).to_string(),
                mtu: wire.mtu,
                sandbox: None,
            },
            Interface {
                name: wire.interface.clone(),
                mac: Mac(wire.mac).to_string(),
                mtu: wire.mtu,
                sandbox: Some(wish.netns.clone()),
            },
        ],
        ips: wire
            .addresses
            .iter()
            .map(|address| IpConfig {
                address: IpNetwork::from(*address),
                gateway: pod_gateway(*address),
                interface: 1,
            })
            .collect(),
        routes: wire
            .addresses
            .iter()
            .map(|address| Route {
                dst: everything(*address),
                gw: Some(pod_gateway(*address)),
            })
            .collect(),
        ..AddResult::default()
    }
}
