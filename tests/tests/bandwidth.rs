//! The capability `bandwidth`: what a pod gets and sends is limited, whichever way it goes, and nothing else is.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use keelway_tests::agents::{
    AgentNode, ClusterFile, addresses_of, cni_result, two_dual_stack_nodes,
};
use keelway_tests::sandbox::{Network, Sandbox, is_root};
use serde_json::{Value, json};

/// Bits per second, and bits: far below what two namespaces of any machine reach.
const RATE: u64 = 40_000_000;
const BURST: u64 = 400_000;
/// Bytes that are sent; several times the burst where there is a limit.
const LIMITED_BYTES: usize = 2 << 20;
const FREE_BYTES: usize = 32 << 20;
/// What is not limited is at least so many times faster.
const RATIO: f64 = 4.0;

struct Topology {
    nodes: [AgentNode; 2],
    _cluster: ClusterFile,
    _dir: tempfile::TempDir,
    _sandbox: Sandbox,
}

fn topology(test: &str) -> Option<Topology> {
    if !is_root(test) {
        return None;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let (cluster, mut nodes) = two_dual_stack_nodes(&sandbox, dir.path(), &[]).expect("two nodes");
    cluster.write(&[]).expect("the cluster's file");
    for node in &mut nodes {
        node.start().expect("an agent");
    }
    Some(Topology {
        nodes,
        _cluster: cluster,
        _dir: dir,
        _sandbox: sandbox,
    })
}

/// A pod with these limits.
fn limited(node: &AgentNode, name: &str, bandwidth: Value) -> (Network, Vec<IpAddr>, Value) {
    let network = Network::new().expect("a network");
    let wish = json!({"runtimeConfig": {"bandwidth": bandwidth}});
    let added = node
        .cni("ADD", name, Some(&network), wish)
        .expect("the plugin");
    let result = cni_result(&added).expect("a result");
    let addresses = addresses_of(&result).expect("addresses");
    (network, addresses, result)
}

/// Sends so many bytes to an address of a namespace; bytes per second from the first that arrives to the last.
fn throughput(from: &Network, to: &Network, address: IpAddr, bytes: usize) -> Result<f64> {
    let listener = to.run(|| TcpListener::bind((address, 7100)))?;
    let receiving = thread::spawn(move || -> Result<f64> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut buffer = vec![0; 1 << 16];
        let mut received = stream.read(&mut buffer)?;
        let (first, began) = (received, Instant::now());
        while received < bytes {
            let length = stream.read(&mut buffer)?;
            ensure!(length > 0, "it ended after {received} bytes");
            received += length;
        }
        Ok((received - first) as f64 / began.elapsed().as_secs_f64())
    });
    from.run(|| -> Result<()> {
        let at = SocketAddr::new(address, 7100);
        let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(5))
            .with_context(|| format!("connect to {at}"))?;
        stream.write_all(&vec![0; bytes])?;
        Ok(())
    })?;
    receiving.join().expect("no panic")
}

/// What a limit lets pass at most of [`LIMITED_BYTES`], the burst included.
fn bound() -> f64 {
    let (rate, burst) = (RATE as f64 / 8.0, BURST as f64 / 8.0);
    // The burst passes at once; a tenth is for headers that are not counted here, and for the bucket's granularity.
    let seconds = (LIMITED_BYTES as f64 - burst) / rate;
    LIMITED_BYTES as f64 / seconds * 1.1
}

#[test]
fn a_pods_traffic_is_limited_whichever_way_it_goes() {
    let Some(lab) = topology("a_pods_traffic_is_limited_whichever_way_it_goes") else {
        return;
    };
    // What is left of it stays until the end.
    let Topology {
        nodes: [mut first, second],
        ..
    } = lab;
    let (a, a_addresses, _) = limited(
        &first,
        "a",
        json!({"ingressRate": RATE, "ingressBurst": BURST}),
    );
    let (b, b_addresses, b_result) = limited(
        &first,
        "b",
        json!({"egressRate": RATE, "egressBurst": BURST}),
    );
    let free = first.wire("free").expect("a pod");
    let far = second.wire("far").expect("a pod");
    let unlimited = throughput(&far.network, &free.network, free.addresses[0], FREE_BYTES);
    let unlimited = unlimited.expect("bytes pass");
    let check = |what: &str, from: &Network, to: &Network, address: IpAddr| {
        let rate = throughput(from, to, address, LIMITED_BYTES).expect("bytes pass");
        assert!(
            rate <= bound() && rate * RATIO <= unlimited,
            "{what}: {rate} bytes/s; at most {} of {unlimited}",
            bound()
        );
    };
    for family in [0, 1] {
        let (to_a, of_far) = (a_addresses[family], far.addresses[family]);
        check("a neighbour to a", &free.network, &a, to_a);
        check("another node's pod to a", &far.network, &a, to_a);
        check("the host to a", &first.host, &a, to_a);
        check(
            "b to a neighbour",
            &b,
            &free.network,
            free.addresses[family],
        );
        check("b to another node's pod", &b, &far.network, of_far);
        check("b to the other host", &b, &second.host, {
            let node: [IpAddr; 2] = [
                IpAddr::from([198, 18, 0, 2]),
                "fd00:198:18::2".parse().expect("an address"),
            ];
            node[family]
        });
    }
    // The other direction of each is free.
    for (what, from, to, address) in [
        ("a to a neighbour", &a, &free.network, free.addresses[0]),
        ("a neighbour to b", &free.network, &b, b_addresses[0]),
    ] {
        let rate = throughput(from, to, address, FREE_BYTES).expect("bytes pass");
        assert!(rate >= bound() * RATIO, "{what}: {rate} bytes/s");
    }

    // Limits outlive the agent, also one that has lost its file, and CHECK sees one that is gone.
    let killed = first.kill_worker().expect("another worker");
    let ready = first.wait("ready", |report| report["ready"] == true);
    ready.unwrap_or_else(|error| panic!("{error:#} after {killed:?}"));
    check("to a after a kill", &free.network, &a, a_addresses[0]);
    let call = |node: &AgentNode| {
        let more =
            json!({"prevResult": b_result, "runtimeConfig": {"bandwidth": {"egressRate": RATE}}});
        node.cni("CHECK", "b", Some(&b), more).expect("the plugin")
    };
    assert!(call(&first).status.success());
    let lifted = b.run(|| {
        let words = ["qdisc", "del", "dev", "eth0", "root"];
        Command::new("tc").args(words).status()
    });
    assert!(lifted.expect("tc").success());
    let gone = call(&first);
    let said = String::from_utf8_lossy(&gone.stdout).into_owned();
    assert!(
        !gone.status.success() && said.contains("no limit of its rate"),
        "{gone:?}"
    );
    first.stop().expect("a good end");
    fs::remove_file(first.state_dir().join("addresses.json")).expect("the file");
    first.start().expect("an agent");
    check("to a without the file", &free.network, &a, a_addresses[0]);
}
