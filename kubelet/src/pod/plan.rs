//! plan: from a pod, what the runtime holds of it and what the worker remembers, to the operations that come next.
//!
//! Pure: no clock, no runtime, no API. The worker executes what comes out, looks again, and plans again.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec, Probe};

use super::memory::{Memory, OpKey, next_backoff_s, restart_wait};
use super::{RestartPolicy, ended, ephemeral_containers, host_network, is_sidecar, spec_grace_s};
use crate::resources::container_limits;
use crate::runtime::{ContainerPhase, ContainerView, PodView, SandboxView};

mod outcome;

use outcome::deadline;
pub use outcome::{Outcome, outcome};

/// What a pod that is already gone from the API gets to end, in seconds (upstream's least grace period).
const GONE_GRACE_S: i64 = 2;
/// What a pod that uses too much of the disk gets to end, in seconds (upstream's figure).
const EVICTED_GRACE_S: i64 = 1;
/// Dead containers kept per name: the last one, and the one before it for `logs --previous`.
const DEAD_KEPT: usize = 2;

/// A Situation is everything a plan depends on.
#[derive(Debug, Clone, Copy)]
pub struct Situation<'a> {
    pub pod: &'a Pod,
    pub view: &'a PodView,
    pub memory: &'a Memory,
    pub now: Timestamp,
    /// Whether pods with a network of their own can be started.
    pub network_ready: bool,
    /// Whether the pod is gone from the API.
    pub removed: bool,
}

/// Why a container is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    PodEnding,
    SandboxGone,
    ImageChanged,
    Resized,
    LivenessFailed,
    StartupFailed,
}

/// An Op is one thing to do for a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    PrepareVolumes,
    RunSandbox {
        attempt: u32,
        stop_first: Vec<String>,
    },
    StopSandbox {
        id: String,
    },
    RemoveSandbox {
        id: String,
    },
    StartContainer {
        name: String,
        attempt: u32,
        sandbox_id: String,
        backoff_s: u64,
        /// The running container of whose process namespace it becomes part.
        target_id: Option<String>,
    },
    StopContainer {
        name: String,
        id: String,
        grace_s: i64,
        deadline: Timestamp,
        reason: StopReason,
    },
    /// Ends a container whose graceful stop is under way, sooner than that stop would.
    KillContainer {
        name: String,
        id: String,
        grace_s: i64,
        deadline: Timestamp,
    },
    RemoveContainer {
        id: String,
    },
    ResizeContainer {
        name: String,
        id: String,
        limits: String,
    },
    Clean,
}

impl Op {
    pub fn key(&self) -> OpKey {
        match self {
            Self::PrepareVolumes => OpKey::Volumes,
            Self::RunSandbox { .. } | Self::StopSandbox { .. } | Self::RemoveSandbox { .. } => {
                OpKey::Sandbox
            }
            Self::StartContainer { name, .. } => OpKey::Start(name.clone()),
            Self::StopContainer { id, .. } => OpKey::Stop(id.clone()),
            Self::KillContainer { id, .. } => OpKey::Kill(id.clone()),
            Self::RemoveContainer { id } => OpKey::Remove(id.clone()),
            Self::ResizeContainer { id, .. } => OpKey::Resize(id.clone()),
            Self::Clean => OpKey::Clean,
        }
    }
}

/// A Plan is what to start now, when to look again at the latest, and whether nothing is left to do for a deleted pod.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    pub ops: Vec<Op>,
    pub wake_at: Option<Timestamp>,
    pub finished: bool,
}

impl Plan {
    fn wake(&mut self, at: Timestamp) {
        self.wake_at = Some(self.wake_at.map_or(at, |known| known.min(at)));
    }
}

/// The sandbox that containers run in, if there is one that works.
pub fn current_sandbox(view: &PodView) -> Option<&SandboxView> {
    view.sandboxes.first().filter(|sandbox| sandbox.ready)
}

/// The latest known run of a container, also when the runtime has forgotten it.
pub fn seen<'a>(view: &'a PodView, memory: &'a Memory, name: &str) -> Option<&'a ContainerView> {
    let remembered = memory.last_seen.get(name);
    view.latest(name)
        .into_iter()
        .chain(remembered)
        .max_by_key(|c| (c.attempt, c.created_at_ns))
}

/// Whether a running container counts as started: its startup probe has passed, or its postStart hook has ended.
pub fn is_started(container: &Container, view: &ContainerView, memory: &Memory) -> bool {
    view.phase == ContainerPhase::Running
        && match container.startup_probe {
            Some(_) => memory
                .verdicts
                .get(&view.id)
                .is_some_and(|v| v.startup == Some(true)),
            None => !memory.post_start.contains(&view.id),
        }
}

