//! `keelway start --store etcd`: the state of this machine's control plane moves out of the embedded store into an etcd that it begins,
//! so that others can join it.
//!
//! Or, by `--store etcd:URL`, the node is to find its state in an etcd elsewhere, which has it by then.
//!
//! One rename decides: until the node's new description is in the place of the old one, the state is the embedded store's, which is only
//! read; from then on it is etcd's. What an attempt that was cut off has left before that goes with the next start.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::member::{self, CA_KEY, OwnMember, VOTE};
use super::run;
use super::share;
use super::{EtcdState, MachineDir, MachineError, MachineState, file, sync, systemd};
use crate::checks::Machine;
use crate::etcd::{self, Member, client_url};
use crate::node::NodeSpec;
use crate::node::launch::Nodes;
use crate::process::STOP_PATIENCE;
use crate::progress::Progress;

/// The description of the node as it is to be.
const NEXT: &str = "node.next.json";
/// What ends the name of a credential that comes with that description, beside the one that it is to replace.
const BESIDE: &str = ".next";
/// The credentials by which an etcd is reached, its own or one elsewhere.
const REACHED_BY: [&str; 3] = [etcd::CA, etcd::CLIENT[0], etcd::CLIENT[1]];
/// The folders of both states, in the node's own.
const EMBEDDED: &str = "var/lib/keelway/controlplane";
const ETCD: &str = "var/lib/etcd";
/// How long a new etcd of one member may take.
const ETCD_PATIENCE: Duration = Duration::from_secs(60);

/// Where the state of a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Home {
    Embedded,
    /// An etcd that this machine has a member of.
    Own,
    /// An etcd elsewhere.
    Elsewhere,
}

/// Where a node's description says that its state is; None when it is no control plane.
pub(super) fn home(spec: &NodeSpec) -> Option<Home> {
    let flags = share::store_flags(spec)?;
    let own = |service: &crate::node::ServiceSpec| service.name == etcd::SERVICE;
    Some(if share::kind_of_store(&flags) == "embedded" {
        Home::Embedded
    } else if spec.services.iter().any(own) {
        Home::Own
    } else {
        Home::Elsewhere
    })
}

/// Brings what is written down of a machine, and the credentials that it has, into line with its description, after a move.
///
/// # Errors
/// When what is left of it cannot be removed.
pub(super) fn tidy(
    dir: &MachineDir,
    known: &mut MachineState,
    spec: &NodeSpec,
) -> Result<(), MachineError> {
    settle(dir)?;
    match home(spec) {
        // It came as far as the rename.
        Some(Home::Own) if known.moving => {
            known.etcd = Some(alone());
            known.moving = false;
        }
        // It did not.
        Some(Home::Embedded) if known.unannounced => {
            if known.moving {
                clear(dir)?;
            }
            (known.unannounced, known.moving) = (false, false);
        }
        Some(Home::Elsewhere) if known.etcd.is_some() => {
            member::forget(dir)?;
            known.etcd = None;
        }
        _ => return Ok(()),
    }
    dir.write(known)
}

/// A member that began its etcd.
fn alone() -> EtcdState {
    EtcdState {
        others: Vec::new(),
        votes: true,
    }
}

/// Removes an etcd that nobody uses yet.
fn clear(dir: &MachineDir) -> Result<(), MachineError> {
    let data = dir.node().join(ETCD);
    if data.exists() {
        fs::remove_dir_all(&data).map_err(file("remove", &data))?;
    }
    let credentials = [CA_KEY].into_iter();
    let credentials = credentials.chain(REACHED_BY).chain(etcd::MEMBER);
    let files = credentials.map(|name| dir.credentials().join(name));
    let files = REACHED_BY
        .map(|name| beside(dir, name))
        .into_iter()
        .chain(files);
    for path in files.chain([dir.node().join(NEXT)]) {
        if path.exists() {
            fs::remove_file(&path).map_err(file("remove", &path))?;
        }
    }
    Ok(())
}

fn beside(dir: &MachineDir, credential: &str) -> PathBuf {
    dir.credentials().join(format!("{credential}{BESIDE}"))
}

