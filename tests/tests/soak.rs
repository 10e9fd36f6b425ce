//! Pods come and go while agent and plugin are killed at random moments: in the end nothing is leaked and nothing is doubled.
//! `KEELWAY_SOAK_S` says for how many seconds, `KEELWAY_SOAK_SEED` with which numbers. The runtime is this test, which does as runtimes
//! do: it deletes what it could not add, repeats deletions until they succeed, and forgets some pods whose namespaces it takes away.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use keelway_tests::agents::{AgentNode, Pod, addresses_of, cni_result, two_dual_stack_nodes};
use keelway_tests::audit::{at_rest, audit};
use keelway_tests::dice::{Dice, soak};
use keelway_tests::sandbox::{Network, Sandbox, ip, is_root};
use serde_json::json;

/// Containers that come and go beside each other.
const LANES: u32 = 6;

/// Adds a pod; sometimes its plugin is killed. What is not added is deleted.
fn come(node: &AgentNode, container: String, dice: &mut Dice) -> Result<Option<Pod>> {
    let network = Network::new()?;
    let output = if dice.below(4) == 0 {
        let life = Duration::from_micros(dice.below(12_000));
        node.cni_killed("ADD", &container, Some(&network), life)?
    } else {
        Some(node.cni("ADD", &container, Some(&network), json!({}))?)
    };
    if let Some(output) = output.filter(|output| output.status.success()) {
        let addresses = addresses_of(&cni_result(&output)?)?;
        let Some(std::net::IpAddr::V4(address)) = addresses.first().copied() else {
            anyhow::bail!("no IPv4 address");
        };
        return Ok(Some(Pod {
            network,
            container,
            address,
            addresses,
        }));
    }
    delete(node, &container, dice)?;
    Ok(None)
}

/// Repeats a deletion until it has succeeded, as runtimes do.
fn delete(node: &AgentNode, container: &str, dice: &mut Dice) -> Result<()> {
    loop {
        let output = if dice.below(4) == 0 {
            let life = Duration::from_micros(dice.below(6000));
            node.cni_killed("DEL", container, None, life)?
        } else {
            Some(node.cni("DEL", container, None, json!({}))?)
        };
        if output.is_some_and(|output| output.status.success()) {
            return Ok(());
        }
    }
}

/// Pods of one lane, until the end; the last one stays.
fn live(
    node: &AgentNode,
    lane: u32,
    seed: u64,
    end: &AtomicBool,
    lives: &AtomicU32,
) -> Result<Pod> {
    let mut dice = Dice::new(seed.wrapping_add(u64::from(lane) * 7919));
    let mut count = 0;
    loop {
        count += 1;
        let pod = come(node, format!("lane-{lane}-{count}"), &mut dice)?;
        lives.fetch_add(1, Ordering::Relaxed);
        let Some(pod) = pod else { continue };
        if end.load(Ordering::Relaxed) {
            return Ok(pod);
        }
        match dice.below(6) {
            // The runtime was killed and knows nothing of it; the namespace goes.
            0 => drop(pod),
            1 => {
                // The namespace goes first.
                let container = pod.container.clone();
                drop(pod);
                delete(node, &container, &mut dice)?;
            }
            _ => delete(node, &pod.container, &mut dice)?,
        }
    }
}

