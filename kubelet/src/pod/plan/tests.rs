//! Tables: what a pod looks like, what the runtime holds, what comes next.

use super::*;
use crate::clock::Wait;
use crate::pod::memory::Verdicts;
use serde_json::{Value, json};

const NOW_S: i64 = 1_000_000;

fn now() -> Timestamp {
    Timestamp::from_second(NOW_S).unwrap()
}

/// A pod with the containers that `spec` names; init containers `s*` are sidecars.
fn pod(init: &[&str], main: &[&str], policy: &str) -> Pod {
    let container = |name: &&str| json!({"name": name, "image": "img"});
    let init = init.iter().map(|name| {
        let mut step = container(name);
        if name.starts_with('s') {
            step["restartPolicy"] = json!("Always");
        }
        step
    });
    let spec = json!({
        "restartPolicy": policy,
        "initContainers": init.collect::<Vec<Value>>(),
        "containers": main.iter().map(container).collect::<Vec<Value>>(),
    });
    serde_json::from_value(json!({"metadata": {"name": "p", "uid": "u"}, "spec": spec})).unwrap()
}

/// A run of a container in sandbox `sb`: `name` runs, `name=3` ended with 3 a minute ago, `name~` is created.
fn run_of(text: &str, attempt: u32) -> ContainerView {
    let (name, phase, exit_code) = match (text.split_once('='), text.strip_suffix('~')) {
        (Some((name, code)), _) => (name, ContainerPhase::Exited, code.parse().unwrap()),
        (None, Some(name)) => (name, ContainerPhase::Created, 0),
        (None, None) => (text, ContainerPhase::Running, 0),
    };
    let second = |s: i64| s * 1_000_000_000;
    ContainerView {
        id: format!("{name}-{attempt}"),
        name: name.to_owned(),
        attempt,
        sandbox_id: "sb".to_owned(),
        phase,
        created_at_ns: second(NOW_S - 100),
        started_at_ns: second(NOW_S - 90),
        finished_at_ns: if phase == ContainerPhase::Exited {
            second(NOW_S - 60)
        } else {
            0
        },
        exit_code,
        reason: String::new(),
        message: String::new(),
        image: "img".to_owned(),
        image_id: "sha256:1".to_owned(),
        spec_image: "img".to_owned(),
        backoff_s: 0,
        limits: String::new(),
        log_path: String::new(),
    }
}

fn view(runs: &[&str]) -> PodView {
    let sandbox = SandboxView {
        id: "sb".to_owned(),
        ready: true,
        ips: vec!["10.0.0.1".to_owned()],
        ..Default::default()
    };
    PodView {
        sandboxes: vec![sandbox],
        containers: runs.iter().map(|text| run_of(text, 0)).collect(),
    }
}

fn ready_memory() -> Memory {
    Memory {
        volumes_ready: true,
        ..Default::default()
    }
}

struct Case {
    pod: Pod,
    view: PodView,
    memory: Memory,
    network_ready: bool,
    removed: bool,
}

fn case(pod: Pod, view: PodView) -> Case {
    Case {
        pod,
        view,
        memory: ready_memory(),
        network_ready: true,
        removed: false,
    }
}

impl Case {
    fn plan(&self) -> Plan {
        self.plan_at(now())
    }

    fn plan_at(&self, now: Timestamp) -> Plan {
        plan(&Situation {
            pod: &self.pod,
            view: &self.view,
            memory: &self.memory,
            now,
            network_ready: self.network_ready,
            removed: self.removed,
        })
    }

    /// The plan's operations in brief, and `finished` if it is.
    fn next(&self) -> Vec<String> {
        let plan = self.plan();
        let finished = plan.finished.then(|| "finished".to_owned());
        plan.ops.iter().map(brief).chain(finished).collect()
    }

    fn deleted(mut self, grace_s: i64) -> Self {
        self.pod.metadata.deletion_timestamp = Some(crate::pod::status::api_time(
            now() + SignedDuration::from_secs(grace_s),
        ));
        self.pod.metadata.deletion_grace_period_seconds = Some(grace_s);
        self.memory.ending_since = Some(now());
        self
    }
}

