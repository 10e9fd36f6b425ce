//! The ranges of the cluster's ServiceCIDRs: what the node routes for its own traffic to Services, beside `--service-cidr`.

use std::collections::BTreeMap;
use std::net::IpAddr;

use cluster_model::api::api::networking::v1::ServiceCIDR;
use cluster_model::watch::ApiOptions;
use cluster_model::watch::kube::api::Api;
use cluster_model::watch::kube::runtime::{WatchStreamExt, watcher};
use cluster_model::{ServiceKey, Snapshot};
use futures::StreamExt;
use ipnetwork::IpNetwork;

use crate::plan::lifeline;
use crate::source::{self, Feed};

/// Follows the ServiceCIDRs and tells the event loop of their ranges. A cluster that is too old to have any (before Kubernetes 1.33), or
/// does not let agents see them, has those of `--service-cidr`.
pub async fn follow(options: ApiOptions, feed: Feed) {
    let client = source::client(&options, "service ranges").await;
    let all: Api<ServiceCIDR> = Api::all(client);
    let mut events = std::pin::pin!(watcher(all, watcher::Config::default()).default_backoff());
    let mut known: BTreeMap<String, Vec<IpNetwork>> = BTreeMap::new();
    let mut complete = false;
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Init) => {
                known.clear();
                complete = false;
            }
            Ok(watcher::Event::InitApply(one) | watcher::Event::Apply(one)) => {
                known.insert(named(&one), ranges(&one));
            }
            Ok(watcher::Event::Delete(one)) => drop(known.remove(&named(&one))),
            Ok(watcher::Event::InitDone) => complete = true,
            Err(error) => {
                tracing::debug!(%error, "service ranges: ServiceCIDRs cannot be watched");
                continue;
            }
        }
        if complete && !feed.service_ranges(known.values().flatten().copied().collect()) {
            return;
        }
    }
}

fn named(one: &ServiceCIDR) -> String {
    one.metadata.name.clone().unwrap_or_default()
}

fn ranges(one: &ServiceCIDR) -> Vec<IpNetwork> {
    let spec = one.spec.as_ref();
    let cidrs = spec.into_iter().flat_map(|spec| &spec.cidrs).flatten();
    let read = |cidr: &String| {
        let range: IpNetwork = cidr.parse().ok()?;
        IpNetwork::new(range.network(), range.prefix()).ok()
    };
    cidrs.filter_map(read).collect()
}

/// What of the ranges a node routes to its Services.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    pub ranges: Vec<IpNetwork>,
    /// Why others are not.
    pub refused: Vec<String>,
}

/// Chooses among what was configured, which is trusted, and what ServiceCIDRs name, whoever has written them: a range with addresses of
/// nodes, pods or API servers would cut the node off from them. A node without a family has no routes of it.
pub fn choose(
    configured: &[IpNetwork],
    told: &[IpNetwork],
    has_family: impl Fn(&IpNetwork) -> bool,
    snapshot: &Snapshot,
) -> Chosen {
    let mut chosen = Chosen {
        ranges: configured.to_vec(),
        refused: Vec::new(),
    };
    for range in told.iter().filter(|range| has_family(range)) {
        if chosen.ranges.contains(range) {
            continue;
        }
        match taken(range, snapshot) {
            None => chosen.ranges.push(*range),
            Some(by) => chosen.refused.push(format!(
                "ServiceCIDR {range} has addresses of {by}: the node's own packets do not find Services there, but for what the socket hook does"
            )),
        }
    }
    chosen
}

