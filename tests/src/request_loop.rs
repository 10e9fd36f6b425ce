//! Requests that go on while something else happens to a cluster.

use std::time::Duration;

use crate::cluster::Cluster;
use crate::process::eventually;

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
