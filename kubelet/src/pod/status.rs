//! status: what the API is told about a pod. Pure: the same pod, view and memory always give the same status.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated,
    ContainerStateWaiting, ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodSpec, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::admission::refusal;
use super::memory::{Memory, OpKey, at_ns, restart_wait};
use super::plan::{Outcome, current_sandbox, is_ending, is_started, limits_of, outcome, seen};
use super::storage::EVICTED;
use super::{RestartPolicy, all_containers, ephemeral_containers, host_network, is_sidecar};
use crate::resources::{container_limits, qos_class};
use crate::runtime::{ContainerPhase, ContainerView, PodView};

/// The condition of a pod whose containers are on their way to other resources (KEP-1287).
const RESIZE_IN_PROGRESS: &str = "PodResizeInProgress";

/// Node facts that appear in a pod's status.
#[derive(Debug, Clone)]
pub struct NodeFacts {
    /// The primary family's first.
    pub ips: Vec<String>,
}

impl NodeFacts {
    /// Puts a pod's addresses of the node's primary family before the others: runtimes give them in any order.
    pub fn order(&self, ips: &mut [String]) {
        let v6 = |ip: &String| ip.contains(':');
        if let Some(first) = self.ips.first() {
            ips.sort_by_key(|ip| v6(ip) != v6(first));
        }
    }
}

/// What a status is made from.
#[derive(Debug, Clone, Copy)]
pub struct Report<'a> {
    pub pod: &'a Pod,
    pub view: &'a PodView,
    pub memory: &'a Memory,
    pub node: &'a NodeFacts,
    pub runtime_name: &'a str,
    /// When this kubelet first saw the pod; used if the API has no start time yet.
    pub first_seen: Timestamp,
    pub now: Timestamp,
    pub removed: bool,
}

/// A time as the API shows it: to the second.
pub fn api_time(at: Timestamp) -> Time {
    Time(Timestamp::from_second(at.as_second()).unwrap_or(at))
}

/// The status of the pod.
pub fn status(report: &Report<'_>) -> PodStatus {
    let empty = PodSpec::default();
    let spec = report.pod.spec.as_ref().unwrap_or(&empty);
    let old = report.pod.status.clone().unwrap_or_default();
    let over = outcome(report.pod, report.view, report.memory, report.now);
    let init_done = initialised(report, spec);
    let init: Vec<_> = spec
        .init_containers
        .iter()
        .flatten()
        .map(|c| container_status(report, spec, c, Role::Init, true))
        .collect();
    let main: Vec<_> = spec
        .containers
        .iter()
        .map(|c| container_status(report, spec, c, Role::Main, init_done))
        .collect();
    let ephemeral: Vec<_> = ephemeral_containers(spec)
        .map(|(c, _)| container_status(report, spec, &c, Role::Ephemeral, true))
        .collect();
    let phase = phase(report, spec, &old, over, init_done, &main);
    let ips = pod_ips(report, &old);
    let (reason, message) = match over {
        Some(Outcome::DeadlineExceeded) => (
            Some("DeadlineExceeded".to_owned()),
            Some("Pod was active on the node longer than the specified deadline".to_owned()),
        ),
        Some(Outcome::Evicted) => (Some(EVICTED.to_owned()), report.memory.evicted.clone()),
        Some(Outcome::Refused) => {
            let refused = report.memory.refused.clone();
            let refusal = refused.or_else(|| refusal(report.pod));
            refusal.map_or((None, None), |refusal| {
                let message = format!("Pod was rejected: {}", refusal.message);
                (Some(refusal.reason.to_owned()), Some(message))
            })
        }
        _ => (old.reason.clone(), old.message.clone()),
    };
    let mut status = PodStatus {
        conditions: None,
        observed_generation: report.pod.metadata.generation,
        host_ip: report.node.ips.first().cloned(),
        host_ips: Some(
            report
                .node
                .ips
                .iter()
                .map(|ip| HostIP { ip: ip.clone() })
                .collect(),
        ),
        pod_ip: ips.first().cloned(),
        pod_ips: (!ips.is_empty()).then(|| ips.into_iter().map(|ip| PodIP { ip }).collect()),
        start_time: old
            .start_time
            .clone()
            .or_else(|| Some(api_time(report.first_seen))),
        qos_class: Some(qos_class(report.pod).as_str().to_owned()),
        init_container_statuses: (!init.is_empty()).then_some(init),
        container_statuses: Some(main),
        ephemeral_container_statuses: (!ephemeral.is_empty()).then_some(ephemeral),
        phase: Some(phase.to_owned()),
        reason,
        message,
        ..old.clone()
    };
    status.conditions = Some(conditions(report, spec, &old, &status, init_done));
    status
}

