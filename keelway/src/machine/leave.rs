//! `keelway leave`: drains this machine's node, takes it out of the cluster, and removes what it left on the machine.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{EvictParams, ListParams, Patch, PatchParams};
use kube::runtime::wait::{await_condition, conditions};
use kube::{Api, ResourceExt};
use serde_json::{Value, json};

use super::member::{self, Etcd};
use super::{MachineDir, MachineError, MachineState, Role, file, join, run, systemd};
use crate::api::ClusterApi;
use crate::checks::Machine;
use crate::etcd;
use crate::machine::spec::local_api;
use crate::progress::Progress;
use crate::state::StateDir;

/// How long a killed node may take to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// An eviction that a PodDisruptionBudget does not allow is tried again, as kubectl does.
const EVICTION_RETRY: Duration = Duration::from_secs(5);
const MIRROR: &str = "kubernetes.io/config.mirror";

/// The flags of `keelway leave`.
#[derive(Debug, Clone, clap::Args)]
pub struct LeaveFlags {
    /// Credentials of somebody who may drain and delete nodes [default: the administrator's, on a control plane]. Without any, the node
    /// drains itself, and its Node object stays
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Seconds that pods have to end
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    drain_timeout: u64,
    /// Go on when the cluster does not answer or pods do not end
    #[arg(long)]
    force: bool,
    /// Also when this machine is the only control plane, and the cluster's state with it
    #[arg(long)]
    delete_cluster: bool,
}

/// Takes this machine out of its cluster.
///
/// # Errors
/// Why it is still in it; trying again is safe.
pub async fn run(
    flags: &LeaveFlags,
    machine: &Machine,
    state: &StateDir,
) -> Result<(), MachineError> {
    let (dir, mut known, lock) = run::claim(state)?;
    let progress = Progress::default();
    let by_force = |told: Result<(), MachineError>| match told {
        Err(error) if flags.force => {
            eprintln!("{error}; going on");
            Ok(())
        }
        told => told,
    };
    let mut others = Vec::new();
    by_force(farewell(flags, &dir, &known, (&mut others, &progress)).await)?;
    by_force(part(flags, &dir, &known, (others, &progress)).await)?;
    // The cluster counts on it no more: what is left is of this machine, and goes whoever answers.
    (known.complete, known.etcd) = (false, None);
    dir.write(&known)?;
    systemd::remove().await?;
    let step = progress.step("node ended, and what it left removed");
    remove(&dir, machine)?;
    drop(lock);
    state.remove_if_empty();
    step.done();
    println!(
        "This machine is no node of cluster {} any more.",
        known.cluster
    );
    Ok(())
}

/// Takes this machine's member out of the cluster's etcd: what is left of it, once its files are gone, would count against the others.
async fn part(
    flags: &LeaveFlags,
    dir: &MachineDir,
    known: &MachineState,
    (others, progress): (Vec<IpAddr>, &Progress),
) -> Result<(), MachineError> {
    let Some(etcd) = known.etcd.as_ref().filter(|_| !flags.delete_cluster) else {
        return Ok(());
    };
    if !known.complete {
        return member::withdraw(dir, known).await;
    }
    let step = progress.step("member of etcd taken out");
    // It can take itself out, when nobody else is known.
    let own = known.addresses[0];
    let now = others.into_iter().chain([own]).map(etcd::client_url);
    let urls = now.chain(etcd.others.iter().cloned()).collect();
    Etcd::new(dir, urls).remove(own).await?;
    step.done();
    Ok(())
}

