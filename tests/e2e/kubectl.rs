//! kubectl, as on any cluster.

use std::time::Duration;

use keelway_tests::cluster::Cluster;
use keelway_tests::process::{eventually, run_with_input};

#[track_caller]
pub fn contains_all(text: &str, expected: &[&str]) {
    for word in expected {
        assert!(text.contains(word), "{word:?} is missing in\n{text}");
    }
}

pub fn get_all_lists_what_was_made(cluster: &Cluster) {
    let all = cluster.kubectl(&["get", "all", "--all-namespaces"]).ok();
    contains_all(
        &all,
        &[
            "NAMESPACE",
            "pod/client",
            "pod/hello-",
            "service/hello",
            "service/kubernetes",
            "deployment.apps/hello",
            "replicaset.apps/hello-",
        ],
    );
    if cluster.is_here() {
        contains_all(
            &all,
            &[
                "service/kube-dns",
                "daemonset.apps/keelway-agent",
                "daemonset.apps/keelway-dns",
            ],
        );
    }
    let wide = cluster.kubectl(&["get", "pods", "--output", "wide"]).ok();
    contains_all(
        &wide,
        &[
            "READY", "STATUS", "RESTARTS", "AGE", "IP", "NODE", "1/1", "Running",
        ],
    );
    let nodes = cluster.kubectl(&["get", "nodes"]).ok();
    assert!(
        nodes.lines().skip(1).all(|line| line.contains(" Ready")),
        "{nodes}"
    );
    let resources = cluster.kubectl(&["api-resources"]).ok();
    contains_all(
        &resources,
        &[
            "deployments",
            "endpointslices",
            "leases",
            "priorityclasses",
            "clusterrolebindings",
        ],
    );
    let info = cluster.kubectl(&["cluster-info"]).ok();
    contains_all(&info, &["is running at"]);
}

pub fn describe_tells_of_pods_services_and_nodes(cluster: &Cluster) {
    let pod = cluster.kubectl(&["describe", "pod", "client"]).ok();
    contains_all(
        &pod,
        &[
            "Name:             client",
            "Container ID:",
            "containerd://",
            "Ready:          True",
            "Events:",
            "Started",
        ],
    );
    let service = cluster.kubectl(&["describe", "service", "hello"]).ok();
    contains_all(&service, &["Selector:", "app=hello", "Endpoints:", ":80"]);
    let deployment = cluster.kubectl(&["describe", "deployment", "hello"]).ok();
    contains_all(
        &deployment,
        &[
            "3 desired | 3 updated | 3 total | 3 available",
            "NewReplicaSet:",
            "ScalingReplicaSet",
        ],
    );
    let nodes = cluster.kubectl(&["describe", "nodes"]).ok();
    contains_all(
        &nodes,
        &[
            "Conditions:",
            "KubeletReady",
            "Capacity:",
            "Allocated resources:",
            "hello-",
        ],
    );
}

/// A manifest with the images of this version.
pub fn versioned(manifest: &str) -> String {
    manifest.replace("${VERSION}", env!("CARGO_PKG_VERSION"))
}

const TICKER: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: ticker}
spec:
  terminationGracePeriodSeconds: 1
  restartPolicy: Never
  containers:
    - name: ticker
      image: localhost/keelway/client:${VERSION}
      command: [sh, -c, "i=0; while true; do i=$((i+1)); echo tick $i; usleep 100000; done"]
"#;

pub fn logs_follow_a_running_container(cluster: &Cluster) {
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], &versioned(TICKER))
        .ok();
    cluster
        .kubectl(&[
            "wait",
            "--for=condition=Ready",
            "pod/ticker",
            "--timeout=60s",
        ])
        .ok();
    let logs = cluster.kubectl(&["logs", "ticker"]).ok();
    assert!(logs.starts_with("tick 1\n"), "{logs}");
    let tail = cluster.kubectl(&["logs", "ticker", "--tail=2"]).ok();
    assert_eq!(tail.lines().count(), 2, "{tail}");
    let follow = cluster.kubectl_running(&["logs", "--follow", "ticker", "--tail=1"]);
    let first = follow.line_with("tick ", Duration::from_secs(10));
    let number: u32 = first.trim_start_matches("tick ").parse().expect("a number");
    follow.line_with(&format!("tick {}", number + 10), Duration::from_secs(10));
    cluster.kubectl(&["delete", "pod", "ticker"]).ok();
    // The log of a pod that is gone ends.
    follow.finish(Duration::from_secs(20));
}

