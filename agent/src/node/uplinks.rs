//! The interfaces by which this node reaches others: found, prepared, followed as they come and go, and with programs on each.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;

use super::{Node, NodeError, keep_router_advertisements, loosen_reverse_path_filter};
use crate::addresses::is_host_interface;
use crate::dataplane::{Op, ServiceBackends};
use crate::net::{self, Kernel, Link, Uplink};
use crate::plan::{Batch, Surveyed, missing_uplinks, plan_uplinks};
use crate::surroundings;

/// The uplinks that the machine has now.
pub(super) fn survey(
    kernel: &mut Kernel,
    first: &Uplink,
    named: &[String],
) -> Result<Vec<Link>, NodeError> {
    let surveyed = Surveyed {
        interfaces: kernel.interfaces()?,
        addresses: kernel.addresses()?,
        defaults: kernel.default_interfaces()?,
    };
    let (link, addresses) = (&first.link, &first.addresses);
    Ok(plan_uplinks(&surveyed, link, addresses, named, is_apart))
}

/// Whether an interface is ours, or another network plugin's.
fn is_apart(name: &str) -> bool {
    [net::OUTER, net::INNER, net::OVERLAY].contains(&name)
        || is_host_interface(name)
        || surroundings::is_foreign(name)
}

/// Sets what the kernel is to do with packets that come by uplinks. Of one that has just gone nothing is set.
///
/// While two nodes do not agree yet on the way between them, packets come by the other one. A strict filter would drop them; pods
/// cannot send from addresses that are not theirs in any case.
pub(super) fn prepare(uplinks: &[Link], ipv6: bool, has_overlay: bool) -> Result<(), NodeError> {
    for link in uplinks {
        let mut set = Ok(());
        if ipv6 {
            set = keep_router_advertisements(&link.name);
        }
        if has_overlay {
            set = set.and_then(|()| loosen_reverse_path_filter(&link.name));
        }
        match set {
            Err(NodeError::Sysctl { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            set => set?,
        }
    }
    Ok(())
}

impl Node {
    /// The names of the interfaces by which other machines are reached, the one with the node's address first.
    pub fn uplink_names(&self) -> impl Iterator<Item = &str> {
        self.uplinks.iter().map(|link| link.name.as_str())
    }

    /// Of the interfaces that were named, those that are not there, in words.
    pub fn missing_uplinks(&self) -> Vec<String> {
        missing_uplinks(&self.uplinks, &self.named_uplinks)
    }

    /// Follows the uplinks as they come and go.
    pub fn settle_uplinks(&mut self, kernel: &mut Kernel) -> Result<(), NodeError> {
        let now = survey(kernel, &self.uplink, &self.named_uplinks)?;
        prepare(&now, self.ipv6, self.overlay.is_some())?;
        let indexes = |links: &[Link]| links.iter().map(|link| link.index).collect::<Vec<_>>();
        let differ = indexes(&now) != indexes(&self.uplinks);
        self.uplinks = now;
        if differ && self.hangs {
            let uplinks: Vec<&str> = self.uplink_names().collect();
            tracing::info!(?uplinks, "other interfaces lead to other machines");
            self.attach_uplinks()?;
        }
        Ok(())
    }

    /// Whether one of these service ports has clients outside keep their addresses at a process of this node.
    pub(super) fn ask_answers<'a>(
        &self,
        mut services: impl Iterator<Item = &'a ServiceBackends>,
    ) -> bool {
        let is_here = |at: &SocketAddr| self.host_addresses.contains(&at.ip());
        !self.answers && services.any(|one| one.keeps_clients && one.all().any(is_here))
    }

    /// Has the node's answers looked at where a batch brings a service port that needs it.
    pub(super) fn settle_answers(&mut self, batch: &Batch) -> Result<(), NodeError> {
        let services = batch.ops.iter().filter_map(|op| match op {
            Op::SetService { backends, .. } | Op::RenewService { backends, .. } => Some(backends),
            _ => None,
        });
        if self.ask_answers(services) {
            self.look_at_answers()?;
        }
        Ok(())
    }

    /// Has the node's answers looked at from now on. That stays: when the last Service that asked for it is gone, its flows go on.
    pub(super) fn look_at_answers(&mut self) -> Result<(), NodeError> {
        self.answers = true;
        if self.hangs {
            tracing::info!("clients outside keep their addresses at processes of this node");
            self.attach_uplinks()?;
        }
        Ok(())
    }

    /// Hangs the programs on every uplink and on the overlay, and takes them off all else. Idempotent.
    pub(super) fn attach_uplinks(&mut self) -> Result<(), NodeError> {
        let overlay = self.overlay.as_ref().map(|overlay| overlay.index);
        let first = self.uplink.link.index;
        let mut hung = BTreeSet::new();
        for index in self.uplinks.iter().map(|link| link.index).chain(overlay) {
            let mut hangs = Ok(());
            if self.answers {
                hangs = self.dataplane.attach_answers(index);
            }
            match hangs.and_then(|()| self.dataplane.attach_uplink(index)) {
                Ok(()) => drop(hung.insert(index)),
                // It has just gone, of which there will be news.
                Err(error) if error.is_gone() && index != first => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.dataplane.keep_uplinks(&hung)?;
        Ok(())
    }
}
