//! CHECK: whether a pod's network is still as its ADD made it.

use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use keelway_cni::protocol::{Response, Wish};
use keelway_cni::{CniError, Code};

use super::Pods;
use crate::addresses::host_interface;
use crate::event::Reply;
use crate::net::{Kernel, Limits, Netlink, PodWire, check_pod};
use crate::node::Node;

impl Pods {
    pub(super) fn check(
        &mut self,
        wish: Wish,
        netns: Option<OwnedFd>,
        reply: Reply<Response>,
        node: Option<&Node>,
    ) {
        let (wire, netns) = match self.to_check(&wish, netns, node) {
            Ok(found) => found,
            Err(refused) => return self.respond("CHECK", &reply, Response::Error(refused)),
        };
        self.note("CHECK", "served");
        let checking = thread::Builder::new().name("check".into()).spawn(move || {
            let found = Netlink::open()
                .and_then(|netlink| check_pod(&mut Kernel::new(netlink), netns.as_fd(), &wire));
            let failed = |why: String| {
                Response::Error(
                    CniError::new(Code::Failed, "the pod's network is not as made")
                        .with_details(why),
                )
            };
            let _ = reply.send(match found {
                Ok(None) => Response::Done,
                Ok(Some(why)) => failed(why),
                Err(error) => failed(error.to_string()),
            });
        });
        if let Err(error) = checking {
            // Nothing is held up by it but the requester, who is told in time.
            tracing::error!(%error, "no thread for a CHECK");
        }
    }

    fn to_check(
        &self,
        wish: &Wish,
        netns: Option<OwnedFd>,
        node: Option<&Node>,
    ) -> Result<(PodWire, OwnedFd), CniError> {
        let host_interface = host_interface(&wish.attachment);
        let allocation = self.pool.get(&host_interface).ok_or_else(|| {
            CniError::new(
                Code::UnknownContainer,
                format!("{} is not known here", wish.attachment),
            )
        })?;
        let netns = netns.ok_or_else(|| {
            CniError::new(Code::InvalidEnvironment, "no network namespace was passed")
        })?;
        let node =
            node.ok_or_else(|| CniError::new(Code::TryAgain, "the Keelway agent is not ready"))?;
        let named = |address: &str| {
            wish.addresses
                .iter()
                .any(|text| text.split('/').next() == Some(address))
        };
        for address in &allocation.addresses {
            if !named(&address.to_string()) {
                return Err(CniError::new(
                    Code::Failed,
                    format!("the pod has {address}, which prevResult does not name"),
                ));
            }
        }
        Ok((
            PodWire {
                host_interface,
                interface: wish.attachment.ifname.clone(),
                addresses: allocation.addresses.clone(),
                mac: allocation.mac(),
                mtu: node.pod_mtu(),
                node_addresses: node.uplink.addresses.clone(),
                limits: Limits::of(allocation.bandwidth, node.pod_mtu()),
            },
            netns,
        ))
    }
}
