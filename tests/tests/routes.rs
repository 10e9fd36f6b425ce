//! Nodes reach each other's pods over whatever is between them, by the way that fits, both families, large packets included.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use keelway_tests::agents::{Pod, node_object};
use keelway_tests::fabric::{Fabric, Nodes, three_nodes};
use keelway_tests::sandbox::{Network, Sandbox, is_root};
use serde_json::Value;

const TIMEOUT: Duration = Duration::from_secs(5);
/// Enough for segments as large as the interfaces take.
const TRANSFER_LEN: usize = 2 << 20;
/// More than any MTU here.
const DATAGRAM_LEN: usize = 6000;
/// A port for each transfer: a process that another test begins may have a copy of the last one's socket for a moment.
static PORT: AtomicU16 = AtomicU16::new(7000);

struct Lab {
    nodes: Nodes,
    pods: Vec<Pod>,
    _dir: tempfile::TempDir,
    _sandbox: Sandbox,
}

fn lab(test: &str, fabric: Fabric, flags: &[&str]) -> Option<Lab> {
    if !is_root(test) {
        return None;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let mut nodes = three_nodes(&sandbox, dir.path(), fabric, flags).expect("three nodes");
    nodes.cluster.write(&[]).expect("the cluster's file");
    for node in &mut nodes.nodes {
        node.start().expect("an agent");
    }
    let pods = nodes
        .nodes
        .iter()
        .map(|node| node.wire("pod").expect("a pod"))
        .collect();
    Some(Lab {
        nodes,
        pods,
        _dir: dir,
        _sandbox: sandbox,
    })
}

/// A transfer there and back, and a datagram in fragments.
fn transfer(server: &Network, address: IpAddr, client: &Network) -> Result<()> {
    let port = PORT.fetch_add(1, Ordering::Relaxed);
    let (listener, socket) = server.run(|| {
        (
            TcpListener::bind((address, port)),
            UdpSocket::bind((address, port)),
        )
    });
    let (listener, socket) = (listener?, socket?);
    socket.set_read_timeout(Some(TIMEOUT))?;
    let serving = thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut bytes = vec![0; TRANSFER_LEN];
        stream.read_exact(&mut bytes)?;
        stream.write_all(&bytes)?;
        let (len, from) = socket.recv_from(&mut bytes)?;
        socket.send_to(&bytes[..len], from).map(drop)
    });
    let pattern: Vec<u8> = (0..TRANSFER_LEN).map(|at| (at % 251) as u8).collect();
    client.run(|| -> Result<()> {
        let at = SocketAddr::new(address, port);
        let mut stream =
            TcpStream::connect_timeout(&at, TIMEOUT).with_context(|| format!("connect to {at}"))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        stream
            .write_all(&pattern)
            .with_context(|| format!("send to {at}"))?;
        let mut back = vec![0; TRANSFER_LEN];
        stream
            .read_exact(&mut back)
            .with_context(|| format!("read from {at}"))?;
        ensure!(back == pattern, "{at} sent something else back");
        let unspecified: IpAddr = if address.is_ipv4() {
            [0, 0, 0, 0].into()
        } else {
            "::".parse()?
        };
        let socket = UdpSocket::bind((unspecified, 0))?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.send_to(&pattern[..DATAGRAM_LEN], at)?;
        let (len, _) = socket
            .recv_from(&mut back)
            .with_context(|| format!("a datagram from {at}"))?;
        ensure!(
            back[..len] == pattern[..DATAGRAM_LEN],
            "{at} sent another datagram back"
        );
        Ok(())
    })?;
    serving.join().expect("no panic").context("the server")
}

impl Lab {
    fn all_pairs(&self, when: &str) {
        for (to, server) in self.pods.iter().enumerate() {
            for (from, node) in self.nodes.nodes.iter().enumerate() {
                for address in &server.addresses {
                    if from != to {
                        transfer(&server.network, *address, &self.pods[from].network)
                            .unwrap_or_else(|error| {
                                panic!("{when}: pod {from} to pod {to}: {error:#}")
                            });
                    }
                    transfer(&server.network, *address, &node.host).unwrap_or_else(|error| {
                        panic!("{when}: host {from} to pod {to}: {error:#}")
                    });
                }
            }
        }
    }

