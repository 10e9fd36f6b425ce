//! What users of other network plugins suffer from, each tried on this one (docs/cni.md has the list, and where the rest of it is tested).

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use keelway_tests::agents::{AgentNode, ClusterFile, program, two_dual_stack_nodes, until};
use keelway_tests::sandbox::{Network, Sandbox, ip, is_root};
use keelway_tests::topology::Topology;
use serde_json::{Value, json};

/// Two nodes, and nothing running on them yet.
struct Lab {
    cluster: ClusterFile,
    nodes: [AgentNode; 2],
    dir: tempfile::TempDir,
    _sandbox: Sandbox,
}

fn lab(test: &str) -> Option<Lab> {
    if !is_root(test) {
        return None;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let (cluster, nodes) = two_dual_stack_nodes(&sandbox, dir.path(), &[]).expect("two nodes");
    Some(Lab {
        cluster,
        nodes,
        dir,
        _sandbox: sandbox,
    })
}

/// Adds pods until no address is left; how many there are.
fn fill(node: &AgentNode, generation: &str) -> Vec<Network> {
    let mut pods = Vec::new();
    loop {
        let network = Network::new().expect("a network");
        let name = format!("{generation}-{}", pods.len());
        let output = node
            .cni("ADD", &name, Some(&network), json!({}))
            .expect("the plugin");
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(said.contains("addresses in use"), "{said}");
            return pods;
        }
        pods.push(network);
    }
}

/// host-local keeps the addresses of all pods of before (containernetworking/plugins#252, kubernetes#108121): a full node has none left.
#[test]
fn after_a_reboot_every_address_can_be_had_again() {
    let Some(mut lab) = lab("after_a_reboot_every_address_can_be_had_again") else {
        return;
    };
    let addresses: [IpAddr; 2] = [
        [198, 18, 0, 1].into(),
        "fd00:198:18::1".parse().expect("ip"),
    ];
    let ranges = ["10.244.1.0/28", "fd00:10:244:1::/64"].map(str::to_owned);
    lab.cluster.nodes[0] = keelway_tests::agents::node_object("node-1", &addresses, &ranges);
    lab.cluster.write(&[]).expect("the cluster's file");
    let [node, _] = &mut lab.nodes;
    node.start().expect("an agent");
    let before = fill(node, "before");
    assert_eq!(before.len(), 12, "a /28 less what is not a pod's");

    // The power goes: no process, no interface and no pin is left, only the disk.
    node.kill().expect("it dies");
    until("the worker is gone with it", || {
        Ok(node.report().is_err().then_some(()))
    })
    .expect("in time");
    drop(before);
    let left = node.links().expect("interfaces");
    node.host.run(|| {
        for (_, name) in left {
            if name.starts_with("kw") || name.starts_with("keelway") {
                // The other end of a pair is gone with the first.
                let _ = ip(&format!("link del {name}"));
            }
        }
    });
    fs::remove_dir_all(node.pin_root()).expect("the pins");
    assert!(node.state_dir().join("addresses.json").exists());

    node.start().expect("an agent");
    let report = node.report().expect("a report");
    assert_eq!(report["allocations"], json!([]), "{report}");
    // Those that are known to have been had may rest a moment longer.
    let mut all = Vec::new();
    until("as many pods as before", || {
        all.extend(fill(node, &format!("after-{}", all.len())));
        Ok((all.len() == 12).then_some(()))
    })
    .expect("in time");
}

