//! kill -9, while traffic goes on.

use std::collections::BTreeMap;
use std::time::Duration;

use keelway_tests::cluster::Cluster;
use keelway_tests::machine::{Process, processes};
use keelway_tests::process::eventually;
use keelway_tests::request_loop::RequestLoop;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::services::{a_service_answers_by_name_from_every_replica, replicas};

/// One request whose body takes ten seconds to send, over one connection to the Service.
const LONG_TRANSFER: &str = "(printf 'POST / HTTP/1.1\\r\\nHost: hello\\r\\nConnection: close\\r\\nContent-Length: 200\\r\\n\\r\\n'; \
                             echo sending >&2; for i in $(seq 200); do printf x; usleep 50000; done; sleep 1) | nc hello 80";

/// Agents have a supervisor and a worker under it: the worker of each node.
fn workers(cluster: &Cluster) -> BTreeMap<String, Process> {
    let mut found = BTreeMap::new();
    for (node, _) in cluster.workers() {
        let all = processes(&format!("{}/{node}", cluster.name), "");
        let is_agent = |pid| {
            all.iter()
                .any(|one| one.pid == pid && one.name == "keelway-agent")
        };
        let worker = all.iter().find(|one| is_agent(one.parent));
        found.extend(worker.map(|worker| (node, worker.clone())));
    }
    found
}

fn kill_now(process: &Process) {
    kill(Pid::from_raw(process.pid), Signal::SIGKILL)
        .unwrap_or_else(|error| panic!("cannot kill {process:?}: {error}"));
}

pub fn a_killed_agent_is_replaced_while_traffic_goes_on(cluster: &Cluster) {
    let before = workers(cluster);
    assert_eq!(
        before.len(),
        cluster.workers().len(),
        "every node has a supervised agent: {before:?}"
    );
    let requests = RequestLoop::start(cluster);
    let transfer = cluster.kubectl_running(&["exec", "client", "--", "sh", "-c", LONG_TRANSFER]);

    for _ in 0..3 {
        let killed = workers(cluster);
        killed.values().for_each(kill_now);
        let replaced = eventually("a new worker on every node", Duration::from_secs(5), || {
            let now = workers(cluster);
            let all_new = killed
                .iter()
                .all(|(node, old)| now.get(node).is_some_and(|new| new.pid != old.pid));
            if all_new {
                Ok(now)
            } else {
                Err(format!("{killed:?} became {now:?}"))
            }
        });
        assert_eq!(replaced.len(), killed.len());
    }

    let answer = transfer.line_with("pod=", Duration::from_secs(30));
    assert!(answer.contains("client="), "{answer}");
    requests.finish();

    // A worker that came back must also bring in what is new.
    cluster
        .kubectl(&["scale", "deploy/hello", "--replicas=4"])
        .ok();
    cluster
        .kubectl(&["rollout", "status", "deploy/hello", "--timeout=60s"])
        .ok();
    assert_eq!(replicas(cluster).len(), 4);
    a_service_answers_by_name_from_every_replica(cluster);
    cluster
        .kubectl(&["scale", "deploy/hello", "--replicas=3"])
        .ok();
    eventually("three replicas", Duration::from_secs(30), || {
        let pods = cluster.get(&["pods", "--selector", "app=hello"]);
        match pods["items"].as_array().map(Vec::len) {
            Some(3) => Ok(()),
            other => Err(format!("{other:?} pods")),
        }
    });
}

pub fn a_killed_control_plane_keeps_traffic_and_every_answered_write(cluster: &Cluster) {
    let control_plane = || {
        let found = processes(&cluster.name, "keelway-control");
        found
            .into_iter()
            .next()
            .ok_or_else(|| "no control plane runs".to_owned())
    };
    let requests = RequestLoop::start(cluster);
    let mut answered = Vec::new();
    for round in 0..2 {
        for number in 0..5 {
            let name = format!("written-{round}-{number}");
            cluster
                .kubectl(&["create", "configmap", &name, "--from-literal=round=yes"])
                .ok();
            answered.push(name);
        }
        let killed = control_plane().unwrap_or_else(|error| panic!("{error}"));
        kill_now(&killed);
        eventually(
            "a new control plane",
            Duration::from_secs(20),
            || match control_plane()? {
                new if new.pid != killed.pid => Ok(()),
                _ => Err("the old one".into()),
            },
        );
        eventually(
            "an API server that is ready",
            Duration::from_secs(30),
            || {
                let ready = cluster.kubectl(&["get", "--raw", "/readyz"]);
                if ready.success {
                    Ok(())
                } else {
                    Err(ready.stderr)
                }
            },
        );
        for name in &answered {
            let map = cluster.get(&["configmap", name]);
            assert_eq!(map["data"]["round"], "yes");
        }
    }
    requests.finish();
    let mut delete = vec!["delete", "configmap"];
    delete.extend(answered.iter().map(String::as_str));
    cluster.kubectl(&delete).ok();
    // Controllers and kubelets go on from where they were.
    let victim = replicas(cluster)
        .into_keys()
        .next()
        .expect("there are replicas");
    cluster.kubectl(&["delete", "pod", &victim]).ok();
    eventually(
        "another pod in the deleted one's place",
        Duration::from_secs(60),
        || {
            let now = replicas(cluster);
            if now.len() == 3 && !now.contains_key(&victim) {
                Ok(())
            } else {
                Err(format!("{now:?}"))
            }
        },
    );
}
