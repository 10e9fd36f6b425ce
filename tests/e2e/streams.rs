//! What goes through the API server to pods and back: port-forward, cp, attach, proxy, debug, logs.

use std::time::Duration;

use keelway_tests::cluster::Cluster;
use keelway_tests::process::{eventually, run, run_with_input};
use serde_json::Value;

use crate::kubectl::versioned;

/// A port or an address that a running kubectl tells in a line: what follows `before`, up to a blank.
fn told(line: &str, before: &str) -> String {
    let rest = line.split(before).nth(1).unwrap_or_default();
    rest.split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}

fn get(url: &str) -> String {
    run(
        &[
            "curl",
            "--silent",
            "--show-error",
            "--fail",
            "--max-time",
            "20",
            url,
        ],
        &[],
        30,
    )
    .ok()
}

pub fn port_forward_reaches_a_pod_and_a_service(cluster: &Cluster) {
    for target in ["service/hello", "deployment/hello"] {
        let forward = cluster.kubectl_running(&["port-forward", target, ":80"]);
        let line = forward.line_with("Forwarding from 127.0.0.1:", Duration::from_secs(20));
        let port = told(&line, "127.0.0.1:");
        // One connection after another on the same forward.
        for _ in 0..3 {
            let said = get(&format!("http://127.0.0.1:{port}/"));
            assert!(said.contains("hello-"), "{target}: {said}");
        }
    }
}

pub fn cp_copies_files_and_folders_both_ways(cluster: &Cluster) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    // More than one message of a stream, and no text.
    let bytes: Vec<u8> = (0..3_000_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    std::fs::create_dir(folder.path().join("out")).expect("a folder");
    std::fs::write(folder.path().join("out/large"), &bytes).expect("a file");
    std::fs::write(folder.path().join("out/small"), "small\n").expect("a file");
    cluster
        .kubectl(&["cp", &path("out"), "client:/tmp/copied"])
        .ok();
    assert_eq!(cluster.in_client("cat /tmp/copied/small").ok(), "small\n");
    cluster
        .kubectl(&["cp", "client:/tmp/copied", &path("back")])
        .ok();
    assert!(
        std::fs::read(folder.path().join("back/large")).expect("it came back") == bytes,
        "not the same bytes"
    );
    cluster.in_client("rm -r /tmp/copied").ok();
}

const LISTENER: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: listener}
spec:
  terminationGracePeriodSeconds: 1
  restartPolicy: Never
  containers:
    - name: listener
      image: localhost/keelway/client:${VERSION}
      stdin: true
      stdinOnce: true
      command: [sh, -c, "while read -r line; do echo heard $line; done; echo over"]
"#;

pub fn attach_gives_a_container_its_input_until_it_ends(cluster: &Cluster) {
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], &versioned(LISTENER))
        .ok();
    cluster
        .kubectl(&[
            "wait",
            "--for=condition=Ready",
            "pod/listener",
            "--timeout=60s",
        ])
        .ok();
    let said = cluster
        .kubectl_with_input(&["attach", "-i", "listener"], "one\ntwo\n")
        .ok();
    assert!(said.contains("heard one\nheard two\nover\n"), "{said}");
    // The end of the input was the end of the container.
    cluster
        .kubectl(&[
            "wait",
            "--for=jsonpath={.status.phase}=Succeeded",
            "pod/listener",
            "--timeout=30s",
        ])
        .ok();
    cluster.kubectl(&["delete", "pod", "listener"]).ok();
    // `run` is create, attach, and the exit code of the program.
    let image = versioned("localhost/keelway/client:${VERSION}");
    let image = format!("--image={image}");
    let command = [
        "run",
        "asked",
        &image,
        "--restart=Never",
        "--rm",
        "-i",
        "--quiet",
        "--",
        "sh",
        "-c",
        "cat; exit 3",
    ];
    let finished = cluster.kubectl_with_input(&command, "through run\n");
    assert!(
        !finished.success && finished.stdout.contains("through run"),
        "{finished}"
    );
}

