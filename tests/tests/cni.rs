//! The CNI plugin as runtimes call it: a process with the specification's environment, a real agent behind it, both address families.
//! What cnitool makes of it is in cnitool.rs.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use keelway_tests::agents::{
    AgentNode, ClusterFile, addresses_of, cni_result, node_object, two_dual_stack_nodes, until,
};
use keelway_tests::sandbox::{Network, Sandbox, is_root};
use serde_json::{Value, json};

struct Topology {
    cluster: ClusterFile,
    nodes: [AgentNode; 2],
    _dir: tempfile::TempDir,
    _sandbox: Sandbox,
}

/// Both nodes with their agents; the ranges of the first one's pods, if other than usual.
fn topology(test: &str, ranges: Option<&[&str]>) -> Option<Topology> {
    if !is_root(test) {
        return None;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let (mut cluster, mut nodes) =
        two_dual_stack_nodes(&sandbox, dir.path(), &[]).expect("two nodes");
    if let Some(ranges) = ranges {
        let ranges: Vec<String> = ranges.iter().map(|range| (*range).to_owned()).collect();
        let addresses = [
            IpAddr::from([198, 18, 0, 1]),
            "fd00:198:18::1".parse().expect("ip"),
        ];
        cluster.nodes[0] = node_object("node-1", &addresses, &ranges);
    }
    cluster.write(&[]).expect("the cluster's file");
    for node in &mut nodes {
        node.start().expect("an agent");
    }
    Some(Topology {
        cluster,
        nodes,
        _dir: dir,
        _sandbox: sandbox,
    })
}

fn code(output: &Output) -> u64 {
    assert!(!output.status.success(), "{output:?}");
    let error: Value = serde_json::from_slice(&output.stdout).expect("an error as JSON");
    error["code"].as_u64().expect("a code")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What `ip` prints in a namespace.
fn ip(network: &Network, words: &str) -> String {
    let output = network.run(|| Command::new("ip").args(words.split_whitespace()).output());
    String::from_utf8_lossy(&output.expect("ip").stdout).into_owned()
}

/// Sends a message to a listener at `address` in one namespace from another one, and gives what comes back.
fn round_trip(server: &Network, address: IpAddr, client: &Network) -> Result<()> {
    let listener = server.run(|| TcpListener::bind((address, 7000)))?;
    let serving = thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut bytes = [0; 5];
        stream.read_exact(&mut bytes)?;
        stream.write_all(&bytes)
    });
    let answer = client.run(|| -> Result<[u8; 5]> {
        let at = SocketAddr::new(address, 7000);
        let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(5))
            .with_context(|| format!("connect to {at}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"hello")?;
        let mut bytes = [0; 5];
        stream.read_exact(&mut bytes)?;
        Ok(bytes)
    })?;
    ensure!(&answer == b"hello", "another answer");
    serving.join().expect("no panic")?;
    Ok(())
}

#[test]
fn every_command_in_every_version() {
    let Some(topology) = topology("every_command_in_every_version", None) else {
        return;
    };
    let [node, _] = &topology.nodes;
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let network = Network::new().expect("a network");
        let conf = |more: Value| {
            let mut conf = json!({"cniVersion": version});
            if let (Value::Object(conf), Value::Object(more)) = (&mut conf, more) {
                conf.extend(more);
            }
            conf
        };
        let listed = node
            .cni("VERSION", "", None, conf(json!({})))
            .expect("the plugin");
        assert!(text(&listed).contains(version), "{listed:?}");

        let added = node
            .cni("ADD", "c1", Some(&network), conf(json!({})))
            .expect("the plugin");
        let result = cni_result(&added).expect("a result");
        assert_eq!(result["cniVersion"], version);
        let addresses = addresses_of(&result).expect("addresses");
        assert_eq!(addresses.len(), 2, "{result}");
        let families: Vec<Option<&str>> = (0..2)
            .map(|n| result["ips"][n]["version"].as_str())
            .collect();
        let old = version.starts_with("0.");
        assert_eq!(
            families,
            if old {
                [Some("4"), Some("6")]
            } else {
                [None, None]
            }
        );
        assert_eq!(result["interfaces"][1]["mtu"].is_u64(), version == "1.1.0");
        assert_eq!(result["routes"][1]["dst"], "::/0");
        let inside = ip(&network, "-o addr show dev eth0");
        assert!(
            addresses
                .iter()
                .all(|address| inside.contains(&address.to_string())),
            "{inside}"
        );

        let with_result = conf(json!({"prevResult": result}));
        let checked = node
            .cni("CHECK", "c1", Some(&network), with_result.clone())
            .expect("the plugin");
        match version {
            "0.3.1" => assert_eq!(code(&checked), 1, "CHECK is of 0.4.0"),
            _ => assert!(
                checked.status.success() && checked.stdout.is_empty(),
                "{checked:?}"
            ),
        }
        let status = node
            .cni("STATUS", "", None, conf(json!({})))
            .expect("the plugin");
        match version {
            "1.1.0" => assert!(
                status.status.success() && status.stdout.is_empty(),
                "{status:?}"
            ),
            _ => assert_eq!(code(&status), 1, "STATUS is of 1.1.0"),
        }
        // Without a namespace, without a result, and again.
        for (netns, more) in [
            (Some(&network), with_result),
            (None, conf(json!({}))),
            (None, conf(json!({}))),
        ] {
            let deleted = node.cni("DEL", "c1", netns, more).expect("the plugin");
            assert!(
                deleted.status.success() && deleted.stdout.is_empty(),
                "{deleted:?}"
            );
        }
        until("no interface", || {
            Ok(ip(&network, "-o link")
                .contains("eth0")
                .then_some(())
                .is_none()
                .then_some(()))
        })
        .expect("it goes");
    }
}

