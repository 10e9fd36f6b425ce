//! CHECK: whether a pod's network is still as its ADD made it.

use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use keelway_cni::protocol::{Response, Wish};
use keelway_cni::{CniError, Code};

use super::Pods;
use crate::addresses::host_interface;
use crate::event::Reply;
use crate::net::{Kernel, Netlink, PodWire, check_pod};
use crate::node::Node;

impl Pods {
    pub(super) fn check(
        &mut self,
        wish: Wish,
        netns: Option<OwnedFd>,
        reply: Reply<Response>,
        node: Option<&Node>,
    ) {
        let host_interface = host_interface(&wish.attachment);
        let refused = match (self.pool.get(&host_interface), netns, node) {
            (None, ..) => CniError::new(
                Code::UnknownContainer,
                format!("{} is not known here", wish.attachment),
            ),
            (_, None, _) => {
                CniError::new(Code::InvalidEnvironment, "no network namespace was passed")
            }
            (.., None) => CniError::new(Code::TryAgain, "the Keelway agent is not ready"),
            (Some(allocation), Some(netns), Some(node)) => {
                let address = allocation.address;
                if !wish
                    .addresses
                    .iter()
                    .any(|text| text.split('/').next() == Some(&address.to_string()))
                {
                    CniError::new(
                        Code::Failed,
                        format!("the pod has {address}, which prevResult does not name"),
                    )
                } else {
                    let wire = PodWire {
                        host_interface,
                        interface: wish.attachment.ifname.clone(),
                        address,
                        mtu: node.uplink.link.mtu,
                        node_address: Some(node.uplink.address),
                    };
                    self.count("CHECK", "served");
                    let checking = thread::Builder::new().name("check".into()).spawn(move || {
                        let found = Netlink::open().and_then(|netlink| {
                            check_pod(&mut Kernel::new(netlink), netns.as_fd(), &wire)
                        });
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
                    return;
                }
            }
        };
        self.respond("CHECK", &reply, Response::Error(refused));
    }
}
