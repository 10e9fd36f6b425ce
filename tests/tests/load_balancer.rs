//! Addresses of load balancers on a link: who answers for them, and who does when that one is gone.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use keelway_agent::net::{Kernel, Netlink};
use keelway_tests::agents::{Pod, Segment, Service, segment, until};
use keelway_tests::sandbox::{Network, Sandbox, ip, is_root};
use serde_json::json;

const VIP: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 200);
/// Within this another node answers for what one answered for that died.
const MOVED_WITHIN: Duration = Duration::from_secs(2);

fn web(endpoints: Vec<(Ipv4Addr, &'static str)>, policy: &str) -> Service {
    Service {
        name: "web",
        address: Ipv4Addr::new(10, 96, 0, 7),
        endpoints,
        spec: json!({"type": "LoadBalancer", "externalTrafficPolicy": policy}),
        balanced: Some(VIP),
    }
}

/// Two nodes that have pools, and a client on their link; `None` without root.
fn topology(test: &str) -> Option<(Sandbox, tempfile::TempDir, Segment)> {
    if !is_root(test) {
        return None;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let pools = dir.path().join("pools.yaml");
    std::fs::write(
        &pools,
        "pools: [{name: link, addresses: [198.18.0.200/29]}]",
    )
    .expect("pools");
    let flags = ["--load-balancer-config", pools.to_str().expect("a path")];
    let mut segment = segment(&sandbox, dir.path(), &flags).expect("a segment");
    segment.cluster.write(&[]).expect("the cluster's file");
    for node in &mut segment.nodes {
        node.start().expect("an agent");
    }
    for node in &segment.nodes {
        node.wait("both on the link", |report| {
            report["linkNodes"] == json!(["node-1", "node-2"])
        })
        .expect("both");
    }
    // Dropped from the last to the first: agents end before what they lie in.
    Some((sandbox, dir, segment))
}

#[test]
fn an_agent_that_stops_hands_over_and_policy_local_stays_with_endpoints() {
    let test = "an_agent_that_stops_hands_over_and_policy_local_stays_with_endpoints";
    let Some((_sandbox, _dir, mut segment)) = topology(test) else {
        return;
    };
    let announces = |segment: &Segment, node: usize| {
        segment.nodes[node]
            .wait("the address", |report| report["announced"] == json!([VIP]))
            .expect("it");
    };
    let pod = segment.nodes[1].add_pod("c").expect("a pod");
    let local = web(vec![(pod.address, "node-2")], "Local");
    segment.cluster.write(&[local]).expect("the file");
    announces(&segment, 1);
    let report = segment.nodes[0].report().expect("a report");
    assert_eq!(report["announced"], json!([]));

    segment
        .cluster
        .write(&[web(vec![(pod.address, "node-2")], "Cluster")])
        .expect("the file");
    let both = |segment: &Segment| {
        let shown = segment
            .nodes
            .each_ref()
            .map(|node| node.report().expect("a report")["announced"] == json!([VIP]));
        shown.iter().position(|announced| *announced)
    };
    let answering = until("one node", || Ok(both(&segment))).expect("a node");
    segment.nodes[answering].stop().expect("it stops");
    announces(&segment, 1 - answering);

    // Nothing is announced that no Service has.
    segment.cluster.write(&[]).expect("the file");
    segment.nodes[1 - answering]
        .wait("silence", |report| report["announced"] == json!([]))
        .expect("silence");
}

/// A connection, and whether its question was answered.
#[derive(Clone, Copy)]
struct Question {
    began: Instant,
    ended: Instant,
    answered: bool,
}

/// A client that connects to the address and asks, again and again.
struct Asking {
    end: Arc<AtomicBool>,
    /// The questions so far.
    asked: Arc<Mutex<Vec<Question>>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Asking {
    /// `patience` is how long one question may take.
    fn from(client: &Network, patience: Duration) -> Self {
        let (end, asked) = (Arc::default(), Arc::default());
        let (stop, heard): (Arc<AtomicBool>, Arc<Mutex<Vec<_>>>) =
            (Arc::clone(&end), Arc::clone(&asked));
        let client = client.try_clone().expect("the client's network");
        let thread = thread::spawn(move || {
            client.run(|| {
                while !stop.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    let answered = ask(patience).is_ok();
                    heard.lock().expect("the list").push(Question {
                        began,
                        ended: Instant::now(),
                        answered,
                    });
                }
            });
        });
        Self {
            end,
            asked,
            thread: Some(thread),
        }
    }

    /// How long after a moment a question was begun that was answered.
    fn answered_after(&self, moment: Instant) -> Duration {
        until("an answer", || {
            let asked = self.asked.lock().expect("the list");
            let later = asked
                .iter()
                .find(|question| question.answered && question.began >= moment);
            Ok(later.map(|question| question.began - moment))
        })
        .expect("an answer")
    }

    /// Ends it: how many questions were answered, and those that were not.
    fn finish(mut self) -> (usize, Vec<Question>) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("no panic");
        }
        let asked = self.asked.lock().expect("the list");
        let (answered, failed): (Vec<Question>, Vec<Question>) =
            asked.iter().partition(|question| question.answered);
        (answered.len(), failed)
    }
}

fn ask(patience: Duration) -> std::io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((VIP, 80)), patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.write_all(b"hello")?;
    let mut buffer = [0; 64];
    match stream.read(&mut buffer)? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// Which node's hardware address the client knows for the balanced address.
