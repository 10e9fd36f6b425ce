//! An API server of ours with a cluster in it, and a client of it; both live in the node's namespace.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use cluster_model::watch::kube::Client;
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use http::{Method, Request};
use keelway::kubeconfig;
use keelway::pki::{ClusterPki, Credential, Subjects};
use keelway_tests::sandbox::Network;
use serde_json::{Value, json};

use super::nodes;

/// How long the server may take to listen.
const PATIENCE: Duration = Duration::from_secs(60);
/// Requests on their way at any time while a cluster is made.
const AT_ONCE: usize = 64;
const ADDRESS: &str = "127.0.0.1:6443";
pub const NODE: &str = "node-1";
const NAMESPACE: &str = "bench";
const NODES: &str = "/api/v1/nodes";

/// A running API server. It ends with this value.
pub struct ApiServer {
    program: PathBuf,
    folder: tempfile::TempDir,
    node: Network,
    process: Child,
}

impl ApiServer {
    /// Starts it with an empty store.
    pub fn start(bin_dir: &Path, node: &Network) -> Result<Self> {
        let folder = tempfile::tempdir().context("a folder for the API server")?;
        write_credentials(folder.path())?;
        let program = bin_dir.join("keelway-controlplane");
        let process = launch(&program, folder.path(), node)?;
        Ok(Self {
            program,
            folder,
            node: node.try_clone()?,
            process,
        })
    }

    /// Ends it as `kill -9` does, and starts it over the same store.
    pub fn restart(&mut self) -> Result<()> {
        self.process.kill().context("ending the API server")?;
        self.process.wait()?;
        self.process = launch(&self.program, self.folder.path(), &self.node)?;
        Ok(())
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("admin.kubeconfig")
    }

    /// Does something with a client in the server's namespace.
    pub fn with_writer<T: Send>(
        &self,
        cluster: Cluster,
        work: impl AsyncFnOnce(Writer) -> Result<T> + Send,
    ) -> Result<T> {
        let kubeconfig = self.kubeconfig();
        self.node.run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async move {
                let writer = Writer::connect(kubeconfig, cluster).await?;
                work(writer).await
            })
        })
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn launch(program: &Path, folder: &Path, node: &Network) -> Result<Child> {
    let mut command = Command::new(program);
    command
        .args(["--components", "api", "--advertise-address", "127.0.0.1"])
        .args(["--bind", ADDRESS, "--service-cidr", super::SERVICE_RANGE])
        .arg("--data-dir")
        .arg(folder.join("data"))
        .arg("--pki-dir")
        .arg(folder)
        .env_remove("LISTEN_FDS")
        .env("RUST_LOG", "info")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = node
        .run(|| command.spawn())
        .with_context(|| format!("starting {}", program.display()))?;
    let log = child.stderr.take().context("its log")?;
    let (say, heard) = mpsc::channel();
    // Reads on to the end: a full pipe would stop the server.
    thread::spawn(move || {
        let mut last = String::new();
        for line in BufReader::new(log).lines().map_while(Result::ok) {
            if line.contains("the API server listens") {
                let _ = say.send(());
            }
            last = line;
        }
        last
    });
    heard
        .recv_timeout(PATIENCE)
        .context("the API server does not listen")?;
    Ok(child)
}

fn write_credentials(folder: &Path) -> Result<()> {
    let pki = ClusterPki::new(&Subjects {
        cluster: "bench",
        control_plane: vec![Ipv4Addr::LOCALHOST.into()],
        services: vec![Ipv4Addr::new(10, 96, 0, 1).into()],
        workers: Vec::new(),
        names: Vec::new(),
        renewed: false,
    })?;
    let write = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| path.display().to_string())
    };
    let pair = |name: &str, credential: &Credential| {
        write(&format!("{name}.crt"), &credential.certificate)?;
        write(&format!("{name}.key"), &credential.key)
    };
    pair("ca", &pki.ca)?;
    pair("apiserver", &pki.apiserver)?;
    pair("apiserver-kubelet-client", &pki.apiserver_kubelet_client)?;
    write("sa.key", &pki.service_accounts.0)?;
    write("sa.pub", &pki.service_accounts.1)?;
    for (name, credential) in [("admin", &pki.admin), ("controllers", &pki.controllers)] {
        let server = format!("https://{ADDRESS}");
        let config = kubeconfig::single(name, &server, &pki.ca.certificate, credential);
        // JSON is YAML.
        write(&format!("{name}.kubeconfig"), &config.to_string())?;
    }
    Ok(())
}

