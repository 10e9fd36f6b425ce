//! `keelway certs rotate-ca`: another authority takes the place of the cluster's while the cluster runs, in the three steps that
//! Kubernetes has for it: all trust both, the new one signs, the old one is dropped. Each can be cut off anywhere, and done again.
//!
//! Where it stands, the files of the credentials say: there is a key that is to sign (`ca-next.key`) from the first step to the second, and
//! `ca.crt` has more than one authority from the first to the third. Everything else is made after them, and follows them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use k8s_openapi::api::core::v1::{ConfigMap, Endpoints, Namespace, Node};
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};

use super::balancer;
use super::discovery;
use super::leave::read_kubeconfig;
use super::run::claim;
use super::share::write;
use super::{MachineDir, MachineError, MachineState, Role, file, sync};
use crate::api::ClusterApi;
use crate::kubeconfig;
use crate::pki::Credential;
use crate::pki::succession::{has_key, is_signed, new_key, signing_first, successor};
use crate::progress::Progress;
use crate::state::StateDir;

const CERTIFICATES: &str = "ca.crt";
const KEY: &str = "ca.key";
const NEXT_KEY: &str = "ca-next.key";
/// Where namespaces have the authorities.
const ROOT_CA: &str = "kube-root-ca.crt";
/// By which authorities a kubelet goes (`kubelet/src/authorities.rs`).
const GOES_BY: &str = "keelway.io/authorities";
/// What the cluster's authority has signed for a control plane, as `certs` names it.
const SIGNED: [&str; 2] = ["apiserver", "apiserver-kubelet-client"];
const KUBECONFIGS: [&str; 2] = ["controllers", "scheduler"];
/// Clients in pods look at their authorities once a minute (kube-rs, client-go), and at once when they are new.
const CLIENTS_LOOK: Duration = Duration::from_secs(65);
/// How often it is asked who knows of the change.
const ASK_PERIOD: Duration = Duration::from_millis(500);

/// The steps, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Step {
    /// Make a new authority, which all trust beside the old one
    Trust,
    /// Let the new one sign: what the old one has signed is replaced
    Issue,
    /// Trust the old one no more
    Drop,
}

/// Where the files say that it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// One authority.
    One,
    /// A new one is trusted, or was about to be.
    Trusted,
    /// The new one signs, and the old one is trusted.
    Issuing,
}

struct Rotation {
    dir: MachineDir,
    known: MachineState,
    patience: Duration,
}

/// `keelway certs rotate-ca`: does a step; without one, says where it stands.
///
/// # Errors
/// Why the step cannot be done, or has not come to its end.
pub async fn run(
    step: Option<Step>,
    patience: Duration,
    state: &StateDir,
) -> Result<(), MachineError> {
    let (dir, known, _lock) = claim(state)?;
    if known.role != Role::ControlPlane {
        return refused("the authority's key is on the control plane: it is rotated there");
    }
    let rotation = Rotation {
        dir,
        known,
        patience,
    };
    let stage = rotation.stage()?;
    let Some(step) = step else {
        println!("{}", stage.says());
        return Ok(());
    };
    match (step, stage) {
        (Step::Trust, Stage::One | Stage::Trusted) => rotation.trust().await?,
        (Step::Trust, Stage::Issuing) => {
            return refused("the new authority signs already: `rotate-ca drop` is next");
        }
        (Step::Issue, Stage::One) => {
            return refused("there is one authority only: `rotate-ca trust` makes another");
        }
        (Step::Issue, stage) => rotation.issue(stage).await?,
        (Step::Drop, Stage::Trusted) => {
            return refused("the old authority still signs: `rotate-ca issue` is next");
        }
        (Step::Drop, _) => rotation.drop_old().await?,
    }
    println!("{}", rotation.stage()?.says());
    Ok(())
}

fn refused<T>(reason: &str) -> Result<T, MachineError> {
    Err(MachineError::Refused(reason.to_owned()))
}

