//! Nodes, and the little that is needed of Pods.

use std::net::IpAddr;
use std::sync::Arc;

use ipnetwork::IpNetwork;

use crate::reject::{self, BadField};
use crate::{Kind, ObjectKey, Rejected, wire};

/// A node: where it is reached, and which pod addresses are its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub name: Arc<str>,
    /// Addresses of type InternalIP, in the node's order.
    pub internal_ips: Vec<IpAddr>,
    /// `spec.podCIDRs`; empty until the node has been given some.
    pub pod_cidrs: Vec<IpNetwork>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// It is being deleted, or the cluster autoscaler is about to.
    pub leaving: bool,
}

/// A pod: its addresses and node, for records and rules by pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Pod {
    pub key: ObjectKey,
    pub node_name: Option<Arc<str>>,
    pub ips: Vec<IpAddr>,
    pub host_network: bool,
    /// Its search path is not the one that all pods of its namespace have.
    pub own_search: bool,
    /// Its containers have ended for good: its address may be another pod's by now.
    pub ended: bool,
}

/// Taint that the cluster autoscaler sets before it takes a node away.
const TO_BE_DELETED_TAINT: &str = "ToBeDeletedByClusterAutoscaler";
pub(crate) const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

impl TryFrom<wire::Node<'_>> for Node {
    type Error = Rejected;

    fn try_from(node: wire::Node<'_>) -> Result<Self, Rejected> {
        convert_node(&node).map_err(|bad| bad.of(Kind::Node, &node.metadata))
    }
}

impl TryFrom<wire::Pod<'_>> for Pod {
    type Error = Rejected;

    fn try_from(pod: wire::Pod<'_>) -> Result<Self, Rejected> {
        convert_pod(&pod).map_err(|bad| bad.of(Kind::Pod, &pod.metadata))
    }
}

fn convert_node(node: &wire::Node<'_>) -> Result<Node, BadField> {
    let name = reject::named(&node.metadata)?.into();
    let listed = node
        .status
        .as_ref()
        .and_then(|status| status.addresses.as_deref())
        .unwrap_or_default()
        .iter()
        .enumerate();
    let internal_ips = listed
        .filter(|(_, address)| address.type_.as_deref() == Some("InternalIP"))
        .map(|(i, address)| {
            reject::address(address.address.as_deref().unwrap_or_default(), || {
                format!("status.addresses[{i}].address")
            })
        })
        .collect::<Result<_, _>>()?;
    Ok(Node {
        name,
        internal_ips,
        pod_cidrs: pod_cidrs(node)?,
        zone: node.metadata.labels.get(ZONE_LABEL).map(Into::into),
        leaving: node.metadata.deletion_timestamp.is_some()
            || node
                .spec
                .iter()
                .flat_map(|spec| spec.taints.iter().flatten())
                .any(|taint| taint.key.as_deref() == Some(TO_BE_DELETED_TAINT)),
    })
}

fn pod_cidrs(node: &wire::Node<'_>) -> Result<Vec<IpNetwork>, BadField> {
    let Some(spec) = &node.spec else {
        return Ok(Vec::new());
    };
    let texts: Vec<&wire::Text<'_>> = match spec.pod_cidrs.as_deref() {
        Some(list) if !list.is_empty() => list.iter().collect(),
        _ => spec
            .pod_cidr
            .iter()
            .filter(|text| !text.is_empty())
            .collect(),
    };
    let parse = |(i, text): (usize, &&wire::Text<'_>)| {
        let bad = |reason| {
            BadField::new(
                format!("spec.podCIDRs[{i}]"),
                format!("{:?} {reason}", &***text),
            )
        };
        let range: IpNetwork = text.parse().map_err(|_| bad("is not a CIDR"))?;
        if !text.contains('/') {
            return Err(bad("has no prefix length"));
        }
        if range.network() != range.ip() {
            return Err(bad("has bits set after its prefix"));
        }
        Ok(range)
    };
    texts.iter().enumerate().map(parse).collect()
}

/// What is listed in a pod's `dnsConfig` comes after what others have; with another policy than the usual one nothing of that is there.
fn has_own_search(spec: &wire::PodSpec<'_>) -> bool {
    let policy = spec.dns_policy.as_deref().unwrap_or_default();
    let searches = spec
        .dns_config
        .as_ref()
        .and_then(|dns| dns.searches.as_deref());
    !matches!(policy, "" | "ClusterFirst" | "ClusterFirstWithHostNet")
        || searches.is_some_and(|searches| !searches.is_empty())
}

fn convert_pod(pod: &wire::Pod<'_>) -> Result<Pod, BadField> {
    let status = pod.status.as_ref();
    let listed = status
        .and_then(|status| status.pod_ips.as_deref())
        .unwrap_or_default();
    Ok(Pod {
        key: reject::namespaced(&pod.metadata)?,
        node_name: pod
            .spec
            .as_ref()
            .and_then(|spec| spec.node_name.as_deref())
            .map(Into::into),
        ips: listed
            .iter()
            .enumerate()
            .map(|(i, one)| {
                reject::address(one.ip.as_deref().unwrap_or_default(), || {
                    format!("status.podIPs[{i}].ip")
                })
            })
            .collect::<Result<_, _>>()?,
        host_network: pod
            .spec
            .as_ref()
            .and_then(|spec| spec.host_network)
            .unwrap_or(false),
        own_search: pod.spec.as_ref().is_some_and(has_own_search),
        ended: matches!(
            status.and_then(|status| status.phase.as_deref()),
            Some("Succeeded" | "Failed")
        ),
    })
}
