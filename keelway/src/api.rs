//! The cluster's API, as `up` and `status` use it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use futures::future::try_join_all;
use ipnetwork::IpNetwork;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::wait::await_condition;
use kube::{Api, Client, Config};
use serde_json::Value;

/// Where the agent and the DNS run.
pub const SYSTEM_NAMESPACE: &str = "kube-system";
/// Between two tries of a request that failed; while the server is busy starting, nothing tells when it has.
const RETRY: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error("the kubeconfig cannot be used: {0}")]
    Kubeconfig(String),
    #[error("cannot create {kind} {name}: {source}")]
    Create {
        kind: String,
        name: String,
        source: Box<kube::Error>,
    },
    #[error("cannot {action}: {source}")]
    Request {
        action: &'static str,
        source: Box<kube::Error>,
    },
    #[error("an object without kind or name is in a manifest")]
    Nameless,
}

fn request(action: &'static str) -> impl FnOnce(kube::Error) -> ApiError {
    move |source| ApiError::Request {
        action,
        source: Box::new(source),
    }
}

/// A client of one cluster.
#[derive(Clone)]
pub struct ClusterApi {
    client: Client,
}

impl ClusterApi {
    /// A client with the credentials of a kubeconfig. Nothing is sent yet.
    ///
    /// # Errors
    /// When the kubeconfig is not usable.
    pub async fn new(kubeconfig: &Value) -> Result<Self, ApiError> {
        let failed = |error: &dyn std::fmt::Display| ApiError::Kubeconfig(error.to_string());
        let kubeconfig: Kubeconfig =
            serde_json::from_value(kubeconfig.clone()).map_err(|error| failed(&error))?;
        let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .map_err(|error| failed(&error))?;
        // A proxy of the environment is for the world; this server is on 127.0.0.1.
        config.proxy_url = None;
        Ok(ClusterApi {
            client: Client::try_from(config).map_err(|error| failed(&error))?,
        })
    }

    /// The client itself.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Gives a node a label that its kubelet may not give it (NodeRestriction).
    ///
    /// # Errors
    /// What the server says.
    pub async fn label_node(&self, name: &str, label: &str) -> Result<(), ApiError> {
        let api: Api<Node> = Api::all(self.client.clone());
        let labels = serde_json::json!({"metadata": {"labels": {label: ""}}});
        api.patch(name, &PatchParams::default(), &Patch::Merge(labels))
            .await
            .map(drop)
            .map_err(request("label the node"))
    }

