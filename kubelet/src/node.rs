//! node: the Node object, its Ready condition, and its lease.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{
    DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeSpec, NodeStatus,
    ObjectReference,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference, Time};
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::authorities::ANNOTATION;
use crate::backoff::Quick;
use crate::cluster::{EventKind, Note, Recorder};
use crate::config::Config;
use crate::machine::{Machine, architecture};
use crate::pod::status::api_time;
use crate::runtime::{Runtime, RuntimeStatus};

/// CRI has no event for "the network is configured now", so its Status is asked: often while a change is awaited.
const STATUS_PERIOD_NOT_READY: Duration = Duration::from_millis(100);
const STATUS_PERIOD_READY: Duration = Duration::from_secs(5);
/// How often the status is posted when nothing changes.
const REPORT_PERIOD: Duration = Duration::from_secs(300);
const LEASE_PERIOD: Duration = Duration::from_secs(10);
const LEASE_DURATION_S: i32 = 40;
const LEASE_NAMESPACE: &str = "kube-node-lease";
/// Memory kept from pods: upstream's hard eviction threshold.
const MEMORY_RESERVED_BYTES: i64 = 100 << 20;

/// What a pod can be given on this node.
pub fn allocatable_memory_bytes(machine: &Machine) -> i64 {
    (machine.memory_bytes - MEMORY_RESERVED_BYTES).max(0)
}

/// Watches over the runtime: its status, kept current.
pub async fn watch_runtime(
    runtime: Arc<dyn Runtime>,
    status: watch::Sender<RuntimeStatus>,
    network: watch::Sender<bool>,
) {
    loop {
        let now = runtime
            .status()
            .await
            .unwrap_or_else(|error| RuntimeStatus {
                message: error.to_string(),
                ..Default::default()
            });
        let ready = now.ready && now.network_ready;
        network.send_if_modified(|known| std::mem::replace(known, ready) != ready);
        status.send_if_modified(|known| {
            let changed = *known != now;
            *known = now;
            changed
        });
        tokio::time::sleep(if ready {
            STATUS_PERIOD_READY
        } else {
            STATUS_PERIOD_NOT_READY
        })
        .await;
    }
}

/// A Registration keeps this node's object in the API.
pub struct Registration {
    pub client: Client,
    pub config: Arc<Config>,
    pub machine: Machine,
    pub recorder: Recorder,
    /// By which authorities the node goes; None where nobody says.
    pub goes_by: watch::Receiver<Option<String>>,
}

impl Registration {
    /// Registers the node and keeps its status and lease for ever.
    pub async fn run(mut self, mut status: watch::Receiver<RuntimeStatus>) {
        let mut retry = Quick::default();
        let mut known: Option<Node> = None;
        let mut reported: Option<Instant> = None;
        let mut leased: Option<Instant> = None;
        loop {
            let mut failed = false;
            if reported.is_none_or(|at| at.elapsed() >= REPORT_PERIOD) {
                let runtime = status.borrow_and_update().clone();
                match self.report(&runtime).await {
                    Ok(node) => {
                        if known.is_none() {
                            tracing::info!(node = self.config.node_name, "registered");
                            self.event(
                                &node,
                                EventKind::Normal,
                                "Starting",
                                "Starting kubelet.".to_owned(),
                            );
                        }
                        self.tell_ready(known.as_ref(), &node);
                        known = Some(node);
                        reported = Some(Instant::now());
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot report the node's status; trying again");
                        failed = true;
                    }
                }
            }
            if let Some(node) = &known
                && leased.is_none_or(|at| at.elapsed() >= LEASE_PERIOD)
            {
                match self.renew_lease(node).await {
                    Ok(()) => leased = Some(Instant::now()),
                    Err(error) => {
                        tracing::warn!(%error, "cannot renew the node's lease; trying again");
                        failed = true;
                    }
                }
            }
            if failed {
                tokio::time::sleep(retry.wait()).await;
                continue;
            }
            retry.clear();
            let next = |at: Option<Instant>, period| at.map_or_else(Instant::now, |at| at + period);
            let wake = next(reported, REPORT_PERIOD).min(next(leased, LEASE_PERIOD));
            tokio::select! {
                changed = status.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    reported = None;
                }
                Ok(()) = self.goes_by.changed() => reported = None,
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    async fn report(&self, runtime: &RuntimeStatus) -> Result<Node, kube::Error> {
        let api: Api<Node> = Api::all(self.client.clone());
        let name = &self.config.node_name;
        let node = match api.get_opt(name).await? {
            Some(node) => node,
            None => {
                let status = self.status(&Node::default(), runtime, Timestamp::now());
                let node = Node {
                    metadata: self.metadata(),
                    spec: Some(NodeSpec {
                        taints: Some(self.config.taints.clone()).filter(|t| !t.is_empty()),
                        ..NodeSpec::default()
                    }),
                    status: Some(status),
                };
                api.create(&PostParams::default(), &node).await?
            }
        };
        let metadata = self.metadata();
        let missing = |wanted: &Option<BTreeMap<String, String>>, has: &Option<BTreeMap<_, _>>| {
            let mut wanted = wanted.iter().flatten();
            wanted.any(|(key, value)| has.as_ref().and_then(|has| has.get(key)) != Some(value))
        };
        if missing(&metadata.labels, &node.metadata.labels)
            || missing(&metadata.annotations, &node.metadata.annotations)
        {
            let patch = serde_json::json!({"metadata": {"labels": metadata.labels,
                "annotations": metadata.annotations}});
            api.patch(name, &PatchParams::default(), &Patch::Merge(patch))
                .await?;
        }
        let status = self.status(&node, runtime, Timestamp::now());
        let patch = serde_json::json!({"status": replacing_addresses(&status)});
        api.patch_status(name, &PatchParams::default(), &Patch::Strategic(patch))
            .await
    }

    fn metadata(&self) -> ObjectMeta {
        let name = &self.config.node_name;
        let labels = [
            ("kubernetes.io/hostname", name.as_str()),
            ("kubernetes.io/os", "linux"),
            ("kubernetes.io/arch", architecture()),
            ("beta.kubernetes.io/os", "linux"),
            ("beta.kubernetes.io/arch", architecture()),
        ];
        let own = labels
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value.to_owned()));
        let goes_by = self.goes_by.borrow().clone();
        ObjectMeta {
            name: Some(name.clone()),
            annotations: goes_by.map(|by| BTreeMap::from([(ANNOTATION.to_owned(), by)])),
            labels: Some(own.chain(self.config.labels.iter().cloned()).collect()),
            ..Default::default()
        }
    }

