//! Changes of a Deployment under requests.

use std::time::Duration;

use keelway_tests::cluster::Cluster;
use keelway_tests::process::{Running, eventually};

use crate::services::replicas;

/// Requests by name, one after another, until [`RequestLoop::finish`].
pub struct RequestLoop<'a> {
    cluster: &'a Cluster,
    running: Running,
}

impl RequestLoop<'_> {
    pub fn start(cluster: &Cluster) -> RequestLoop<'_> {
        let script = "rm -f /tmp/stop; i=0; echo started; \
                      while [ ! -e /tmp/stop ]; do i=$((i+1)); \
                      wget -T 5 -qO /dev/null http://hello/ 2>/tmp/error || echo \"request $i failed: $(cat /tmp/error)\"; done; \
                      echo \"requests: $i\"";
        let running = cluster.kubectl_running(&["exec", "client", "--", "sh", "-c", script]);
        running.line_with("started", Duration::from_secs(10));
        RequestLoop { cluster, running }
    }

    /// Ends the loop; every request of it must have been answered.
    #[track_caller]
    pub fn finish(self) {
        self.cluster.in_client("touch /tmp/stop").ok();
        let lines = self.running.finish(Duration::from_secs(20));
        let [last] = &lines[..] else {
            panic!("requests were lost: {lines:#?}");
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
