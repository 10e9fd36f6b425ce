//! Services of both families under churn: pods, endpoints and Services come and go, workers are killed every 20 s and supervisors now
//! and then. No client sees a request fail but those that are on their way to an endpoint that dies without notice, from its death until
//! it is out of every node's maps. `KEELWAY_SOAK_S` says for how many seconds, `KEELWAY_SOAK_SEED` with which numbers. A minute or less
//! kills more often, so that a short run sees it all.

mod asking;
mod churn;
mod explain;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use keelway_tests::agents::{DUAL_STACK_RANGES, dual_stack_segment, until};
use keelway_tests::dice::{Dice, soak};
use keelway_tests::nodes::{self, ask};
use keelway_tests::sandbox::{Network, Sandbox, is_root};

use asking::{Failure, KINDS, Kind, Tally, carry_out, get, open, read_tally, run, since_epoch};
use churn::{BACKENDS, Churn, NODE_PORT, WEB, WEB_V6};
use explain::Record;

#[test]
fn client() {
    nodes::client(carry_out);
}

#[test]
fn whatever_changes_and_whoever_is_killed_no_request_fails() {
    if !is_root("whatever_changes_and_whoever_is_killed_no_request_fails") {
        return;
    }
    let (seconds, seed) = soak(25);
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let mut segment =
        dual_stack_segment(&sandbox, dir.path(), &DUAL_STACK_RANGES).expect("a segment");
    segment.cluster.write(&[]).expect("the cluster's file");
    for node in &mut segment.nodes {
        node.start().expect("an agent");
    }
    let clients = [
        segment.nodes[0].wire("client-1").expect("a pod"),
        segment.nodes[1].wire("client-2").expect("a pod"),
    ];
    let group = segment.nodes[0].cgroup.path().display().to_string();
    let beside = segment.client.try_clone().expect("the client's network");
    let hosts = [0, 1].map(|node| segment.nodes[node].host.try_clone().expect("a host"));
    let mut churn = Churn {
        segment,
        dice: Dice::new(seed),
        began: Instant::now(),
        backends: Vec::new(),
        ending: Vec::new(),
        others: BTreeMap::new(),
        pods: 0,
        writes: 0,
        deaths: Vec::new(),
        record: Record::default(),
    };
    while churn.backends.len() < BACKENDS.start {
        churn.add().expect("a backend");
    }
    let (web, web_v6) = (SocketAddr::from((WEB, 80)), SocketAddr::from((WEB_V6, 80)));
    let ports = [0, 1].map(|node| SocketAddr::from((churn.segment.nodes[node].address, NODE_PORT)));
    let node_v6: IpAddr = "fd00:198:18::2".parse().expect("an address");
    let port_v6 = SocketAddr::new(node_v6, NODE_PORT);
    // Everybody is served before it begins.
    for (network, at) in [
        (&clients[0].network, web),
        (&clients[1].network, web),
        (&hosts[0], web),
        (&beside, ports[0]),
        (&beside, ports[1]),
        (&clients[0].network, web_v6),
        (&clients[1].network, web_v6),
        (&hosts[0], web_v6),
        (&beside, port_v6),
    ] {
        network
            .run(|| {
                until("an answer", || {
                    Ok(open(at).and_then(|mut stream| get(&mut stream, true)).ok())
                })
            })
            .expect("an answer");
    }

    let end = Arc::new(AtomicBool::new(false));
    let began = Instant::now();
    churn.began = began;
    let mut running = Vec::new();
    let mut start = |name: String, network: &Network, kind: Kind, at: SocketAddr| {
        let network = network.try_clone().expect("a network");
        let end = end.clone();
        let thread = thread::spawn(move || {
            Ok(network.run(|| run(kind, at, began, || end.load(Ordering::Relaxed))))
        });
        running.push((format!("{name}, {kind:?}"), thread));
    };
    for kind in KINDS {
        start("pod of node-1".into(), &clients[0].network, kind, web);
        start("outside, node-2's port".into(), &beside, kind, ports[1]);
    }
    for kind in [Kind::KeptHttp, Kind::ConnectedUdp] {
        let pod = &clients[0].network;
        start("pod of node-1, IPv6".into(), pod, kind, web_v6);
        start(
            "outside, node-2's port, IPv6".into(),
            &beside,
            kind,
            port_v6,
        );
    }
    let pod = &clients[1].network;
    start("pod of node-2, IPv6".into(), pod, Kind::Http, web_v6);
    start("node-1, IPv6".into(), &hosts[0], Kind::Http, web_v6);
    start("pod of node-2".into(), &clients[1].network, Kind::Http, web);
    start("node-1".into(), &hosts[0], Kind::Http, web);
    start("node-1".into(), &hosts[0], Kind::ConnectedUdp, web);
    start(
        "outside, node-1's port".into(),
        &beside,
        Kind::KeptHttp,
        ports[0],
    );
    let beginning = (since_epoch() - began.elapsed()).as_micros();
    for (kind, at) in [
        (Kind::Http, web),
        (Kind::ConnectedUdp, web),
        (Kind::Http, web_v6),
    ] {
        let (network, group) = (clients[0].network.try_clone().expect("it"), group.clone());
        let thread = thread::spawn(move || {
            let request = format!("{kind:?} {at} {group} {seconds} {beginning}");
            ask(&network, None, &request).and_then(|answer| read_tally(&answer))
        });
        let name = format!("pod of node-1 at the socket, {at}, {kind:?}");
        running.push((name, thread));
    }

    let length = Duration::from_secs(seconds);
    let every = Duration::from_secs(if seconds > 60 { 20 } else { 4 });
    let (mut kills, mut supervisors) = (0_u32, 0_u32);
    // One at least, also of a short run.
    let mut churned = churn.add().and_then(|()| churn.lose());
    let since = Instant::now();
    while churned.is_ok() && since.elapsed() < length {
        if since.elapsed() >= every * (kills + supervisors + 1) {
            let node = (kills + supervisors) as usize % 2;
            // Three workers, then a supervisor with its worker.
            churned = if (kills + supervisors) % 4 == 3 {
                supervisors += 1;
                churn.kill_supervisor(node)
            } else {
                kills += 1;
                churn.kill_worker(node)
            };
        } else {
            churned = churn.step();
            thread::sleep(Duration::from_millis(100 + churn.dice.below(300)));
        }
    }
    end.store(true, Ordering::Relaxed);
    let tallies: Vec<(String, Tally)> = running
        .into_iter()
        .map(|(name, thread)| {
            let tally: Result<Tally> = thread.join().expect("no panic");
            (name, tally.expect("a tally"))
        })
        .collect();
    println!(
        "{} pods came, {} died, the cluster changed {} times, {kills} workers and {supervisors} supervisors were killed",
        churn.pods,
        churn.deaths.len(),
        churn.writes
    );
    let (mut failed, mut unexplained, mut lost) = (Vec::new(), Vec::new(), 0);
    for (name, tally) in &tallies {
        println!(
            "{name}: {} requests, {} failed, the slowest took {:?}",
            tally.asked,
            tally.failed.len(),
            tally.slowest
        );
        for one in &tally.failed {
            let Failure {
                when, took, why, ..
            } = one;
            if churn
                .deaths
                .iter()
                .any(|death| death.explains(one, &churn.record))
            {
                lost += 1;
            } else {
                let when = when.as_secs_f64();
                failed.push(format!("{when:8.3} {name}: {why} after {took:?}"));
                unexplained.push(one);
            }
        }
    }
    println!("{lost} requests were lost to endpoints that died");
    if !failed.is_empty() {
        churn.record.hear(&churn.segment.nodes, churn.began);
        let mut log = churn.record.log.clone();
        log.extend(failed.iter().cloned());
        log.sort();
        println!("{}", log.join("\n"));
        for (what, one) in failed.iter().zip(unexplained) {
            println!("{what}\n  {}", churn.record.explain(one).join("\n  "));
        }
        for node in &churn.segment.nodes {
            let report = node.report().expect("a report");
            println!("{}: {}", node.name, report["counters"]);
        }
    }
    churned.expect("no change fails");
    assert!(kills > 0 && supervisors > 0, "nobody was killed");
    assert_eq!(failed, Vec::<String>::new(), "seed {seed}");
}