    /// Waits until each node's way to each other one is as wished; both number from 1.
    fn wait(&self, what: &str, wished: impl Fn(u8, u8) -> Option<&'static str>) {
        for (number, node) in (1..).zip(&self.nodes.nodes) {
            let right = |path: &Value| {
                let to = path["node"]
                    .as_str()
                    .and_then(|name| name.strip_prefix("node-")?.parse().ok());
                to.and_then(|to| wished(number, to))
                    .is_none_or(|way| path["way"] == way)
            };
            node.wait(what, |report| {
                let paths = report["paths"].as_array().cloned().unwrap_or_default();
                !paths.is_empty() && paths.iter().all(right)
            })
            .unwrap_or_else(|error| {
                let paths = node.report().map(|report| report["paths"].to_string());
                panic!("{error:#}: {paths:?}")
            });
        }
    }

    /// Waits until every other node's questions to this one are without an answer.
    fn silent(&self, cut: u8) {
        let others = (1..).zip(&self.nodes.nodes).filter(|(n, _)| *n != cut);
        for (_, node) in others {
            let name = format!("node-{cut}");
            let waited = node.wait("silence", |report| {
                let paths = report["paths"].as_array().cloned().unwrap_or_default();
                let mut there = paths.iter().filter(|path| path["node"] == name.as_str());
                there.all(|path| path["unanswered"] != 0 && path["latencyUs"].is_null())
            });
            waited.unwrap_or_else(|error| panic!("{error:#}"));
        }
    }

    /// Waits until every node has an answer of every other again: the way there is the same all along.
    fn answered(&self) {
        for node in &self.nodes.nodes {
            let waited = node.wait("answers", |report| {
                let paths = report["paths"].as_array().cloned().unwrap_or_default();
                paths
                    .iter()
                    .all(|path| path["unanswered"] == 0 && path["latencyUs"].is_u64())
            });
            waited.unwrap_or_else(|error| panic!("{error:#}"));
        }
    }