fn known_to(client: &Network, segment: &Segment) -> Option<usize> {
    let shown = client.run(|| {
        let address = VIP.to_string();
        let words = ["neigh", "show", &address];
        Command::new("ip").args(words).output().expect("ip")
    });
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    segment.nodes.iter().position(|node| {
        let links = node.host.run(|| {
            let mut kernel = Kernel::new(Netlink::open().expect("netlink"));
            // Interfaces may come meanwhile: the list may change while it is read.
            until("a list of the links", || Ok(kernel.links().ok()))
        });
        let links = links.expect("links");
        let uplink = links.into_iter().find(|link| link.name == "eth0");
        let mac = uplink.and_then(|link| link.mac).expect("an address");
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        shown.contains(&mac)
    })
}

/// The one node that announces the address.
fn announcer(segment: &Segment) -> usize {
    until("one node", || {
        let announce = |node: usize| {
            let report = segment.nodes[node].report().expect("a report");
            report["announced"] == json!([VIP])
        };
        Ok(match (announce(0), announce(1)) {
            (true, false) => Some(0),
            (false, true) => Some(1),
            _ => None,
        })
    })
    .expect("a node")
}

/// A Service whose one endpoint is not on the node that answers for its address. Gives that node, and the endpoint.
fn served_from_the_other_node(segment: &Segment) -> (usize, Pod) {
    segment
        .cluster
        .write(&[web(Vec::new(), "Cluster")])
        .expect("the file");
    let first = announcer(segment);
    let other = &segment.nodes[1 - first];
    let pod = other.add_pod("p").expect("a pod");
    let endpoints = vec![(pod.address, other.name)];
    segment
        .cluster
        .write(&[web(endpoints, "Cluster")])
        .expect("the file");
    segment
        .client
        .run(|| until("an answer", || Ok(ask(Duration::from_secs(1)).ok())))
        .expect("an answer");
    (first, pod)
}

#[test]
fn when_the_answering_nodes_agent_is_killed_another_answers_and_only_what_is_on_its_way_may_fail() {
    let test = "when_the_answering_nodes_agent_is_killed_another_answers";
    let Some((_sandbox, _dir, mut segment)) = topology(test) else {
        return;
    };
    let (first, _pod) = served_from_the_other_node(&segment);
    assert_eq!(known_to(&segment.client, &segment), Some(first));
    // Programs stay when the agent goes: whoever still knows the old way is served by it.
    let asking = Asking::from(&segment.client, Duration::from_secs(3));
    asking.answered_after(Instant::now());
    let killed = Instant::now();
    segment.nodes[first].kill().expect("killed");
    until("the other node's address", || {
        Ok(known_to(&segment.client, &segment).filter(|node| *node == 1 - first))
    })
    .expect("it");
    let seen = Instant::now();
    asking.answered_after(seen);
    let (answered, failed) = asking.finish();
    let moved = seen - killed;
    println!(
        "moved {moved:?} after the kill; {answered} connections answered, {} failed",
        failed.len()
    );
    assert!(moved < MOVED_WITHIN, "moved after {moved:?}");
    // The one connection that is on its way at that moment has its flow on the old node, and is lost.
    assert!(failed.len() <= 1, "{} of {answered}", failed.len());
    for question in failed {
        let spans_the_move = question.began <= seen && question.ended >= killed;
        assert!(spans_the_move, "{:?} after it", question.began - killed);
    }
}

#[test]
fn when_the_answering_node_is_cut_off_another_serves_the_address() {
    let test = "when_the_answering_node_is_cut_off_another_serves_the_address";
    let Some((_sandbox, _dir, segment)) = topology(test) else {
        return;
    };
    let (first, _pod) = served_from_the_other_node(&segment);
    let port = format!("p{}", first + 1);
    let link = |state: &str| {
        let words = format!("link set {port} {state}");
        segment.switch.run(|| ip(&words)).expect("the switch");
    };
    let mut fastest = Duration::MAX;
    for _ in 0..3 {
        until("the first node's address", || {
            Ok(known_to(&segment.client, &segment).filter(|node| *node == first))
        })
        .expect("it");
        let asking = Asking::from(&segment.client, Duration::from_millis(150));
        asking.answered_after(Instant::now());
        link("down");
        let cut = Instant::now();
        let moved = asking.answered_after(cut);
        let (answered, failed) = asking.finish();
        let failed = failed.len();
        println!("served {moved:?} after the cut; {answered} answered, {failed} not");
        // Otherwise nothing was cut: the switch floods frames whose receiver is gone, and they are not the other node's.
        assert!(failed > 0, "no connection was lost");
        assert_eq!(known_to(&segment.client, &segment), Some(1 - first));
        fastest = fastest.min(moved);
        link("up");
        for node in &segment.nodes {
            node.wait("both on the link", |report| {
                report["linkNodes"] == json!(["node-1", "node-2"])
            })
            .expect("both");
        }
        assert_eq!(announcer(&segment), first, "it is its own again");
    }
    assert!(fastest < MOVED_WITHIN, "served after {fastest:?} at best");
}

#[test]
fn wrong_pools_are_refused_at_the_start() {
    let dir = tempfile::tempdir().expect("a folder");
    let pools = dir.path().join("pools.yaml");
    std::fs::write(
        &pools,
        "pools: [{name: a, addresses: [198.18.0.9-198.18.0.1]}]",
    )
    .expect("it");
    let flags = ["--load-balancer-config", pools.to_str().expect("a path")];
    let output = keelway_tests::agents::agent_run(&flags).expect("an agent");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(
        said.contains("pools.yaml") && said.contains("before the first"),
        "{said}"
    );
}
