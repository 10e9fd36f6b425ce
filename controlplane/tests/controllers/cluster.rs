//! A control plane as a process of its own, with credentials made for it, and nodes whose kubelet does no more than say that
//! pods run.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod, ServiceAccount};
use kube::api::{Api, DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Config};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::json;
use tempfile::TempDir;
use tokio::task::JoinSet;

/// How long anything may take before a test gives up on it.
const PATIENCE: Duration = Duration::from_secs(180);
/// Between attempts of what was not answered.
const RETRY: Duration = Duration::from_millis(200);

pub struct Cluster {
    pub client: Client,
    folder: TempDir,
    port: u16,
    components: &'static str,
    process: Option<Process>,
    nodes: JoinSet<()>,
}

/// A process that does not outlive its test: dropping it is kill -9.
pub struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Cluster {
    /// A control plane that answers, with nothing in it but what it makes itself.
    pub async fn start() -> Self {
        Self::start_with("api,controllers,scheduler").await
    }

    /// The same with some of the components only; the API server is one of them.
    pub async fn start_with(components: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // Free a moment ago; the server takes it at once.
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let kubeconfig = credentials(folder.path(), port);
        let kubeconfig = Kubeconfig::from_yaml(&kubeconfig).unwrap();
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .unwrap();
        let client = Client::try_from(config).unwrap();
        let mut cluster = Self {
            client,
            folder,
            port,
            components,
            process: None,
            nodes: JoinSet::new(),
        };
        cluster.launch().await;
        cluster
    }

    /// Starts the process and waits until it answers.
    pub async fn launch(&mut self) {
        self.process = Some(self.launch_more(self.components, "127.0.0.1"));
        let client = self.client.clone();
        self.eventually("the API server answers", async || {
            client.apiserver_version().await.is_ok()
        })
        .await;
    }

    /// One more process of the control plane.
    pub fn launch_more(&self, components: &str, advertised: &str) -> Process {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log())
            .unwrap();
        // It ends with the test's thread, however that ends.
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(env!("CARGO_BIN_EXE_keelway-controlplane"))
            .arg("--data-dir")
            .arg(self.folder.path().join("data"))
            .arg("--pki-dir")
            .arg(self.folder.path())
            .args(["--bind", &format!("127.0.0.1:{}", self.port)])
            .args([
                "--advertise-address",
                advertised,
                "--components",
                components,
            ])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Process(process)
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Waits until something holds; fails with the control plane's log if it never does.
    pub async fn eventually(&self, what: &str, mut holds: impl AsyncFnMut() -> bool) {
        let start = Instant::now();
        while !holds().await {
            if start.elapsed() > PATIENCE {
                let log = std::fs::read_to_string(self.log()).unwrap_or_default();
                let there = self.described().await;
                panic!("not within {} s: {what}\n{there}{log}", PATIENCE.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// What there is, for who reads why a test failed: pods by how far they have come, and what their owners believe.
    async fn described(&self) -> String {
        let all = ListParams::default();
        let mut lines = Vec::new();
        match Api::<Pod>::all(self.client.clone()).list(&all).await {
            Ok(pods) => {
                let mut counts: BTreeMap<String, (usize, String)> = BTreeMap::new();
                for pod in pods {
                    let node = pod.spec.and_then(|spec| spec.node_name);
                    let phase = pod.status.and_then(|status| status.phase);
                    let going = pod.metadata.deletion_timestamp.is_some();
                    let state = format!("on {node:?}, {phase:?}, going: {going}");
                    let (count, example) = counts.entry(state).or_default();
                    *count += 1;
                    *example = pod.metadata.name.unwrap_or_default();
                }
                for (state, (count, example)) in counts {
                    lines.push(format!("{count} pods {state}, such as {example}"));
                }
            }
            Err(error) => lines.push(format!("pods: {error}")),
        }
        match Api::<ReplicaSet>::all(self.client.clone()).list(&all).await {
            Ok(sets) => lines.extend(sets.into_iter().map(|set| {
                let (name, status) = (set.metadata.name.unwrap_or_default(), set.status);
                format!("set {name}: {}", json!(status))
            })),
            Err(error) => lines.push(format!("sets: {error}")),
        }
        lines.join("\n") + "\n"
    }

    /// Registers nodes with room for 500 pods each, and runs their pods.
    pub async fn add_nodes(&mut self, count: usize) {
        for index in 0..count {
            let name = format!("node-{index}");
            register(&self.client, &name).await;
            self.nodes.spawn(renew(self.client.clone(), name));
        }
        self.nodes.spawn(run_pods(self.client.clone()));
    }

    /// Waits until pods may be made, which need their namespace's account, and until every node takes them: a new one is
    /// tainted as not ready until a controller has seen that it is.
    pub async fn takes_pods(&self) {
        let accounts: Api<ServiceAccount> = self.api("default");
        self.eventually("the default account is there", async || {
            matches!(accounts.get_opt("default").await, Ok(Some(_)))
        })
        .await;
        let nodes: Api<Node> = Api::all(self.client.clone());
        self.eventually("no node is tainted", async || {
            let Ok(nodes) = nodes.list(&ListParams::default()).await else {
                return false;
            };
            let taints = |node: &Node| node.spec.as_ref().and_then(|spec| spec.taints.clone());
            nodes
                .items
                .iter()
                .all(|node| taints(node).unwrap_or_default().is_empty())
        })
        .await;
    }

    /// Name of the user that a token stands for, as the API server tells whoever asks with it.
    pub async fn user_of(&self, token: &str) -> Option<String> {
        let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}});
        let request = http::Request::post("/apis/authentication.k8s.io/v1/tokenreviews")
            .header("content-type", "application/json")
            .body(review.to_string().into_bytes())
            .unwrap();
        let answer: serde_json::Value = self.client.request(request).await.unwrap();
        let name = answer.pointer("/status/user/username")?.as_str()?;
        Some(name.to_string())
    }

    pub fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), namespace)
    }
}