    fn status(&self, node: &Node, runtime: &RuntimeStatus, now: Timestamp) -> NodeStatus {
        let old = node.status.clone().unwrap_or_default();
        let quantities = |memory_bytes: i64| {
            let entries = [
                ("cpu", self.machine.cpus.to_string()),
                ("memory", format!("{}Ki", memory_bytes / 1024)),
                (
                    "ephemeral-storage",
                    format!("{}Ki", self.machine.disk_bytes / 1024),
                ),
                ("pods", self.config.pods_max.to_string()),
            ];
            Some(
                entries
                    .into_iter()
                    .map(|(key, value)| (key.to_owned(), Quantity(value)))
                    .collect(),
            )
        };
        let address = |type_: &str, address: String| NodeAddress {
            type_: type_.to_owned(),
            address,
        };
        let internal = self.config.node_ips.iter();
        let internal = internal.map(|ip| address("InternalIP", ip.to_string()));
        let hostname = address("Hostname", self.config.node_name.clone());
        let before = old.conditions.clone().unwrap_or_default();
        NodeStatus {
            capacity: quantities(self.machine.memory_bytes),
            allocatable: quantities(allocatable_memory_bytes(&self.machine)),
            addresses: Some(internal.chain([hostname]).collect()),
            conditions: Some(conditions(runtime, &before, now)),
            daemon_endpoints: Some(NodeDaemonEndpoints {
                kubelet_endpoint: Some(DaemonEndpoint {
                    port: self.config.port.into(),
                }),
            }),
            node_info: Some(self.machine.info.clone()),
            ..Default::default()
        }
    }

    fn tell_ready(&self, before: Option<&Node>, after: &Node) {
        let is_ready = |node: &Node| {
            let conditions = node
                .status
                .iter()
                .flat_map(|s| s.conditions.iter().flatten());
            conditions
                .into_iter()
                .any(|c| c.type_ == "Ready" && c.status == "True")
        };
        let name = &self.config.node_name;
        match (before.is_some_and(is_ready), is_ready(after)) {
            (false, true) => self.event(
                after,
                EventKind::Normal,
                "NodeReady",
                format!("Node {name} status is now: NodeReady"),
            ),
            (true, false) => self.event(
                after,
                EventKind::Normal,
                "NodeNotReady",
                format!("Node {name} status is now: NodeNotReady"),
            ),
            _ => {}
        }
    }

