//! A node that is described is started, by `server`, `join` or again by `start`, and watched over while its command stays.

use std::fs;
use std::path::Path;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::api::{Patch, PatchParams};
use nix::sys::signal::Signal;

use super::moving::{self, Home};
use super::server::{CONTROL_PLANE_LABEL, FACTS, StoreFlags};
use super::spec::ClusterFacts;
use super::{MachineDir, MachineError, MachineState, Role, file, leave, member, share, systemd};
use crate::api::ClusterApi;
use crate::checks::{self, Machine};
use crate::node::NodeSpec;
use crate::node::launch::{LaunchError, Nodes};
use crate::process::STOP_PATIENCE;
use crate::state::{ClusterLock, StateDir};

/// What the kubelet waits for at the first start: that the API server knows the token that it comes with.
pub const API: &str = "api";

/// Locks this machine's folder, which has a node.
pub(super) fn claim(
    state: &StateDir,
) -> Result<(MachineDir, MachineState, ClusterLock), MachineError> {
    let dir = MachineDir::of(state);
    let lock = dir.0.lock()?.ok_or(MachineError::NoMember)?;
    let known = dir.known()?.ok_or(MachineError::NoMember)?;
    Ok((dir, known, lock))
}

/// Starts the node from its description, which is in a file too, and writes down its PID 1.
///
/// # Errors
/// What PID 1 says.
pub(super) async fn launch(
    dir: &MachineDir,
    (spec, path): (&NodeSpec, &Path),
    known: &mut MachineState,
    program: &Path,
) -> Result<Nodes, MachineError> {
    let machine = checks::machine().map_err(|error| MachineError::Refused(error.to_string()))?;
    let hierarchies = machine.hierarchies.for_the_machine();
    // A command that was killed may have left a node that is about to end.
    hierarchies.kill(&spec.cluster, STOP_PATIENCE)?;
    hierarchies.create(&spec.cluster, &spec.name)?;
    remember_settings(spec, known);
    dir.write(known)?;
    let mut nodes = Nodes::default();
    nodes.start(program, spec, path, None)?;
    let name = spec.name.as_str();
    let init = nodes.wait(|board| board.init(name)).await?;
    known.init = Some(init);
    dir.write(known)?;
    nodes
        .wait(|board| board.is_booted(name).then_some(()))
        .await?;
    Ok(nodes)
}

/// What the machine's network was set to before it became a node: `leave` gives that back.
fn remember_settings(spec: &NodeSpec, known: &mut MachineState) {
    for name in spec.net_sysctls.keys() {
        let path = Path::new("/proc/sys/net").join(name);
        let is_known = known
            .settings_before
            .iter()
            .any(|(known, _)| *known == path);
        if let (false, Ok(value)) = (is_known, fs::read_to_string(&path)) {
            let value = value.trim().to_owned();
            known.settings_before.push((path, value));
        }
    }
}

/// `keelway start`: starts a machine's node as it was described, after a reboot for example. On another store when one is named: `etcd`
/// moves the state there.
///
/// # Errors
/// When this machine is no node, or runs as one already.
pub async fn start(
    state: &StateDir,
    (machine, program): (&Machine, &Path),
    (stay, store): (bool, &StoreFlags),
) -> Result<(), MachineError> {
    let (dir, mut known, lock) = claim(state)?;
    if !known.complete {
        return Err(MachineError::NoMember);
    }
    let path = dir.spec();
    let text = fs::read(&path).map_err(file("read", &path))?;
    let mut spec: NodeSpec =
        serde_json::from_slice(&text).map_err(|error| file("read", &path)(error.into()))?;
    let moves = store.brings_members()?;
    match moving::home(&spec) {
        Some(Home::Embedded) if moves => {
            moving::check(&dir, &known, machine)?;
            let moved = moving::to_own_etcd(&dir, &mut known, spec, program).await;
            let nodes = moved.inspect_err(|_| {
                eprintln!("The state is whole: `keelway start` starts the node on it.");
            })?;
            nodes.tell(API).await?;
            nodes.tell(member::VOTE).await?;
            nodes.while_well(announce(&dir, &mut known)).await?;
            drop(lock);
            return hand_over(nodes, stay).await;
        }
        Some(Home::Own) if moves && known.is_running() => {
            println!("The state is in an etcd of its own already.");
            return announce(&dir, &mut known).await;
        }
        // A move that was cut off after it had come about.
        Some(Home::Own) if moves => {}
        Some(Home::Elsewhere) if moves => {
            let reason = "the state is in an etcd elsewhere, and stays there: it is the embedded store's that moves into an etcd of its own";
            return Err(MachineError::Refused(reason.to_owned()));
        }
        None if store.is_shared() => return Err(share::ShareError::NoControlPlane.into()),
        _ => {}
    }
    if known.is_running() {
        return Err(MachineError::Running(known.node));
    }
    moving::tidy(&dir, &mut known, &spec)?;
    if store.is_shared() && !moves {
        let (flags, files) = store.flags();
        moving::check_there(&store.named()).await?;
        share::change_store(&mut spec, &flags)?;
        member::leave_out(&mut spec);
        known.unannounced = true;
        dir.write(&known)?;
        let next = moving::describe(&dir, &spec)?;
        moving::bring(&dir, &files)?;
        moving::decide(&dir, &next)?;
        moving::tidy(&dir, &mut known, &spec)?;
    }
    let nodes = launch(&dir, (&spec, &path), &mut known, program).await?;
    nodes.tell(API).await?;
    // A join that was cut off may have left that to do.
    nodes.while_well(member::promote(&dir, &mut known)).await?;
    nodes.tell(member::VOTE).await?;
    if known.unannounced {
        nodes.while_well(announce(&dir, &mut known)).await?;
    }
    drop(lock);
    settle(nodes, stay).await
}