fn pod_ips(report: &Report<'_>, old: &PodStatus) -> Vec<String> {
    let sandbox = current_sandbox(report.view);
    if host_network(report.pod) {
        return if sandbox.is_some() || old.pod_ip.is_some() {
            report.node.ips.clone()
        } else {
            Vec::new()
        };
    }
    match sandbox {
        Some(sandbox) => sandbox.ips.clone(),
        None => old
            .pod_ips
            .iter()
            .flatten()
            .map(|ip| ip.ip.clone())
            .collect(),
    }
}

fn initialised(report: &Report<'_>, spec: &PodSpec) -> bool {
    let main_started = spec
        .containers
        .iter()
        .any(|c| seen(report.view, report.memory, &c.name).is_some());
    main_started
        || spec
            .init_containers
            .iter()
            .flatten()
            .all(|c| init_container_done(report, c))
}

fn init_container_done(report: &Report<'_>, container: &Container) -> bool {
    seen(report.view, report.memory, &container.name).is_some_and(|run| {
        match is_sidecar(container) {
            true => is_started(container, run, report.memory),
            false => run.phase == ContainerPhase::Exited && run.exit_code == 0,
        }
    })
}

fn phase(
    report: &Report<'_>,
    spec: &PodSpec,
    old: &PodStatus,
    over: Option<Outcome>,
    init_done: bool,
    main: &[ContainerStatus],
) -> &'static str {
    match (over, old.phase.as_deref()) {
        // A pod never comes back from an end that was reported.
        (_, Some("Failed")) => return "Failed",
        (_, Some("Succeeded")) => return "Succeeded",
        (Some(Outcome::Succeeded), _) => return "Succeeded",
        (Some(_), _) => return "Failed",
        (None, _) => {}
    }
    let runs: Vec<_> = spec
        .containers
        .iter()
        .map(|c| seen(report.view, report.memory, &c.name))
        .collect();
    if is_ending(report.pod, report.removed) {
        let alive = report
            .view
            .containers
            .iter()
            .any(|c| c.phase == ContainerPhase::Running);
        let all_over = runs
            .iter()
            .all(|run| run.is_none_or(|c| c.phase == ContainerPhase::Exited));
        let starting = report
            .memory
            .in_flight
            .iter()
            .any(|key| matches!(key, OpKey::Start(_)));
        if !alive && all_over && !starting {
            let success =
                !runs.is_empty() && runs.iter().all(|run| run.is_some_and(|c| c.exit_code == 0));
            return if success { "Succeeded" } else { "Failed" };
        }
    }
    let never_ran = |s: &ContainerStatus| {
        let waiting = s
            .state
            .as_ref()
            .is_some_and(|state| state.waiting.is_some());
        let before = s
            .last_state
            .as_ref()
            .is_some_and(|state| state.terminated.is_some());
        waiting && !before
    };
    if !init_done || main.iter().any(never_ran) {
        "Pending"
    } else {
        "Running"
    }
}

/// What a container is to its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Init,
    Main,
    Ephemeral,
}