/// AWS's and others' configuration was there before anybody could serve it (amazon-vpc-cni-k8s#282), and pods got an error, or another
/// plugin's network (multus#1499).
#[test]
fn the_configuration_appears_when_pods_can_be_served_and_not_before() {
    let Some(mut lab) = lab("the_configuration_appears_when_pods_can_be_served") else {
        return;
    };
    let Lab { cluster, nodes, .. } = &mut lab;
    let [node, _] = nodes;
    // A cluster in which this node has no range of pods yet.
    let there = cluster.nodes.clone();
    let addresses: [IpAddr; 1] = [[198, 18, 0, 1].into()];
    cluster.nodes[0] = keelway_tests::agents::node_object("node-1", &addresses, &[]);
    cluster.write(&[]).expect("the cluster's file");
    let agent = node.spawn().expect("an agent");
    node.adopt(agent);
    let report = node.wait("what it lacks", |report| {
        report["ready"] == false
            && report["problems"]
                .as_array()
                .is_some_and(|all| !all.is_empty())
    });
    let report = report.expect("a report");
    assert!(!node.conf_list().exists(), "{report}");
    let network = Network::new().expect("a network");
    let refused = node
        .cni("ADD", "early", Some(&network), json!({}))
        .expect("the plugin");
    let error: Value = serde_json::from_slice(&refused.stdout).expect("an error");
    assert_eq!(error["code"], 11, "try again: {error}");
    let status = node
        .cni("STATUS", "", None, json!({"cniVersion": "1.1.0"}))
        .expect("the plugin");
    let error: Value = serde_json::from_slice(&status.stdout).expect("an error");
    assert_eq!(error["code"], 50, "{error}");

    cluster.nodes = there;
    cluster.write(&[]).expect("the cluster's file");
    until("the configuration", || {
        Ok(node.conf_list().exists().then_some(()))
    })
    .expect("in time");
    // It is there, so whoever reads it is served: at the first attempt.
    node.wire("first").expect("a pod");
    let text = fs::read_to_string(node.conf_list()).expect("the configuration");
    let list: Value = serde_json::from_str(&text).expect("JSON");
    // Nothing in it that could expire (calico#9428), and no file that could be missing after a reboot (flannel#2437).
    for word in ["kubeconfig", "token", "subnet"] {
        assert!(!text.contains(word), "{list}");
    }
}