pub fn proxies_lead_to_pods_services_and_nodes(cluster: &Cluster) {
    let raw = |path: &str| cluster.kubectl(&["get", "--raw", path]);
    let pods = cluster.get(&["pods", "--selector", "app=hello"]);
    let pod = pods["items"][0]["metadata"]["name"]
        .as_str()
        .expect("a pod");
    for path in [
        "services/hello:http/proxy/".to_owned(),
        "services/hello:80/proxy/".to_owned(),
        format!("pods/{pod}/proxy/"),
        format!("pods/{pod}:80/proxy/"),
    ] {
        let said = raw(&format!("/api/v1/namespaces/default/{path}")).ok();
        assert!(said.contains("hello-"), "{path}: {said}");
    }
    let refused = raw("/api/v1/namespaces/default/services/hello:81/proxy/").refused();
    assert!(
        refused.contains("no service port 81 found for service"),
        "{refused}"
    );
    let refused = raw(&format!("/api/v1/namespaces/default/pods/{pod}:1/proxy/")).refused();
    assert!(
        refused.contains("error trying to reach service"),
        "{refused}"
    );
    let nodes = cluster.get(&["nodes"]);
    let node = nodes["items"][0]["metadata"]["name"]
        .as_str()
        .expect("a node");
    assert_eq!(
        raw(&format!("/api/v1/nodes/{node}/proxy/healthz")).ok(),
        "ok"
    );
    let logs = raw(&format!("/api/v1/nodes/{node}:10250/proxy/logs/")).ok();
    assert!(logs.contains("href=\"./pods/\""), "{logs}");

    let proxy = cluster.kubectl_running(&["proxy", "--port=0"]);
    let line = proxy.line_with("Starting to serve on ", Duration::from_secs(20));
    let base = format!("http://{}", told(&line, "Starting to serve on "));
    let version: Value = serde_json::from_str(&get(&format!("{base}/version"))).expect("JSON");
    assert!(
        version["gitVersion"]
            .as_str()
            .is_some_and(|version| version.starts_with("v1."))
    );
    let said = get(&format!(
        "{base}/api/v1/namespaces/default/services/hello:http/proxy/?x=1"
    ));
    assert!(said.contains("hello-"), "{said}");
    // Without its last slash the address leads to the one with it.
    let url = format!("{base}/api/v1/namespaces/default/services/hello:http/proxy");
    let head = run(
        &["curl", "--silent", "--head", "--max-time", "20", &url],
        &[],
        30,
    )
    .ok();
    assert!(
        head.contains("301") && head.to_lowercase().contains("hello:http/proxy/"),
        "{head}"
    );
}

pub fn debug_adds_a_container_that_sees_the_others_processes(cluster: &Cluster) {
    let image = versioned("--image=localhost/keelway/client:${VERSION}");
    let pod = cluster.get(&["pods", "--selector", "app=hello"])["items"][0]["metadata"]["name"]
        .as_str()
        .expect("a pod")
        .to_owned();
    let debug = [
        "debug",
        &pod,
        &image,
        "--container=looker",
        "--target=echo",
        "--profile=general",
        "-i",
        "--quiet",
        "--",
    ];
    let script = [
        "sh",
        "-c",
        "read -r line; echo said $line; ps | grep -c '[/]echo'",
    ];
    // The end of the input ends the attachment, not the container.
    cluster
        .kubectl_with_input(&[&debug[..], &script].concat(), "a word\n")
        .ok();
    let status = eventually(
        "the end of the ephemeral container",
        Duration::from_secs(30),
        || {
            let pod = cluster.get(&["pod", &pod]);
            let status = pod["status"]["ephemeralContainerStatuses"][0].clone();
            match status["state"]["terminated"]["exitCode"].as_i64() {
                Some(0) => Ok(status),
                _ => Err(status.to_string()),
            }
        },
    );
    assert_eq!(status["name"], "looker");
    // The pod goes on as before, and its log and the other's can be read.
    assert_eq!(
        cluster.get(&["pod", &pod])["status"]["containerStatuses"][0]["ready"],
        true
    );
    let logs = cluster.kubectl(&["logs", &pod, "-c", "looker"]).ok();
    assert_eq!(
        logs, "said a word\n1\n",
        "the other container's process is seen"
    );
    let refused = cluster
        .kubectl(&[
            "patch",
            "pod",
            &pod,
            "--type=merge",
            "-p",
            r#"{"spec":{"ephemeralContainers":[]}}"#,
        ])
        .refused();
    assert!(
        refused.contains("pod updates may not change fields other than"),
        "{refused}"
    );
    cluster
        .kubectl(&["delete", "pod", &pod, "--wait=false"])
        .ok();
    cluster
        .kubectl(&["rollout", "status", "deploy/hello", "--timeout=60s"])
        .ok();
}