/// What comes next for the pod.
pub fn plan(situation: &Situation<'_>) -> Plan {
    let mut plan = Plan::default();
    let Some(spec) = &situation.pod.spec else {
        return plan;
    };
    let over = outcome(
        situation.pod,
        situation.view,
        situation.memory,
        situation.now,
    )
    .is_some();
    if is_ending(situation.pod, situation.removed) || over {
        end(situation, spec, &mut plan);
    } else {
        if let Some(at) = deadline(situation.pod) {
            plan.wake(at);
        }
        run(situation, spec, &mut plan);
    }
    let Plan { ops, .. } =
        std::mem::take(&mut plan.ops)
            .into_iter()
            .fold(Plan::default(), |mut kept, op| {
                let key = op.key();
                if situation.memory.in_flight.contains(&key)
                    || kept.ops.iter().any(|other| other.key() == key)
                {
                    return kept;
                }
                match situation.memory.held_until(&key, situation.now) {
                    Some(at) => plan.wake(at),
                    None => kept.ops.push(op),
                }
                kept
            });
    plan.ops = ops;
    plan
}

/// Whether someone wants the pod to end.
pub fn is_ending(pod: &Pod, removed: bool) -> bool {
    removed || pod.metadata.deletion_timestamp.is_some() || ended(pod)
}

fn run(s: &Situation<'_>, spec: &PodSpec, plan: &mut Plan) {
    let fresh = s.memory.volumes_fresh.map(|fresh| fresh.end(s.now));
    if !s.memory.volumes_ready || s.memory.volumes_stale || fresh == Some(None) {
        plan.ops.push(Op::PrepareVolumes);
    } else if let Some(at) = fresh.flatten() {
        plan.wake(at);
    }
    let Some(sandbox) = current_sandbox(s.view) else {
        replace_sandbox(s, plan);
        return;
    };
    for name in spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers)
        .map(|c| &c.name)
    {
        let dead = s
            .view
            .containers
            .iter()
            .filter(|c| c.name == *name && c.phase != ContainerPhase::Running);
        plan.ops.extend(
            dead.skip(DEAD_KEPT)
                .map(|c| Op::RemoveContainer { id: c.id.clone() }),
        );
    }
    for old in s.view.sandboxes.iter().skip(1) {
        if !s.view.containers.iter().any(|c| c.sandbox_id == old.id) {
            plan.ops.push(Op::RemoveSandbox { id: old.id.clone() });
        }
    }
    if !s.memory.volumes_ready {
        return;
    }
    // Ephemeral containers may help to find out why the others do not start.
    for (container, target) in ephemeral_containers(spec) {
        start_once(s, &container, target, sandbox, plan);
    }
    if initialise(s, spec, sandbox, plan) {
        for container in &spec.containers {
            keep_running(s, container, RestartPolicy::of(spec), sandbox, plan);
        }
    }
}

fn replace_sandbox(s: &Situation<'_>, plan: &mut Plan) {
    let deadline = s.now + SignedDuration::from_secs(spec_grace_s(s.pod));
    let running: Vec<_> = s
        .view
        .containers
        .iter()
        .filter(|c| c.phase == ContainerPhase::Running)
        .collect();
    if !running.is_empty() {
        plan.ops.extend(
            running
                .into_iter()
                .map(|c| stop(s, c, deadline, StopReason::SandboxGone)),
        );
        return;
    }
    if s.network_ready || host_network(s.pod) {
        plan.ops.push(Op::RunSandbox {
            attempt: s.view.sandboxes.first().map_or(0, |old| old.attempt + 1),
            stop_first: s.view.sandboxes.iter().map(|old| old.id.clone()).collect(),
        });
    }
}

/// Runs init containers one after the other; true when main containers may run.
fn initialise(s: &Situation<'_>, spec: &PodSpec, sandbox: &SandboxView, plan: &mut Plan) -> bool {
    let main_started = spec
        .containers
        .iter()
        .any(|c| s.view.in_sandbox(&c.name, &sandbox.id).is_some());
    for container in spec.init_containers.iter().flatten() {
        let run = s.view.in_sandbox(&container.name, &sandbox.id);
        if is_sidecar(container) {
            keep_running(s, container, RestartPolicy::Always, sandbox, plan);
            if !main_started && !run.is_some_and(|run| is_started(container, run, s.memory)) {
                return false;
            }
        } else if !main_started
            && !run.is_some_and(|run| run.phase == ContainerPhase::Exited && run.exit_code == 0)
        {
            let policy = match RestartPolicy::of(spec) {
                // An init container that succeeds is never repeated, whatever the pod's policy.
                RestartPolicy::Always | RestartPolicy::OnFailure => RestartPolicy::OnFailure,
                RestartPolicy::Never => RestartPolicy::Never,
            };
            keep_running(s, container, policy, sandbox, plan);
            return false;
        }
    }
    true
}