/// Who has addresses of a range beside Services.
fn taken(range: &IpNetwork, snapshot: &Snapshot) -> Option<String> {
    let servers = snapshot
        .slices(&lifeline())
        .iter()
        .flat_map(|slice| &slice.endpoints);
    if servers.into_iter().any(|one| range.contains(one.address)) {
        return Some("the API server".to_owned());
    }
    let has_pods =
        |pods: &IpNetwork| range.contains(pods.network()) || pods.contains(range.network());
    let mut nodes: Vec<_> = snapshot.nodes().collect();
    nodes.sort_by(|one, other| one.name.cmp(&other.name));
    nodes.into_iter().find_map(|node| {
        if node.internal_ips.iter().any(|ip| range.contains(*ip)) {
            return Some(format!("node {}", node.name));
        }
        let pods = node.pod_cidrs.iter().any(has_pods);
        pods.then(|| format!("pods of node {}", node.name))
    })
}

/// A Service whose address is in none of the routed ranges: the host's own packets do not find it.
pub fn unrouted(routed: &[IpNetwork], snapshot: &Snapshot) -> Option<(ServiceKey, IpAddr)> {
    snapshot.services().find_map(|service| {
        let mut addresses = service.cluster_ips.iter();
        let outside = addresses.find(|ip| !routed.iter().any(|range| range.contains(**ip)))?;
        Some((service.key.clone(), *outside))
    })
}

#[cfg(test)]
mod tests {
    use cluster_model::{Change, Dirty, read_manifest};

    use super::*;

    fn networks(ranges: &[&str]) -> Vec<IpNetwork> {
        ranges.iter().map(|range| range.parse().unwrap()).collect()
    }

    fn snapshot() -> Snapshot {
        let text = r#"[
            {"kind": "Node", "metadata": {"name": "n"}, "spec": {"podCIDRs": ["10.244.1.0/24"]},
                "status": {"addresses": [{"type": "InternalIP", "address": "198.18.0.11"}]}},
            {"kind": "EndpointSlice", "metadata": {"name": "kubernetes", "namespace": "default",
                "labels": {"kubernetes.io/service-name": "kubernetes"}}, "addressType": "IPv4",
                "endpoints": [{"addresses": ["192.0.2.1"]}], "ports": [{"port": 6443}]},
            {"kind": "Service", "metadata": {"name": "web", "namespace": "a"},
                "spec": {"clusterIP": "203.0.113.7", "clusterIPs": ["203.0.113.7"], "ports": [{"port": 80}]}}]"#;
        let mut snapshot = Snapshot::default();
        for object in read_manifest(text.as_bytes()).unwrap() {
            snapshot.apply(Change::Upsert(object), &mut Dirty::default());
        }
        snapshot
    }

    #[test]
    fn ranges_that_are_others_too_are_not_routed() {
        let (snapshot, configured) = (snapshot(), networks(&["10.96.0.0/16"]));
        let told = networks(&[
            "10.96.0.0/16",
            "203.0.113.0/24",
            "10.0.0.0/8",
            "10.244.1.128/25",
            "198.18.0.0/24",
            "192.0.2.0/30",
            "2001:db8::/64",
        ]);
        let chosen = choose(&configured, &told, IpNetwork::is_ipv4, &snapshot);
        assert_eq!(chosen.ranges, networks(&["10.96.0.0/16", "203.0.113.0/24"]));
        let refused: Vec<&str> = chosen
            .refused
            .iter()
            .filter_map(|why| why.split_once(':')?.0.strip_prefix("ServiceCIDR "))
            .collect();
        assert_eq!(
            refused,
            [
                "10.0.0.0/8 has addresses of pods of node n",
                "10.244.1.128/25 has addresses of pods of node n",
                "198.18.0.0/24 has addresses of node n",
                "192.0.2.0/30 has addresses of the API server",
            ]
        );
    }

    #[test]
    fn a_service_in_no_routed_range_is_found() {
        let snapshot = snapshot();
        let found = unrouted(&networks(&["10.96.0.0/16"]), &snapshot);
        let web = (ServiceKey::new("a", "web"), "203.0.113.7".parse().unwrap());
        assert_eq!(found, Some(web));
        let routed = networks(&["10.96.0.0/16", "203.0.113.0/24"]);
        assert_eq!(unrouted(&routed, &snapshot), None);
    }
}