const TALKER: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: talker}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: talker
      image: localhost/keelway/client:${VERSION}
      command: [sh, -c, "echo first; echo complaint >&2; echo last; [ -e /keep/ran ] && exec sleep 1000; touch /keep/ran"]
      volumeMounts: [{name: keep, mountPath: /keep}]
    - name: quiet
      image: localhost/keelway/client:${VERSION}
      command: [sleep, "1000"]
  volumes: [{name: keep, emptyDir: {}}]
"#;

pub fn logs_come_as_their_options_ask(cluster: &Cluster) {
    cluster
        .kubectl_with_input(&["apply", "-f", "-"], &versioned(TALKER))
        .ok();
    cluster
        .kubectl(&[
            "wait",
            "--for=condition=Ready",
            "pod/talker",
            "--timeout=60s",
        ])
        .ok();
    let logs = |options: &[&str]| {
        cluster.kubectl(&[&["logs", "talker", "-c", "talker"], options].concat())
    };
    // The first run has ended, the second runs.
    eventually("a second run", Duration::from_secs(30), || {
        let pod = cluster.get(&["pod", "talker"]);
        match pod["status"]["containerStatuses"]
            .as_array()
            .and_then(|all| all.iter().find(|c| c["name"] == "talker"))
        {
            Some(status) if status["restartCount"] == 1 && status["ready"] == true => Ok(()),
            status => Err(format!("{status:?}")),
        }
    });
    let all = logs(&[]).ok();
    assert_eq!(all.lines().count(), 3, "{all}");
    assert_eq!(logs(&["--previous"]).ok().lines().count(), 3);
    // Which of the two outputs is first is the runtime's to say.
    assert_eq!(logs(&["--limit-bytes=5"]).ok(), all[..5]);
    assert_eq!(logs(&["--tail=0"]).ok(), "");
    let timed = logs(&["--timestamps", "--tail=1"]).ok();
    assert!(timed.starts_with("20") && timed.contains("Z "), "{timed}");
    assert_eq!(logs(&["--since=1h"]).ok(), all);
    assert_eq!(logs(&["--since-time=2100-01-01T00:00:00Z"]).ok(), "");
    let raw = |query: &str| {
        let path = format!("/api/v1/namespaces/default/pods/talker/log?container=talker&{query}");
        cluster.kubectl(&["get", "--raw", &path])
    };
    assert_eq!(raw("stream=Stderr").ok(), "complaint\n");
    assert_eq!(raw("stream=Stdout").ok(), "first\nlast\n");
    let refused = cluster
        .kubectl(&["logs", "talker", "-c", "quiet", "--previous"])
        .refused();
    assert!(
        refused.contains("previous terminated container \"quiet\" in pod \"talker\" not found"),
        "{refused}"
    );
    let refused = cluster
        .kubectl(&["logs", "talker", "-c", "nobody"])
        .refused();
    assert!(
        refused.contains("container nobody is not valid for pod talker"),
        "{refused}"
    );
    cluster.kubectl(&["delete", "pod", "talker"]).ok();
}

pub fn a_terminal_knows_its_size_and_its_programs_exit_code(cluster: &Cluster) {
    // `script` gives kubectl a terminal, of which `stty` says how large it is: soon, as kubectl tells it when the program runs.
    let line = cluster.kubectl_line("exec -it client -- sh -c 'for i in $(seq 100); do stty size 2>/dev/null | grep 33 && break; usleep 50000; done; exit 9'");
    let session = format!("stty rows 33 cols 77; {line}; echo code=$?");
    let said = run_with_input(&["script", "-qec", &session, "/dev/null"], &[], 30, "").ok();
    assert!(said.contains("33 77") && said.contains("code=9"), "{said}");
}
