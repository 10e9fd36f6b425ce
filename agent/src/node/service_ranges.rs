//! The ways of the node's own traffic to the ranges of Services.

use ipnetwork::IpNetwork;

use super::{Node, NodeError, pod_mtu};
use crate::net::{self, Kernel};

impl Node {
    /// Whether the node has an address of a range's family.
    pub fn has_family_of(&self, range: &IpNetwork) -> bool {
        let mut own = self.uplink.addresses.iter();
        own.any(|ip| ip.is_ipv4() == range.is_ipv4())
    }

    /// The ranges that are routed.
    pub fn service_ranges(&self) -> &[IpNetwork] {
        &self.service_ranges
    }

    /// Routes these ranges of Services, and no others: also none that an earlier worker knew of.
    pub fn settle_service_ranges(
        &mut self,
        kernel: &mut Kernel,
        wished: &[IpNetwork],
    ) -> Result<(), NodeError> {
        if self.service_ranges != wished {
            self.make_service_veth(kernel, wished)?;
            self.service_ranges = wished.to_vec();
            self.others_are_gone = false;
        }
        if !self.others_are_gone {
            let gone = net::keep_to_ranges(kernel, &self.service_veth, wished)?;
            if !gone.is_empty() {
                tracing::info!(?gone, "ranges are of no Services any more");
            }
            self.others_are_gone = true;
        }
        Ok(())
    }

    /// Puts right what somebody did to the pair into which Service ranges are routed: programs that keep the host's network take away
    /// what they did not make.
    pub(super) fn keep_service_veth(&mut self, kernel: &mut Kernel) -> Result<(), NodeError> {
        if net::service_veth_is_whole(kernel, &self.service_veth, &self.service_ranges)? {
            let there = kernel.addresses()?;
            let missing = self
                .reserved
                .iter()
                .flat_map(|own| [own.host, own.probe])
                .filter(|own| !there.iter().any(|(_, ip, _)| ip == own));
            for own in missing.collect::<Vec<_>>() {
                tracing::warn!(%own, "an address of this node's own was taken away; it is back");
                kernel.add_own_address(self.service_veth.outer, own)?;
            }
            return Ok(());
        }
        tracing::warn!("the way of Service addresses was changed; it is made as it was");
        self.make_service_veth(kernel, &self.service_ranges)
    }

    /// Makes of the pair what is missing, and routes the ranges into it.
    fn make_service_veth(
        &self,
        kernel: &mut Kernel,
        ranges: &[IpNetwork],
    ) -> Result<(), NodeError> {
        let made = net::make_service_veth(
            kernel,
            ranges,
            &self.uplink.addresses,
            pod_mtu(self.routing, &self.uplink),
        )?;
        if made != self.service_veth {
            // Programs hang on the old pair; a new worker hangs them on this one.
            return Err(NodeError::ServiceVeth);
        }
        Ok(())
    }
}
