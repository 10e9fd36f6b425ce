//! The API server away, with connections that hang: what pods ask meanwhile is answered.

use std::thread;
use std::time::Duration;

use keelway_tests::cluster::Cluster;
use keelway_tests::machine::processes;
use keelway_tests::process::eventually;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::names::address_of_hello;

/// How long it is away, in seconds; ten minutes is what was asked for, and more than CI has.
const AWAY_S: &str = "KEELWAY_DNS_AWAY_S";
const AWAY_S_DEFAULT: u64 = 8;

/// A process that stands still, and goes on at the end.
struct Stopped(Pid);

impl Stopped {
    fn start(pid: Pid) -> Self {
        kill(pid, Signal::SIGSTOP).expect("it can be stopped");
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// Questions of a pod, round by round, until there is a file that says that it is enough; a line for each wrong answer, and one at the end. What
/// is answered at the pod's interface, what by a server, what by way of the search path, and what is denied.
fn asking(address: &str) -> String {
    let name = "hello.default.svc.cluster.local";
    format!(
        "rm -f /tmp/enough /tmp/asked; \
         is() {{ want=$1; shift; got=$(dig +short +tries=1 +time=4 $* 2>&1); [ \"$got\" = \"$want\" ] || echo \"round $i: $*: $got\"; }}; \
         i=0; (while [ ! -e /tmp/enough ]; do i=$((i+1)); \
         is {address} {name}; is {name}. -x {address}; is {address} +search hello.default; is '' absent.default.svc.cluster.local; \
         busybox nslookup hello 2>&1 | grep -q {address} || echo \"round $i: nslookup\"; \
         done; echo \"rounds: $i\") </dev/null >/tmp/asked 2>&1 &"
    )
}

pub fn pods_resolve_names_while_the_api_server_is_away(cluster: &Cluster) {
    let away_s = std::env::var(AWAY_S).ok();
    let away_s = away_s.map_or(AWAY_S_DEFAULT, |text| text.parse().expect("seconds"));
    let address = address_of_hello(cluster);
    let found = processes(&cluster.name, "keelway-control");
    let server = found.first().expect("a control plane runs");
    cluster.in_client(&asking(&address)).ok();
    let stopped = Stopped::start(Pid::from_raw(server.pid));
    thread::sleep(Duration::from_secs(away_s));
    drop(stopped);
    eventually("the API server", Duration::from_secs(60), || {
        let ready = cluster.kubectl(&["get", "--raw", "/readyz", "--request-timeout=5s"]);
        if ready.success {
            Ok(())
        } else {
            Err(ready.to_string())
        }
    });
    cluster.in_client("touch /tmp/enough").ok();
    let log = eventually("the last round", Duration::from_secs(30), || match cluster
        .in_client("cat /tmp/asked")
        .ok()
    {
        log if log.contains("rounds: ") => Ok(log),
        log => Err(log),
    });
    let [last] = log.lines().collect::<Vec<_>>()[..] else {
        panic!("wrong answers while it was away:\n{log}");
    };
    let rounds = last
        .strip_prefix("rounds: ")
        .and_then(|text| text.parse().ok());
    assert!(rounds.is_some_and(|rounds: u64| rounds > away_s), "{last}");
    println!("         away for {away_s} s, {last}, all answered");
    // What has happened since is told by the same server, and the next ones find the cluster as it was.
    cluster
        .kubectl(&["create", "service", "clusterip", "back", "--tcp=80"])
        .ok();
    let asked = "dig +short back.default.svc.cluster.local";
    eventually(
        "a name that is new",
        Duration::from_secs(30),
        || match cluster.in_client(asked).ok() {
            found if !found.trim().is_empty() => Ok(()),
            found => Err(found),
        },
    );
    cluster.kubectl(&["delete", "service", "back"]).ok();
    cluster
        .kubectl(&[
            "wait",
            "--for=condition=Ready",
            "nodes",
            "--all",
            "--timeout=60s",
        ])
        .ok();
}