/// What the cluster is told, while it can be; gives where its other control planes are.
async fn farewell(
    flags: &LeaveFlags,
    dir: &MachineDir,
    known: &MachineState,
    (others, progress): (&mut Vec<IpAddr>, &Progress),
) -> Result<(), MachineError> {
    if !known.complete {
        return Ok(());
    }
    let admin = match &flags.kubeconfig {
        Some(path) => Some(read_kubeconfig(path)?),
        None if known.role == Role::ControlPlane => Some(read_kubeconfig(&dir.kubeconfig())?),
        None => None,
    };
    let can_delete = admin.is_some();
    let api = match admin {
        Some(admin) => ClusterApi::new(&admin).await?,
        None if !known.is_running() => {
            let reason = "this machine's node does not run, so it cannot drain itself; `keelway start` starts it, --kubeconfig \
                lets somebody else do it, --force goes on without";
            return Err(MachineError::Refused(reason.to_owned()));
        }
        None => join::own_api(dir, local_api(known.addresses[0]).to_string()).await?,
    };
    let all: Api<Node> = Api::all(api.client());
    if known.role == Role::ControlPlane && !flags.delete_cluster {
        let params = ListParams::default().labels(super::server::CONTROL_PLANE_LABEL);
        let found = all.list(&params).await.map_err(refused)?;
        let elsewhere = found.items.iter();
        let elsewhere: Vec<&Node> = elsewhere
            .filter(|node| node.name_any() != known.node)
            .collect();
        if elsewhere.is_empty() {
            let reason = format!(
                "this machine is the only control plane of cluster {}: with it goes the cluster's state; --delete-cluster says so",
                known.cluster
            );
            return Err(MachineError::Refused(reason));
        }
        others.extend(addresses(&elsewhere));
    }
    if known.role == Role::Worker || !flags.delete_cluster {
        let step = progress.step("pods moved elsewhere");
        let limit = Duration::from_secs(flags.drain_timeout);
        let drained = tokio::time::timeout(limit, drain(&api, &known.node)).await;
        drained.unwrap_or_else(|_| {
            let reason = format!("pods of this node have not ended within {limit:?}");
            Err(MachineError::Refused(reason))
        })?;
        step.done();
    }
    if can_delete {
        let gone = all.delete(&known.node, &Default::default()).await;
        match gone {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            other => drop(other.map_err(refused)?),
        }
    } else {
        println!(
            "The cluster still has the object of this node: kubectl delete node {}",
            known.node
        );
    }
    Ok(())
}

/// Where nodes are.
fn addresses(nodes: &[&Node]) -> impl Iterator<Item = IpAddr> {
    let statuses = nodes.iter().filter_map(|node| node.status.as_ref());
    let addresses = statuses.flat_map(|status| status.addresses.iter().flatten());
    let internal = addresses.filter(|address| address.type_ == "InternalIP");
    internal.filter_map(|address| address.address.parse().ok())
}

fn refused(error: kube::Error) -> MachineError {
    MachineError::Refused(format!("asking the cluster: {error}"))
}

pub(super) fn read_kubeconfig(path: &std::path::Path) -> Result<Value, MachineError> {
    let text = fs::read_to_string(path).map_err(file("read", path))?;
    serde_saphyr::from_str(&text)
        .map_err(|error| file("read", path)(io::Error::other(error.to_string())))
}

/// Lets no new pod come, and evicts those that are there: all but those that DaemonSets would make anew here, and the node's own.
async fn drain(api: &ClusterApi, node: &str) -> Result<(), MachineError> {
    let nodes: Api<Node> = Api::all(api.client());
    let cordon = Patch::Merge(json!({"spec": {"unschedulable": true}}));
    match nodes.patch(node, &PatchParams::default(), &cordon).await {
        // An earlier attempt came as far as that.
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
        patched => drop(patched.map_err(refused)?),
    }
    let pods: Api<Pod> = Api::all(api.client());
    let params = ListParams::default().fields(&format!("spec.nodeName={node}"));
    let found = pods.list(&params).await.map_err(refused)?;
    let leaving = found.items.into_iter().filter(moves);
    let evictions = leaving.map(|pod| {
        let namespace = pod.namespace().unwrap_or_default();
        let of: Api<Pod> = Api::namespaced(api.client(), &namespace);
        async move { evict(of, pod).await }
    });
    futures::future::try_join_all(evictions).await.map(drop)
}

/// Whether a pod has to be moved elsewhere.
fn moves(pod: &Pod) -> bool {
    let owners = pod.metadata.owner_references.iter().flatten();
    let of_daemon_set = owners
        .into_iter()
        .any(|owner| owner.kind == "DaemonSet" && owner.controller == Some(true));
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    let ended = matches!(phase, Some("Succeeded" | "Failed"));
    !of_daemon_set && !ended && !pod.annotations().contains_key(MIRROR)
}