/// A kubelet deletes a sandbox again and again, without a namespace (kubernetes#133081): an empty variable is none.
#[test]
fn a_deletion_without_a_namespace_succeeds_as_often_as_it_comes() {
    let Some(mut lab) = lab("a_deletion_without_a_namespace_succeeds") else {
        return;
    };
    lab.cluster.write(&[]).expect("the cluster's file");
    let [node, _] = &mut lab.nodes;
    node.start().expect("an agent");
    let pod = node.wire("a").expect("a pod");
    let conf = node.plugin_conf().to_string();
    let delete = |netns: Option<&str>| {
        let mut plugin = Command::new(program("keelway-cni").expect("the plugin"));
        plugin
            .env_clear()
            .envs([
                ("CNI_COMMAND", "DEL"),
                ("CNI_CONTAINERID", pod.container.as_str()),
                ("CNI_IFNAME", "eth0"),
                ("CNI_PATH", "/opt/cni/bin"),
            ])
            .envs(netns.map(|path| ("CNI_NETNS", path)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut running = plugin.spawn().expect("the plugin");
        let mut input = running.stdin.take().expect("piped");
        input.write_all(conf.as_bytes()).expect("written");
        drop(input);
        running.wait_with_output().expect("it ends")
    };
    for netns in [Some(""), Some("/run/netns/gone"), None, Some("")] {
        let deleted = delete(netns);
        assert!(
            deleted.status.success() && deleted.stdout.is_empty(),
            "{netns:?}: {deleted:?}"
        );
    }
    node.wait("no pod", |report| {
        report["allocations"] == json!([]) && report["interfacesToRemove"] == 0
    })
    .expect("in time");
}

/// Programs that run cannot be written to ("text file busy"): the plugin is replaced while runtimes execute it.
#[test]
fn the_plugin_is_replaced_while_it_runs() {
    let Some(mut lab) = lab("the_plugin_is_replaced_while_it_runs") else {
        return;
    };
    lab.cluster.write(&[]).expect("the cluster's file");
    let [node, _] = &mut lab.nodes;
    node.start().expect("an agent");
    let bin_dir = lab.dir.path().join("bin");
    let install = || {
        let mut command = Command::new(program("keelway-agent").expect("the agent"));
        command.arg("install").arg("--bin-dir").arg(&bin_dir);
        command.output().expect("it runs")
    };
    assert!(install().status.success());
    // It waits for its configuration, and runs as long.
    let mut running = Command::new(bin_dir.join("keelway-cni"))
        .env_clear()
        .envs([("CNI_COMMAND", "STATUS"), ("CNI_PATH", "/opt/cni/bin")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the plugin");
    let busy = fs::OpenOptions::new()
        .write(true)
        .open(bin_dir.join("keelway-cni"));
    let busy = busy.expect_err("it runs").kind();
    assert_eq!(busy, std::io::ErrorKind::ExecutableFileBusy);
    let again = install();
    assert!(again.status.success(), "{again:?}");
    let mut conf = node.plugin_conf();
    conf["cniVersion"] = json!("1.1.0");
    let mut input = running.stdin.take().expect("piped");
    input
        .write_all(conf.to_string().as_bytes())
        .expect("written");
    drop(input);
    let ended = running.wait_with_output().expect("it ends");
    assert!(ended.status.success(), "{ended:?}");
}

/// One attempt to talk to an address, from a namespace.
fn at_once(client: &Network, at: SocketAddr) -> Result<()> {
    client.run(|| {
        let mut stream = TcpStream::connect_timeout(&at, Duration::from_millis(900))
            .with_context(|| format!("connect to {at}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer == "here", "{at} said {answer:?}");
        Ok(())
    })
}

/// Programs that ask the API server as soon as they run, and end when it does not answer, crash in pods whose network comes late. A lost
/// first packet would be sent again after a second.
#[test]
fn a_pod_reaches_api_server_and_services_from_its_first_moment() {
    let Some(topology) = Topology::start("a_pod_reaches_api_server_and_services", &[]) else {
        return;
    };
    let Topology {
        cluster, nodes, c, ..
    } = &topology;
    let [first, second] = nodes;
    // The API server is on the other node's host; a Service leads to a pod there.
    let api = SocketAddr::from(([198, 18, 0, 2], 6443));
    for (network, at) in [
        (&second.host, api),
        (&c.network, SocketAddr::from(([0, 0, 0, 0], 8443))),
    ] {
        let listener = network.run(|| TcpListener::bind(at)).expect("a listener");
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let _ = stream.write_all(b"here");
            }
        });
    }
    cluster.write(&[]).expect("the cluster's file");
    for count in 0..20 {
        let pod = first.wire(&format!("first-{count}")).expect("a pod");
        for at in [api, SocketAddr::new(c.address.into(), 8443)] {
            at_once(&pod.network, at).unwrap_or_else(|error| panic!("pod {count}: {error:#}"));
        }
    }
}

/// Two nodes, the first of which is told `flags`.
fn told(test: &str, flags: impl FnOnce(&std::path::Path) -> Vec<String>) -> Option<Lab> {
    if !is_root(test) {
        return None;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let flags = flags(dir.path());
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let (cluster, nodes) = two_dual_stack_nodes(&sandbox, dir.path(), &flags).expect("two nodes");
    cluster.write(&[]).expect("the cluster's file");
    Some(Lab {
        cluster,
        nodes,
        dir,
        _sandbox: sandbox,
    })
}

/// An agent that ends because somebody has its port takes the node's network with it, for numbers.
#[test]
fn an_agent_whose_port_for_metrics_is_taken_works_and_has_it_later() {
    let test = "an_agent_whose_port_for_metrics_is_taken";
    let metrics = "127.0.0.1:9555";
    let Some(mut lab) = told(test, |_| vec!["--metrics".into(), metrics.into()]) else {
        return;
    };
    let [node, _] = &mut lab.nodes;
    let taken = node.host.run(|| TcpListener::bind(metrics));
    let taken = taken.expect("a listener");
    node.start().expect("an agent that is ready");
    drop(taken);
    until("metrics", || {
        let answer = node.host.run(|| -> Result<String> {
            let mut stream = TcpStream::connect(metrics)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        });
        Ok(answer.ok().filter(|answer| answer.contains("keelway_")))
    })
    .expect("metrics");
    assert_eq!(node.report().expect("a report")["restarts"], 0);
}

/// A configuration that becomes wrong while the agent runs ends it no sooner than before, and no worker of it leaves the node alone.
#[test]
fn a_configuration_that_becomes_wrong_is_read_again_until_it_is_right() {
    let test = "a_configuration_that_becomes_wrong";
    let right = "pools: [{name: link, addresses: [198.18.0.200/29]}]";
    let with_pools = |dir: &std::path::Path| {
        let pools = dir.join("pools.yaml");
        fs::write(&pools, right).expect("pools");
        let path = pools.to_str().expect("a path").to_owned();
        vec!["--load-balancer-config".to_owned(), path]
    };
    let Some(mut lab) = told(test, with_pools) else {
        return;
    };
    let pools = lab.dir.path().join("pools.yaml");
    let [node, _] = &mut lab.nodes;
    node.start().expect("an agent");
    fs::write(&pools, "pools: what").expect("a file");
    node.kill_worker().expect("another worker");
    // The second one has ended by itself when there is a third.
    let second = node.worker().ok();
    until("a worker that reads it again", || {
        Ok(node.worker().ok().filter(|now| Some(*now) != second))
    })
    .expect("a third worker");
    fs::write(&pools, right).expect("pools");
    node.wait("ready", |report| {
        report["ready"] == true && report["restarts"].as_u64() >= Some(2)
    })
    .expect("it is right again");
}