#[test]
fn pods_of_both_families_reach_each_other_and_the_hosts() {
    let Some(topology) = topology("pods_of_both_families_reach_each_other_and_the_hosts", None)
    else {
        return;
    };
    let [first, second] = &topology.nodes;
    let (a, b) = (
        first.wire("a").expect("a pod"),
        first.wire("b").expect("a pod"),
    );
    let c = second.wire("c").expect("a pod");
    for (server, client) in [
        (&a, &b.network),
        (&a, &c.network),
        (&c, &a.network),
        (&a, &first.host),
        (&c, &first.host),
    ] {
        for address in &server.addresses {
            round_trip(&server.network, *address, client).expect("an answer");
        }
    }
    for address in [
        IpAddr::from([198, 18, 0, 2]),
        "fd00:198:18::2".parse().expect("ip"),
    ] {
        round_trip(&second.host, address, &a.network).expect("the other host");
    }
    // A new agent finds both families again, without its file.
    let Topology {
        nodes: [mut first, _second],
        ..
    } = topology;
    first.stop().expect("a good end");
    fs::remove_file(first.state_dir().join("addresses.json")).expect("the file");
    first.start().expect("an agent");
    let report = first.report().expect("a report");
    let found: BTreeSet<String> = report["allocations"]
        .as_array()
        .expect("allocations")
        .iter()
        .map(|one| one["addresses"].to_string())
        .collect();
    let expected = [&a, &b].map(|pod| json!(pod.addresses).to_string());
    assert_eq!(found, BTreeSet::from(expected));
    for address in &a.addresses {
        round_trip(&a.network, *address, &b.network).expect("an answer");
    }
}