pub fn exec_runs_programs_with_input_status_and_terminal(cluster: &Cluster) {
    let output = cluster
        .kubectl_with_input(
            &["exec", "-i", "client", "--", "cat"],
            "through standard input\n",
        )
        .ok();
    assert_eq!(output, "through standard input\n");
    let refused = cluster.in_client("echo to stderr >&2; exit 7").refused();
    contains_all(&refused, &["to stderr", "exit code 7"]);
    // `script` gives kubectl a terminal, as a person has one.
    let line = cluster.kubectl_line("exec -it client -- sh");
    let session = run_with_input(
        &["script", "-qec", &line, "/dev/null"],
        &[],
        30,
        "tty; echo answer=$((6*7))\nexit\n",
    )
    .ok();
    contains_all(&session, &["/dev/pts/", "answer=42"]);
}

pub fn get_watch_reports_changes_as_they_happen(cluster: &Cluster) {
    let watch = cluster.kubectl_running(&["get", "pods", "--watch", "--selector", "run=watched"]);
    let manifest =
        versioned(TICKER).replace("name: ticker}", "name: watched, labels: {run: watched}}");
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], &manifest)
        .ok();
    watch.line_with("Running", Duration::from_secs(30));
    cluster.kubectl(&["delete", "pod", "watched"]).ok();
    watch.line_with("Terminating", Duration::from_secs(10));
}

pub fn labels_scale_and_wait_work_together(cluster: &Cluster) {
    cluster
        .kubectl(&["label", "pod", "client", "purpose=asking"])
        .ok();
    let listed = cluster
        .kubectl(&[
            "get",
            "pods",
            "--selector",
            "purpose=asking",
            "--output",
            "name",
        ])
        .ok();
    assert_eq!(listed, "pod/client\n");
    let refused = cluster
        .kubectl(&["label", "pod", "client", "purpose=another"])
        .refused();
    assert!(refused.contains("already has a value"), "{refused}");
    cluster
        .kubectl(&["label", "pod", "client", "purpose-"])
        .ok();
    cluster
        .kubectl(&["scale", "deploy/hello", "--replicas=2"])
        .ok();
    cluster
        .kubectl(&[
            "wait",
            "--for=jsonpath={.status.replicas}=2",
            "deploy/hello",
            "--timeout=60s",
        ])
        .ok();
    cluster
        .kubectl(&["scale", "deploy/hello", "--replicas=3"])
        .ok();
    cluster
        .kubectl(&["rollout", "status", "deploy/hello", "--timeout=60s"])
        .ok();
    let history = cluster
        .kubectl(&[
            "get",
            "replicasets",
            "--selector",
            "app=hello",
            "--output",
            "name",
        ])
        .ok();
    assert_eq!(history.lines().count(), 1, "{history}");
}

const CONFIGURED: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: configured}
spec:
  terminationGracePeriodSeconds: 1
  restartPolicy: Never
  initContainers:
    - name: before
      image: localhost/keelway/client:${VERSION}
      command: [sh, -c, "echo made before > /work/note"]
      volumeMounts: [{name: work, mountPath: /work}]
  containers:
    - name: main
      image: localhost/keelway/client:${VERSION}
      command: [sh, -c, "cat /work/note /config/greeting /secret/word; echo \"$FROM_MAP on $NODE\"; cat /var/run/secrets/kubernetes.io/serviceaccount/namespace"]
      env:
        - {name: FROM_MAP, valueFrom: {configMapKeyRef: {name: greetings, key: greeting}}}
        - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
      volumeMounts:
        - {name: work, mountPath: /work}
        - {name: config, mountPath: /config}
        - {name: secret, mountPath: /secret}
  volumes:
    - {name: work, emptyDir: {}}
    - {name: config, configMap: {name: greetings}}
    - {name: secret, secret: {secretName: words}}
"#;

pub fn configuration_reaches_containers_as_files_and_environment(cluster: &Cluster) {
    cluster
        .kubectl(&[
            "create",
            "configmap",
            "greetings",
            "--from-literal=greeting=good day",
        ])
        .ok();
    cluster
        .kubectl(&[
            "create",
            "secret",
            "generic",
            "words",
            "--from-literal=word=open sesame",
        ])
        .ok();
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], &versioned(CONFIGURED))
        .ok();
    eventually("the pod to complete", Duration::from_secs(60), || {
        let pod = cluster.get(&["pod", "configured"]);
        match pod["status"]["phase"].as_str() {
            Some("Succeeded") => Ok(()),
            phase => Err(format!("{phase:?}")),
        }
    });
    let logs = cluster.kubectl(&["logs", "configured"]).ok();
    let node = cluster.get(&["pod", "configured"])["spec"]["nodeName"]
        .as_str()
        .expect("it ran")
        .to_owned();
    assert_eq!(
        logs,
        format!("made before\ngood dayopen sesamegood day on {node}\ndefault")
    );
    cluster
        .kubectl(&[
            "delete",
            "pod/configured",
            "configmap/greetings",
            "secret/words",
        ])
        .ok();
}
