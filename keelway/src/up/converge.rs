//! From started nodes to a cluster whose DNS answers.

use std::net::IpAddr;
use std::path::Path;

use ipnetwork::IpNetwork;

use super::{
    API, CLUSTER_DOMAIN, CONTROL_PLANE, FORWARDER, IMAGES, Plan, UpError, is_control_plane,
};
use crate::api::ClusterApi;
use crate::containerd;
use crate::deploy;
use crate::network::{self, PodRoute};
use crate::node::launch::Nodes;
use crate::seed::{self, Seed};
use crate::state::NodeState;

impl Plan<'_> {
    /// From started nodes to a cluster whose DNS answers.
    pub(super) async fn converge(&self, api: &ClusterApi, nodes: &Nodes) -> Result<(), UpError> {
        let workers: Vec<&NodeState> = self
            .state
            .nodes
            .iter()
            .filter(|node| !node.control_plane)
            .collect();
        let names: Vec<String> = workers.iter().map(|node| node.name.clone()).collect();
        let server = async {
            let step = self.progress.step("API server");
            api.ready().await;
            nodes.tell(API).await?;
            step.done();
            Ok::<_, UpError>(())
        };
        let runtimes = async {
            self.plant_images(&workers).await?;
            nodes.tell(IMAGES).await?;
            let step = self.progress.step("containerd on every node");
            nodes
                .wait(|board| {
                    names
                        .iter()
                        .all(|node| board.is_ready(node, "containerd"))
                        .then_some(())
                })
                .await?;
            step.done();
            Ok::<_, UpError>(())
        };
        let way_out = async {
            if !self.has_forwarder() {
                return Ok(());
            }
            let step = self.progress.step("forwarder to the outside");
            nodes
                .wait(|board| board.is_ready(CONTROL_PLANE, FORWARDER).then_some(()))
                .await?;
            step.done();
            Ok::<_, UpError>(())
        };
        tokio::try_join!(server, runtimes, way_out)?;

        let step = self.progress.step("agent and DNS deployed");
        for object in deploy::objects(&self.settings())? {
            api.create(&object).await?;
        }
        step.done();
        let ready = self.progress.step("nodes Ready");
        let agent = self.progress.step("agent ready on every node");
        let dns = self.progress.step("cluster DNS ready on every node");
        let nodes_ready = async {
            api.nodes_ready(&names).await?;
            self.route_pods(api).await?;
            ready.done();
            Ok::<_, UpError>(())
        };
        let agent_ready = async {
            api.daemon_set_ready("keelway-agent", self.config.nodes)
                .await;
            agent.done();
            Ok(())
        };
        let dns_ready = async {
            api.daemon_set_ready("keelway-dns", self.config.nodes).await;
            dns.done();
            Ok(())
        };
        tokio::try_join!(nodes_ready, agent_ready, dns_ready)?;
        Ok(())
    }

    /// Tells control planes' nodes where pods' IPv6 addresses are, once nodes have their ranges.
    async fn route_pods(&self, api: &ClusterApi) -> Result<(), UpError> {
        let nodes = &self.state.nodes;
        let control_planes = nodes.iter().filter(|node| is_control_plane(node));
        for init in control_planes.filter_map(|node| node.init) {
            route_pods(api, nodes, init.pid).await?;
        }
        Ok(())
    }

    /// Gives every worker's containerd, before it starts, all images.
    async fn plant_images(&self, workers: &[&NodeState]) -> Result<(), UpError> {
        let config = self.containerd_config();
        let source = seed::Source {
            archives: &self.config.archives,
            keelway: &self.config.binaries.keelway,
            machine: self.machine,
            cluster: &self.dir,
            snapshotter: self.snapshotter,
            containerd_config: &config,
        };
        let seed = match Seed::find(&source) {
            Some(seed) => seed,
            None => {
                let step = self.progress.step("images imported, once for this build");
                let seed = Seed::make(&source).await?;
                step.done();
                seed
            }
        };
        let step = self.progress.step("images on every node");
        for node in workers {
            seed.plant(&self.dir.node(&node.name).join("var/lib/containerd"))?;
        }
        step.done();
        Ok(())
    }

    pub(super) fn settings(&self) -> deploy::Settings {
        // The agent's pod has the machine's /sys/fs/cgroup at /host/cgroup.
        let v2 = self.machine.hierarchies.v2_mount();
        let beside_v1 = v2.strip_prefix("/sys/fs/cgroup").unwrap_or(Path::new(""));
        let cgroup = Path::new("/host/cgroup")
            .join(beside_v1)
            .join("keelway")
            .join(&self.state.name)
            .join("$(NODE_NAME)");
        let family = self.config.ip_family;
        let services = family.services();
        let mut agent_args: Vec<String> = services
            .iter()
            .map(|range| format!("--service-cidr={range}"))
            .collect();
        agent_args.extend(self.config.agent_args.iter().cloned());
        // With a way out the nodes have a name server, which the manifest's own arguments lead to.
        let upstreams = self.config.dns_upstreams.iter();
        let dns_args = upstreams
            .map(|server| format!("--upstream={server}"))
            .collect();
        deploy::Settings {
            api_server: self.api_server(),
            cgroup: cgroup.display().to_string(),
            cluster_dns: family.cluster_dns().to_string(),
            cluster_domain: CLUSTER_DOMAIN.into(),
            agent_args,
            dns_args,
            builds: containerd::digests(&self.config.archives),
        }
    }
}

/// Tells one control plane's node, by the number of its PID 1, where pods' IPv6 addresses are; nothing in a cluster without.
pub(super) async fn route_pods(
    api: &ClusterApi,
    nodes: &[NodeState],
    control_plane: u32,
) -> Result<(), UpError> {
    let v6 = |node: &NodeState| {
        let mut addresses = node.addresses().into_iter();
        addresses.find_map(|address| match address {
            IpAddr::V6(address) => Some(address),
            IpAddr::V4(_) => None,
        })
    };
    if !nodes.iter().any(|node| v6(node).is_some()) {
        return Ok(());
    }
    let ranges = api.pod_ranges().await?;
    let of_node = |node: &NodeState| {
        let range = ranges
            .get(&node.name)?
            .iter()
            .find_map(|range| match range {
                IpNetwork::V6(range) => Some(*range),
                IpNetwork::V4(_) => None,
            })?;
        Some(PodRoute {
            range,
            node: v6(node)?,
        })
    };
    let routes: Vec<PodRoute> = nodes.iter().filter_map(of_node).collect();
    tokio::task::spawn_blocking(move || network::route_pods(control_plane, &routes))
        .await
        .map_err(|_| UpError::Panicked)??;
    Ok(())
}