fn brief(op: &Op) -> String {
    match op {
        Op::PrepareVolumes => "volumes".to_owned(),
        Op::RunSandbox { attempt, .. } => format!("run sandbox {attempt}"),
        Op::StopSandbox { id } => format!("stop sandbox {id}"),
        Op::RemoveSandbox { id } => format!("remove sandbox {id}"),
        Op::StartContainer {
            name,
            attempt,
            backoff_s,
            ..
        } => format!("start {name} {attempt} backoff {backoff_s}"),
        Op::StopContainer { name, grace_s, .. } => format!("stop {name} in {grace_s}"),
        Op::KillContainer { name, grace_s, .. } => format!("kill {name} in {grace_s}"),
        Op::RemoveContainer { id } => format!("remove {id}"),
        Op::ResizeContainer { name, limits, .. } => format!("resize {name} to {limits}"),
        Op::Clean => "clean".to_owned(),
    }
}

#[test]
fn containers_start_in_order() {
    let init = ["i1", "i2"];
    for (runs, expected) in [
        (vec![], vec!["start i1 0 backoff 0"]),
        (vec!["i1"], vec![]),
        (vec!["i1=0"], vec!["start i2 0 backoff 0"]),
        (
            vec!["i1=0", "i2=0"],
            vec!["start a 0 backoff 0", "start b 0 backoff 0"],
        ),
        (vec!["i1=0", "i2=0", "a"], vec!["start b 0 backoff 0"]),
        // Init containers that the runtime has forgotten are not repeated once a main container was started.
        (vec!["a", "b"], vec![]),
        (vec!["i1=1"], vec!["start i1 1 backoff 10"]),
        (vec!["i1~"], vec!["remove i1-0"]),
    ] {
        assert_eq!(
            case(pod(&init, &["a", "b"], "Always"), view(&runs)).next(),
            expected,
            "{runs:?}"
        );
    }
}

#[test]
fn a_sidecar_is_started_in_its_turn_and_kept_running() {
    for (runs, expected) in [
        (vec![], vec!["start s 0 backoff 0"]),
        (vec!["s"], vec!["start i 0 backoff 0"]),
        (vec!["s=0", "i"], vec!["start s 1 backoff 10"]),
        (vec!["s", "i=0"], vec!["start a 0 backoff 0"]),
        (vec!["s=0", "i=0", "a"], vec!["start s 1 backoff 10"]),
    ] {
        assert_eq!(
            case(pod(&["s", "i"], &["a"], "Always"), view(&runs)).next(),
            expected,
            "{runs:?}"
        );
    }
}

#[test]
fn a_sidecar_with_a_startup_probe_holds_up_what_follows_until_it_has_passed() {
    let mut waiting = case(pod(&["s"], &["a"], "Always"), view(&["s"]));
    waiting
        .pod
        .spec
        .as_mut()
        .unwrap()
        .init_containers
        .as_mut()
        .unwrap()[0]
        .startup_probe = Some(Probe::default());
    assert!(waiting.next().is_empty());
    let passed = Verdicts {
        startup: Some(true),
        ..Default::default()
    };
    waiting.memory.verdicts.insert("s-0".to_owned(), passed);
    assert_eq!(waiting.next(), ["start a 0 backoff 0"]);
}

#[test]
fn the_restart_policy_decides_what_runs_again() {
    for (policy, run, expected, ended) in [
        ("Always", "a=0", vec!["start a 1 backoff 10"], None),
        ("Always", "a=1", vec!["start a 1 backoff 10"], None),
        ("OnFailure", "a=1", vec!["start a 1 backoff 10"], None),
        (
            "OnFailure",
            "a=0",
            vec!["stop sandbox sb"],
            Some(Outcome::Succeeded),
        ),
        (
            "Never",
            "a=0",
            vec!["stop sandbox sb"],
            Some(Outcome::Succeeded),
        ),
        (
            "Never",
            "a=1",
            vec!["stop sandbox sb"],
            Some(Outcome::Failed),
        ),
        ("Never", "a", vec![], None),
    ] {
        let case = case(pod(&[], &["a"], policy), view(&[run]));
        assert_eq!(case.next(), expected, "{policy} {run}");
        assert_eq!(
            outcome(&case.pod, &case.view, &case.memory, now()),
            ended,
            "{policy} {run}"
        );
    }
    let failed_init = case(pod(&["i"], &["a"], "Never"), view(&["i=1"]));
    assert_eq!(
        outcome(
            &failed_init.pod,
            &failed_init.view,
            &failed_init.memory,
            now()
        ),
        Some(Outcome::Failed)
    );
}

