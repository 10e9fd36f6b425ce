//! Whether a node has what its pods need, and nothing else: interfaces, addresses, routes, hooks, map entries, files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;

use anyhow::{Context as _, Result};
use keelway_agent::addresses::{host_interface, is_host_interface};
use keelway_agent::dataplane;
use keelway_agent::net::{Kernel, Netlink};
use keelway_cni::Attachment;
use serde_json::Value;

use crate::agents::{AgentNode, Pod, until};

/// What is wrong when everything has come to rest: as [`audit`], after as long as an agent may take.
pub fn at_rest(node: &AgentNode, pods: &[&Pod]) -> Vec<String> {
    let mut last = Vec::new();
    // Pods that went without a word, and deletions that wait, are found with the next round of upkeep.
    let rested = until("rest", || {
        last = audit(node, pods).unwrap_or_else(|error| vec![format!("no audit: {error:#}")]);
        Ok(last.is_empty().then_some(()))
    });
    match rested {
        Ok(()) => Vec::new(),
        Err(_) => last,
    }
}

/// What is wrong on a node that is to have these pods and no other; empty when all is well. To be asked once the agent has come to rest.
pub fn audit(node: &AgentNode, pods: &[&Pod]) -> Result<Vec<String>> {
    let mut wrong = Vec::new();
    let expected: BTreeMap<String, &Pod> = pods
        .iter()
        .map(|pod| {
            let attachment = Attachment {
                container_id: pod.container.clone(),
                ifname: "eth0".into(),
            };
            (host_interface(&attachment), *pod)
        })
        .collect();
    let addresses: BTreeMap<IpAddr, &str> = expected
        .iter()
        .flat_map(|(name, pod)| pod.addresses.iter().map(move |ip| (*ip, name.as_str())))
        .collect();
    let all: usize = pods.iter().map(|pod| pod.addresses.len()).sum();
    if addresses.len() != all {
        wrong.push("an address is given to two pods".into());
    }

    let report = node.report()?;
    let saved = fs::read(node.state_dir().join("addresses.json")).unwrap_or(b"{}".into());
    let saved: Value = serde_json::from_slice(&saved).context("the file of addresses")?;
    for (whose, allocations) in [
        ("agent", &report["allocations"]),
        ("file", &saved["allocations"]),
    ] {
        compare(
            &mut wrong,
            &format!("allocation of the {whose}"),
            allocations
                .as_array()
                .into_iter()
                .flatten()
                .map(|one| format!("{} {}", one["hostInterface"], one["addresses"])),
            expected.iter().map(|(name, pod)| {
                format!(
                    "{} {}",
                    Value::from(name.as_str()),
                    serde_json::json!(pod.addresses)
                )
            }),
        );
    }
    let links = node.links()?;
    compare(
        &mut wrong,
        "interface",
        links
            .iter()
            .map(|(_, name)| name.clone())
            .filter(|name| is_host_interface(name)),
        expected.keys().cloned(),
    );
    let index: BTreeMap<&str, u32> = links
        .iter()
        .map(|(index, name)| (name.as_str(), *index))
        .collect();
    let indexed = |name: &str| index.get(name).copied().unwrap_or_default();
    compare(
        &mut wrong,
        "hook",
        node.pod_hooks()?.into_iter(),
        expected.keys().flat_map(|name| {
            ["pod_ingress", "pod_egress"].map(|hook| format!("{hook}-{}", indexed(name)))
        }),
    );
    let routes = node
        .host
        .run(|| -> Result<_> { Ok(Kernel::new(Netlink::open()?).pod_routes()?) })?;
    let led = |address: &IpAddr, index: u32| format!("{address} by interface {index}");
    compare(
        &mut wrong,
        "route",
        routes.iter().map(|(index, address)| led(address, *index)),
        addresses
            .iter()
            .map(|(address, name)| led(address, indexed(name))),
    );
    let held = dataplane::held(&node.pin_root()).context("the maps")?;
    compare(
        &mut wrong,
        "map entry",
        held.pods
            .iter()
            .map(|(address, pod)| led(address, pod.ifindex)),
        addresses
            .iter()
            .map(|(address, name)| led(address, indexed(name))),
    );
    let waiting = fs::read_dir(node.state_dir().join("deleted")).map_or(0, Iterator::count);
    if waiting > 0 {
        wrong.push(format!("{waiting} deletions wait still"));
    }
    for pod in pods {
        let inside = pod
            .network
            .run(|| -> Result<_> { Ok(Kernel::new(Netlink::open()?).addresses()?) })?;
        let inside: BTreeSet<IpAddr> = inside.into_iter().map(|(_, ip, _)| ip).collect();
        if let Some(missing) = pod.addresses.iter().find(|ip| !inside.contains(ip)) {
            wrong.push(format!(
                "{} does not have its address {missing}",
                pod.container
            ));
        }
    }
    Ok(wrong)
}

fn compare(
    wrong: &mut Vec<String>,
    what: &str,
    there: impl Iterator<Item = String>,
    expected: impl Iterator<Item = String>,
) {
    let (there, expected): (BTreeSet<String>, BTreeSet<String>) =
        (there.collect(), expected.collect());
    wrong.extend(
        there
            .difference(&expected)
            .map(|one| format!("{what} left over: {one}")),
    );
    wrong.extend(
        expected
            .difference(&there)
            .map(|one| format!("{what} missing: {one}")),
    );
}