fn keep_running(
    s: &Situation<'_>,
    container: &Container,
    policy: RestartPolicy,
    sandbox: &SandboxView,
    plan: &mut Plan,
) {
    let latest = seen(s.view, s.memory, &container.name);
    let start = |backoff_s| Op::StartContainer {
        name: container.name.clone(),
        attempt: latest.map_or(0, |c| c.attempt + 1),
        sandbox_id: sandbox.id.clone(),
        backoff_s,
        target_id: None,
    };
    let Some(run) = s.view.in_sandbox(&container.name, &sandbox.id) else {
        // A new sandbox does not punish its containers: nothing says that they failed.
        plan.ops.push(start(0));
        return;
    };
    match run.phase {
        ContainerPhase::Created
            if !s
                .memory
                .in_flight
                .contains(&OpKey::Start(container.name.clone())) =>
        {
            // Left behind by a kubelet that died between create and start.
            plan.ops.push(Op::RemoveContainer { id: run.id.clone() });
        }
        ContainerPhase::Created => {}
        ContainerPhase::Running => {
            let verdicts = s.memory.verdicts.get(&run.id).copied().unwrap_or_default();
            let image_changed =
                !run.spec_image.is_empty() && Some(&run.spec_image) != container.image.as_ref();
            let resized = resize(container, run, s.memory);
            let (reason, probe) = match verdicts {
                _ if image_changed => (StopReason::ImageChanged, None),
                _ if resized == Some(Resize::Restart) => (StopReason::Resized, None),
                v if v.startup_failed => {
                    (StopReason::StartupFailed, container.startup_probe.as_ref())
                }
                v if v.liveness_failed => (
                    StopReason::LivenessFailed,
                    container.liveness_probe.as_ref(),
                ),
                _ => {
                    if resized == Some(Resize::InPlace) {
                        plan.ops.push(Op::ResizeContainer {
                            name: run.name.clone(),
                            id: run.id.clone(),
                            limits: container_limits(container.resources.as_ref()).to_string(),
                        });
                    }
                    return;
                }
            };
            let grace = |p: &Probe| p.termination_grace_period_seconds;
            let grace_s = probe.and_then(grace).unwrap_or_else(|| spec_grace_s(s.pod));
            plan.ops.push(stop(
                s,
                run,
                s.now + SignedDuration::from_secs(grace_s),
                reason,
            ));
        }
        ContainerPhase::Exited if policy.restarts(run.exit_code) => {
            match restart_wait(run).end(s.now) {
                Some(at) => plan.wake(at),
                None => plan.ops.push(start(next_backoff_s(run))),
            }
        }
        ContainerPhase::Exited => {}
    }
}

/// Starts an ephemeral container, which nothing ever restarts. One that looks into another waits until that runs.
fn start_once(
    s: &Situation<'_>,
    container: &Container,
    target: Option<&str>,
    sandbox: &SandboxView,
    plan: &mut Plan,
) {
    if seen(s.view, s.memory, &container.name).is_some() {
        return;
    }
    let running = |name: &str| {
        let run = s.view.in_sandbox(name, &sandbox.id);
        run.filter(|run| run.phase == ContainerPhase::Running)
            .map(|run| run.id.clone())
    };
    let target_id = match target.filter(|name| !name.is_empty()) {
        Some(name) => match running(name) {
            Some(id) => Some(id),
            None => return,
        },
        None => None,
    };
    plan.ops.push(Op::StartContainer {
        name: container.name.clone(),
        attempt: 0,
        sandbox_id: sandbox.id.clone(),
        backoff_s: 0,
        target_id,
    });
}

/// How a running container comes to the resources that its spec names now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resize {
    InPlace,
    Restart,
}

/// What a container runs with, as `Limits` prints them; None when nothing is known of it.
pub fn limits_of<'a>(run: &'a ContainerView, memory: &'a Memory) -> Option<&'a str> {
    let made_with = Some(run.limits.as_str()).filter(|limits| !limits.is_empty());
    memory.limits.get(&run.id).map(String::as_str).or(made_with)
}