async fn register(client: &Client, name: &str) {
    let nodes: Api<Node> = Api::all(client.clone());
    let node: Node = serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
    }))
    .unwrap();
    nodes.create(&PostParams::default(), &node).await.unwrap();
    let room = json!({"cpu": "64", "memory": "64Gi", "pods": "500"});
    let status = json!({"status": {
        "capacity": room, "allocatable": room,
        "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
    }});
    nodes
        .patch_status(name, &PatchParams::default(), &Patch::Merge(status))
        .await
        .unwrap();
}

async fn renew(client: Client, name: String) {
    let leases: Api<Lease> = Api::namespaced(client, "kube-node-lease");
    let lease = Lease {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            ..Default::default()
        },
        spec: None,
    };
    let _ = leases.create(&PostParams::default(), &lease).await;
    loop {
        let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime(jiff::Timestamp::now());
        let spec = json!({"spec": {"holderIdentity": name, "renewTime": now}});
        let _ = leases
            .patch(&name, &PatchParams::default(), &Patch::Merge(spec))
            .await;
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
}

/// Every bound pod runs and is ready at once, or ends at once if its command says so; every pod that is to go, goes.
async fn run_pods(client: Client) {
    let pods: Api<Pod> = Api::all(client.clone());
    let stream = watcher(pods, watcher::Config::default())
        .default_backoff()
        .applied_objects();
    let mut stream = std::pin::pin!(stream);
    let mut serial = 0u32;
    loop {
        let pod = match stream.try_next().await {
            Ok(Some(pod)) => pod,
            // It goes on by itself; what it said matters when a test fails.
            other => {
                eprintln!("the watch of all pods: {other:?}");
                continue;
            }
        };
        let spec = pod.spec.as_ref().unwrap();
        let phase = pod
            .status
            .as_ref()
            .and_then(|status| status.phase.as_deref())
            .unwrap_or("Pending");
        if spec.node_name.is_none() {
            continue;
        }
        let name = pod.metadata.name.clone().unwrap();
        let own: Api<Pod> =
            Api::namespaced(client.clone(), pod.metadata.namespace.as_deref().unwrap());
        if pod.metadata.deletion_timestamp.is_some() {
            tokio::spawn(end(own, name));
        } else if let ("Pending", Some(code)) = (phase, exit_code(&pod)) {
            let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::now());
            let status = json!({"status": {
                "phase": if code == 0 { "Succeeded" } else { "Failed" },
                "containerStatuses": [{
                    "name": "main", "image": "image", "imageID": "", "ready": false, "restartCount": 0,
                    "state": {"terminated": {"exitCode": code, "finishedAt": now}},
                }],
            }});
            tokio::spawn(report(own, name, status));
        } else if phase == "Pending" {
            serial += 1;
            let address = format!("10.244.{}.{}", serial / 250, serial % 250 + 1);
            let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(jiff::Timestamp::now());
            // Strategic: conditions of others stay.
            let status = json!({"status": {
                "phase": "Running", "podIP": address, "podIPs": [{"ip": address}],
                "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now}],
            }});
            tokio::spawn(report(own, name, status));
        }
    }
}

