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
use super::{EtcdState, MachineDir, MachineError, MachineState, file};
use crate::checks::{self, Machine};
use crate::etcd::{self, Arrival, Member, client_url, peer_url};
use crate::node::{NodeSpec, ServiceSpec};
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
    let pki = EtcdPki::new(
        cluster,
        &[(member.name.clone(), vec![member.address])],
        true,
    )?;
    write(dir, [etcd::CA, CA_KEY], &pki.ca)?;
    write(dir, etcd::CLIENT, &pki.client)?;
    for own in &pki.members {
        write(dir, etcd::MEMBER, own)?;
    }
    Ok(OwnMember {
        service: member.service(&[member.as_initial()], Arrival::Founder),
        store: etcd::own_store_flags(&[client_url(member.address)]),
    })
}

/// Makes this machine's member known to the etcd of `shared`, and its credentials.
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
    let etcd = Etcd::new(dir, share::urls(&shared.store));
    let own_peer = peer_url(member.address);
    let before = etcd.list().await?;
    let namesake = before
        .iter()
        .find(|known| known.name == member.name && !known.peer_urls.contains(&own_peer));
    if let Some(peer) = namesake.and_then(|known| known.peer_urls.first()) {
        return Err(MachineError::Refused(format!(
            "etcd has a member {} at {peer}: if it is this machine's of before, `keelway store member remove {peer}`, on a control plane, takes it out",
            member.name
        )));
    }
    let all = etcd.add(member).await?;
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
        store: etcd::own_store_flags(&urls),
    })
}

/// Gives the member of this machine a vote, if it has none yet. What is known of the machine is written down before, since the answer may be
/// lost, and after.
///
/// # Errors
/// What etcd says.
pub async fn promote(dir: &MachineDir, known: &mut MachineState) -> Result<(), MachineError> {
    let Some(etcd) = known.etcd.clone().filter(|etcd| !etcd.votes) else {
        return Ok(());
    };
    dir.write(known)?;
    let others = etcd.others.clone();
    Etcd::new(dir, others).promote(known.addresses[0]).await?;
    known.etcd = Some(EtcdState {
        votes: true,
        ..etcd
    });
    dir.write(known)
}

/// Takes a member of etcd back that has not come about: the others decide without it, but take no other one as long as it is expected.
///
/// # Errors
/// What etcd says, and what takes it out.
pub async fn withdraw(dir: &MachineDir, known: &MachineState) -> Result<(), MachineError> {
    let Some(etcd) = known.etcd.as_ref().filter(|etcd| !etcd.votes) else {
        return Ok(());
    };
    let own = known.addresses[0];
    let removed = Etcd::new(dir, etcd.others.clone()).remove(own).await;
    removed.map_err(|error| {
        let peer = peer_url(own);
        let advice = format!(
            "{error}; `keelway store member remove {peer}`, on a control plane, takes the member out that was to be here"
        );
        MachineError::Refused(advice)
    })
}

/// Takes the member out of a node's description, whose state is elsewhere now.
pub fn leave_out(spec: &mut NodeSpec) {
    spec.services
        .retain(|service| service.name != etcd::SERVICE);
    for service in &mut spec.services {
        let after = &mut service.after;
        after.retain(|name| name != etcd::SERVICE && name != VOTE);
    }
}

/// Removes what the member had: nobody is to be given a key to the authority of an etcd that is not used any more.
///
/// # Errors
/// When a file cannot be removed.
pub fn forget(dir: &MachineDir) -> Result<(), MachineError> {
    for name in [CA_KEY, etcd::MEMBER[0], etcd::MEMBER[1]] {
        let path = dir.credentials().join(name);
        if path.exists() {
            std::fs::remove_file(&path).map_err(file("remove", &path))?;
        }
    }
    Ok(())
}

/// The flags by which this machine's programs reach the etcd that it has a member of; None when it has none.
pub fn reached(dir: &MachineDir) -> Option<Vec<String>> {
    let known = dir.read()?;
    let own = client_url(known.addresses[0]);
    let others = [etcd::remembered(&dir.node()), known.etcd?.others].concat();
    let mut urls = vec![own];
    for url in others {
        if !urls.contains(&url) {
            urls.push(url);
        }
    }
    Some(Etcd::new(dir, urls).flags())
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

    async fn list(&self) -> Result<Vec<Shown>, MachineError> {
        self.shown(&["list"]).await
    }

    async fn add(&self, own: &Member) -> Result<Vec<Shown>, MachineError> {
        let words = ["add", &peer_url(own.address), "--name", &own.name];
        self.shown(&words).await
    }

    async fn shown(&self, words: &[&str]) -> Result<Vec<Shown>, MachineError> {
        let said = self.ask(&[words, &["--output", "json"]].concat()).await?;
        serde_json::from_str(&said)
            .map_err(|error| MachineError::Refused(format!("etcd's members: {error}")))
    }

    async fn promote(&self, own: IpAddr) -> Result<(), MachineError> {
        self.ask(&["promote", &peer_url(own)]).await.map(drop)
    }

    /// Takes the member of this machine out.
    ///
    /// # Errors
    /// What etcd says.
    pub async fn remove(&self, own: IpAddr) -> Result<(), MachineError> {
        self.ask(&["remove", &peer_url(own)]).await.map(drop)
    }

    fn flags(&self) -> Vec<String> {
        etcd::store_flags(&self.dir.credentials(), &self.urls)
    }

    async fn ask(&self, words: &[&str]) -> Result<String, MachineError> {
        let words = [&["member"], words].concat();
        let words = words.into_iter().map(str::to_owned).chain(self.flags());
        let said = controlplane(&words.collect::<Vec<_>>()).await;
        said.map_err(|reason| MachineError::Refused(format!("asking etcd: {reason}")))
    }
}

/// Asks the control plane's program, which knows its stores; gives what it says, or why it did not do it.
pub(super) async fn controlplane(words: &[String]) -> Result<String, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new(program.with_file_name("keelway-controlplane"))
        .arg("store")
        .args(words)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|error| error.to_string())?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        return Ok(said(&output.stdout));
    }
    Err(said(&output.stderr)
        .trim_start_matches("Error: ")
        .to_owned())
}