/// Keeps the credentials of an etcd elsewhere beside those that they replace once the node is described as it is to be.
///
/// # Errors
/// When one cannot be read or written.
pub(super) fn bring(dir: &MachineDir, files: &[(&Path, &'static str)]) -> Result<(), MachineError> {
    for (from, name) in files {
        let text = fs::read_to_string(from).map_err(file("read", from))?;
        let path = beside(dir, name);
        share::write(&path, &text)?;
        sync(&path)?;
    }
    Ok(())
}

/// Puts the credentials in their place that came with the description that the node has, and removes those of one that it has not got: it
/// lies there as long as nothing is decided.
fn settle(dir: &MachineDir) -> Result<(), MachineError> {
    let next = dir.node().join(NEXT);
    let is_decided = !next.exists();
    for name in REACHED_BY {
        let (given, path) = (beside(dir, name), dir.credentials().join(name));
        if !given.exists() {
            continue;
        }
        if is_decided {
            fs::rename(&given, &path).map_err(file("replace", &path))?;
        } else {
            fs::remove_file(&given).map_err(file("remove", &given))?;
        }
    }
    if !is_decided {
        fs::remove_file(&next).map_err(file("remove", &next))?;
    }
    Ok(())
}

/// Whether there can be an etcd on this machine.
///
/// # Errors
/// When its program is missing, or there is one already, which nobody here has begun.
pub(super) fn check(
    dir: &MachineDir,
    known: &MachineState,
    machine: &Machine,
) -> Result<(), MachineError> {
    member::check(machine)?;
    let data = dir.node().join(ETCD);
    if data.exists() && !known.moving {
        let reason = format!(
            "{} holds an etcd that is not this cluster's state: move it away, or remove it",
            data.display()
        );
        return Err(MachineError::Refused(reason));
    }
    Ok(())
}

/// Moves the state, and starts the node on it; a node that runs is stopped before. The caller has the lock.
///
/// # Errors
/// Why the state is where it was; trying again is safe.
pub(super) async fn to_own_etcd(
    dir: &MachineDir,
    known: &mut MachineState,
    mut spec: NodeSpec,
    program: &Path,
) -> Result<Nodes, MachineError> {
    let progress = Progress::default();
    if let Some(init) = known.init.filter(|_| known.is_running()) {
        let step = progress.step("node stopped");
        systemd::pause().await?;
        let ended = init.signal_and_wait(Signal::SIGTERM, STOP_PATIENCE);
        ended.map_err(file("end the node of", dir.path()))?;
        step.done();
    }
    (known.unannounced, known.moving) = (true, true);
    dir.write(known)?;
    clear(dir)?;
    let step = progress.step("an etcd of its own");
    let own = Member {
        name: known.node.clone(),
        address: known.addresses[0],
    };
    let OwnMember { service, store } = member::found(dir, &known.cluster, &own)?;
    share::change_store(&mut spec, &store)?;
    for controlplane in &mut spec.services {
        if controlplane.name == "controlplane" {
            controlplane.after = vec![etcd::SERVICE.to_owned(), VOTE.to_owned()];
        }
    }
    spec.services.push(service);
    let next = describe(dir, &spec)?;
    let nodes = run::launch(dir, (&spec, &next), known, program).await?;
    let serves = nodes.wait(|board| board.is_ready(&spec.name, etcd::SERVICE).then_some(()));
    match tokio::time::timeout(ETCD_PATIENCE, serves).await {
        Ok(serves) => serves?,
        Err(_) => {
            let reason = format!("etcd does not serve within {ETCD_PATIENCE:?}");
            return Err(MachineError::Refused(reason));
        }
    }
    step.done();
    let step = progress.step("state moved");
    let said = nodes.while_well(copy(dir, &own)).await?;
    decide(dir, &next)?;
    step.done();
    tidy(dir, known, &spec)?;
    println!(
        "{said}. It is in etcd now; as it was, with its Secrets, it is still in {}.",
        dir.node().join(EMBEDDED).display()
    );
    Ok(nodes)
}

/// Whether the cluster's state is in the etcd that the flags name: on an empty one, a control plane would begin another cluster.
///
/// # Errors
/// What is missing there.
pub(super) async fn check_there(flags: &[String]) -> Result<(), MachineError> {
    let words = [&["show".to_owned()], flags].concat();
    let shown = member::controlplane(&words).await;
    shown.map(drop).map_err(|reason| {
        let advice = "`keelway store migrate` brings the state there, from where it is";
        MachineError::Refused(format!("the etcd that was named: {reason}; {advice}"))
    })
}

/// Copies the state, which nobody changes meanwhile: the control plane waits.
async fn copy(dir: &MachineDir, own: &Member) -> Result<String, MachineError> {
    let from = format!("embedded:{}", dir.node().join(EMBEDDED).display());
    let to = etcd::store_flags(&dir.credentials(), &[client_url(own.address)]);
    let to = to.into_iter().map(|word| match word.as_str() {
        "--store" => "--to".to_owned(),
        _ => word,
    });
    let words = ["migrate".to_owned(), "--from".to_owned(), from];
    let copied = member::controlplane(&words.into_iter().chain(to).collect::<Vec<_>>()).await;
    copied.map_err(|reason| MachineError::Refused(format!("moving the state: {reason}")))
}

/// Writes what the node is to be beside what it is.
///
/// # Errors
/// When it cannot be written.
pub(super) fn describe(dir: &MachineDir, spec: &NodeSpec) -> Result<PathBuf, MachineError> {
    let next = dir.node().join(NEXT);
    let text = serde_json::to_vec_pretty(spec);
    let text = text.map_err(|error| file("write", &next)(error.into()))?;
    fs::write(&next, text).map_err(file("write", &next))?;
    sync(&next)?;
    sync(&dir.node())?;
    Ok(next)
}

/// Puts a description of the node in the place of the one that it has, on disk.
///
/// # Errors
/// When it cannot be put there.
pub(super) fn decide(dir: &MachineDir, next: &Path) -> Result<(), MachineError> {
    let path = dir.spec();
    fs::rename(next, &path).map_err(file("replace", &path))?;
    sync(&dir.node())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::StateDir;

    /// A machine whose etcd is its own, with a description and credentials of one elsewhere beside, as `start` has brought them.
    fn moving(folder: &Path) -> MachineDir {
        let dir = MachineDir::of(&StateDir::at(folder));
        fs::create_dir_all(dir.credentials()).expect("a folder");
        fs::write(dir.spec(), "ours").expect("written");
        fs::write(dir.node().join(NEXT), "theirs").expect("written");
        let theirs = folder.join("theirs");
        fs::write(&theirs, "theirs").expect("written");
        for name in REACHED_BY {
            fs::write(dir.credentials().join(name), "ours").expect("written");
        }
        bring(&dir, &REACHED_BY.map(|name| (theirs.as_path(), name))).expect("brought");
        dir
    }

    /// What the credentials are that lie there; nothing but those that belong there may.
    fn credentials(dir: &MachineDir) -> Vec<String> {
        let folder = fs::read_dir(dir.credentials()).expect("a folder");
        assert_eq!(folder.count(), REACHED_BY.len());
        let read = |name| fs::read_to_string(dir.credentials().join(name)).expect("there");
        REACHED_BY.map(read).into()
    }

    #[test]
    fn credentials_of_another_etcd_take_their_place_with_the_description_and_not_before() {
        for cut in 0..REACHED_BY.len() {
            let folder = tempfile::tempdir().expect("a folder");
            // Cut off before it was decided, in the middle of what was brought.
            let dir = moving(folder.path());
            for name in &REACHED_BY[cut..] {
                fs::remove_file(beside(&dir, name)).expect("there");
            }
            settle(&dir).expect("settled");
            assert_eq!(credentials(&dir), ["ours"; 3], "{cut}");
            assert_eq!(fs::read_to_string(dir.spec()).expect("there"), "ours");
            assert!(!dir.node().join(NEXT).exists());

            // Cut off after that, in the middle of what takes its place.
            let dir = moving(folder.path());
            decide(&dir, &dir.node().join(NEXT)).expect("decided");
            for name in &REACHED_BY[..cut] {
                fs::rename(beside(&dir, name), dir.credentials().join(name)).expect("renamed");
            }
            settle(&dir).expect("settled");
            assert_eq!(credentials(&dir), ["theirs"; 3], "{cut}");
            settle(&dir).expect("settled");
            assert_eq!(fs::read_to_string(dir.spec()).expect("there"), "theirs");
        }
    }
}