impl Stage {
    fn says(self) -> &'static str {
        match self {
            Stage::One => {
                "One authority is trusted, and signs. `keelway certs rotate-ca trust` makes another."
            }
            Stage::Trusted => {
                "Two authorities are trusted, and the old one signs. Give people the kubeconfig anew, which trusts both, and restart pods that read their ca.crt only once; then \
                 `keelway certs rotate-ca issue` lets the new one sign."
            }
            Stage::Issuing => {
                "Two authorities are trusted, and the new one signs. Give people the new kubeconfig; then \
                 `keelway certs rotate-ca drop` ends the old one."
            }
        }
    }
}

impl Rotation {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.credentials().join(name)
    }

    fn read(&self, name: &str) -> Result<String, MachineError> {
        let path = self.path(name);
        fs::read_to_string(&path).map_err(file("read", &path))
    }

    fn stage(&self) -> Result<Stage, MachineError> {
        if self.path(NEXT_KEY).exists() {
            return Ok(Stage::Trusted);
        }
        let others = signing_first(&self.read(CERTIFICATES)?, &self.read(KEY)?)?;
        match others.len() {
            0 | 1 => Ok(Stage::One),
            _ => Ok(Stage::Issuing),
        }
    }

    async fn trust(&self) -> Result<(), MachineError> {
        self.check_alone().await?;
        let progress = Progress::default();
        let step = progress.step("another authority");
        if !self.path(NEXT_KEY).exists() {
            replace(&self.path(NEXT_KEY), &new_key()?)?;
        }
        let (next, key) = (self.read(NEXT_KEY)?, self.read(KEY)?);
        let certificate = self.read(CERTIFICATES)?;
        if !has_key(&certificate, &next)? {
            let before = Credential {
                certificate: certificate.clone(),
                key,
            };
            let new = successor(&self.known.cluster, &next, &before)?;
            replace(&self.path(CERTIFICATES), &(certificate + &new.concat()))?;
        }
        step.done();
        self.spread(&progress).await
    }

    async fn issue(&self, stage: Stage) -> Result<(), MachineError> {
        self.check_alone().await?;
        let progress = Progress::default();
        if stage == Stage::Trusted {
            let certificates = self.read(CERTIFICATES)?;
            if !has_key(&certificates, &self.read(NEXT_KEY)?)? {
                return refused("`rotate-ca trust` was cut off: it is to be done again");
            }
            self.spread(&progress).await?;
            let step = progress.step("clients in pods have looked at their authorities");
            tokio::time::sleep(CLIENTS_LOOK).await;
            step.done();
            // From here on the new one signs.
            let (from, to) = (self.path(NEXT_KEY), self.path(KEY));
            fs::rename(&from, &to).map_err(file("replace", &to))?;
            sync(&self.dir.credentials())?;
        }
        let step = progress.step("certificates of the control plane");
        let ordered = signing_first(&self.read(CERTIFICATES)?, &self.read(KEY)?)?;
        self.put_certificates(&ordered.concat())?;
        self.renew()?;
        step.done();
        self.spread(&progress).await
    }

    async fn drop_old(&self) -> Result<(), MachineError> {
        self.check_alone().await?;
        let progress = Progress::default();
        let certificates = self.read(CERTIFICATES)?;
        let ordered = signing_first(&certificates, &self.read(KEY)?)?;
        let signing = ordered.first().map(String::as_str).unwrap_or_default();
        for (name, leaf) in self.leaves()? {
            if !is_signed(&leaf, signing) {
                return refused(&format!(
                    "{name} is of the old authority: `rotate-ca issue` is to be done again"
                ));
            }
        }
        self.spread(&progress).await?;
        self.shown(signing, &progress).await?;
        self.put_certificates(signing)?;
        self.spread(&progress).await
    }

    /// Waits until the API server shows a certificate of this authority: from then on those are served who trust no other.
    async fn shown(&self, authority: &str, progress: &Progress) -> Result<(), MachineError> {
        let step = progress.step("the API server shows a certificate of the new authority");
        let mut admin = read_kubeconfig(&self.dir.kubeconfig())?;
        set_authorities(&mut admin, authority);
        let client = ClusterApi::new(&admin).await?.client();
        let until = Instant::now() + self.patience;
        while let Err(error) = client.apiserver_version().await {
            if Instant::now() > until {
                return Err(asking(error));
            }
            tokio::time::sleep(ASK_PERIOD).await;
        }
        step.done();
        Ok(())
    }

    fn put_certificates(&self, text: &str) -> Result<(), MachineError> {
        if self.read(CERTIFICATES)? == text {
            return Ok(());
        }
        replace(&self.path(CERTIFICATES), text)
    }

    fn kubeconfigs(&self) -> Vec<PathBuf> {
        let parts = KUBECONFIGS.map(|name| self.path(&format!("{name}.kubeconfig")));
        let all = parts.into_iter().chain([self.dir.kubeconfig()]);
        all.filter(|path| path.exists()).collect()
    }

    /// What the authority has signed for this control plane, by name.
    fn leaves(&self) -> Result<Vec<(String, String)>, MachineError> {
        let mut leaves = Vec::new();
        for name in SIGNED {
            let name = format!("{name}.crt");
            let leaf = self.read(&name)?;
            leaves.push((name, leaf));
        }
        for path in self.kubeconfigs() {
            let config = read_kubeconfig(&path)?;
            let data = config.pointer("/users/0/user/client-certificate-data");
            let data = data.and_then(Value::as_str).unwrap_or_default();
            let pem = BASE64_STANDARD.decode(data).unwrap_or_default();
            let pem = String::from_utf8_lossy(&pem).into_owned();
            leaves.push((path.display().to_string(), pem));
        }
        Ok(leaves)
    }

    /// Has the control plane's program sign anew what the authority of before has signed.
    fn renew(&self) -> Result<(), MachineError> {
        let own = std::env::current_exe().map_err(file("find", Path::new("/proc/self/exe")))?;
        let program = own.with_file_name("keelway-controlplane");
        let mut command = Command::new(&program);
        command.args(["certs", "renew", "--pki-dir"]);
        command.arg(self.dir.credentials());
        let mut names: Vec<&str> = SIGNED.into_iter().chain(KUBECONFIGS).collect();
        if self.dir.kubeconfig().exists() {
            command.arg("--kubeconfig").arg(self.dir.kubeconfig());
            names.push("admin");
        }
        let output = command.args(names).output();
        let output = output.map_err(file("run", &program))?;
        match output.status.success() {
            true => Ok(()),
            false => refused(String::from_utf8_lossy(&output.stderr).trim()),
        }
    }

    async fn api(&self) -> Result<ClusterApi, MachineError> {
        let admin = read_kubeconfig(&self.dir.kubeconfig())?;
        Ok(ClusterApi::new(&admin).await?)
    }

    /// The authority's key is in files of one machine: others would sign by the old one.
    async fn check_alone(&self) -> Result<(), MachineError> {
        let client = self.api().await?.client();
        let endpoints: Api<Endpoints> = Api::namespaced(client, "default");
        let endpoints = endpoints.get("kubernetes").await.map_err(asking)?;
        match balancer::addresses(&endpoints).len() {
            0 | 1 => Ok(()),
            _ => refused(
                "the cluster has several control planes, each with the authority's key: the authorities of such a cluster are not rotated by this command",
            ),
        }
    }

    /// Tells everybody of the authorities that there are, and waits until everybody knows.
    async fn spread(&self, progress: &Progress) -> Result<(), MachineError> {
        let authorities = self.read(CERTIFICATES)?;
        for path in self.kubeconfigs() {
            let mut config = read_kubeconfig(&path)?;
            if set_authorities(&mut config, &authorities) {
                replace(&path, &kubeconfig::to_yaml(&config))?;
            }
        }
        let client = self.api().await?.client();
        tell_those_that_join(&client, &authorities).await?;
        let step = progress.step("all namespaces and nodes know");
        let until = Instant::now() + self.patience;
        loop {
            let behind = behind(&client, &authorities).await;
            match behind {
                Ok(behind) if behind.is_empty() => break,
                Ok(behind) if Instant::now() > until => {
                    return refused(&format!(
                        "these do not know of the change yet: {}. The step is to be done again; a node that is gone for good is to be deleted first",
                        behind.join(", ")
                    ));
                }
                // The server may just have changed what it shows.
                Err(error) if Instant::now() > until => return Err(error),
                _ => tokio::time::sleep(ASK_PERIOD).await,
            }
        }
        step.done();
        Ok(())
    }
}

