//! `keelway status`: what of a cluster runs.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::api::ClusterApi;
use crate::connectivity::Connectivity;
use crate::node::ServiceStatus;
use crate::state::{ClusterDir, NodeState};

/// An API server that has not answered by then counts as down.
const PATIENCE: Duration = Duration::from_secs(5);

/// The state of a cluster, as printed and as JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    pub name: String,
    pub context: String,
    pub api_server: String,
    /// None when it answers, else why not.
    pub api_error: Option<String>,
    /// Who may do what.
    pub authorization: &'static str,
    pub nodes: Vec<NodeStatus>,
    pub agents: Option<Ready>,
    pub dns: Option<Ready>,
    /// How nodes reach each other's pods, when that was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connectivity: Option<Connectivity>,
    /// Everything that should run does.
    pub healthy: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeStatus {
    pub name: String,
    pub address: String,
    /// In a cluster of both families, that of the second one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub second_address: Option<String>,
    pub control_plane: bool,
    /// Whether its PID 1 runs.
    pub running: bool,
    /// A command has begun to replace it and has not come to the end of that.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub unsettled: bool,
    /// What Kubernetes says of it; None for the control plane's own node.
    pub ready: Option<bool>,
    pub pid: Option<u32>,
    pub services: Vec<ServiceStatus>,
}

#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Ready {
    pub ready: i32,
    pub wanted: i32,
}

impl Status {
    /// Looks at a cluster; None when there is no such cluster.
    pub async fn of(dir: &ClusterDir) -> Option<Status> {
        let state = dir.read()?;
        let api = match kubeconfig_of(dir) {
            Some(kubeconfig) => ClusterApi::new(&kubeconfig)
                .await
                .map_err(|error| error.to_string()),
            None => Err("the cluster has no kubeconfig yet".into()),
        };
        let (mut api_error, mut known, mut agents, mut dns) = (None, Vec::new(), None, None);
        match api {
            Err(error) => api_error = Some(error),
            Ok(api) => match tokio::time::timeout(PATIENCE, api.check()).await {
                Err(_) => api_error = Some(format!("no answer within {PATIENCE:?}")),
                Ok(Err(error)) => api_error = Some(error.to_string()),
                Ok(Ok(())) => {
                    known = api.nodes().await.unwrap_or_default();
                    let ready = |(ready, wanted)| Ready { ready, wanted };
                    agents = api.daemon_set("keelway-agent").await.ok().map(ready);
                    dns = api.daemon_set("keelway-dns").await.ok().map(ready);
                }
            },
        }
        let nodes: Vec<NodeStatus> = state
            .nodes
            .iter()
            .map(|node| node_status(dir, node, &known))
            .collect();
        let all_ready =
            |set: Option<Ready>| set.is_some_and(|set| set.wanted > 0 && set.ready == set.wanted);
        let nodes_well = nodes
            .iter()
            .all(|node| node.running && !node.unsettled && node.ready != Some(false));
        Some(Status {
            context: crate::kubeconfig::context_name(&state.name),
            api_server: format!("https://127.0.0.1:{}", state.api_port),
            authorization: "RBAC and Node",
            healthy: api_error.is_none() && nodes_well && all_ready(agents) && all_ready(dns),
            name: state.name,
            api_error,
            nodes,
            agents,
            dns,
            connectivity: None,
        })
    }

    /// Adds how nodes reach each other's pods; a pair that does not makes the cluster unhealthy.
    pub fn connect(&mut self) {
        let connectivity = Connectivity::of(&self.nodes);
        self.healthy &= connectivity.is_whole();
        self.connectivity = Some(connectivity);
    }
}

/// The administrator's kubeconfig of a cluster.
pub fn kubeconfig_of(dir: &ClusterDir) -> Option<Value> {
    serde_saphyr::from_str(&std::fs::read_to_string(dir.kubeconfig()).ok()?).ok()
}

fn node_status(dir: &ClusterDir, node: &NodeState, known: &[(String, bool)]) -> NodeStatus {
    let running = node.is_running();
    let ready = known
        .iter()
        .find(|(name, _)| *name == node.name)
        .map(|(_, ready)| *ready);
    NodeStatus {
        name: node.name.clone(),
        address: node.address.to_string(),
        second_address: node.second_address.map(|address| address.to_string()),
        control_plane: node.control_plane,
        running,
        unsettled: node.unsettled,
        ready: if node.control_plane {
            None
        } else {
            Some(ready.unwrap_or(false))
        },
        pid: node.init.filter(|_| running).map(|init| init.pid),
        services: dir.services(&node.name),
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "cluster {} (context {}): {}",
            self.name,
            self.context,
            if self.healthy {
                "healthy"
            } else {
                "NOT healthy"
            }
        )?;
        match &self.api_error {
            None => writeln!(f, "  API server     {} answers", self.api_server)?,
            Some(error) => writeln!(
                f,
                "  API server     {} does not answer: {error}",
                self.api_server
            )?,
        }
        writeln!(f, "  authorization  {}", self.authorization)?;
        for (name, set) in [("agent", self.agents), ("DNS", self.dns)] {
            match set {
                Some(set) => writeln!(f, "  {name:<13}  {} of {} nodes", set.ready, set.wanted)?,
                None => writeln!(f, "  {name:<13}  unknown")?,
            }
        }
        for node in &self.nodes {
            let state = match (node.running, node.ready) {
                _ if node.unsettled => "unsettled",
                (false, _) => "down",
                (true, None) => "running",
                (true, Some(true)) => "Ready",
                (true, Some(false)) => "NotReady",
            };
            let address = match &node.second_address {
                Some(second) => format!("{} {second}", node.address),
                None => node.address.clone(),
            };
            write!(f, "  {:<13}  {address:<15} {state:<9}", node.name)?;
            for service in &node.services {
                let state = if service.pid.is_some() && node.running {
                    ""
                } else {
                    " down"
                };
                write!(f, " {}{state}", service.name)?;
                if service.restarts > 0 {
                    write!(f, " (restarts: {})", service.restarts)?;
                }
            }
            writeln!(f)?;
        }
        if self.nodes.iter().any(|node| node.unsettled) {
            let why = "a command that replaces a node is at work or was cut off";
            writeln!(f, "  unsettled: {why}; `keelway upgrade` goes on with it")?;
        }
        if let Some(connectivity) = &self.connectivity {
            write!(f, "  pods of other nodes:\n{connectivity}")?;
        }
        Ok(())
    }
}
