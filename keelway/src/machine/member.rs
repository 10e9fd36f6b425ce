//! This machine's member of the etcd that keeps the cluster's state, where control planes bring their own (`--store etcd`): begun by
//! `server`, come to by `join --control-plane`, taken out by `leave`.
//!
//! One that comes has no vote until it has what the others have (etcd calls it a learner): until then, the others decide without it,
//! and an attempt that is cut off takes nothing from them.

use std::net::IpAddr;
use std::process::Stdio;

use serde::Deserialize;
use tokio::process::Command;

use super::share::{self, Shared};
use super::{MachineDir, MachineError};
use crate::checks::{self, Machine};
use crate::etcd::{self, Arrival, Member, client_url, peer_url};
use crate::node::ServiceSpec;
use crate::pki::{Credential, EtcdPki};

/// What a control plane waits for at its first start: that its member of etcd has a vote.
pub const VOTE: &str = "vote";
/// The key of etcd's authority, which signs the members that come.
pub const CA_KEY: &str = "etcd-ca.key";

/// A member as a service, and how the control plane beside it finds etcd.
#[derive(Debug, Clone)]
pub struct OwnMember {
    pub service: ServiceSpec,
    pub store: Vec<String>,
}

/// Whether this machine has etcd's program.
///
/// # Errors
/// When it does not.
pub fn check(machine: &Machine) -> Result<(), MachineError> {
    checks::etcd(machine).map_err(|error| MachineError::Refused(error.to_string()))
}

/// Makes an etcd's credentials, and its first member.
///
/// # Errors
/// When they cannot be made or written.
pub fn found(dir: &MachineDir, cluster: &str, member: &Member) -> Result<OwnMember, MachineError> {
    let pki = EtcdPki::new(cluster, &[(member.name.clone(), vec![member.address])])?;
    write(dir, [etcd::CA, CA_KEY], &pki.ca)?;
    write(dir, etcd::CLIENT, &pki.client)?;
    for own in &pki.members {
        write(dir, etcd::MEMBER, own)?;
    }
    Ok(OwnMember {
        service: member.service(&[member.as_initial()], Arrival::Founder),
        store: etcd::store_flags(&[client_url(member.address)]),
    })
}

/// Has the etcd of `shared` expect this machine's member, whose credentials are made; gives also what [`Etcd`] needs to reach the others.
///
/// # Errors
/// What etcd says.
pub async fn arrive(
    dir: &MachineDir,
    shared: &Shared,
    member: &Member,
) -> Result<OwnMember, MachineError> {
    let authority = Credential {
        certificate: shared.file(etcd::CA).to_owned(),
        key: shared.file(CA_KEY).to_owned(),
    };
    let own = EtcdPki::member(authority, &member.name, member.address)?;
    write(dir, etcd::MEMBER, &own)?;
    let all = Etcd::new(dir, share::urls(&shared.store))
        .add(member.address)
        .await?;
    let own_peer = peer_url(member.address);
    let (mut cluster, mut urls) = (Vec::new(), vec![client_url(member.address)]);
    for known in &all {
        let is_own = known.peer_urls.contains(&own_peer);
        let name = if is_own { &member.name } else { &known.name };
        cluster.extend(known.peer_urls.iter().map(|url| format!("{name}={url}")));
        if !is_own {
            urls.extend(known.client_urls.iter().cloned());
        }
    }
    Ok(OwnMember {
        service: member.service(&cluster, Arrival::Latecomer),
        store: etcd::store_flags(&urls),
    })
}

fn write(dir: &MachineDir, names: [&str; 2], made: &Credential) -> Result<(), MachineError> {
    let folder = dir.credentials();
    let texts = [&made.certificate, &made.key];
    let mut pairs = names.into_iter().zip(texts);
    pairs.try_for_each(|(name, text)| share::write(&folder.join(name), text))
}

/// A member as `keelway-controlplane store member` shows it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shown {
    name: String,
    peer_urls: Vec<String>,
    client_urls: Vec<String>,
}

/// An etcd that a member of this machine is or is to be part of, asked by the control plane's program, which knows how.
#[derive(Debug)]
pub struct Etcd<'a> {
    dir: &'a MachineDir,
    urls: Vec<String>,
}

impl<'a> Etcd<'a> {
    pub fn new(dir: &'a MachineDir, urls: Vec<String>) -> Self {
        Etcd { dir, urls }
    }

    async fn add(&self, own: IpAddr) -> Result<Vec<Shown>, MachineError> {
        let peer = peer_url(own);
        let said = self.ask(&["add", &peer, "--output", "json"]).await?;
        serde_json::from_str(&said)
            .map_err(|error| MachineError::Refused(format!("etcd's members: {error}")))
    }

    /// Gives the member of this machine a vote.
    ///
    /// # Errors
    /// What etcd says.
    pub async fn promote(&self, own: IpAddr) -> Result<(), MachineError> {
        self.ask(&["promote", &peer_url(own)]).await.map(drop)
    }

    /// Takes the member of this machine out.
    ///
    /// # Errors
    /// What etcd says.
    pub async fn remove(&self, own: IpAddr) -> Result<(), MachineError> {
        self.ask(&["remove", &peer_url(own)]).await.map(drop)
    }

    async fn ask(&self, words: &[&str]) -> Result<String, MachineError> {
        let refused = |reason: String| MachineError::Refused(format!("asking etcd: {reason}"));
        let own = std::env::current_exe().map_err(|error| refused(error.to_string()))?;
        let folder = self.dir.credentials();
        let [certificate, key] = etcd::CLIENT.map(|name| folder.join(name));
        let output = Command::new(own.with_file_name("keelway-controlplane"))
            .args(["store", "member"])
            .args(words)
            .args(["--store", &format!("etcd:{}", self.urls.join(","))])
            .arg("--etcd-cafile")
            .arg(folder.join(etcd::CA))
            .arg("--etcd-certfile")
            .arg(certificate)
            .arg("--etcd-keyfile")
            .arg(key)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(|error| refused(error.to_string()))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(refused(
            said.trim().trim_start_matches("Error: ").to_owned(),
        ))
    }
}