fn asking(error: kube::Error) -> MachineError {
    MachineError::Refused(format!("asking the cluster: {error}"))
}

/// False when the kubeconfig has just these.
fn set_authorities(config: &mut Value, authorities: &str) -> bool {
    let data = Value::from(BASE64_STANDARD.encode(authorities));
    let Some(cluster) = config.pointer_mut("/clusters/0/cluster") else {
        return false;
    };
    let is_new = cluster["certificate-authority-data"] != data;
    cluster["certificate-authority-data"] = data;
    is_new
}

/// Machines that join know the cluster by this. Tokens sign it anew; until then it has no signatures rather than wrong ones.
async fn tell_those_that_join(client: &Client, authorities: &str) -> Result<(), MachineError> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), discovery::NAMESPACE);
    let map = maps.get(discovery::NAME).await.map_err(asking)?;
    let mut data = map.data.unwrap_or_default();
    let text = data.remove(discovery::CONTENT).unwrap_or_default();
    let unreadable = |error: serde_saphyr::Error| {
        MachineError::Refused(format!("ConfigMap {}: {error}", discovery::NAME))
    };
    let mut config: Value = serde_saphyr::from_str(&text).map_err(unreadable)?;
    if !set_authorities(&mut config, authorities) {
        return Ok(());
    }
    let mut new = serde_json::Map::new();
    new.extend(data.into_keys().map(|signature| (signature, Value::Null)));
    let text = kubeconfig::to_yaml(&config);
    new.insert(discovery::CONTENT.to_owned(), text.into());
    let patch = Patch::Merge(json!({"data": new}));
    let patched = maps
        .patch(discovery::NAME, &PatchParams::default(), &patch)
        .await;
    patched.map(drop).map_err(asking)
}