#[test]
fn addresses_and_macs_are_given_as_asked_and_exhaustion_is_told_in_numbers() {
    let ranges = ["10.244.1.0/29", "fd00:10:244:1::/64"];
    let Some(topology) = topology("addresses_and_macs_are_given_as_asked", Some(&ranges)) else {
        return;
    };
    let [node, _] = &topology.nodes;
    let wish = json!({"runtimeConfig": {
        "ips": ["10.244.1.5/24", "fd00:10:244:1::99"], "mac": "02:00:00:00:00:42",
        "dns": {"servers": ["10.96.0.10"], "searches": ["svc.cluster.local"], "options": ["ndots:5"]},
    }});
    let network = Network::new().expect("a network");
    let add = |container: &str, network: &Network, more: Value| {
        node.cni("ADD", container, Some(network), more)
            .expect("the plugin")
    };
    let result = cni_result(&add("c1", &network, wish.clone())).expect("a result");
    assert_eq!(result["ips"][0]["address"], "10.244.1.5/32");
    assert_eq!(result["ips"][1]["address"], "fd00:10:244:1::99/128");
    assert_eq!(result["dns"]["nameservers"][0], "10.96.0.10");
    assert_eq!(result["interfaces"][1]["mac"], "02:00:00:00:00:42");
    assert!(ip(&network, "link show eth0").contains("02:00:00:00:00:42"));
    let other = Network::new().expect("a network");
    let refused = add("c2", &other, wish);
    assert!(
        code(&refused) == 11 && text(&refused).contains("belongs to default/c1"),
        "{refused:?}"
    );
    let refused = add(
        "c2",
        &other,
        json!({"runtimeConfig": {"ips": ["192.0.2.1"]}}),
    );
    assert!(
        text(&refused).contains("none of this node's pod ranges"),
        "{refused:?}"
    );
    let networks: Vec<Network> = (0..4).map(|_| Network::new().expect("a network")).collect();
    let status = || {
        node.cni("STATUS", "", None, json!({"cniVersion": "1.1.0"}))
            .expect("the plugin")
    };
    assert!(status().status.success());
    for (n, network) in networks.iter().enumerate().take(3) {
        cni_result(&add(&format!("f{n}"), network, json!({}))).expect("a result");
    }
    let refused = add("f3", &networks[3], json!({}));
    assert!(
        code(&refused) == 11 && text(&refused).contains("4 of 4 IPv4 addresses in use"),
        "{refused:?}"
    );
    let full = status();
    assert!(
        code(&full) == 50 && text(&full).contains("4 of 4 IPv4"),
        "{full:?}"
    );
    assert!(
        node.cni("DEL", "f0", None, json!({}))
            .expect("the plugin")
            .status
            .success()
    );
    let refused = add("f3", &networks[3], json!({}));
    assert!(text(&refused).contains("1 resting"), "{refused:?}");
    let given = until("the address has rested", || {
        let output = add("f3", &networks[3], json!({}));
        Ok(output.status.success().then_some(output))
    });
    cni_result(&given.expect("an address")).expect("a result");
    drop(topology.cluster);
}

#[test]
fn a_chain_keeps_what_came_before_and_check_tolerates_what_came_after() {
    let Some(topology) = topology("a_chain_keeps_what_came_before", None) else {
        return;
    };
    let [node, _] = &topology.nodes;
    let network = Network::new().expect("a network");
    let before = json!({"prevResult": {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "net1", "sandbox": network.path()}],
        "ips": [{"address": "192.0.2.7/24", "interface": 0}],
    }});
    let added = node
        .cni("ADD", "c1", Some(&network), before)
        .expect("the plugin");
    let mut result = cni_result(&added).expect("a result");
    assert_eq!(result["interfaces"][0]["name"], "net1");
    assert_eq!(
        result["ips"][0],
        json!({"address": "192.0.2.7/24", "interface": 0})
    );
    assert_eq!(result["ips"][1]["interface"], 2, "{result}");
    let interfaces = result["interfaces"].as_array_mut().expect("interfaces");
    interfaces.push(json!({"name": "ifb0"}));
    let checked = node
        .cni("CHECK", "c1", Some(&network), json!({"prevResult": result}))
        .expect("the plugin");
    assert!(checked.status.success(), "{checked:?}");
}