#[test]
fn back_off_doubles_and_is_forgotten_after_a_long_run() {
    for (before_s, ran_s, ended_s_ago, expected) in [
        (0, 1, 0, Ok(10)),
        (10, 1, 9, Err(1)),
        (10, 1, 10, Ok(20)),
        (160, 1, 160, Ok(300)),
        (300, 1, 0, Err(300)),
        (300, 600, 0, Ok(10)),
    ] {
        let mut case = case(pod(&[], &["a"], "Always"), view(&["a=1"]));
        let run = &mut case.view.containers[0];
        let second = 1_000_000_000;
        run.backoff_s = before_s;
        run.finished_at_ns = (NOW_S - ended_s_ago) * second;
        run.started_at_ns = run.finished_at_ns - ran_s * second;
        let plan = case.plan();
        match expected {
            Ok(backoff_s) => assert_eq!(
                case.next(),
                [format!("start a 1 backoff {backoff_s}")],
                "{before_s}"
            ),
            Err(wait_s) => {
                assert!(plan.ops.is_empty(), "{before_s}");
                assert_eq!(
                    plan.wake_at,
                    Some(now() + SignedDuration::from_secs(wait_s)),
                    "{before_s}"
                );
            }
        }
    }
}

#[test]
fn a_sandbox_needs_the_network_unless_the_pod_is_on_the_hosts() {
    let mut waiting = case(pod(&[], &["a"], "Always"), PodView::default());
    waiting.network_ready = false;
    assert!(waiting.next().is_empty());
    waiting.pod.spec.as_mut().unwrap().host_network = Some(true);
    assert_eq!(waiting.next(), ["run sandbox 0"]);
    waiting.pod.spec.as_mut().unwrap().host_network = None;
    waiting.network_ready = true;
    waiting.memory.volumes_ready = false;
    assert_eq!(
        waiting.next(),
        ["volumes", "run sandbox 0"],
        "volumes and network are made at the same time"
    );
}

#[test]
fn a_dead_sandbox_is_replaced_when_its_containers_have_ended() {
    let mut case = case(pod(&[], &["a"], "Always"), view(&["a"]));
    case.view.sandboxes[0].ready = false;
    assert_eq!(case.next(), ["stop a in 30"]);
    case.view.containers[0].phase = ContainerPhase::Exited;
    assert_eq!(case.next(), ["run sandbox 1"]);
    let new = SandboxView {
        id: "sb2".to_owned(),
        attempt: 1,
        ready: true,
        ..Default::default()
    };
    case.view.sandboxes.insert(0, new);
    assert_eq!(
        case.next(),
        ["start a 1 backoff 0"],
        "the count of restarts goes on"
    );
}

#[test]
fn a_deleted_pod_ends_from_the_inside_out() {
    let full = || pod(&["s1", "s2"], &["a", "b"], "Always");
    for (runs, expected) in [
        (
            vec!["s1", "s2", "a", "b"],
            vec!["stop a in 20", "stop b in 20"],
        ),
        (vec!["s1", "s2", "a=0", "b"], vec!["stop b in 20"]),
        (vec!["s1", "s2", "a=0", "b=0"], vec!["stop s2 in 20"]),
        (vec!["s1", "s2=0", "a=0", "b=0"], vec!["stop s1 in 20"]),
        (vec!["s1=0", "s2=0", "a=0", "b=0"], vec!["stop sandbox sb"]),
    ] {
        assert_eq!(
            case(full(), view(&runs)).deleted(20).next(),
            expected,
            "{runs:?}"
        );
    }
    let mut over = case(full(), view(&["a=0"])).deleted(20);
    over.view.sandboxes[0].ready = false;
    assert_eq!(over.next(), ["remove sandbox sb"]);
    over.view = PodView::default();
    assert_eq!(over.next(), ["clean"]);
    over.memory.cleaned = true;
    assert_eq!(over.next(), ["finished"]);
}