fn container_status(
    report: &Report<'_>,
    spec: &PodSpec,
    container: &Container,
    role: Role,
    init_done: bool,
) -> ContainerStatus {
    let init = role == Role::Init;
    let run = seen(report.view, report.memory, &container.name);
    let previous = run.and_then(|run| {
        report.view.containers.iter().find(|c| {
            c.name == run.name && c.attempt < run.attempt && c.phase == ContainerPhase::Exited
        })
    });
    let known = known_status(report.pod, container);
    let failure = report
        .memory
        .failures
        .get(&OpKey::Start(container.name.clone()));
    let waiting = |reason: &str, message: Option<String>| ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(reason.to_owned()),
            message,
        }),
        ..Default::default()
    };
    let mut last_state = previous.map(|c| terminated(report, c));
    if last_state.is_none() && run.is_some_and(|run| run.attempt > 0) {
        // The runtime has forgotten the run before this one; the API may not have.
        last_state = known.and_then(|s| s.last_state.clone());
    }
    let state = match run {
        None => match failure {
            Some(failure) => waiting(failure.reason, Some(failure.message.clone())),
            None if init || !init_done => waiting("PodInitializing", None),
            None => waiting("ContainerCreating", None),
        },
        Some(run) => match run.phase {
            ContainerPhase::Created => waiting("ContainerCreating", None),
            ContainerPhase::Running => ContainerState {
                running: Some(ContainerStateRunning {
                    started_at: Some(api_time(at_ns(run.started_at_ns))),
                }),
                ..Default::default()
            },
            ContainerPhase::Exited => {
                let policy = match (is_sidecar(container), role, RestartPolicy::of(spec)) {
                    (_, Role::Ephemeral, _) => RestartPolicy::Never,
                    (true, ..) => RestartPolicy::Always,
                    (false, Role::Init, RestartPolicy::Always) => RestartPolicy::OnFailure,
                    (_, _, policy) => policy,
                };
                let again =
                    policy.restarts(run.exit_code) && !is_ending(report.pod, report.removed);
                match failure {
                    Some(failure) if again => {
                        last_state = Some(terminated(report, run));
                        waiting(failure.reason, Some(failure.message.clone()))
                    }
                    _ if again && restart_wait(run).end(report.now).is_some() => {
                        last_state = Some(terminated(report, run));
                        let message = format!(
                            "back-off {}s restarting failed container={} pod={}_{}({})",
                            run.backoff_s,
                            container.name,
                            report.pod.metadata.name.as_deref().unwrap_or_default(),
                            report.pod.metadata.namespace.as_deref().unwrap_or_default(),
                            report.pod.metadata.uid.as_deref().unwrap_or_default(),
                        );
                        waiting("CrashLoopBackOff", Some(message))
                    }
                    _ => terminated(report, run),
                }
            }
        },
    };
    let started = run.is_some_and(|run| is_started(container, run, report.memory));
    // What is on its way is not there yet: the last that was reported holds until then.
    let resources = match run.is_none_or(|run| is_resized(container, run, report.memory)) {
        true => container.resources.clone(),
        false => known.and_then(|s| s.resources.clone()),
    };
    ContainerStatus {
        name: container.name.clone(),
        allocated_resources: container
            .resources
            .as_ref()
            .and_then(|r| r.requests.clone()),
        resources,
        ready: match (run, init && !is_sidecar(container)) {
            (Some(run), true) => run.phase == ContainerPhase::Exited && run.exit_code == 0,
            (Some(_), false) if role == Role::Ephemeral => false,
            (Some(run), false) => is_ready(container, run, report.memory),
            (None, _) => false,
        },
        started: Some(started),
        restart_count: run.map_or(known.map_or(0, |s| s.restart_count), |run| {
            i32::try_from(run.attempt).unwrap_or(i32::MAX)
        }),
        image: run
            .map(|run| run.image.clone())
            .filter(|i| !i.is_empty())
            .or(container.image.clone())
            .unwrap_or_default(),
        image_id: run.map(|run| run.image_id.clone()).unwrap_or_default(),
        container_id: run.map(|run| format!("{}://{}", report.runtime_name, run.id)),
        state: Some(state),
        last_state,
        ..Default::default()
    }
}

/// Whether a container runs with the resources that its spec names now.
fn is_resized(container: &Container, run: &ContainerView, memory: &Memory) -> bool {
    let wanted = container_limits(container.resources.as_ref()).to_string();
    limits_of(run, memory).is_none_or(|present| present == wanted)
}

/// The condition that holds while containers do not run with the resources of the spec yet.
fn resize_in_progress(
    report: &Report<'_>,
    spec: &PodSpec,
    old: &PodStatus,
) -> Option<PodCondition> {
    let waiting = |container: &Container| {
        let run = report.view.latest(&container.name)?;
        let behind = run.phase == ContainerPhase::Running
            && !is_resized(container, run, report.memory)
            && !is_ending(report.pod, report.removed);
        behind.then(|| report.memory.failures.get(&OpKey::Resize(run.id.clone())))
    };
    let behind: Vec<_> = all_containers(spec)
        .filter_map(|(c, _)| waiting(c))
        .collect();
    let failure = behind.iter().copied().flatten().next();
    let before = old.conditions.iter().flatten();
    let since = before
        .filter(|c| c.type_ == RESIZE_IN_PROGRESS)
        .find_map(|c| c.last_transition_time.clone());
    (!behind.is_empty()).then(|| PodCondition {
        type_: RESIZE_IN_PROGRESS.to_owned(),
        status: "True".to_owned(),
        reason: failure.map(|_| "Error".to_owned()),
        message: failure.map(|failure| failure.message.clone()),
        last_transition_time: Some(since.unwrap_or_else(|| api_time(report.now))),
        last_probe_time: None,
        observed_generation: report.pod.metadata.generation,
    })
}