    fn event(&self, node: &Node, kind: EventKind, reason: &'static str, message: String) {
        let object = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(self.config.node_name.clone()),
            uid: node.metadata.uid.clone(),
            ..Default::default()
        };
        self.recorder.record(Note {
            object,
            kind,
            reason,
            message,
        });
    }

    async fn renew_lease(&self, node: &Node) -> Result<(), kube::Error> {
        let api: Api<Lease> = Api::namespaced(self.client.clone(), LEASE_NAMESPACE);
        let name = &self.config.node_name;
        let now = MicroTime(Timestamp::now());
        let patch = serde_json::json!({"spec": {
            "holderIdentity": name, "leaseDurationSeconds": LEASE_DURATION_S, "renewTime": now,
        }});
        match api
            .patch(name, &PatchParams::default(), &Patch::Merge(patch))
            .await
        {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            answer => return answer.map(drop),
        }
        let owner = OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: name.clone(),
            uid: node.metadata.uid.clone().unwrap_or_default(),
            ..Default::default()
        };
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                owner_references: Some(vec![owner]),
                ..Default::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(name.clone()),
                lease_duration_seconds: Some(LEASE_DURATION_S),
                renew_time: Some(now),
                ..Default::default()
            }),
        };
        api.create(&PostParams::default(), &lease).await.map(drop)
    }
}

/// A status as a strategic patch. The API merges addresses by their type, of which two addresses have the same: so they are
/// replaced as a whole.
fn replacing_addresses(status: &NodeStatus) -> serde_json::Value {
    let mut patch = serde_json::json!(status);
    if let Some(addresses) = patch["addresses"].as_array_mut() {
        addresses.push(serde_json::json!({"$patch": "replace"}));
    }
    patch
}

/// The conditions of the node. A transition keeps its time for as long as the condition keeps its value.
fn conditions(
    runtime: &RuntimeStatus,
    before: &[NodeCondition],
    now: Timestamp,
) -> Vec<NodeCondition> {
    let ready = match (runtime.ready, runtime.network_ready) {
        (true, true) => (
            true,
            "KubeletReady",
            "kubelet is posting ready status".to_owned(),
        ),
        (true, false) => (
            false,
            "KubeletNotReady",
            format!(
                "container runtime network not ready: {}",
                runtime.network_message
            ),
        ),
        (false, _) => (
            false,
            "KubeletNotReady",
            format!("container runtime is down: {}", runtime.message),
        ),
    };
    let computed = [
        (
            "MemoryPressure",
            (
                false,
                "KubeletHasSufficientMemory",
                "kubelet has sufficient memory available".to_owned(),
            ),
        ),
        (
            "DiskPressure",
            (
                false,
                "KubeletHasNoDiskPressure",
                "kubelet has no disk pressure".to_owned(),
            ),
        ),
        (
            "PIDPressure",
            (
                false,
                "KubeletHasSufficientPID",
                "kubelet has sufficient PID available".to_owned(),
            ),
        ),
        ("Ready", ready),
    ];
    let condition = |(kind, (holds, reason, message)): (&str, (bool, &str, String))| {
        let value = if holds { "True" } else { "False" };
        let same = before.iter().find(|c| c.type_ == kind && c.status == value);
        let since: Option<Time> = same.and_then(|c| c.last_transition_time.clone());
        NodeCondition {
            type_: kind.to_owned(),
            status: value.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message),
            last_heartbeat_time: Some(api_time(now)),
            last_transition_time: Some(since.unwrap_or_else(|| api_time(now))),
        }
    };
    computed.into_iter().map(condition).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_is_ready_only_with_a_network_and_keeps_its_transition_times() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let ready = |list: &[NodeCondition]| {
            let condition = list.iter().find(|c| c.type_ == "Ready").unwrap();
            (
                condition.status.clone(),
                condition.message.clone().unwrap(),
                condition.last_transition_time.clone().unwrap().0,
            )
        };
        let no_network = RuntimeStatus {
            ready: true,
            network_message: "no conf".to_owned(),
            ..Default::default()
        };
        let first = conditions(&no_network, &[], at(1));
        assert_eq!(
            ready(&first),
            (
                "False".to_owned(),
                "container runtime network not ready: no conf".to_owned(),
                at(1)
            )
        );
        let second = conditions(&no_network, &first, at(2));
        assert_eq!(ready(&second).2, at(1));
        let all = RuntimeStatus {
            ready: true,
            network_ready: true,
            ..Default::default()
        };
        assert_eq!(
            ready(&conditions(&all, &second, at(3))),
            (
                "True".to_owned(),
                "kubelet is posting ready status".to_owned(),
                at(3)
            )
        );
        let down = RuntimeStatus {
            message: "gone".to_owned(),
            ..Default::default()
        };
        assert_eq!(
            ready(&conditions(&down, &[], at(1))).1,
            "container runtime is down: gone"
        );
    }
}