#[test]
fn a_clock_that_is_set_back_holds_nothing_up() {
    let at = |case: &Case, seconds| -> Vec<String> {
        let plan = case.plan_at(now() + SignedDuration::from_secs(seconds));
        plan.ops.iter().map(brief).collect()
    };
    let full = || pod(&[], &["a"], "Always");
    let mut ended = case(full(), view(&["a=1"]));
    ended.view.containers[0].backoff_s = 300;
    assert!(at(&ended, 0).is_empty(), "it backs off");
    let mut failed = case(full(), view(&[]));
    let start = OpKey::Start("a".to_owned());
    failed
        .memory
        .fail(start, "Failed", "no".to_owned(), now(), 10, 300);
    assert!(at(&failed, 0).is_empty(), "it is tried again later");
    let mut served = case(full(), view(&["a"]));
    served.memory.volumes_fresh = Some(Wait::new(now(), 2_880));
    assert!(at(&served, 0).is_empty(), "its token is young");
    let leaving = case(full(), view(&["a"])).deleted(30);
    assert_eq!(at(&leaving, 10), ["stop a in 20"]);
    for by in [-3_600, -31_536_000] {
        assert_eq!(at(&ended, by), ["start a 1 backoff 300"], "{by}");
        assert_eq!(at(&failed, by), ["start a 0 backoff 0"], "{by}");
        // The API server refuses one that is issued in what is the future now.
        assert_eq!(at(&served, by), ["volumes"], "{by}");
        assert_eq!(at(&leaving, by), ["stop a in 30"], "{by}");
    }
}

#[test]
fn a_shorter_grace_period_overtakes_a_stop_that_is_under_way() {
    let mut case = case(pod(&[], &["a"], "Always"), view(&["a"])).deleted(30);
    case.memory.in_flight.insert(OpKey::Stop("a-0".to_owned()));
    case.memory
        .stop_deadlines
        .insert("a-0".to_owned(), now() + SignedDuration::from_secs(30));
    assert!(case.next().is_empty(), "the stop is under way");
    case.pod.metadata.deletion_grace_period_seconds = Some(3);
    assert_eq!(case.next(), ["kill a in 3"]);
    case.removed = true;
    assert_eq!(
        case.next(),
        ["kill a in 2"],
        "a pod whose object is gone ends at once"
    );
}

#[test]
fn a_pod_that_ended_by_itself_keeps_its_containers_until_it_is_deleted() {
    let mut done = case(pod(&[], &["a"], "Never"), view(&["a=0"]));
    done.view.sandboxes[0].ready = false;
    assert!(done.next().is_empty());
    assert_eq!(done.deleted(30).next(), ["remove sandbox sb"]);
}

#[test]
fn nothing_is_torn_down_under_a_container_that_is_being_started() {
    let mut case = case(pod(&[], &["a"], "Always"), view(&[])).deleted(30);
    case.memory.in_flight.insert(OpKey::Start("a".to_owned()));
    assert!(case.next().is_empty());
    case.memory.in_flight.clear();
    assert_eq!(case.next(), ["stop sandbox sb"]);
}

#[test]
fn failed_probes_and_changed_images_restart_a_container() {
    let with = |verdicts: Verdicts, image: &str| {
        let mut case = case(pod(&[], &["a"], "Always"), view(&["a"]));
        let container = &mut case.pod.spec.as_mut().unwrap().containers[0];
        container.image = Some(image.to_owned());
        container.liveness_probe = Some(Probe {
            termination_grace_period_seconds: Some(5),
            ..Default::default()
        });
        case.memory.verdicts.insert("a-0".to_owned(), verdicts);
        case.next()
    };
    assert!(with(Verdicts::default(), "img").is_empty());
    assert_eq!(
        with(
            Verdicts {
                liveness_failed: true,
                ..Default::default()
            },
            "img"
        ),
        ["stop a in 5"]
    );
    assert_eq!(
        with(
            Verdicts {
                startup_failed: true,
                ..Default::default()
            },
            "img"
        ),
        ["stop a in 30"]
    );
    assert_eq!(with(Verdicts::default(), "other"), ["stop a in 30"]);
}

