//! Changes of a Deployment under requests.

use std::time::Duration;

use keelway_tests::cluster::Cluster;
use keelway_tests::process::eventually;
use keelway_tests::request_loop::RequestLoop;

use crate::services::replicas;

pub fn scaling_deleting_and_restarting_lose_no_request(cluster: &Cluster) {
    let requests = RequestLoop::start(cluster);
    let status = ["rollout", "status", "deploy/hello", "--timeout=90s"];

    cluster
        .kubectl(&["scale", "deploy/hello", "--replicas=5"])
        .ok();
    cluster.kubectl(&status).ok();
    assert_eq!(replicas(cluster).len(), 5);

    let victim = replicas(cluster)
        .into_keys()
        .next()
        .expect("there are replicas");
    cluster.kubectl(&["delete", "pod", &victim]).ok();
    eventually(
        "another pod in the deleted one's place",
        Duration::from_secs(30),
        || {
            let now = replicas(cluster);
            if now.len() == 5 && !now.contains_key(&victim) {
                Ok(())
            } else {
                Err(format!("{now:?}"))
            }
        },
    );

    let before = replicas(cluster);
    cluster
        .kubectl(&["rollout", "restart", "deploy/hello"])
        .ok();
    cluster.kubectl(&status).ok();
    let after = replicas(cluster);
    assert!(
        after.keys().all(|pod| !before.contains_key(pod)),
        "{before:?} became {after:?}"
    );

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
    requests.finish();
}

/// What users of the add-on do to upgrade it. Pods that are made meanwhile wait for the next agent, and requests for nobody.
pub fn an_upgrade_of_the_agent_loses_no_request(cluster: &Cluster) {
    let agents = || {
        let pods = cluster.get(&[
            "pods",
            "-n",
            "kube-system",
            "--selector",
            "app.kubernetes.io/name=keelway-agent",
        ]);
        let pods = pods["items"].as_array().cloned().unwrap_or_default();
        pods.iter()
            .map(|pod| pod["metadata"]["uid"].to_string())
            .collect::<Vec<_>>()
    };
    let before = agents();
    let requests = RequestLoop::start(cluster);
    let agent = ["-n", "kube-system", "daemonset/keelway-agent"];
    cluster
        .kubectl(&["rollout", "restart", agent[0], agent[1], agent[2]])
        .ok();
    cluster
        .kubectl(&["scale", "deploy/hello", "--replicas=6"])
        .ok();
    cluster
        .kubectl(&[
            "rollout",
            "status",
            agent[0],
            agent[1],
            agent[2],
            "--timeout=120s",
        ])
        .ok();
    cluster
        .kubectl(&["rollout", "status", "deploy/hello", "--timeout=90s"])
        .ok();
    let after = agents();
    assert_eq!(before.len(), after.len());
    assert!(
        after.iter().all(|agent| !before.contains(agent)),
        "{before:?} became {after:?}"
    );
    cluster
        .kubectl(&["scale", "deploy/hello", "--replicas=3"])
        .ok();
    eventually(
        "three replicas",
        Duration::from_secs(30),
        || match replicas(cluster).len() {
            3 => Ok(()),
            other => Err(format!("{other} pods")),
        },
    );
    requests.finish();
}