/// Whether a container takes traffic: it runs, is started, and its readiness probe, if it has one, says yes.
pub fn is_ready(container: &Container, run: &ContainerView, memory: &Memory) -> bool {
    let probed = container.readiness_probe.is_none()
        || memory
            .verdicts
            .get(&run.id)
            .is_some_and(|v| v.readiness == Some(true));
    is_started(container, run, memory) && probed
}

/// What the API already has on a container.
pub fn known_status<'a>(pod: &'a Pod, container: &Container) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    let all = status
        .init_container_statuses
        .iter()
        .chain(&status.container_statuses)
        .chain(&status.ephemeral_container_statuses)
        .flatten();
    all.into_iter().find(|s| s.name == container.name)
}

fn terminated(report: &Report<'_>, run: &ContainerView) -> ContainerState {
    let reason = match (run.reason.as_str(), run.exit_code) {
        ("", 0) => "Completed",
        ("", _) => "Error",
        (reason, _) => reason,
    };
    let message = report.memory.termination_messages.get(&run.id).cloned();
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: run.exit_code,
            reason: Some(reason.to_owned()),
            message: message.or_else(|| Some(run.message.clone()).filter(|m| !m.is_empty())),
            started_at: Some(api_time(at_ns(run.started_at_ns))),
            finished_at: Some(api_time(at_ns(run.finished_at_ns))),
            container_id: Some(format!("{}://{}", report.runtime_name, run.id)),
            signal: None,
        }),
        ..Default::default()
    }
}

fn conditions(
    report: &Report<'_>,
    spec: &PodSpec,
    old: &PodStatus,
    new: &PodStatus,
    init_done: bool,
) -> Vec<PodCondition> {
    let phase = new.phase.as_deref().unwrap_or_default();
    let names = |list: Vec<&str>| format!("[{}]", list.join(" "));
    let sandbox = current_sandbox(report.view).is_some();
    let incomplete: Vec<&str> = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|c| !init_container_done(report, c))
        .map(|c| c.name.as_str())
        .collect();
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|c| is_sidecar(c))
        .map(|c| c.name.as_str());
    let long_lived: Vec<&str> = sidecars
        .chain(spec.containers.iter().map(|c| c.name.as_str()))
        .collect();
    let all = new
        .init_container_statuses
        .iter()
        .chain(&new.container_statuses)
        .flatten();
    let unready: Vec<&str> = all
        .filter(|s| !s.ready && long_lived.contains(&s.name.as_str()))
        .map(|s| s.name.as_str())
        .collect();

    let initialised = match (phase, init_done) {
        ("Succeeded", _) => (true, Some("PodCompleted"), None),
        (_, true) => (true, None, None),
        _ => (
            false,
            Some("ContainersNotInitialized"),
            Some(format!(
                "containers with incomplete status: {}",
                names(incomplete)
            )),
        ),
    };
    let containers_ready = match phase {
        "Succeeded" => (false, Some("PodCompleted"), None),
        "Failed" => (false, Some("PodFailed"), None),
        _ if unready.is_empty() => (true, None, None),
        _ => (
            false,
            Some("ContainersNotReady"),
            Some(format!(
                "containers with unready status: {}",
                names(unready)
            )),
        ),
    };
    let holds = |kind: &str| {
        old.conditions
            .iter()
            .flatten()
            .any(|c| c.type_ == kind && c.status == "True")
    };
    let gates = spec
        .readiness_gates
        .iter()
        .flatten()
        .map(|gate| gate.condition_type.as_str());
    let closed: Vec<&str> = gates.filter(|gate| !holds(gate)).collect();
    let ready = match &containers_ready {
        (true, ..) if !closed.is_empty() => (
            false,
            Some("ReadinessGatesNotReady"),
            Some(format!(
                "the status of pod readiness gates is not \"True\": {}",
                names(closed)
            )),
        ),
        other => other.clone(),
    };

    let computed = [
        ("PodReadyToStartContainers", (sandbox, None, None)),
        ("Initialized", initialised),
        ("Ready", ready),
        ("ContainersReady", containers_ready),
    ];
    let mut conditions = Vec::new();
    for (kind, (holds, reason, message)) in computed {
        let value = if holds { "True" } else { "False" };
        let before = old.conditions.iter().flatten().find(|c| c.type_ == kind);
        let unchanged = before
            .filter(|c| c.status == value)
            .and_then(|c| c.last_transition_time.clone());
        conditions.push(PodCondition {
            type_: kind.to_owned(),
            status: value.to_owned(),
            reason: reason.map(str::to_owned),
            message,
            last_transition_time: Some(unchanged.unwrap_or_else(|| api_time(report.now))),
            last_probe_time: None,
            observed_generation: report.pod.metadata.generation,
        });
    }
    conditions.extend(resize_in_progress(report, spec, old));
    let foreign = |c: &&PodCondition| !is_own_condition(&c.type_);
    let others: Vec<_> = old
        .conditions
        .iter()
        .flatten()
        .filter(foreign)
        .cloned()
        .collect();
    if !others.iter().any(|c| c.type_ == "PodScheduled") {
        conditions.push(PodCondition {
            type_: "PodScheduled".to_owned(),
            status: "True".to_owned(),
            last_transition_time: Some(api_time(report.first_seen)),
            ..Default::default()
        });
    }
    conditions.extend(others);
    conditions
}

