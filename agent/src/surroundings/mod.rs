//! What else is on a node that could be in the way of pods: other network plugins, programs that keep the host's network, packet
//! filters. What can be worked with is; the rest is named, with what to do about it.

mod daemons;
mod filter;
mod leftovers;
mod ports;

use std::path::Path;

use crate::addresses::HOST_INTERFACE_PREFIX;
use crate::net::nftables::{Nftables, OurRule};
use crate::net::{Link, NetlinkError};

pub use daemons::{Daemon, daemons};
pub use filter::{Opening, plan_openings};
pub use leftovers::{earlier_configurations, foreign_interfaces, foreign_rules, is_foreign};
pub use ports::own_connections;

/// Looks around, lets pods pass where a filter would drop them, and says in words what was found.
pub fn look(links: &[Link], cni_conf_dir: &Path, proc: &Path) -> Vec<String> {
    let mut notes = foreign_interfaces(links.iter().map(|link| link.name.as_str()));
    notes.extend(earlier_configurations(cni_conf_dir));
    match settle_filter() {
        Ok(found) => notes.extend(found),
        // A kernel without nftables has nothing to look at.
        Err(error) if error.errno().is_some_and(is_absent) => {}
        Err(error) => notes.push(format!("the packet filter cannot be looked at: {error}")),
    }
    notes.extend(filter::legacy(proc));
    notes.extend(daemons(proc).into_iter().filter_map(Daemon::note));
    notes.extend(own_connections(proc));
    notes
}

/// Whether rules of ours are in the packet filter.
pub fn has_openings() -> Result<bool, NetlinkError> {
    Ok(!openings()?.1.is_empty())
}

/// Removes the rules of ours from the packet filter.
pub fn close_openings() -> Result<(), NetlinkError> {
    let (mut nftables, rules) = match openings()? {
        (Some(nftables), rules) => (nftables, rules),
        (None, _) => return Ok(()),
    };
    rules.iter().try_for_each(|rule| nftables.remove(rule))
}

/// Rules of ours, and the packet filter that they are in, if the kernel has one.
fn openings() -> Result<(Option<Nftables>, Vec<OurRule>), NetlinkError> {
    let opened = Nftables::open().and_then(|mut nftables| {
        let rules = nftables.our_rules()?;
        Ok((Some(nftables), rules))
    });
    match opened {
        Err(error) if error.errno().is_some_and(is_absent) => Ok((None, Vec::new())),
        opened => opened,
    }
}

fn settle_filter() -> Result<Vec<String>, NetlinkError> {
    let mut nftables = Nftables::open()?;
    let chains = nftables.chains()?;
    let mut notes = foreign_rules(&chains);
    notes.extend(filter::firewalld(&chains));
    if chains.iter().any(|chain| chain.forwards && chain.drops) {
        let ours = nftables.our_rules()?;
        for opening in plan_openings(&chains, &ours) {
            for side in opening.sides {
                nftables.let_pass(opening.chain, side, HOST_INTERFACE_PREFIX)?;
            }
            tracing::info!(
                table = opening.chain.table,
                chain = opening.chain.name,
                "its policy drops what is forwarded: pods pass by rules of ours"
            );
        }
        notes.extend(filter::notes(&chains));
    }
    Ok(notes)
}

fn is_absent(errno: nix::errno::Errno) -> bool {
    use nix::errno::Errno;
    matches!(
        errno,
        Errno::EPROTONOSUPPORT | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP | Errno::EINVAL
    )
}
