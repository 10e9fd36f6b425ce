//! Pods on a real containerd, which runs in namespaces of its own; the cluster is in memory.
//!
//! The test runs itself again inside fresh mount, network, IPC and PID namespaces. When that process ends, the kernel
//! ends everything that it started; only its cgroups are left to remove.

mod fake;
mod node;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use fake::pod;
use futures::StreamExt;
use keelway_kubelet::logs::{Selection, stream};
use keelway_kubelet::runtime::{ContainerPhase, Runtime};
use node::{IMAGE, Node, POD_IP, soon};
use serde_json::json;

const FOLDER: &str = "KEELWAY_KUBELET_TEST_FOLDER";

#[test]
fn pods_live_and_end_on_a_real_containerd() {
    if !nix::unistd::Uid::effective().is_root() {
        println!("skipped: needs root");
        return;
    }
    for program in ["containerd", "runc", "busybox", "unshare", "tar", "ip"] {
        let found = Command::new(program).arg("--help").output();
        if found.is_err() {
            println!("skipped: needs {program}");
            return;
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let inside = Command::new("unshare")
        .args([
            "--mount",
            "--net",
            "--ipc",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--",
        ])
        .arg(std::env::current_exe().unwrap())
        .args(["inside", "--exact", "--ignored", "--nocapture"])
        .env(FOLDER, folder.path())
        .output()
        .unwrap();
    node::remove_cgroups(folder.path());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let containerd =
        std::fs::read_to_string(folder.path().join("containerd.log")).unwrap_or_default();
    let last: Vec<_> = containerd.lines().rev().take(15).collect();
    assert!(
        inside.status.success(),
        "{}\n{}\ncontainerd, last first: {last:#?}",
        text(&inside.stdout),
        text(&inside.stderr)
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "runs in namespaces that pods_live_and_end_on_a_real_containerd makes"]
async fn inside() {
    let Ok(folder) = std::env::var(FOLDER) else {
        println!("skipped: needs the namespaces of pods_live_and_end_on_a_real_containerd");
        return;
    };
    let mut node = Node::start(Path::new(&folder)).await;
    node.cluster.put_config_map("cm", "greeting", "hello");
    whole_life_of_a_pod(&mut node).await;
    an_end_is_noticed_at_once(&node).await;
    logs_can_be_read(&node).await;
    who_fills_the_disk_is_evicted(&node).await;
}

async fn whole_life_of_a_pod(node: &mut Node) {
    let said = node.folder.join("said");
    let script = format!(
        "trap 'echo bye > {}; exit 0' TERM; while :; do sleep 0.1; done",
        said.display()
    );
    let mut object = pod(
        "life",
        json!({
            "terminationGracePeriodSeconds": 20,
            "initContainers": [{
                "name": "i", "image": IMAGE, "command": ["sh", "-c", "echo $GREETING > /w/f"],
                "env": [{"name": "GREETING", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "greeting"}}}],
                "resources": {"limits": {"memory": "64Mi", "cpu": "500m"}},
                "volumeMounts": [{"name": "w", "mountPath": "/w"}],
            }],
            "containers": [{
                "name": "c", "image": IMAGE, "command": ["sh", "-c", script],
                "resources": {"limits": {"memory": "64Mi", "cpu": "500m"}},
                "readinessProbe": {"exec": {"command": ["sh", "-c", "grep -q hello /w/f"]}},
                "volumeMounts": [
                    {"name": "w", "mountPath": "/w", "subPath": "."}, {"name": "m", "mountPath": "/m"},
                    {"name": "cm", "mountPath": "/cm"}, {"name": "host", "mountPath": node.folder},
                ],
            }],
            "volumes": [
                {"name": "w", "emptyDir": {}}, {"name": "m", "emptyDir": {"medium": "Memory"}},
                {"name": "cm", "configMap": {"name": "cm"}}, {"name": "host", "hostPath": {"path": node.folder, "type": "Directory"}},
            ],
        }),
    );
    node.start_pod(&object);
    soon("the pod is ready", || node.is_ready("life")).await;
    let status = node.cluster.status("life").unwrap();
    assert_eq!(status.pod_ip.as_deref(), Some(POD_IP));
    assert_eq!(status.qos_class.as_deref(), Some("Guaranteed"));

    let id = node.running("life", "c").await.unwrap();
    for (command, output) in [
        ("cat /w/f /cm/greeting", "hello\nhello"),
        ("grep -c ' /m tmpfs' /proc/mounts", "1\n"),
        ("grep -c life /etc/hosts", "1\n"),
        (
            "head -1 /etc/resolv.conf",
            "search default.svc.cluster.local svc.cluster.local cluster.local\n",
        ),
        ("hostname", "life\n"),
    ] {
        let command = ["sh", "-c", command].map(str::to_owned).to_vec();
        assert_eq!(
            node.runtime
                .exec(&id, command.clone(), 5)
                .await
                .unwrap()
                .output,
            output,
            "{command:?}"
        );
    }
    node.assert_memory_limit("uid-life", 64 << 20);

    node.cluster.put_config_map("cm", "greeting", "goodbye");
    let file = node.volume("life", "kubernetes.io~configmap/cm/greeting");
    soon("the file follows the ConfigMap", || {
        std::fs::read_to_string(&file).is_ok_and(|text| text == "goodbye")
    })
    .await;

    object.status = node.cluster.status("life");
    node.kill_workers();
    node.start_pod(&object);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(
        node.running("life", "c").await,
        Some(id),
        "what runs is adopted"
    );
    assert!(node.is_ready("life"));

    node.mark_deleted(&mut object, 20);
    node.update(object);
    soon("the object is removed", || node.cluster.is_deleted("life")).await;
    assert_eq!(
        std::fs::read_to_string(&said).unwrap(),
        "bye\n",
        "the container was asked to end"
    );
    node.assert_nothing_left("life").await;
}

async fn an_end_is_noticed_at_once(node: &Node) {
    let object = pod(
        "job",
        json!({
            "restartPolicy": "Never",
            "containers": [{
                "name": "c", "image": IMAGE,
                "command": ["sh", "-c", "sleep 0.5; echo -n the reason > /dev/termination-log; exit 3"],
            }],
        }),
    );
    node.start_pod(&object);
    soon("it has failed", || {
        node.cluster.phase("job") == Some("Failed".to_owned())
    })
    .await;
    let status = node
        .cluster
        .status("job")
        .unwrap()
        .container_statuses
        .unwrap()
        .remove(0);
    let end = status.state.unwrap().terminated.unwrap();
    assert_eq!(
        (end.exit_code, end.message.as_deref(), end.reason.as_deref()),
        (3, Some("the reason"), Some("Error"))
    );
    let view = node.runtime.observe("uid-job").await.unwrap();
    let ended_at_ns = i128::from(view.containers[0].finished_at_ns);
    let late_ms = (node.reported_at("job").as_nanosecond() - ended_at_ns) / 1_000_000;
    // Without announcements it would be seconds.
    assert!(late_ms < 900, "reported {late_ms} ms after the end");
}

async fn logs_can_be_read(node: &Node) {
    let object = pod(
        "talk",
        json!({
            "hostNetwork": true,
            "containers": [{"name": "c", "image": IMAGE, "command": ["sh", "-c", "echo one; echo two >&2; sleep 100"]}],
        }),
    );
    node.start_pod(&object);
    soon("it runs", || node.is_ready("talk")).await;
    assert_eq!(
        node.cluster.status("talk").unwrap().pod_ip.as_deref(),
        Some("127.0.0.1")
    );
    let view = node.runtime.observe("uid-talk").await.unwrap();
    let run = view
        .containers
        .iter()
        .find(|c| c.phase == ContainerPhase::Running)
        .unwrap();
    let selection = Selection {
        follow: true,
        ..Default::default()
    };
    let mut log = Box::pin(stream(
        run.log_path.clone().into(),
        selection,
        Box::pin(std::future::pending()),
    ));
    let mut text = Vec::new();
    while text.len() < "one\ntwo\n".len() {
        let piece = tokio::time::timeout(Duration::from_secs(10), log.next()).await;
        text.extend(piece.expect("the log is written").unwrap().unwrap());
    }
    // Two pipes have no order between them.
    let mut lines: Vec<_> = std::str::from_utf8(&text).unwrap().lines().collect();
    lines.sort();
    assert_eq!(lines, ["one", "two"]);
}

/// The snapshotter here makes whole copies of images, which no container has written.
async fn who_fills_the_disk_is_evicted(node: &Node) {
    let script = |fill: &str| json!(["sh", "-c", format!("{fill}; sleep 100")]);
    let limits = json!({"limits": {"ephemeral-storage": "64Ki"}});
    node.start_pod(&pod(
        "modest",
        json!({
            "hostNetwork": true,
            "containers": [{"name": "c", "image": IMAGE, "command": script("true"), "resources": limits}],
        }),
    ));
    let fill = "dd if=/dev/zero of=/w/f bs=1M count=3";
    node.start_pod(&pod(
        "full",
        json!({
            "hostNetwork": true,
            "containers": [{
                "name": "c", "image": IMAGE, "command": script(fill), "volumeMounts": [{"name": "w", "mountPath": "/w"}],
            }],
            "volumes": [{"name": "w", "emptyDir": {"sizeLimit": "2Mi"}}],
        }),
    ));
    soon("the other one is ready", || node.is_ready("modest")).await;
    soon("it has failed", || {
        node.cluster.phase("full") == Some("Failed".to_owned())
    })
    .await;
    let status = node.cluster.status("full").unwrap();
    assert_eq!(status.reason.as_deref(), Some("Evicted"));
    let message = status.message.unwrap();
    assert!(
        message.starts_with("Usage of EmptyDir volume \"w\""),
        "{message}"
    );
    assert!(node.is_ready("modest"));
}
