//! Changes of a Deployment under requests.

use std::time::Duration;

use keelway_tests::cluster::Cluster;
use keelway_tests::process::eventually;

use crate::services::replicas;

/// Requests by name, one after another, until [`RequestLoop::finish`]. They go on in the client pod by themselves: a session of
/// kubectl would end with the API server.
pub struct RequestLoop<'a> {
    cluster: &'a Cluster,
}

const REQUESTS: &str = "rm -f /tmp/stop /tmp/requests; i=0; (while [ ! -e /tmp/stop ]; do i=$((i+1)); \
                        wget -T 5 -qO /dev/null http://hello/ 2>/tmp/error || echo \"request $i failed: $(cat /tmp/error)\"; \
                        done; echo \"requests: $i\") </dev/null >/tmp/requests 2>&1 &";

impl RequestLoop<'_> {
    pub fn start(cluster: &Cluster) -> RequestLoop<'_> {
        cluster.in_client(REQUESTS).ok();
        RequestLoop { cluster }
    }

    /// Ends the loop; every request of it must have been answered.
    #[track_caller]
    pub fn finish(self) {
        self.cluster.in_client("touch /tmp/stop").ok();
        let log = eventually("the loop's end", Duration::from_secs(20), || {
            let log = self.cluster.in_client("cat /tmp/requests").ok();
            if log.contains("requests: ") {
                Ok(log)
            } else {
                Err(log)
            }
        });
        let [last] = log.lines().collect::<Vec<_>>()[..] else {
            panic!("requests were lost:\n{log}");
        };
        let count: u32 = last
            .strip_prefix("requests: ")
            .and_then(|count| count.parse().ok())
            .unwrap_or(0);
        assert!(count > 20, "{last}");
        println!("         {last}, all answered");
    }
}

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
