//! Ranges of pods for nodes, where the cluster gives them none.
//!
//! A controller manager that is told a range for the cluster's pods gives each node a part of it (`Node.spec.podCIDRs`). Where none does,
//! and the agents were told one, one of them does the same, by a Lease: [`plan`] decides, and what it decides is written to the Node,
//! where everybody looks for it and the API lets nobody change it afterwards.

mod plan;

use std::collections::BTreeMap;
use std::time::Duration;

use cluster_model::api::api::core::v1::Node;
use cluster_model::watch::kube::Client;
use cluster_model::watch::kube::api::{Api, Patch, PatchParams};
use cluster_model::watch::kube::runtime::{WatchStreamExt, watcher};
use cluster_model::watch::{self, ApiOptions};
use futures::{FutureExt, StreamExt};
use ipnetwork::IpNetwork;
use serde_json::json;

use crate::lease::Candidate;
use crate::source;
pub use plan::{Assignment, ClusterRange, ClusterRangeError, Exhausted, plan};

const LEASE: &str = "keelway-node-ranges";
/// The pause before what could not be written is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Gives out ranges while this agent holds the Lease. Never ends.
pub async fn run(options: ApiOptions, identity: String, ranges: Vec<ClusterRange>) {
    let client = source::client(&options, "node ranges").await;
    let mut candidate = Candidate::new(client.clone(), LEASE, &identity);
    loop {
        candidate.lead().await;
        tracing::info!(lease = LEASE, "giving out nodes' ranges of pods");
        tokio::select! {
            () = candidate.keep() => {
                tracing::warn!(lease = LEASE, "another agent gives out nodes' ranges");
            }
            () = give(client.clone(), &ranges) => {}
        }
    }
}

/// Gives every node ranges that comes without.
async fn give(client: Client, ranges: &[ClusterRange]) {
    let api: Api<Node> = Api::all(client);
    let mut events =
        std::pin::pin!(watcher(api.clone(), watcher::Config::default()).default_backoff());
    let mut nodes: BTreeMap<String, Vec<IpNetwork>> = BTreeMap::new();
    let (mut synced, mut failed) = (false, false);
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(event) => take(event, &mut nodes, &mut synced),
                None => return,
            },
            () = tokio::time::sleep(RETRY), if failed => {}
        }
        // Nodes that come together are planned together.
        while let Some(Some(event)) = events.next().now_or_never() {
            take(event, &mut nodes, &mut synced);
        }
        if !synced {
            continue;
        }
        let (assignments, exhausted) = plan(&nodes, ranges);
        if let Some(exhausted) = exhausted {
            tracing::warn!(%exhausted, "a node stays without pods");
        }
        failed = false;
        for one in assignments {
            match write(&api, &one).await {
                Ok(()) => {
                    tracing::info!(node = one.node, ranges = ?one.ranges, "a node has its range of pods");
                    nodes.insert(one.node, one.ranges);
                }
                Err(error) => {
                    tracing::warn!(node = one.node, %error, "a node's range cannot be written");
                    failed = true;
                }
            }
        }
    }
}

fn take(
    event: Result<watcher::Event<Node>, watcher::Error>,
    nodes: &mut BTreeMap<String, Vec<IpNetwork>>,
    synced: &mut bool,
) {
    match event {
        // Until a list is complete, a node that is missing in it may have the range that seems free.
        Ok(watcher::Event::Init) => {
            nodes.clear();
            *synced = false;
        }
        Ok(watcher::Event::InitDone) => *synced = true,
        Ok(watcher::Event::InitApply(node) | watcher::Event::Apply(node)) => {
            let name = node.metadata.name.clone().unwrap_or_default();
            nodes.insert(name, ranges_of(&node));
        }
        Ok(watcher::Event::Delete(node)) => {
            nodes.remove(&node.metadata.name.unwrap_or_default());
        }
        Err(error) => tracing::debug!(%error, "node ranges: the nodes cannot be watched"),
    }
}

/// The ranges that a node has. One that cannot be read is nobody's to give either.
fn ranges_of(node: &Node) -> Vec<IpNetwork> {
    let Some(spec) = &node.spec else {
        return Vec::new();
    };
    let listed = spec.pod_cidrs.iter().flatten();
    listed
        .chain(&spec.pod_cidr)
        .filter_map(|text| text.parse().ok())
        .collect()
}

async fn write(api: &Api<Node>, one: &Assignment) -> Result<(), watch::kube::Error> {
    let texts: Vec<String> = one.ranges.iter().map(ToString::to_string).collect();
    let patch = json!({"spec": {"podCIDR": texts.first(), "podCIDRs": texts}});
    // Refused by the API when somebody was faster: what a node has cannot be changed.
    api.patch(&one.node, &PatchParams::default(), &Patch::Strategic(patch))
        .await
        .map(drop)
}