#[test]
fn whatever_is_killed_nothing_is_leaked_and_nothing_is_doubled() {
    let test = "whatever_is_killed_nothing_is_leaked_and_nothing_is_doubled";
    if !is_root(test) {
        return;
    }
    let (seconds, seed) = soak(15);
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let (cluster, nodes) = two_dual_stack_nodes(&sandbox, dir.path(), &[]).expect("two nodes");
    cluster.write(&[]).expect("the cluster's file");
    let [mut node, _] = nodes;
    node.start().expect("an agent");

    let (end, lives) = (AtomicBool::new(false), AtomicU32::new(0));
    let mut kills = 0;
    let stayed: Vec<Pod> = thread::scope(|scope| {
        let killable = node.killable().expect("the agent");
        let node = &node;
        let (end, lives) = (&end, &lives);
        let lanes: Vec<_> = (0..LANES)
            .map(|lane| scope.spawn(move || live(node, lane, seed, end, lives)))
            .collect();
        let mut dice = Dice::new(seed ^ 0x5bd1_e995);
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(seconds) {
            // The moment is what this is about; there is nothing to await.
            thread::sleep(Duration::from_millis(400 + dice.below(2400)));
            if killable.kill_worker() {
                kills += 1;
            }
        }
        end.store(true, Ordering::Relaxed);
        lanes
            .into_iter()
            .map(|lane| lane.join().expect("no panic").expect("a lane"))
            .collect()
    });
    println!(
        "{} pods came, {kills} agents were killed, {} pods stay",
        lives.load(Ordering::Relaxed),
        stayed.len()
    );
    assert!(kills > 0, "nothing was tried");
    let pods: Vec<&Pod> = stayed.iter().collect();
    assert_eq!(at_rest(&node, &pods), Vec::<String>::new(), "seed {seed}");

    // The whole agent, supervisor included, and its file with it.
    node.kill().expect("killed");
    std::fs::remove_file(node.state_dir().join("addresses.json")).expect("the file");
    node.start().expect("an agent");
    assert_eq!(
        at_rest(&node, &pods),
        Vec::<String>::new(),
        "after the file was lost"
    );
    for pod in &stayed {
        assert!(
            node.cni("DEL", &pod.container, None, json!({}))
                .expect("the plugin")
                .status
                .success()
        );
    }
    assert_eq!(at_rest(&node, &[]), Vec::<String>::new(), "in the end");
}

#[test]
fn the_audit_finds_what_is_planted() {
    if !is_root("the_audit_finds_what_is_planted") {
        return;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let (cluster, nodes) = two_dual_stack_nodes(&sandbox, dir.path(), &[]).expect("two nodes");
    cluster.write(&[]).expect("the cluster's file");
    let [mut node, _] = nodes;
    node.start().expect("an agent");
    let (kept, leaked) = (
        node.wire("kept").expect("a pod"),
        node.wire("leaked").expect("a pod"),
    );
    assert_eq!(at_rest(&node, &[&kept, &leaked]), Vec::<String>::new());
    // A pod that nobody knows any more: every trace of it is found.
    let found = audit(&node, &[&kept]).expect("an audit").join("\n");
    for trace in [
        "allocation of the agent",
        "allocation of the file",
        "interface",
        "hook",
        "route",
        "map entry",
    ] {
        assert!(
            found.contains(&format!("{trace} left over")),
            "{trace}: {found}"
        );
    }
    assert!(!found.contains("missing"), "{found}");
    // One that is missing.
    let other = Pod {
        network: Network::new().expect("a network"),
        container: "nobody".into(),
        address: [10, 244, 1, 200].into(),
        addresses: vec![[10, 244, 1, 200].into()],
    };
    let found = audit(&node, &[&kept, &leaked, &other])
        .expect("an audit")
        .join("\n");
    for trace in [
        "allocation of the agent missing",
        "interface missing",
        "route missing",
        "does not have its address",
    ] {
        assert!(found.contains(trace), "{trace}: {found}");
    }
    // An interface and a route by themselves.
    node.host
        .run(|| -> Result<()> {
            ip("link add kw0123456789ab type veth peer name other")?;
            ip("link set kw0123456789ab up")?;
            ip("route add 10.244.1.250/32 dev kw0123456789ab proto 107")
        })
        .expect("planted");
    let found = audit(&node, &[&kept, &leaked])
        .expect("an audit")
        .join("\n");
    assert!(
        found.contains("interface left over: kw0123456789ab")
            && found.contains("route left over: 10.244.1.250"),
        "{found}"
    );
    // Two pods with one address.
    let twin = Pod {
        network: Network::new().expect("a network"),
        container: "twin".into(),
        address: kept.address,
        addresses: kept.addresses.clone(),
    };
    let found = audit(&node, &[&kept, &twin]).expect("an audit").join("\n");
    assert!(found.contains("given to two pods"), "{found}");
}