/// Says what has become of a pod until it is heard, or the pod is gone: a kubelet does not give up either.
async fn report(pods: Api<Pod>, name: String, status: serde_json::Value) {
    let (options, patch) = (PatchParams::default(), Patch::Strategic(status));
    while let Err(error) = pods.patch_status(&name, &options, &patch).await {
        if is_gone(&error) {
            return;
        }
        eprintln!("the status of pod {name}: {error}");
        tokio::time::sleep(RETRY).await;
    }
}

async fn end(pods: Api<Pod>, name: String) {
    let at_once = DeleteParams::default().grace_period(0);
    while let Err(error) = pods.delete(&name, &at_once).await {
        if is_gone(&error) {
            return;
        }
        eprintln!("the end of pod {name}: {error}");
        tokio::time::sleep(RETRY).await;
    }
}

fn is_gone(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// What the pod's container ends with at once: its command is `exit N`.
fn exit_code(pod: &Pod) -> Option<i32> {
    let command = pod.spec.as_ref()?.containers.first()?.command.as_ref()?;
    match command.as_slice() {
        [exit, code] if exit == "exit" => code.parse().ok(),
        _ => None,
    }
}

/// Writes what the control plane needs into the folder; gives an administrator's kubeconfig.
fn credentials(folder: &Path, port: u16) -> String {
    let write = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
    let ca_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, "test-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca = params.self_signed(&ca_key).unwrap().pem();
    write("ca.crt", &ca);
    write("ca.key", &ca_key.serialize_pem());
    let issuer = Issuer::new(params, ca_key);
    let sign = |subject: &str, group: Option<&str>, usage| -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        if let Some(group) = group {
            params
                .distinguished_name
                .push(DnType::OrganizationName, group);
        }
        params.distinguished_name.push(DnType::CommonName, subject);
        params.subject_alt_names = vec![SanType::IpAddress("127.0.0.1".parse().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        (
            params.signed_by(&key, &issuer).unwrap().pem(),
            key.serialize_pem(),
        )
    };
    for (name, usage) in [
        ("apiserver", ExtendedKeyUsagePurpose::ServerAuth),
        (
            "apiserver-kubelet-client",
            ExtendedKeyUsagePurpose::ClientAuth,
        ),
    ] {
        let (certificate, key) = sign(name, None, usage);
        write(&format!("{name}.crt"), &certificate);
        write(&format!("{name}.key"), &key);
    }
    let accounts = KeyPair::generate().unwrap();
    write("sa.key", &accounts.serialize_pem());
    write("sa.pub", &accounts.public_key_pem());
    let kubeconfig = |subject: &str, group: Option<&str>| -> String {
        use base64::Engine;
        let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
        let (certificate, key) = sign(subject, group, ExtendedKeyUsagePurpose::ClientAuth);
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {
                "server": format!("https://127.0.0.1:{port}"), "certificate-authority-data": encode(&ca),
            }}],
            "users": [{"name": "test", "user": {
                "client-certificate-data": encode(&certificate), "client-key-data": encode(&key),
            }}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        })
        .to_string()
    };
    write(
        "controllers.kubeconfig",
        &kubeconfig("system:keelway-controllers", None),
    );
    write(
        "scheduler.kubeconfig",
        &kubeconfig("system:kube-scheduler", None),
    );
    kubeconfig("admin", Some("system:masters"))
}
