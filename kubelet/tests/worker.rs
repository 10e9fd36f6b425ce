//! Workers of pods against a runtime and a cluster that are in memory, with time that jumps.

mod fake;

use std::time::Duration;

use fake::{Stage, eventually, pod};
use keelway_kubelet::pod::admission::conflict;
use serde_json::json;

#[tokio::test(start_paused = true)]
async fn a_pod_is_started_in_order_and_becomes_ready() {
    let stage = Stage::new();
    let pod = stage.start(pod(
        "p",
        json!({
            "initContainers": [{"name": "i", "image": "img:1"}],
            "containers": [{"name": "c", "image": "img:1"}],
        }),
    ));
    eventually("the init container runs", || stage.runtime.is_running("i")).await;
    eventually("that is reported", || {
        stage.cluster.phase("p") == Some("Pending".to_owned())
    })
    .await;
    stage.runtime.exit("i", 0);
    eventually("the pod is ready", || stage.is_ready("p")).await;
    assert_eq!(
        stage.runtime.calls(),
        [
            "run sandbox p",
            "create i 0",
            "start i",
            "create c 0",
            "start c"
        ]
    );
    let status = stage.cluster.status("p").unwrap();
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(status.pod_ip.as_deref(), Some("10.0.0.1"));
    assert_eq!(status.host_ip.as_deref(), Some("192.0.2.1"));
    assert_eq!(
        stage.cluster.reasons(&pod),
        [
            "Pulled", "Created", "Started", "Pulled", "Created", "Started"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_crashing_container_is_restarted_with_growing_waits() {
    let stage = Stage::new();
    stage.start(pod(
        "p",
        json!({"containers": [{"name": "c", "image": "img:1"}]}),
    ));
    for (attempt, wait_s) in [(0, 0), (1, 10), (2, 20), (3, 40)] {
        eventually("it runs", || {
            stage.runtime.attempt("c") == Some(attempt) && stage.runtime.is_running("c")
        })
        .await;
        let ended = tokio::time::Instant::now();
        stage.runtime.exit("c", 1);
        if wait_s > 0 {
            let waiting = || stage.cluster.waiting("p", "c") == Some("CrashLoopBackOff".to_owned());
            eventually("the back-off shows", waiting).await;
        }
        eventually("it runs again", || {
            stage.runtime.attempt("c") == Some(attempt + 1)
        })
        .await;
        let waited = ended.elapsed();
        let expected = Duration::from_secs(wait_s);
        assert!(
            waited >= expected && waited < expected + Duration::from_secs(1),
            "attempt {attempt} waited {waited:?}"
        );
    }
    let restarts = || {
        stage
            .cluster
            .status("p")
            .unwrap()
            .container_statuses
            .unwrap()[0]
            .restart_count
    };
    eventually("the restarts are counted", || restarts() == 4).await;
}

#[tokio::test(start_paused = true)]
async fn a_deleted_pod_ends_gracefully_and_its_object_goes_last() {
    let stage = Stage::new();
    let mut object = stage.start(pod(
        "p",
        json!({
            "initContainers": [{"name": "s", "image": "img:1", "restartPolicy": "Always"}],
            "containers": [{"name": "c", "image": "img:1"}],
        }),
    ));
    eventually("the pod is ready", || stage.is_ready("p")).await;
    stage.runtime.forget_calls();
    stage.mark_deleted(&mut object, 30);
    stage.update(object);
    eventually("the object is removed", || stage.cluster.is_deleted("p")).await;
    assert_eq!(
        stage.runtime.calls(),
        ["stop c 30", "stop s 30", "stop sandbox", "remove sandbox"]
    );
    let status = stage.cluster.status("p").unwrap();
    assert_eq!(status.phase.as_deref(), Some("Succeeded"));
    let state = status.container_statuses.unwrap()[0].state.clone().unwrap();
    assert_eq!(state.terminated.unwrap().exit_code, 0);
    assert!(stage.folder_is_gone("p"));
}

#[tokio::test(start_paused = true)]
async fn a_pod_whose_object_vanished_is_ended_at_once() {
    let stage = Stage::new();
    let object = stage.start(pod(
        "p",
        json!({"containers": [{"name": "c", "image": "img:1"}]}),
    ));
    eventually("it runs", || stage.runtime.is_running("c")).await;
    stage.runtime.forget_calls();
    stage.remove(&object);
    eventually("nothing is left", || stage.runtime.is_empty()).await;
    assert_eq!(
        stage.runtime.calls(),
        ["stop c 2", "stop sandbox", "remove sandbox"]
    );
    assert!(
        !stage.cluster.is_deleted("p"),
        "there is no object to remove"
    );
}

#[tokio::test(start_paused = true)]
async fn a_kubelet_that_comes_back_adopts_what_runs() {
    let mut stage = Stage::new();
    let mut object = stage.start(pod("p", json!({
        "containers": [{"name": "c", "image": "img:1", "readinessProbe": {"exec": {"command": ["true"]}}}],
    })));
    eventually("the pod is ready", || stage.is_ready("p")).await;
    object.status = stage.cluster.status("p");
    stage.kill_workers();
    stage.runtime.forget_calls();
    let reports = stage.cluster.reports("p");
    stage.start(object);
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(
        stage.runtime.calls(),
        Vec::<String>::new(),
        "nothing is started or stopped"
    );
    assert_eq!(
        stage.cluster.reports("p"),
        reports,
        "nothing new is reported, above all not that the pod is unready"
    );
}

#[tokio::test(start_paused = true)]
async fn pods_wait_for_the_network_and_host_network_pods_do_not() {
    let stage = Stage::without_network();
    stage.start(pod(
        "agent",
        json!({"hostNetwork": true, "containers": [{"name": "a", "image": "img:1"}]}),
    ));
    stage.start(pod(
        "p",
        json!({"containers": [{"name": "c", "image": "img:1"}]}),
    ));
    eventually("the host-network pod is ready", || stage.is_ready("agent")).await;
    assert_eq!(
        stage.cluster.status("agent").unwrap().pod_ip.as_deref(),
        Some("192.0.2.1")
    );
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(stage.runtime.attempt("c"), None);
    let ready_at = tokio::time::Instant::now();
    stage.network_is_ready();
    eventually("the other pod runs", || stage.runtime.is_running("c")).await;
    assert!(ready_at.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_missing_config_map_holds_a_pod_up_until_it_appears_and_updates_follow() {
    let stage = Stage::new();
    let object = stage.start(pod("p", json!({
        "containers": [{"name": "c", "image": "img:1", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
        "volumes": [{"name": "v", "configMap": {"name": "cm"}}],
    })));
    eventually("the failure is on record", || {
        stage.cluster.reasons(&object).contains(&"FailedMount")
    })
    .await;
    assert_eq!(stage.runtime.attempt("c"), None);
    stage.cluster.put_config_map("cm", "k", "1");
    eventually("it runs", || stage.runtime.is_running("c")).await;
    assert_eq!(stage.volume_file("p", "kubernetes.io~configmap/v/k"), "1");
    stage.cluster.put_config_map("cm", "k", "2");
    eventually("the file follows", || {
        stage.volume_file("p", "kubernetes.io~configmap/v/k") == "2"
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_container_that_fails_its_liveness_probe_is_restarted() {
    let stage = Stage::new();
    let object = stage.start(pod("p", json!({"containers": [{
        "name": "c", "image": "img:1",
        "livenessProbe": {"exec": {"command": ["check"]}, "periodSeconds": 2, "failureThreshold": 3},
    }]})));
    eventually("it runs", || stage.runtime.is_running("c")).await;
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(stage.runtime.attempt("c"), Some(0));
    stage.runtime.set_exec_result(1);
    eventually("it is restarted", || stage.runtime.attempt("c") == Some(1)).await;
    assert!(stage.runtime.calls().contains(&"stop c 30".to_owned()));
    let reasons = stage.cluster.reasons(&object);
    assert!(
        reasons.contains(&"Unhealthy") && reasons.contains(&"Killing"),
        "{reasons:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn readiness_follows_its_probe() {
    let stage = Stage::new();
    stage.runtime.set_exec_result(1);
    stage.start(pod("p", json!({"containers": [{
        "name": "c", "image": "img:1",
        "readinessProbe": {"exec": {"command": ["check"]}, "periodSeconds": 10, "failureThreshold": 1},
    }]})));
    eventually("it runs", || stage.runtime.is_running("c")).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!stage.is_ready("p"));
    stage.runtime.set_exec_result(0);
    let able_at = tokio::time::Instant::now();
    eventually("the pod is ready", || stage.is_ready("p")).await;
    assert!(
        able_at.elapsed() < Duration::from_secs(1),
        "long before the probe's period is over"
    );
    stage.runtime.set_exec_result(1);
    eventually("the pod is unready", || !stage.is_ready("p")).await;
    assert!(stage.runtime.is_running("c"));
}

#[tokio::test(start_paused = true)]
async fn an_image_that_may_not_be_pulled_is_waited_for() {
    let stage = Stage::new();
    let spec = json!({"containers": [{"name": "c", "image": "other", "imagePullPolicy": "Never"}]});
    let object = stage.start(pod("p", spec));
    let waiting = || stage.cluster.waiting("p", "c") == Some("ErrImageNeverPull".to_owned());
    eventually("the reason shows", waiting).await;
    stage.runtime.import("other");
    eventually("it runs", || stage.runtime.is_running("c")).await;
    assert!(
        stage
            .cluster
            .reasons(&object)
            .contains(&"ErrImageNeverPull")
    );
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_done_is_reported_and_left_in_place() {
    let stage = Stage::new();
    stage.start(pod(
        "p",
        json!({"restartPolicy": "Never", "containers": [{"name": "c", "image": "img:1"}]}),
    ));
    eventually("it runs", || stage.runtime.is_running("c")).await;
    stage.runtime.exit("c", 0);
    eventually("it has succeeded", || {
        stage.cluster.phase("p") == Some("Succeeded".to_owned())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(
        stage.runtime.calls().last().map(String::as_str),
        Some("stop sandbox")
    );
    assert!(!stage.runtime.is_empty(), "its logs can still be read");
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_writes_more_than_it_may_is_evicted() {
    let stage = Stage::new();
    let resources = json!({"limits": {"ephemeral-storage": "5Mi"}});
    let pod = stage.start(pod(
        "p",
        json!({"containers": [{"name": "c", "image": "img:1", "resources": resources}]}),
    ));
    stage.runtime.set_written_bytes(4 << 20);
    eventually("the pod is ready", || stage.is_ready("p")).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(stage.is_ready("p"), "it writes what it may");
    stage.runtime.forget_calls();
    stage.runtime.set_written_bytes(6 << 20);
    eventually("its end is reported", || {
        stage.cluster.phase("p") == Some("Failed".to_owned())
    })
    .await;
    eventually("it has ended", || stage.runtime.calls().len() == 2).await;
    assert_eq!(stage.runtime.calls(), ["stop c 1", "stop sandbox"]);
    let status = stage.cluster.status("p").unwrap();
    assert_eq!(status.reason.as_deref(), Some("Evicted"));
    assert!(stage.cluster.reasons(&pod).contains(&"Evicted"));
    assert!(!stage.cluster.is_deleted("p"));
}

#[tokio::test(start_paused = true)]
async fn a_runtime_class_chooses_the_handler_and_an_unknown_one_holds_the_pod_up() {
    let stage = Stage::new();
    let spec = |class: &str| json!({"runtimeClassName": class, "containers": [{"name": "c", "image": "img:1"}]});
    let lost = stage.start(pod("lost", spec("unknown")));
    eventually("the failure is on record", || {
        let reasons = stage.cluster.reasons(&lost);
        reasons.contains(&"FailedCreatePodSandBox")
    })
    .await;
    assert_eq!(stage.runtime.calls(), Vec::<String>::new());
    stage.start(pod("p", spec("sandboxed")));
    eventually("the pod is ready", || stage.is_ready("p")).await;
    assert_eq!(stage.runtime.calls()[0], "run sandbox p by vm");
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_may_not_run_here_fails_at_once_and_one_without_its_isolation_waits() {
    let stage = Stage::new();
    let refused = stage.start(pod(
        "refused",
        json!({
            "securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]},
            "containers": [{"name": "c", "image": "img:1"}],
        }),
    ));
    eventually("it has failed", || {
        stage.cluster.phase("refused") == Some("Failed".to_owned())
    })
    .await;
    let status = stage.cluster.status("refused").unwrap();
    assert_eq!(status.reason.as_deref(), Some("SysctlForbidden"));
    assert_eq!(stage.cluster.reasons(&refused), ["SysctlForbidden"]);
    // A port of the node that another pod has: only who knows all pods can tell.
    let port = json!({"containers": [{"name": "c", "image": "img:1", "ports": [{"containerPort": 1, "hostPort": 1}]}]});
    let other = pod("other", port.clone());
    let late = pod("late", port);
    let refusal = conflict(&late, [&other]);
    let late = stage.start_refusing(late, refusal);
    eventually("it has failed", || {
        stage.cluster.phase("late") == Some("Failed".to_owned())
    })
    .await;
    let status = stage.cluster.status("late").unwrap();
    assert_eq!(status.reason.as_deref(), Some("NodePorts"));
    assert_eq!(
        status.message.as_deref(),
        Some(
            "Pod was rejected: Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports"
        )
    );
    assert_eq!(stage.cluster.reasons(&late), ["NodePorts"]);
    let unsafe_here = stage.start(pod(
        "p",
        json!({"hostUsers": false, "containers": [{"name": "c", "image": "img:1"}]}),
    ));
    eventually("the failure is on record", || {
        let reasons = stage.cluster.reasons(&unsafe_here);
        reasons.contains(&"FailedCreatePodSandBox")
    })
    .await;
    assert_eq!(stage.runtime.calls(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn images_are_pulled_with_the_credentials_that_fit() {
    let stage = Stage::new();
    let config = json!({"auths": {
        "registry.example": {"username": "anna", "password": "p"},
        "other.example": {"username": "otto", "password": "p"},
    }});
    let secret = json!({
        "metadata": {"name": "keys"}, "type": "kubernetes.io/dockerconfigjson",
        "data": {".dockerconfigjson": k8s_openapi::ByteString(config.to_string().into_bytes())},
    });
    stage
        .cluster
        .put_secret(serde_json::from_value(secret).unwrap());
    stage.runtime.import("registry.example/app");
    let object = stage.start(pod(
        "p",
        json!({
            "imagePullSecrets": [{"name": "lost"}, {"name": "keys"}],
            "containers": [{"name": "c", "image": "registry.example/app", "imagePullPolicy": "Always"}],
        }),
    ));
    eventually("the pod is ready", || stage.is_ready("p")).await;
    let pulls = |calls: Vec<String>| -> Vec<String> {
        let pull = |call: &String| call.starts_with("pull");
        calls.into_iter().filter(pull).collect()
    };
    assert_eq!(
        pulls(stage.runtime.calls()),
        ["pull registry.example/app as anna"]
    );
    let reasons = stage.cluster.reasons(&object);
    assert!(
        reasons.contains(&"FailedToRetrieveImagePullSecret"),
        "what cannot be used is said: {reasons:?}"
    );
}