/// The cluster that a subject is to learn: so many Services, each with one port, and slices as Kubernetes' own controller makes them.
#[derive(Clone, Copy, Debug)]
pub struct Cluster {
    pub services: usize,
    pub endpoints: usize,
}

impl Cluster {
    /// Endpoints of one Service: all have as many, give or take one.
    fn endpoints_of(self, service: usize) -> std::ops::Range<usize> {
        let first = |service: usize| service * self.endpoints / self.services;
        first(service)..first(service + 1)
    }

    /// The same by slices.
    fn slices_of(self, service: usize) -> Vec<std::ops::Range<usize>> {
        let all = self.endpoints_of(service);
        let firsts = all.clone().step_by(SLICE_ENDPOINTS);
        firsts
            .map(|first| first..all.end.min(first + SLICE_ENDPOINTS))
            .collect()
    }
}

impl Cluster {
    /// The Service that a turn of the churn is about: a step that has no divisor in common with their number passes by all.
    fn churned(self, turn: u32, left_alone: usize) -> usize {
        let others = (self.services - 1).max(1);
        let index = turn as usize * 7919 % others;
        index + usize::from(self.services > 1 && index >= left_alone)
    }
}

/// Endpoints of a slice at most: what the controller makes by default.
const SLICE_ENDPOINTS: usize = 100;

/// A client that makes and changes the cluster.
pub struct Writer {
    client: Client,
    cluster: Cluster,
}

impl Writer {
    pub async fn connect(kubeconfig: PathBuf, cluster: Cluster) -> Result<Self> {
        let options = cluster_model::watch::ApiOptions {
            kubeconfig: Some(kubeconfig),
            api_server: None,
        };
        let client = cluster_model::watch::client(&options).await?;
        Ok(Self { client, cluster })
    }

    async fn send(&self, method: Method, path: &str, body: &Value) -> Result<()> {
        let is_patch = method == Method::PATCH;
        let content_type = if is_patch {
            "application/merge-patch+json"
        } else {
            "application/json"
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", content_type)
            .body(body.to_string().into_bytes())?;
        let answered = self.client.request_text(request).await;
        answered.map(drop).with_context(|| path.to_owned())
    }

    /// Makes the node and the namespace.
    pub async fn found(&self) -> Result<()> {
        let namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
        self.send(Method::POST, "/api/v1/namespaces", &namespace)
            .await?;
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE},
            "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]},
            "status": {"addresses": [{"type": "InternalIP", "address": super::NODE_ADDRESS}]},
        });
        self.add_node(&node).await
    }

    /// Makes Services and slices of the namespace that are described already.
    pub async fn add(&self, objects: Vec<Value>) -> Result<()> {
        stream::iter(objects.into_iter().map(Ok))
            .try_for_each_concurrent(AT_ONCE, |object| async move {
                let path = match object["kind"].as_str() {
                    Some("EndpointSlice") => slices(),
                    _ => services(),
                };
                self.send(Method::POST, &path, &object).await
            })
            .await
    }

    /// Makes the node, the namespace and the cluster.
    pub async fn make(&self, made: impl Fn()) -> Result<()> {
        self.found().await?;
        let (services, slices) = (services(), slices());
        stream::iter((0..self.cluster.services).map(Ok))
            .try_for_each_concurrent(AT_ONCE, |index| {
                let (services, slices, made) = (&services, &slices, &made);
                async move {
                    self.send(Method::POST, services, &service(index)).await?;
                    for (number, range) in self.cluster.slices_of(index).into_iter().enumerate() {
                        let slice = slice(index, number, range);
                        self.send(Method::POST, slices, &slice).await?;
                    }
                    made();
                    anyhow::Ok(())
                }
            })
            .await
    }

    /// Makes so many other nodes.
    pub async fn make_nodes(&self, count: usize, made: impl Fn()) -> Result<()> {
        stream::iter((0..count).map(Ok))
            .try_for_each_concurrent(AT_ONCE, |number| {
                let made = &made;
                async move {
                    self.add_node(&nodes::object(number)).await?;
                    made();
                    anyhow::Ok(())
                }
            })
            .await
    }

    pub async fn add_node(&self, node: &Value) -> Result<()> {
        self.send(Method::POST, NODES, node).await
    }

    pub async fn remove_node(&self, name: &str) -> Result<()> {
        let path = format!("{NODES}/{name}");
        self.send(Method::DELETE, &path, &json!({})).await
    }

    /// Changes the endpoints of a Service: another address for its first one with each turn.
    pub async fn change(&self, index: usize, turn: u32) -> Result<()> {
        let first = self.cluster.slices_of(index).into_iter().next();
        let mut endpoints = endpoints(first.unwrap_or_default());
        if let Some(first) = endpoints.first_mut() {
            *first = endpoint(Ipv4Addr::from_bits(
                u32::from_be_bytes([10, 200, 0, 0]) + turn,
            ));
        }
        let path = format!(
            "/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices/{}",
            slice_name(index, 0)
        );
        let patch = json!({"endpoints": endpoints});
        self.send(Method::PATCH, &path, &patch).await
    }

    /// So many changes per second of Services all over the cluster, for a while, each told when it is made. One Service is left
    /// alone, for whoever looks at it, unless there is no other.
    pub async fn churn(
        &self,
        per_second: u32,
        duration: Duration,
        left_alone: usize,
        made: impl Fn(),
    ) -> Result<()> {
        let mut pace = tokio::time::interval(Duration::from_secs(1) / per_second);
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
        let begun = tokio::time::Instant::now();
        let ticks = stream::unfold((pace, 0_u32), |(mut pace, turn)| async move {
            pace.tick().await;
            // Where changes take longer, there are fewer.
            (begun.elapsed() < duration).then_some((turn, (pace, turn + 1)))
        });
        ticks
            .map(Ok)
            .try_for_each_concurrent(AT_ONCE, |turn| {
                let made = &made;
                async move {
                    let index = self.cluster.churned(turn, left_alone);
                    self.change(index, 1000 + turn).await?;
                    made();
                    anyhow::Ok(())
                }
            })
            .await
    }
}

