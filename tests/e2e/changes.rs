//! What people change with kubectl, and how they look at it first: explain, diff, edit, patch, apply, rollout, drain.

use std::time::Duration;

use keelway_tests::cluster::Cluster;
use keelway_tests::process::eventually;
use serde_json::Value;

use crate::kubectl::{contains_all, versioned};

const SETTINGS: &str = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {color: blue, size: small}\n";

fn data(cluster: &Cluster) -> Value {
    cluster.get(&["configmap", "settings"])["data"].clone()
}

pub fn explain_tells_fields_with_their_meaning(cluster: &Cluster) {
    let all = cluster
        .kubectl(&["explain", "deployment", "--recursive"])
        .ok();
    contains_all(
        &all,
        &[
            "GROUP:      apps",
            "rollingUpdate",
            "maxSurge",
            "<DeploymentSpec>",
        ],
    );
    let field = cluster
        .kubectl(&["explain", "pod.spec.terminationGracePeriodSeconds"])
        .ok();
    contains_all(&field, &["<integer>", "DESCRIPTION:"]);
}

pub fn patches_of_three_types_and_a_diff(cluster: &Cluster) {
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], SETTINGS)
        .ok();
    let changed = SETTINGS.replace("blue", "green");
    let diff = cluster.kubectl_with_input(&["diff", "-f", "-"], &changed);
    assert!(!diff.success, "a difference is an exit code of 1");
    contains_all(&diff.stdout, &["-  color: blue", "+  color: green"]);
    cluster
        .kubectl_with_input(&["diff", "-f", "-"], SETTINGS)
        .ok();
    let patch = |kind: &str, patch: &str| {
        cluster.kubectl(&["patch", "configmap", "settings", kind, "-p", patch])
    };
    patch("--type=merge", r#"{"data":{"size":null,"shape":"round"}}"#).ok();
    assert_eq!(
        data(cluster),
        serde_json::json!({"color": "blue", "shape": "round"})
    );
    patch(
        "--type=json",
        r#"[{"op":"replace","path":"/data/color","value":"red"}]"#,
    )
    .ok();
    let refused = patch(
        "--type=json",
        r#"[{"op":"test","path":"/data/color","value":"blue"}]"#,
    )
    .refused();
    assert!(!refused.is_empty());
    let containers = r#"{"spec":{"template":{"spec":{"containers":[{"name":"echo","env":[{"name":"ADDED","value":"1"}]}]}}}}"#;
    let dry = [
        "patch",
        "deployment",
        "hello",
        "--type=strategic",
        "--dry-run=server",
        "-o",
        "json",
        "-p",
        containers,
    ];
    let merged: Value = serde_json::from_str(&cluster.kubectl(&dry).ok()).expect("JSON");
    let env = merged["spec"]["template"]["spec"]["containers"][0]["env"]
        .as_array()
        .expect("env")
        .clone();
    let names: Vec<&str> = env
        .iter()
        .filter_map(|variable| variable["name"].as_str())
        .collect();
    assert!(
        names.contains(&"ADDED") && names.contains(&"POD_NAME"),
        "{names:?}"
    );
}

pub fn edit_saves_what_the_editor_leaves(cluster: &Cluster) {
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], SETTINGS)
        .ok();
    let kubectl = keelway_tests::cluster::client("kubectl");
    let edit = |editor: &str| {
        let editor = [("KUBE_EDITOR", editor)];
        cluster.run(&[&kubectl, "edit", "configmap", "settings"], &editor)
    };
    let said = edit("sed -i s/blue/yellow/").ok();
    assert!(said.contains("edited"), "{said}");
    assert_eq!(data(cluster)["color"], "yellow");
    let said = edit("true");
    assert!(
        said.stdout.contains("no changes") || said.stderr.contains("no changes"),
        "{said}"
    );
}

pub fn apply_on_the_server_side_keeps_each_managers_fields(cluster: &Cluster) {
    cluster
        .kubectl(&["delete", "configmap", "settings", "--ignore-not-found"])
        .ok();
    let apply = |manager: &str, manifest: &str, more: &[&str]| {
        let manager = format!("--field-manager={manager}");
        let command = [&["apply", "--server-side", &manager, "-f", "-"], more].concat();
        cluster.kubectl_with_input(&command, manifest)
    };
    apply("painter", SETTINGS, &[]).ok();
    let green = SETTINGS.replace("blue", "green");
    let refused = apply("decorator", &green, &[]).refused();
    contains_all(&refused, &["conflict", "painter", ".data.color"]);
    apply("decorator", &green, &["--force-conflicts"]).ok();
    // The first manager gives up a field; the other still wants it.
    let without_color = SETTINGS.replace("color: blue, ", "");
    apply("painter", &without_color, &[]).ok();
    assert_eq!(data(cluster)["color"], "green");
    apply("decorator", &without_color.replace("size: small", ""), &[]).ok();
    assert_eq!(data(cluster), serde_json::json!({"size": "small"}));
    cluster.kubectl(&["delete", "configmap", "settings"]).ok();
}