async fn evict(pods: Api<Pod>, pod: Pod) -> Result<(), MachineError> {
    let (name, uid) = (pod.name_any(), pod.uid().unwrap_or_default());
    loop {
        match pods.evict(&name, &EvictParams::default()).await {
            Ok(_) => break,
            Err(kube::Error::Api(status)) if status.code == 404 => return Ok(()),
            // A PodDisruptionBudget says: not now.
            Err(kube::Error::Api(status)) if status.code == 429 => {
                tokio::time::sleep(EVICTION_RETRY).await;
            }
            Err(error) => return Err(refused(error)),
        }
    }
    let gone = await_condition(pods, &name, conditions::is_deleted(&uid)).await;
    gone.map(drop)
        .map_err(|error| MachineError::Refused(format!("waiting for pod {name} to end: {error}")))
}

/// Ends the node and removes all of it; the caller has the lock. Each step succeeds when there is nothing to do.
pub(super) fn remove(dir: &MachineDir, machine: &Machine) -> Result<(), MachineError> {
    let known = dir.read();
    let hierarchies = machine.hierarchies.for_the_machine();
    if let Some(known) = &known {
        if let Some(init) = known.init {
            init.kill_and_wait(PATIENCE)
                .map_err(file("end the node of", dir.path()))?;
        }
        hierarchies.kill(&known.node, PATIENCE)?;
        hierarchies.remove(&known.node, PATIENCE)?;
        clear_network(dir);
        for (path, value) in &known.settings_before {
            // One that somebody else has changed since is theirs only if it differs from what we set; all of ours are "1".
            if fs::read_to_string(path).is_ok_and(|now| now.trim() == "1") {
                fs::write(path, value).map_err(file("set", path))?;
            }
        }
    }
    machine.hierarchies.kill(&dir.0.name, PATIENCE)?;
    machine.hierarchies.remove(&dir.0.name, PATIENCE)?;
    dir.remove()
}

/// Takes the agent's interfaces, routes and rules off the machine; the agent of the same build lies beside this program.
fn clear_network(dir: &MachineDir) {
    let agent = std::env::current_exe().map(|own| own.with_file_name("keelway-agent"));
    let Ok(agent) = agent else { return };
    let none = dir.path().join("none");
    let outcome = Command::new(&agent)
        .args(["uninstall", "--with-pods"])
        .args(["--bin-dir".as_ref(), none.as_os_str()])
        .args(["--cni-conf-dir".as_ref(), none.as_os_str()])
        .args(["--pin-root".as_ref(), none.as_os_str()])
        .args(["--state-dir".as_ref(), none.as_os_str()])
        .args(["--socket".as_ref(), none.join("agent.sock").as_os_str()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .output();
    match outcome {
        Ok(output) if output.status.success() => {}
        Ok(output) => eprint!("{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => eprintln!(
            "{} cannot be run ({error}): interfaces that begin with keelway stay",
            agent.display()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(value: Value) -> Pod {
        serde_json::from_value(value).expect("a pod")
    }

    #[test]
    fn pods_of_daemon_sets_and_those_that_have_ended_stay() {
        let owner = |kind: &str| json!([{"apiVersion": "apps/v1", "kind": kind, "name": "x", "uid": "u", "controller": true}]);
        for (value, wanted) in [
            (json!({"metadata": {"name": "a"}}), true),
            (
                json!({"metadata": {"name": "a", "ownerReferences": owner("ReplicaSet")}}),
                true,
            ),
            (
                json!({"metadata": {"name": "a", "ownerReferences": owner("DaemonSet")}}),
                false,
            ),
            (
                json!({"metadata": {"name": "a"}, "status": {"phase": "Succeeded"}}),
                false,
            ),
            (
                json!({"metadata": {"name": "a", "annotations": {MIRROR: "x"}}}),
                false,
            ),
        ] {
            assert_eq!(moves(&pod(value.clone())), wanted, "{value}");
        }
    }
}