    fn mtu(&self, pod: usize) -> String {
        let show = || {
            std::process::Command::new("ip")
                .args(["link", "show", "eth0"])
                .output()
        };
        let output = self.pods[pod].network.run(show).expect("ip");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

#[test]
fn on_one_link_ways_become_direct_and_a_node_that_was_cut_off_comes_back() {
    let Some(lab) = lab("on_one_link_ways_become_direct", Fabric::OneLink, &[]) else {
        return;
    };
    lab.all_pairs("at first, by whichever way");
    lab.wait("direct", |_, _| Some("direct"));
    lab.all_pairs("direct");
    assert!(
        lab.mtu(0).contains("mtu 1450"),
        "what fits both ways: {}",
        lab.mtu(0)
    );
    for cut in 1..=3 {
        lab.nodes.cut_off(cut, true).expect("cut off");
        lab.wait("doubt", |from, to| {
            (from == cut || to == cut).then_some("vxlan")
        });
        lab.nodes.cut_off(cut, false).expect("back");
        lab.wait("direct again", |_, _| Some("direct"));
        lab.all_pairs(&format!("after node {cut} came back"));
    }
    let told = std::process::Command::new(
        keelway_tests::agents::program("keelway-agent").expect("the agent"),
    )
    .args(["routes", "--socket"])
    .arg(lab.nodes.nodes[0].socket())
    .output()
    .expect("routes");
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(
        told.lines().count() == 5 && told.contains("fd00:10:244:3::/64") && told.contains(" us"),
        "{told}"
    );
}

#[test]
fn a_network_that_carries_pods_no_more_is_left_for_the_overlay_in_both_families() {
    let Some(mut lab) = lab("a_network_that_carries_pods_no_more", Fabric::OneLink, &[]) else {
        return;
    };
    for turn in 1..=2 {
        lab.wait("direct", |_, _| Some("direct"));
        lab.nodes.refuse_pods(true).expect("refused");
        lab.wait("the overlay", |_, _| Some("vxlan"));
        lab.all_pairs(&format!("turn {turn}: refused"));
        for node in &lab.nodes.nodes {
            let report = node.report().expect("a report");
            let problems = report["problems"].to_string();
            assert!(!problems.contains("route"), "turn {turn}: {problems}");
        }
        lab.nodes.refuse_pods(false).expect("carried");
    }
    lab.wait("direct again", |_, _| Some("direct"));
    // An agent that starts knows of no proven way, and goes back to the overlay at first.
    let [first, ..] = &mut lab.nodes.nodes;
    first.kill().expect("killed");
    lab.nodes.refuse_pods(true).expect("refused");
    lab.nodes.nodes[0].start().expect("an agent");
    lab.wait("the overlay", |_, _| Some("vxlan"));
    lab.all_pairs("after a start");
}

#[test]
fn on_two_links_neighbours_are_reached_directly_and_the_others_by_the_overlay() {
    let Some(lab) = lab("on_two_links", Fabric::TwoLinks, &[]) else {
        return;
    };
    let apart = |from, to| from == 3 || to == 3;
    let mixed = |from, to| Some(if apart(from, to) { "vxlan" } else { "direct" });
    lab.wait("mixed", mixed);
    lab.all_pairs("mixed");
    for cut in 1..=3 {
        lab.nodes.cut_off(cut, true).expect("cut off");
        lab.silent(cut);
        lab.wait("doubt", |from, to| {
            (from == cut || to == cut).then_some("vxlan")
        });
        lab.nodes.cut_off(cut, false).expect("back");
        lab.wait("mixed again", mixed);
        lab.all_pairs(&format!("after node {cut} came back"));
    }
}

#[test]
fn behind_routers_and_in_clouds_the_overlay_has_all() {
    for fabric in [Fabric::Routed, Fabric::Cloud] {
        let Some(lab) = lab("behind_routers_and_in_clouds", fabric, &[]) else {
            return;
        };
        lab.all_pairs("at first");
        let [first, ..] = &lab.nodes.nodes;
        // Questions have been asked and answered by the way in use, and none directly.
        let report = first
            .wait("answers", |report| {
                let paths = report["paths"].as_array().cloned().unwrap_or_default();
                !paths.is_empty() && paths.iter().all(|path| path["latencyUs"].is_u64())
            })
            .expect("a report");
        for path in report["paths"].as_array().expect("paths") {
            assert!(
                path["way"] == "vxlan" && path["proven"] == false,
                "{fabric:?}: {path}"
            );
        }
        lab.all_pairs("later");
        for cut in 1..=3 {
            lab.nodes.cut_off(cut, true).expect("cut off");
            lab.silent(cut);
            lab.nodes.cut_off(cut, false).expect("back");
            lab.answered();
            lab.all_pairs(&format!("{fabric:?}: after node {cut} came back"));
        }
    }
}

#[test]
fn one_way_alone_can_be_asked_for() {
    for (routing, way, mtu) in [
        ("direct", "direct", "mtu 1500"),
        ("vxlan", "vxlan", "mtu 1450"),
    ] {
        let Some(lab) = lab(
            "one_way_alone_can_be_asked_for",
            Fabric::OneLink,
            &["--routing", routing],
        ) else {
            return;
        };
        lab.wait("the way", |_, _| Some(way));
        assert!(lab.mtu(0).contains(mtu), "{routing}: {}", lab.mtu(0));
        lab.all_pairs(routing);
    }
}

#[test]
fn nodes_go_come_and_get_other_ranges() {
    let Some(mut lab) = lab("nodes_go_come_and_get_other_ranges", Fabric::OneLink, &[]) else {
        return;
    };
    let ways = |lab: &Lab, count: usize| {
        lab.nodes.nodes[0]
            .wait("the ways", |report| {
                report["paths"].as_array().map(Vec::len) == Some(count)
            })
            .expect("a report")
    };
    ways(&lab, 4);
    let third = lab.nodes.cluster.nodes.pop().expect("three");
    lab.nodes.cluster.write(&[]).expect("the cluster's file");
    ways(&lab, 2);
    lab.nodes.cluster.nodes.push(third);
    lab.nodes.cluster.write(&[]).expect("the cluster's file");
    ways(&lab, 4);
    lab.all_pairs("after it came back");
    let addresses = [
        IpAddr::from([198, 18, 0, 3]),
        "fd00:18:0::3".parse().expect("ip"),
    ];
    let ranges = ["10.244.33.0/24", "fd00:10:244:33::/64"].map(str::to_owned);
    lab.nodes.cluster.nodes[2] = node_object("node-3", &addresses, &ranges);
    lab.nodes.cluster.write(&[]).expect("the cluster's file");
    let renumbered = &lab.nodes.nodes[2];
    renumbered
        .wait("the new ranges", |report| {
            report["ready"] == true
                && lab.nodes.nodes[0]
                    .report()
                    .is_ok_and(|first| first["paths"].to_string().contains("10.244.33.0"))
        })
        .expect("a report");
    let pod = renumbered.wire("new").expect("a pod");
    assert!(
        pod.addresses[0].to_string().starts_with("10.244.33."),
        "{:?}",
        pod.addresses
    );
    lab.pods[2] = pod;
    lab.all_pairs("after it was renumbered");
}

/// A cluster's largest size, of which this node is real, and its neighbour.
const NODES: u16 = 5000;

#[test]
fn five_thousand_nodes_come_flap_and_go() {
    if !is_root("five_thousand_nodes_come_flap_and_go") {
        return;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let (mut cluster, [mut node, mut neighbour]) =
        keelway_tests::agents::two_nodes(&sandbox, dir.path(), &[]).expect("two nodes");
    for number in 3..=NODES {
        let [high, low] = number.to_be_bytes();
        let underlay = IpAddr::from([198, 19, high, low]);
        let range = format!("10.{}.{low}.0/24", 64 + high);
        cluster.nodes.push(node_object(
            &format!("node-{number}"),
            &[underlay],
            &[range],
        ));
    }
    cluster.write(&[]).expect("the cluster's file");
    for node in [&mut node, &mut neighbour] {
        node.start().expect("an agent");
    }
    let ways = |what: &str, wished: usize| {
        let report = node
            .wait(what, |report| {
                let paths = report["paths"].as_array().map(Vec::len);
                paths == Some(wished) && report["problems"] == serde_json::json!([])
            })
            .expect("a report");
        // In the kernel too, one for each, and one that closes the node's own range.
        let routes = node.host.run(|| {
            let mut kernel = keelway_agent::net::Kernel::new(keelway_agent::net::Netlink::open()?);
            let overlay = kernel.link("keelway-vx")?.map(|link| link.index);
            kernel.node_routes(overlay)
        });
        let ranges = routes
            .expect("routes")
            .into_iter()
            .filter(|route| route.range().prefix() == 24)
            .count();
        assert_eq!(ranges, wished + 1, "{what}: {}", report["problems"]);
    };
    let all = usize::from(NODES) - 1;
    ways("all nodes", all);
    let (a, b) = (
        node.wire("a").expect("a pod"),
        neighbour.wire("b").expect("a pod"),
    );
    let pass = || transfer(&b.network, b.addresses[0], &a.network).expect("a transfer");
    pass();
    // A tenth of the cluster loses its power, and has it again.
    let there = cluster.nodes.clone();
    cluster.nodes.truncate(there.len() * 9 / 10);
    cluster.write(&[]).expect("the cluster's file");
    ways("without a tenth", cluster.nodes.len() - 1);
    pass();
    cluster.nodes = there;
    cluster.write(&[]).expect("the cluster's file");
    ways("all nodes again", all);
    pass();
    cluster.nodes.truncate(2);
    cluster.write(&[]).expect("the cluster's file");
    ways("the neighbour alone", 1);
    pass();
}
