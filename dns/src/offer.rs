//! By what rules others may answer for names of the cluster in this server's place: a pure function of the configuration.
//!
//! The agent of the node answers plain questions at pods' interfaces where it may (`docs/dns.md`). It may where such an answer depends on
//! nothing but the cluster: whatever the configuration does to names of the cluster before the cluster is looked at is not its to know.

use std::net::{IpAddr, SocketAddr};

use cluster_model::share::{Offer, Rules};

use crate::config::spec::{BlockSpec, DNS_PORT, Spec};
use crate::name::Name;

/// What a server that serves at an address says.
pub fn offer(spec: &Spec, serves: SocketAddr, own: &[IpAddr]) -> Offer {
    let addresses = match serves.ip() {
        any if any.is_unspecified() => own.to_vec(),
        one => vec![one],
    };
    match rules(spec) {
        Some(rules) if serves.port() == DNS_PORT && !addresses.is_empty() => {
            Offer::Answer { rules, addresses }
        }
        _ => Offer::Refuse,
    }
}

/// What holds for all names of the cluster; `None` when something else than the cluster may decide about one.
pub fn rules(spec: &Spec) -> Option<Rules> {
    let origins = &spec.zone.origins;
    let first = block(spec, origins.first()?)?;
    for origin in origins {
        let apart = |other: &Name| other == origin || !other.is_in(origin);
        let is_ours = block(spec, origin).is_some_and(|block| std::ptr::eq(block, first));
        let mut zones = spec.blocks.iter().flat_map(|block| &block.zones);
        if !is_ours || !origins.iter().all(apart) || !zones.all(apart) || hides(first, origin) {
            return None;
        }
    }
    let cluster = first.cluster.as_ref()?;
    if !first.rewrites.is_empty() || first.log.is_on() {
        return None;
    }
    Some(Rules {
        origins: origins.iter().map(ToString::to_string).collect(),
        ttl_s: cluster.ttl_s,
        udp_bytes_max: u16::try_from(first.udp_bytes_max).ok()?,
        recursion: !first.routes.is_empty(),
        endpoint_pod_names: spec.zone.endpoint_pod_names,
    })
}

/// The block that decides about a name, as [`crate::rules::Rules::find`] finds it.
fn block<'a>(spec: &'a Spec, name: &Name) -> Option<&'a BlockSpec> {
    let blocks = spec.blocks.iter();
    let zones = blocks.flat_map(|block| block.zones.iter().map(move |zone| (zone, block)));
    let around = zones.filter(|(zone, _)| name.is_in(zone));
    // The first of several that are as long.
    let longest = around.rev().max_by_key(|(zone, _)| zone.labels());
    longest.map(|(_, block)| block)
}

/// Whether a table of hosts has, or denies, names of a domain.
fn hides(block: &BlockSpec, origin: &Name) -> bool {
    let Some(hosts) = &block.hosts else {
        return false;
    };
    let goes_on = hosts.fallthrough.iter().any(|zone| origin.is_in(zone));
    let mut zones = hosts.zones.iter();
    let about = hosts.is_about(origin.wire()) || zones.any(|zone| zone.is_in(origin));
    let mut names = hosts.names();
    let has = names.any(|name| name.is_in(origin) && hosts.is_about(name.wire()));
    (about && !goes_on) || has
}