/// Those that go by other authorities still.
async fn behind(client: &Client, authorities: &str) -> Result<Vec<String>, MachineError> {
    let all = ListParams::default();
    let named = all.clone().fields(&format!("metadata.name={ROOT_CA}"));
    let maps: Api<ConfigMap> = Api::all(client.clone());
    let maps = maps.list(&named).await.map_err(asking)?;
    let knows = |map: &ConfigMap| {
        let data = map.data.as_ref().and_then(|data| data.get(CERTIFICATES));
        data.is_some_and(|data| data == authorities)
    };
    let told: BTreeSet<String> = maps
        .items
        .into_iter()
        .filter(knows)
        .filter_map(|map| map.metadata.namespace)
        .collect();
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let namespaces = namespaces.list(&all).await.map_err(asking)?.items;
    let namespaces = namespaces.into_iter().map(|namespace| namespace.metadata);
    let mut behind: Vec<String> = namespaces
        .filter(|namespace| namespace.deletion_timestamp.is_none())
        .filter_map(|namespace| namespace.name)
        .filter(|name| !told.contains(name))
        .map(|name| format!("namespace {name}"))
        .collect();
    let digest = discovery::sha256(authorities.as_bytes());
    let nodes: Api<Node> = Api::all(client.clone());
    for node in nodes.list(&all).await.map_err(asking)?.items {
        let said = node.metadata.annotations.unwrap_or_default();
        if said.get(GOES_BY) != Some(&digest) {
            let name = node.metadata.name.unwrap_or_default();
            behind.push(format!("node {name}"));
        }
    }
    Ok(behind)
}

/// Replaces a file that only its owner may read, whole or not at all, on disk.
fn replace(path: &Path, text: &str) -> Result<(), MachineError> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    write(&new, text)?;
    sync(&new)?;
    fs::rename(&new, path).map_err(file("replace", path))?;
    path.parent().map_or(Ok(()), sync)
}