    /// Waits until one node is there and Ready, by what that node may see.
    pub async fn node_ready(&self, name: &str) {
        let api: Api<Node> = Api::all(self.client.clone());
        let ready = |node: Option<&Node>| node.is_some_and(is_ready);
        while await_condition(api.clone(), name, ready).await.is_err() {
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Waits until /readyz says ok. The socket is open before the server runs, so the first connection waits in its
    /// queue until the server takes it; only a server that says "not yet" is asked again.
    pub async fn ready(&self) {
        loop {
            let Ok(ask) = http_get("/readyz") else { return };
            if self.client.request_text(ask).await.is_ok() {
                return;
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Whether /readyz says ok now.
    ///
    /// # Errors
    /// What it says instead.
    pub async fn check(&self) -> Result<(), ApiError> {
        let Ok(ask) = http_get("/readyz") else {
            return Ok(());
        };
        self.client
            .request_text(ask)
            .await
            .map(drop)
            .map_err(request("reach the API server"))
    }

    /// Creates an object. One that is there already is left as it is.
    ///
    /// # Errors
    /// What the server has against it.
    pub async fn create(&self, object: &DynamicObject) -> Result<(), ApiError> {
        self.bring(object, false).await
    }

    /// Creates an object, or makes it in all that this one says what this one says.
    ///
    /// # Errors
    /// What the server has against it.
    pub async fn apply(&self, object: &DynamicObject) -> Result<(), ApiError> {
        self.bring(object, true).await
    }

    async fn bring(&self, object: &DynamicObject, anew: bool) -> Result<(), ApiError> {
        let types = object.types.as_ref().ok_or(ApiError::Nameless)?;
        let name = object.metadata.name.clone().ok_or(ApiError::Nameless)?;
        let gvk = GroupVersionKind::try_from(types).map_err(|_| ApiError::Nameless)?;
        let resource = ApiResource::from_gvk(&gvk);
        let api: Api<DynamicObject> = match &object.metadata.namespace {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        };
        // Before creating, which an address that a Service has already is refused by.
        let mut outcome = match anew {
            true => {
                api.patch(&name, &PatchParams::default(), &Patch::Merge(object))
                    .await
            }
            false => api.create(&PostParams::default(), object).await,
        };
        match &outcome {
            Err(kube::Error::Api(status)) if !anew && status.reason == "AlreadyExists" => {
                return Ok(());
            }
            Err(kube::Error::Api(status)) if anew && status.reason == "NotFound" => {
                outcome = api.create(&PostParams::default(), object).await;
            }
            _ => {}
        }
        match outcome {
            Ok(_) => Ok(()),
            Err(source) => Err(ApiError::Create {
                kind: types.kind.clone(),
                name,
                source: Box::new(source),
            }),
        }
    }

    /// Waits until all these nodes are Ready.
    ///
    /// # Errors
    /// None so far: a watch that breaks is begun anew.
    pub async fn nodes_ready(&self, names: &[String]) -> Result<(), ApiError> {
        let api: Api<Node> = Api::all(self.client.clone());
        try_join_all(names.iter().map(|name| {
            let api = api.clone();
            async move {
                while await_condition(api.clone(), name, |node: Option<&Node>| {
                    node.is_some_and(is_ready)
                })
                .await
                .is_err()
                {
                    tokio::time::sleep(RETRY).await;
                }
                Ok(())
            }
        }))
        .await
        .map(drop)
    }

    /// Waits until a DaemonSet of kube-system is ready on `nodes` nodes.
    pub async fn daemon_set_ready(&self, name: &str, nodes: u8) {
        let api: Api<DaemonSet> = Api::namespaced(self.client.clone(), SYSTEM_NAMESPACE);
        let ready = |set: Option<&DaemonSet>| {
            let status = set.and_then(|set| set.status.as_ref());
            status.is_some_and(|status| {
                status.desired_number_scheduled >= i32::from(nodes)
                    && status.number_ready >= i32::from(nodes)
            })
        };
        while await_condition(api.clone(), name, ready).await.is_err() {
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Whether all pods of a DaemonSet of kube-system are what it says now, and ready.
    ///
    /// # Errors
    /// When the server does not answer or has no such set.
    pub async fn is_rolled_out(&self, name: &str) -> Result<bool, ApiError> {
        let api: Api<DaemonSet> = Api::namespaced(self.client.clone(), SYSTEM_NAMESPACE);
        let set = api.get(name).await.map_err(request("read a DaemonSet"))?;
        Ok(is_rolled_out(Some(&set)))
    }

    /// Waits until they are.
    pub async fn rolled_out(&self, name: &str) {
        let api: Api<DaemonSet> = Api::namespaced(self.client.clone(), SYSTEM_NAMESPACE);
        while await_condition(api.clone(), name, is_rolled_out)
            .await
            .is_err()
        {
            tokio::time::sleep(RETRY).await;
        }
    }

    /// When a node's kubelet has renewed its lease last; None when the server does not answer.
    pub async fn lease_of_node(&self, name: &str) -> Option<MicroTime> {
        let api: Api<Lease> = Api::namespaced(self.client.clone(), "kube-node-lease");
        api.get(name).await.ok()?.spec?.renew_time
    }

    /// The nodes, each with whether it is Ready.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn nodes(&self) -> Result<Vec<(String, bool)>, ApiError> {
        let api: Api<Node> = Api::all(self.client.clone());
        let list = api
            .list(&ListParams::default())
            .await
            .map_err(request("list nodes"))?;
        Ok(list
            .items
            .iter()
            .map(|node| {
                (
                    node.metadata.name.clone().unwrap_or_default(),
                    is_ready(node),
                )
            })
            .collect())
    }

    /// The ranges of pod addresses of each node.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn pod_ranges(&self) -> Result<BTreeMap<String, Vec<IpNetwork>>, ApiError> {
        let api: Api<Node> = Api::all(self.client.clone());
        let list = api.list(&ListParams::default()).await;
        let nodes = list.map_err(request("list nodes"))?.items.into_iter();
        let ranges = |node: &Node| {
            let ranges = node.spec.as_ref().and_then(|spec| spec.pod_cidrs.as_ref());
            let ranges = ranges.into_iter().flatten();
            ranges.filter_map(|range| range.parse().ok()).collect()
        };
        Ok(nodes
            .map(|node| {
                (
                    node.metadata.name.clone().unwrap_or_default(),
                    ranges(&node),
                )
            })
            .collect())
    }

    /// How many pods of a DaemonSet of kube-system are ready, and how many there should be.
    ///
    /// # Errors
    /// When the server does not answer or has no such set.
    pub async fn daemon_set(&self, name: &str) -> Result<(i32, i32), ApiError> {
        let api: Api<DaemonSet> = Api::namespaced(self.client.clone(), SYSTEM_NAMESPACE);
        let status = api
            .get(name)
            .await
            .map_err(request("read a DaemonSet"))?
            .status
            .unwrap_or_default();
        Ok((status.number_ready, status.desired_number_scheduled))
    }

    /// A line for each node and pod that is not ready, for the one who reads why a cluster did not come up.
    pub async fn what_is_missing(&self) -> String {
        let mut out = String::new();
        for (node, ready) in self.nodes().await.unwrap_or_default() {
            if !ready {
                let _ = writeln!(out, "node {node} is not Ready");
            }
        }
        let api: Api<Pod> = Api::namespaced(self.client.clone(), SYSTEM_NAMESPACE);
        let pods = api
            .list(&ListParams::default())
            .await
            .map(|list| list.items)
            .unwrap_or_default();
        for pod in pods {
            let status = pod.status.unwrap_or_default();
            if status
                .conditions
                .iter()
                .flatten()
                .any(|condition| condition.type_ == "Ready" && condition.status == "True")
            {
                continue;
            }
            let node = pod
                .spec
                .and_then(|spec| spec.node_name)
                .unwrap_or_else(|| "no node".into());
            let name = pod.metadata.name.unwrap_or_default();
            let phase = status.phase.unwrap_or_else(|| "no phase".into());
            let _ = write!(out, "pod {name} on {node}: {phase}");
            for container in status
                .init_container_statuses
                .iter()
                .flatten()
                .chain(status.container_statuses.iter().flatten())
            {
                let state = container.state.clone().unwrap_or_default();
                if let Some(waiting) = state.waiting {
                    let (reason, message) = (
                        waiting.reason.unwrap_or_default(),
                        waiting.message.unwrap_or_default(),
                    );
                    let _ = write!(out, "; {} waits: {reason} {message}", container.name);
                }
                if let Some(ended) = state.terminated.filter(|ended| ended.exit_code != 0) {
                    let _ = write!(
                        out,
                        "; {} ended with {}: {}",
                        container.name,
                        ended.exit_code,
                        ended.message.unwrap_or_default()
                    );
                }
            }
            out.push('\n');
        }
        out
    }
}

fn http_get(path: &str) -> Result<http::Request<Vec<u8>>, http::Error> {
    http::Request::get(path).body(Vec::new())
}

/// Whether a DaemonSet's controller has seen what it says now, and made all pods so.
fn is_rolled_out(set: Option<&DaemonSet>) -> bool {
    let Some((set, status)) = set.and_then(|set| Some((set, set.status.as_ref()?))) else {
        return false;
    };
    let wanted = status.desired_number_scheduled;
    status.observed_generation >= set.metadata.generation
        && status.updated_number_scheduled.unwrap_or_default() >= wanted
        && status.number_ready >= wanted
        && status.number_unavailable.unwrap_or_default() == 0
}

/// Whether a node says that it is Ready.
pub fn is_ready(node: &Node) -> bool {
    let conditions = node
        .status
        .iter()
        .flat_map(|status| status.conditions.iter().flatten());
    conditions
        .into_iter()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True")
}