fn services() -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/services")
}

fn slices() -> String {
    format!("/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices")
}

/// The address of a Service.
pub fn service_address(index: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from_be_bytes([10, 96, 1, 0]) + index as u32)
}

fn service_name(index: usize) -> String {
    format!("service-{index}")
}

fn slice_name(index: usize, number: usize) -> String {
    format!("service-{index}-{number:05}")
}

fn service(index: usize) -> Value {
    let (name, address) = (service_name(index), service_address(index));
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"app": name}},
        "spec": {"type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "selector": {"app": name},
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}]},
    })
}

fn endpoint(address: Ipv4Addr) -> Value {
    json!({
        "addresses": [address], "conditions": {"ready": true, "serving": true, "terminating": false}, "nodeName": NODE,
        "targetRef": {"kind": "Pod", "name": format!("pod-{address}"), "namespace": NAMESPACE},
    })
}

fn endpoints(range: std::ops::Range<usize>) -> Vec<Value> {
    range
        .map(|number| {
            endpoint(Ipv4Addr::from_bits(
                u32::from_be_bytes([10, 128, 0, 0]) + number as u32,
            ))
        })
        .collect()
}

fn slice(index: usize, number: usize, range: std::ops::Range<usize>) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": slice_name(index, number), "namespace": NAMESPACE,
            "labels": {"kubernetes.io/service-name": service_name(index), "endpointslice.kubernetes.io/managed-by": "bench"}},
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints(range),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_endpoints_are_given_out_once() {
        let cluster = Cluster {
            services: 44_000,
            endpoints: 250_000,
        };
        let mut next = 0;
        for index in 0..cluster.services {
            let range = cluster.endpoints_of(index);
            assert_eq!(range.start, next);
            assert!((5..=6).contains(&range.len()), "{range:?}");
            next = range.end;
        }
        assert_eq!(next, cluster.endpoints);
    }

    #[test]
    fn the_churn_passes_by_all_services_but_one() {
        let churned = |services, turns| {
            let cluster = Cluster {
                services,
                endpoints: services,
            };
            let turns = 0..turns;
            let all: std::collections::BTreeSet<usize> = turns
                .map(|turn| cluster.churned(turn, services / 2))
                .collect();
            all.into_iter().collect::<Vec<_>>()
        };
        assert_eq!(churned(1, 3), [0]);
        assert_eq!(churned(2, 3), [0]);
        assert_eq!(churned(5, 4), [0, 1, 3, 4]);
        let all = churned(10_000, 9_999);
        assert_eq!(all.len(), 9_999);
        assert!(!all.contains(&5_000));
    }

    #[test]
    fn many_endpoints_are_in_slices_of_a_hundred() {
        let cluster = Cluster {
            services: 1,
            endpoints: 10_050,
        };
        let slices = cluster.slices_of(0);
        assert_eq!(slices.len(), 101);
        assert_eq!(slices.last(), Some(&(10_000..10_050)));
        let all: Vec<usize> = slices.into_iter().flatten().collect();
        assert!(all.into_iter().eq(0..10_050));
    }
}