fn resize(container: &Container, run: &ContainerView, memory: &Memory) -> Option<Resize> {
    let present = limits_of(run, memory)?;
    let wanted = container_limits(container.resources.as_ref()).to_string();
    if present == wanted {
        return None;
    }
    // Shares and quota are the CPU's, the rest is memory.
    let parts = |limits: &str| {
        limits
            .rsplit_once('/')
            .map(|(cpu, memory)| [cpu.to_owned(), memory.to_owned()])
            .unwrap_or_default()
    };
    let (present, wanted) = (parts(present), parts(&wanted));
    let restarts = |resource: &str| {
        let mut policies = container.resize_policy.iter().flatten();
        policies.any(|p| p.resource_name == resource && p.restart_policy == "RestartContainer")
    };
    let restart = (present[0] != wanted[0] && restarts("cpu"))
        || (present[1] != wanted[1] && restarts("memory"));
    Some(if restart {
        Resize::Restart
    } else {
        Resize::InPlace
    })
}

fn stop(s: &Situation<'_>, run: &ContainerView, deadline: Timestamp, reason: StopReason) -> Op {
    let (name, id) = (run.name.clone(), run.id.clone());
    let left_ms = deadline.duration_since(s.now).as_millis().max(0);
    let grace_s = i64::try_from((left_ms + 999) / 1000).unwrap_or(i64::MAX);
    match s.memory.stop_deadlines.get(&id) {
        Some(under_way) if deadline + SignedDuration::from_secs(1) < *under_way => {
            Op::KillContainer {
                name,
                id,
                grace_s,
                deadline,
            }
        }
        _ => Op::StopContainer {
            name,
            id,
            grace_s,
            deadline,
            reason,
        },
    }
}

/// When a pod that is ending must be gone.
fn ending_deadline(s: &Situation<'_>) -> Timestamp {
    // Where the clock was set back it begins anew, rather than when the clock has caught up.
    let since = s.memory.ending_since.map_or(s.now, |at| at.min(s.now));
    let grace_s = if s.removed {
        // Whoever removed the object (a forced delete) does not wait for its containers.
        GONE_GRACE_S
    } else if s.memory.evicted.is_some() {
        EVICTED_GRACE_S
    } else {
        s.pod
            .metadata
            .deletion_grace_period_seconds
            .unwrap_or_else(|| spec_grace_s(s.pod))
    };
    let since = if s.removed { s.now } else { since };
    since + SignedDuration::from_secs(grace_s)
}

fn end(s: &Situation<'_>, spec: &PodSpec, plan: &mut Plan) {
    let deadline = ending_deadline(s);
    let alive = |c: &&ContainerView| c.phase == ContainerPhase::Running;
    let sidecars: Vec<&str> = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|c| is_sidecar(c))
        .map(|c| c.name.as_str())
        .collect();
    let is_main = |c: &&ContainerView| !sidecars.contains(&c.name.as_str());
    let mains: Vec<_> = s
        .view
        .containers
        .iter()
        .filter(alive)
        .filter(is_main)
        .collect();
    // Sidecars serve the others to the end, and end one by one in reverse order of their start.
    let last_sidecar = sidecars.iter().rev().find_map(|name| {
        s.view
            .containers
            .iter()
            .filter(alive)
            .find(|c| c.name == **name)
    });
    if !mains.is_empty() || last_sidecar.is_some() {
        let next = if mains.is_empty() {
            last_sidecar.into_iter().collect()
        } else {
            mains
        };
        plan.ops.extend(
            next.into_iter()
                .map(|c| stop(s, c, deadline, StopReason::PodEnding)),
        );
        return;
    }
    let busy = |key: &OpKey| matches!(key, OpKey::Start(_) | OpKey::Sandbox | OpKey::Volumes);
    if s.memory.in_flight.iter().any(busy) {
        return;
    }
    if let Some(sandbox) = s.view.sandboxes.iter().find(|sandbox| sandbox.ready) {
        plan.ops.push(Op::StopSandbox {
            id: sandbox.id.clone(),
        });
        return;
    }
    // A pod that ended by itself keeps its containers, for their logs and exit codes, until it is deleted.
    if !s.removed && s.pod.metadata.deletion_timestamp.is_none() {
        return;
    }
    if let Some(sandbox) = s.view.sandboxes.first() {
        plan.ops.push(Op::RemoveSandbox {
            id: sandbox.id.clone(),
        });
    } else if !s.view.containers.is_empty() {
        plan.ops.extend(
            s.view
                .containers
                .iter()
                .map(|c| Op::RemoveContainer { id: c.id.clone() }),
        );
    } else if !s.memory.cleaned {
        plan.ops.push(Op::Clean);
    } else {
        plan.finished = true;
    }
}

#[cfg(test)]
mod tests;
