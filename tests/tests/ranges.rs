//! A node with several ranges of a family: pods get addresses of all of them, and are reached at each.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ipnetwork::IpNetwork;
use keelway_tests::agents::{Pod, node_object, two_dual_stack_nodes};
use keelway_tests::audit::at_rest;
use keelway_tests::sandbox::{Network, Sandbox, is_root};
use serde_json::json;

const RANGES: [&str; 4] = [
    "10.244.1.0/29",
    "fd00:10:244:1::/125",
    "10.244.9.0/29",
    "fd00:10:244:9::/125",
];
/// A /29 has 6 addresses for pods, and the first two of the first are the node's.
const PODS: usize = 4 + 6;
const PATIENCE: Duration = Duration::from_secs(5);

/// Says a word to each of the pod's addresses, and hears it back.
fn reach(pod: &Pod, client: &Network) -> Result<()> {
    for address in &pod.addresses {
        let at = SocketAddr::new(*address, 7000);
        let listener = pod.network.run(|| TcpListener::bind(at))?;
        let serving = thread::spawn(move || -> std::io::Result<()> {
            let (mut stream, _) = listener.accept()?;
            let mut word = [0; 5];
            stream.read_exact(&mut word)?;
            stream.write_all(&word)
        });
        client.run(|| -> Result<()> {
            let mut stream = TcpStream::connect_timeout(&at, PATIENCE)
                .with_context(|| format!("connect to {at}"))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(b"hello")?;
            let mut word = [0; 5];
            stream.read_exact(&mut word)?;
            ensure!(&word == b"hello", "another answer");
            Ok(())
        })?;
        serving.join().expect("no panic")?;
    }
    Ok(())
}

#[test]
fn pods_have_addresses_of_every_range_and_are_reached_at_each() {
    if !is_root("pods_have_addresses_of_every_range_and_are_reached_at_each") {
        return;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let (mut cluster, [mut node, mut other]) =
        two_dual_stack_nodes(&sandbox, dir.path(), &[]).expect("two nodes");
    let addresses: [IpAddr; 2] = [
        [198, 18, 0, 1].into(),
        "fd00:198:18::1".parse().expect("an address"),
    ];
    cluster.nodes[0] = node_object("node-1", &addresses, &RANGES.map(str::to_owned));
    cluster.write(&[]).expect("the cluster's file");
    for node in [&mut node, &mut other] {
        node.start().expect("an agent");
    }
    let pods: Vec<Pod> = (0..PODS)
        .map(|number| node.wire(&format!("pod-{number}")).expect("a pod"))
        .collect();
    let network = Network::new().expect("a network");
    let refused = node
        .cni("ADD", "one-more", Some(&network), json!({}))
        .expect("the plugin");
    let said = String::from_utf8_lossy(&refused.stdout);
    assert!(said.contains("10 of 10 IPv4 addresses in use"), "{said}");

    let ranges = RANGES.map(|range| range.parse::<IpNetwork>().expect("a range"));
    let used: BTreeSet<IpNetwork> = pods
        .iter()
        .flat_map(|pod| &pod.addresses)
        .filter_map(|address| ranges.into_iter().find(|range| range.contains(*address)))
        .collect();
    // Ten pods fill both ranges of IPv4; of IPv6, a /125 has seven addresses less the node's two.
    assert_eq!(used, BTreeSet::from(ranges));
    assert!(pods.iter().all(|pod| pod.addresses.len() == 2));

    let far = other.wire("far").expect("a pod");
    for pod in &pods {
        reach(pod, &far.network).expect("from the other node's pod");
        reach(pod, &other.host).expect("from the other node");
        reach(&far, &pod.network).expect("to the other node's pod");
    }
    reach(&pods[0], &pods[PODS - 1].network).expect("from range to range");

    // Without its file, the agent finds the same by what is there.
    let all: Vec<&Pod> = pods.iter().collect();
    node.stop().expect("a good end");
    fs::remove_file(node.state_dir().join("addresses.json")).expect("the file");
    node.start().expect("an agent");
    assert_eq!(at_rest(&node, &all), Vec::<String>::new());
}