#[test]
fn gc_removes_what_no_runtime_names_and_nothing_else() {
    let Some(topology) = topology("gc_removes_what_no_runtime_names_and_nothing_else", None) else {
        return;
    };
    let [node, _] = &topology.nodes;
    let pods: Vec<_> = ["a", "b", "c"]
        .map(|name| node.wire(name).expect("a pod"))
        .into();
    let other_network = Network::new().expect("a network");
    let other = json!({"name": "second"});
    let added = node
        .cni("ADD", "other", Some(&other_network), other.clone())
        .expect("the plugin");
    cni_result(&added).expect("a result");
    let valid = json!({"cniVersion": "1.1.0", "cni.dev/valid-attachments": [
        {"containerID": pods[1].container, "ifname": "eth0"},
    ]});
    let collected = node.cni("GC", "", None, valid).expect("the plugin");
    assert!(
        collected.status.success() && collected.stdout.is_empty(),
        "{collected:?}"
    );
    let report = node
        .wait("two pods", |report| {
            report["allocations"].as_array().map(Vec::len) == Some(2)
                && report["interfacesToRemove"] == 0
        })
        .expect("a report");
    let text = report["allocations"].to_string();
    assert!(
        text.contains("container-b") && text.contains("\"other\""),
        "{text}"
    );
    assert_eq!(node.pod_interfaces().expect("interfaces").len(), 2);
    // Named by nobody, in its own network.
    let none = json!({"cniVersion": "1.1.0", "name": "second", "cni.dev/valid-attachments": []});
    assert!(
        node.cni("GC", "", None, none)
            .expect("the plugin")
            .status
            .success()
    );
    until("one interface", || {
        Ok((node.pod_interfaces()?.len() == 1).then_some(()))
    })
    .expect("it goes");
}

#[test]
fn an_interface_is_made_anew_right_behind_its_deletion() {
    let Some(topology) = topology("an_interface_is_made_anew_right_behind_its_deletion", None)
    else {
        return;
    };
    let [node, _] = &topology.nodes;
    let network = Network::new().expect("a network");
    let mut had = BTreeSet::new();
    for round in 0..4 {
        // The same container, and another one in the same namespace.
        let container = format!("c{}", round / 2);
        let added = node
            .cni("ADD", &container, Some(&network), json!({}))
            .expect("the plugin");
        let result = cni_result(&added).unwrap_or_else(|error| panic!("round {round}: {error:#}"));
        had.insert(addresses_of(&result).expect("addresses"));
        let check = node.cni(
            "CHECK",
            &container,
            Some(&network),
            json!({"prevResult": result}),
        );
        assert!(check.expect("the plugin").status.success(), "round {round}");
        assert!(
            node.cni("DEL", &container, None, json!({}))
                .expect("the plugin")
                .status
                .success()
        );
    }
    assert_eq!(had.len(), 4, "no address is had again at once: {had:?}");
}

#[test]
fn two_hundred_at_once_are_added_and_deleted_without_a_failure() {
    let Some(topology) = topology("two_hundred_at_once", None) else {
        return;
    };
    let [node, _] = &topology.nodes;
    let networks: Vec<Network> = (0..200)
        .map(|_| Network::new().expect("a network"))
        .collect();
    let all = |command: &str, wished: &(dyn Fn(&Output) -> bool + Sync)| {
        thread::scope(|scope| {
            let calls: Vec<_> = networks
                .iter()
                .enumerate()
                .map(|(n, network)| {
                    scope.spawn(move || {
                        node.cni(command, &format!("c{n}"), Some(network), json!({}))
                    })
                })
                .collect();
            for call in calls {
                let output = call.join().expect("no panic").expect("the plugin");
                assert!(wished(&output), "{command}: {output:?}");
            }
        });
    };
    all("ADD", &|output| output.status.success());
    let report = node.report().expect("a report");
    let addresses: BTreeSet<String> = report["allocations"]
        .as_array()
        .expect("allocations")
        .iter()
        .flat_map(|one| one["addresses"].as_array().cloned().unwrap_or_default())
        .map(|address| address.to_string())
        .collect();
    assert_eq!(addresses.len(), 400);
    all("DEL", &|output| {
        output.status.success() && output.stdout.is_empty()
    });
    node.wait("nothing left", |report| {
        report["allocations"] == json!([]) && report["interfacesToRemove"] == 0
    })
    .expect("a report");
    assert_eq!(
        node.pod_interfaces().expect("interfaces"),
        Vec::<String>::new()
    );
    until("no hooks", || {
        Ok(node.pod_hooks()?.is_empty().then_some(()))
    })
    .expect("none");
}