pub fn a_rollout_is_watched_paused_and_undone(cluster: &Cluster) {
    let rollout = |arguments: &[&str]| cluster.kubectl(&[&["rollout"], arguments].concat());
    let status = || rollout(&["status", "deploy/hello", "--timeout=90s"]).ok();
    let variable = || {
        let deployment = cluster.get(&["deployment", "hello"]);
        let container = &deployment["spec"]["template"]["spec"]["containers"][0];
        let env = container["env"].as_array().cloned().unwrap_or_default();
        env.iter().any(|variable| variable["name"] == "ROLLED")
    };
    rollout(&["pause", "deploy/hello"]).ok();
    cluster
        .kubectl(&["set", "env", "deploy/hello", "ROLLED=1"])
        .ok();
    let templates = || {
        cluster.get(&["replicasets", "--selector", "app=hello"])["items"]
            .as_array()
            .map_or(0, Vec::len)
    };
    let before = templates();
    rollout(&["resume", "deploy/hello"]).ok();
    status();
    assert!(
        variable() && templates() == before + 1,
        "a new ReplicaSet after the resume"
    );
    rollout(&["undo", "deploy/hello"]).ok();
    status();
    assert!(!variable());
    contains_all(&rollout(&["history", "deploy/hello"]).ok(), &["REVISION"]);
}

pub fn drain_empties_a_node_and_uncordon_opens_it(cluster: &Cluster) {
    let pods = cluster.get(&["pods", "--selector", "app=hello"]);
    // One that goes already, as those of the last rollout may, is no reason for a drain to be held.
    let pods = pods["items"].as_array().into_iter().flatten();
    let mut staying = pods.filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
    let node = staying.next().expect("one that stays")["spec"]["nodeName"]
        .as_str()
        .expect("it runs")
        .to_owned();
    let here = |cluster: &Cluster| {
        let field = format!("--field-selector=spec.nodeName={node}");
        let pods = cluster.get(&["pods", "--selector", "app=hello", &field]);
        pods["items"].as_array().map_or(0, Vec::len)
    };
    // A budget that nothing satisfies holds the drain; a client asks again every few seconds.
    let budget = "apiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: all-of-hello}\nspec: {minAvailable: 100, selector: {matchLabels: {app: hello}}}\n";
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], budget)
        .ok();
    let status = r#"{"status":{"observedGeneration":1,"disruptionsAllowed":0,"currentHealthy":3,"desiredHealthy":100,"expectedPods":3}}"#;
    let patch = [
        "patch",
        "poddisruptionbudget",
        "all-of-hello",
        "--subresource=status",
        "--type=merge",
        "-p",
        status,
    ];
    cluster.kubectl(&patch).ok();
    let drain = [
        "drain",
        &node,
        "--ignore-daemonsets",
        "--delete-emptydir-data",
        "--force",
        "--pod-selector=app=hello",
    ];
    let held = cluster.kubectl(&[&drain[..], &["--timeout=6s"]].concat());
    assert!(!held.success, "{held}");
    contains_all(
        &held.stderr,
        &["Cannot evict pod as it would violate the pod's disruption budget"],
    );
    cluster
        .kubectl(&["delete", "poddisruptionbudget", "all-of-hello"])
        .ok();
    cluster
        .kubectl(&[&drain[..], &["--timeout=60s"]].concat())
        .ok();
    assert_eq!(here(cluster), 0);
    assert_eq!(cluster.get(&["node", &node])["spec"]["unschedulable"], true);
    cluster.kubectl(&["uncordon", &node]).ok();
    cluster
        .kubectl(&["rollout", "status", "deploy/hello", "--timeout=60s"])
        .ok();
}

pub fn questions_about_access_and_metrics_are_answered(cluster: &Cluster) {
    assert_eq!(
        cluster.kubectl(&["auth", "can-i", "create", "pods"]).ok(),
        "yes\n"
    );
    let token = cluster
        .kubectl(&["create", "token", "default", "--duration=20m"])
        .ok();
    assert_eq!(token.trim().split('.').count(), 3, "{token}");
    let top = cluster.kubectl(&["top", "nodes"]).refused();
    contains_all(&top, &["Metrics API not available"]);
    assert_eq!(cluster.kubectl(&["get", "--raw", "/readyz"]).ok(), "ok");
    let resources = cluster.kubectl(&["get", "--raw", "/api/v1"]).ok();
    contains_all(
        &resources,
        &[
            "pods/eviction",
            "pods/ephemeralcontainers",
            "pods/resize",
            "services/proxy",
        ],
    );
}

const SIZED: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: sized}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: sized
      image: localhost/keelway/client:${VERSION}
      command: [sleep, "1000"]
      resources: {requests: {cpu: 100m, memory: 32Mi}, limits: {cpu: 200m, memory: 32Mi}}
"#;

pub fn a_running_pod_is_resized_in_place(cluster: &Cluster) {
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], &versioned(SIZED))
        .ok();
    cluster
        .kubectl(&[
            "wait",
            "--for=condition=Ready",
            "pod/sized",
            "--timeout=60s",
        ])
        .ok();
    let patch = r#"{"spec":{"containers":[{"name":"sized","resources":{"limits":{"cpu":"400m","memory":"64Mi"}}}]}}"#;
    cluster
        .kubectl(&["patch", "pod", "sized", "--subresource=resize", "-p", patch])
        .ok();
    let status = eventually("the new limits", Duration::from_secs(30), || {
        let pod = cluster.get(&["pod", "sized"]);
        let status = pod["status"]["containerStatuses"][0].clone();
        match status["resources"]["limits"]["memory"].as_str() {
            Some("64Mi") => Ok(status),
            _ => Err(status.to_string()),
        }
    });
    assert_eq!(status["restartCount"], 0, "{status}");
    assert_eq!(status["resources"]["limits"]["cpu"], "400m");
    let refused = cluster
        .kubectl(&[
            "patch",
            "pod",
            "sized",
            "-p",
            r#"{"spec":{"containers":[{"name":"sized","resources":{"limits":{"cpu":"1"}}}]}}"#,
        ])
        .refused();
    assert!(
        refused.contains("pod updates may not change fields other than"),
        "{refused}"
    );
    cluster.kubectl(&["delete", "pod", "sized"]).ok();
}