#[test]
fn a_failed_operation_waits_and_dead_containers_beyond_two_are_removed() {
    let mut case = case(pod(&[], &["a"], "Always"), view(&[]));
    case.memory.fail(
        OpKey::Start("a".to_owned()),
        "ErrImagePull",
        String::new(),
        now(),
        10,
        300,
    );
    let plan = case.plan();
    assert!(plan.ops.is_empty());
    assert_eq!(plan.wake_at, Some(now() + SignedDuration::from_secs(10)));
    case.memory.failures.clear();
    case.view.containers = vec![
        run_of("a", 3),
        run_of("a=1", 2),
        run_of("a=1", 1),
        run_of("a=1", 0),
    ];
    assert_eq!(case.next(), ["remove a-0"]);
}

#[test]
fn the_active_deadline_ends_a_pod() {
    let mut case = case(pod(&[], &["a"], "Always"), view(&["a"]));
    case.pod.spec.as_mut().unwrap().active_deadline_seconds = Some(60);
    let started = |ago_s: i64| k8s_openapi::api::core::v1::PodStatus {
        start_time: Some(crate::pod::status::api_time(
            now() - SignedDuration::from_secs(ago_s),
        )),
        ..Default::default()
    };
    case.pod.status = Some(started(59));
    assert_eq!(
        (case.next(), case.plan().wake_at),
        (vec![], Some(now() + SignedDuration::from_secs(1)))
    );
    case.pod.status = Some(started(60));
    assert_eq!(case.next(), ["stop a in 30"]);
}

#[test]
fn an_ephemeral_container_is_started_once_when_its_target_runs() {
    let mut debugged = pod(&["i"], &["a"], "Always");
    let ephemeral = json!([{"name": "d", "image": "img"}, {"name": "e", "image": "img", "targetContainerName": "a"}]);
    debugged.spec.as_mut().unwrap().ephemeral_containers =
        serde_json::from_value(ephemeral).unwrap();
    for (runs, expected) in [
        // Also while an init container hangs.
        (vec!["i"], vec!["start d 0 backoff 0"]),
        (
            vec!["a"],
            vec!["start d 0 backoff 0", "start e 0 backoff 0"],
        ),
        (vec!["a", "d", "e"], vec![]),
        (vec!["a", "d=1", "e=0"], vec![]),
    ] {
        assert_eq!(
            case(debugged.clone(), view(&runs)).next(),
            expected,
            "{runs:?}"
        );
    }
    let plan = case(debugged, view(&["a", "d"])).plan();
    assert!(
        matches!(&plan.ops[..], [Op::StartContainer { target_id: Some(id), .. }] if id == "a-0")
    );
}

#[test]
fn a_container_is_resized_in_place_unless_its_policy_asks_for_a_restart() {
    let sized = |policy: Value| {
        let mut pod = pod(&[], &["a"], "Always");
        let container = &mut pod.spec.as_mut().unwrap().containers[0];
        container.resources =
            serde_json::from_value(json!({"limits": {"cpu": "500m", "memory": "64Mi"}})).unwrap();
        container.resize_policy = serde_json::from_value(policy).unwrap();
        pod
    };
    let restart =
        |resource: &str| json!([{"resourceName": resource, "restartPolicy": "RestartContainer"}]);
    let (wanted, less_cpu) = ("512/50000/67108864", "102/10000/67108864");
    for (policy, made_with, expected) in [
        (json!(null), wanted, vec![]),
        (
            json!(null),
            less_cpu,
            vec!["resize a to 512/50000/67108864"],
        ),
        (restart("cpu"), less_cpu, vec!["stop a in 30"]),
        (
            restart("memory"),
            less_cpu,
            vec!["resize a to 512/50000/67108864"],
        ),
        (restart("memory"), "512/50000/0", vec!["stop a in 30"]),
        // Made by something that did not say.
        (json!(null), "", vec![]),
    ] {
        let mut view = view(&["a"]);
        view.containers[0].limits = made_with.to_owned();
        let mut case = case(sized(policy.clone()), view);
        assert_eq!(case.next(), expected, "{policy} {made_with}");
        // What it was resized to counts, not what it was made with.
        case.memory
            .limits
            .insert("a-0".to_owned(), wanted.to_owned());
        assert!(case.next().is_empty(), "{policy} {made_with}");
    }
}