/// Lets the node go on as it did before it was moved.
async fn hand_over(nodes: Nodes, stay: bool) -> Result<(), MachineError> {
    if !stay && systemd::is_installed() {
        nodes.stop().await?;
        return Ok(systemd::resume().await?);
    }
    settle(nodes, stay).await
}

/// Tells the cluster what machines that would join, and those that would leave, are to know: that the state is where several control
/// planes reach it, and that this is one.
///
/// # Errors
/// What the cluster says.
pub(super) async fn announce(
    dir: &MachineDir,
    known: &mut MachineState,
) -> Result<(), MachineError> {
    if known.role == Role::ControlPlane {
        let admin = leave::read_kubeconfig(&dir.kubeconfig())?;
        let api = ClusterApi::new(&admin).await?;
        api.ready().await;
        tell_store(&api).await?;
        api.label_node(&known.node, CONTROL_PLANE_LABEL).await?;
    }
    known.unannounced = false;
    dir.write(known)
}

async fn tell_store(api: &ClusterApi) -> Result<(), MachineError> {
    let refused =
        |error: kube::Error| MachineError::Refused(format!("asking the cluster: {error}"));
    let maps: Api<ConfigMap> = Api::namespaced(api.client(), "kube-system");
    let map = maps.get(FACTS).await.map_err(refused)?;
    let text = map.data.and_then(|mut data| data.remove("cluster"));
    let facts = serde_json::from_str::<ClusterFacts>(&text.unwrap_or_default());
    let unreadable = |error| MachineError::Refused(format!("ConfigMap {FACTS}: {error}"));
    let mut facts = facts.map_err(unreadable)?;
    if facts.store == "etcd" {
        return Ok(());
    }
    facts.store = "etcd".to_owned();
    let text = serde_json::to_string_pretty(&facts).map_err(unreadable)?;
    let patch = Patch::Merge(serde_json::json!({"data": {"cluster": text}}));
    let patched = maps.patch(FACTS, &PatchParams::default(), &patch).await;
    patched.map(drop).map_err(refused)
}

/// `keelway stop`: ends this machine's node, which `start` starts again. Pods end with it.
///
/// # Errors
/// When this machine is no node.
pub fn stop(state: &StateDir) -> Result<(), MachineError> {
    let (dir, known, _lock) = claim(state)?;
    if let Some(init) = known.init {
        let ended = init.signal_and_wait(Signal::SIGTERM, STOP_PATIENCE);
        ended.map_err(file("end the node of", dir.path()))?;
    }
    Ok(())
}

/// Tells who started this command that the node runs (sd_notify(3)).
fn notify_ready() -> std::io::Result<()> {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return Ok(());
    };
    let channel = std::os::unix::net::UnixDatagram::unbound()?;
    channel.send_to(b"READY=1", path).map(drop)
}

/// Lets the node go on by itself, or stays with it until it or this command is ended.
///
/// # Errors
/// Why the node ended.
pub(super) async fn settle(nodes: Nodes, stay: bool) -> Result<(), MachineError> {
    if !stay {
        nodes.detach().await?;
        return Ok(());
    }
    // Not needed where nobody waits to be told.
    let _ = notify_ready();
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .map_err(|source| {
        MachineError::Launch(LaunchError::Start {
            node: "this machine".to_owned(),
            source,
        })
    })?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
        ended = nodes.wait::<std::convert::Infallible>(|_| None) => match ended {
            Ok(never) => match never {},
            Err(error) => return Err(error.into()),
        },
    }
    nodes.stop().await?;
    Ok(())
}