/// Whether a condition of a pod is the kubelet's to set.
pub fn is_own_condition(kind: &str) -> bool {
    [
        "PodReadyToStartContainers",
        "Initialized",
        "Ready",
        "ContainersReady",
        RESIZE_IN_PROGRESS,
    ]
    .contains(&kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::SandboxView;
    use serde_json::json;

    fn running(limits: &str) -> PodView {
        let run = ContainerView {
            id: "c-0".to_owned(),
            name: "c".to_owned(),
            attempt: 0,
            sandbox_id: "sb".to_owned(),
            phase: ContainerPhase::Running,
            created_at_ns: 0,
            started_at_ns: 0,
            finished_at_ns: 0,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
            image: String::new(),
            image_id: String::new(),
            spec_image: String::new(),
            limits: limits.to_owned(),
            backoff_s: 0,
            log_path: String::new(),
        };
        let sandbox = SandboxView {
            id: "sb".to_owned(),
            ready: true,
            ..Default::default()
        };
        PodView {
            sandboxes: vec![sandbox],
            containers: vec![run],
        }
    }

    #[test]
    fn addresses_of_the_nodes_primary_family_come_first() {
        for (node, expected) in [
            (vec!["192.0.2.1", "2001:db8::1"], ["10.0.0.1", "fd00::1"]),
            (vec!["2001:db8::1"], ["fd00::1", "10.0.0.1"]),
        ] {
            let mut ips = ["fd00::1", "10.0.0.1"].map(str::to_owned);
            let ips_of_node = node.iter().map(ToString::to_string).collect();
            NodeFacts { ips: ips_of_node }.order(&mut ips);
            assert_eq!(ips, expected);
        }
    }

    #[test]
    fn a_resize_shows_until_the_container_runs_with_what_it_was_given() {
        let resources = json!({"requests": {"cpu": "500m"}});
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p"},
            "spec": {"containers": [{"name": "c", "resources": resources}]}}))
        .unwrap();
        let wanted = container_limits(pod.spec.as_ref().unwrap().containers[0].resources.as_ref());
        let wanted = wanted.to_string();
        let mut failed = Memory::default();
        let (key, now) = (OpKey::Resize("c-0".to_owned()), Timestamp::UNIX_EPOCH);
        failed.fail(key, "ResizeError", "no room".to_owned(), now, 10, 300);
        let done = Memory {
            limits: [("c-0".to_owned(), wanted.clone())].into(),
            ..Default::default()
        };
        for (made_with, memory, expected) in [
            (wanted.as_str(), Memory::default(), None),
            ("", Memory::default(), None),
            ("1/1/1", Memory::default(), Some(None)),
            ("1/1/1", failed, Some(Some("no room".to_owned()))),
            ("1/1/1", done, None),
        ] {
            let status = status(&Report {
                pod: &pod,
                view: &running(made_with),
                memory: &memory,
                node: &NodeFacts { ips: Vec::new() },
                runtime_name: "containerd",
                first_seen: now,
                now,
                removed: false,
            });
            let mut conditions = status.conditions.into_iter().flatten();
            let found = conditions.find(|c| c.type_ == RESIZE_IN_PROGRESS);
            assert_eq!(found.map(|c| c.message), expected, "{made_with}");
        }
    }
}
