//! The agent is killed before each of the steps by which it adds or deletes a pod, one after another: whatever it had done by then, nothing
//! is leaked and nothing is doubled. `KEELWAY_STEPS=all` tries every step, else some of them.

#![cfg(target_arch = "x86_64")]

use anyhow::{Context as _, Result, ensure};
use keelway_tests::agents::{
    AgentNode, Pod, addresses_of, cni_result, two_dual_stack_nodes, until,
};
use keelway_tests::audit;
use keelway_tests::sandbox::{Network, Sandbox, is_root};
use keelway_tests::steps::Steps;
use serde_json::json;

/// Of so many steps, one is tried.
const STRIDE: u32 = 9;
/// More steps than there are.
const STEPS_MAX: u32 = 400;

fn stride() -> u32 {
    match std::env::var("KEELWAY_STEPS").as_deref() {
        Ok("all") => 1,
        _ => STRIDE,
    }
}

fn at_rest(node: &AgentNode, pods: &[&Pod]) -> Result<()> {
    let wrong = audit::at_rest(node, pods);
    ensure!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

fn deleted(node: &AgentNode, container: &str) -> Result<()> {
    until("it is deleted", || {
        let output = node.cni("DEL", container, None, json!({}))?;
        Ok(output.status.success().then_some(()))
    })
}

/// A pod, once the agent that has just begun can add one.
fn added(node: &AgentNode, name: &str) -> Result<Pod> {
    until("an agent that adds", || Ok(node.wire(name).ok()))
}

/// Adds a pod with the agent killed before that step, and says whether there was such a step.
fn add_killed(node: &AgentNode, step: u32) -> Result<bool> {
    let first = added(node, &format!("first-{step}"))?;
    deleted(node, &first.container)?;
    at_rest(node, &[]).context("before")?;
    let (container, network) = (format!("add-{step}"), Network::new()?);
    let steps = Steps::follow(node.worker()?, step)?;
    steps.count();
    let output = node.cni("ADD", &container, Some(&network), json!({}))?;
    let taken = steps.finish()?;
    let result = cni_result(&output);
    match &result {
        Ok(result) => {
            let addresses = addresses_of(result)?;
            let Some(std::net::IpAddr::V4(address)) = addresses.first().copied() else {
                anyhow::bail!("no IPv4 address");
            };
            let pod = Pod {
                network,
                container: container.clone(),
                address,
                addresses,
            };
            at_rest(node, &[&pod]).context("with the pod")?;
        }
        Err(_) => ensure!(taken >= step, "it failed by itself: {output:?}"),
    }
    deleted(node, &container)?;
    at_rest(node, &[]).context("without the pod")?;
    Ok(taken >= step)
}

fn delete_killed(node: &AgentNode, step: u32) -> Result<bool> {
    let pod = added(node, &format!("del-{step}"))?;
    at_rest(node, &[&pod])?;
    let steps = Steps::follow(node.worker()?, step)?;
    steps.count();
    let output = node.cni("DEL", &pod.container, None, json!({}))?;
    // What goes behind the answer counts too.
    let gone = until("the interface goes", || {
        Ok(node.pod_interfaces()?.is_empty().then_some(()))
    });
    let taken = steps.finish()?;
    ensure!(
        output.status.success(),
        "a deletion never fails: {output:?}"
    );
    gone?;
    at_rest(node, &[])?;
    Ok(taken >= step)
}

#[test]
fn killed_at_any_step_nothing_is_leaked() {
    if !is_root("killed_at_any_step_nothing_is_leaked") {
        return;
    }
    let sandbox = Sandbox::enter().expect("a sandbox");
    let dir = tempfile::tempdir().expect("a folder");
    let (cluster, [mut node, _other]) =
        two_dual_stack_nodes(&sandbox, dir.path(), &[]).expect("two nodes");
    cluster.write(&[]).expect("the cluster's file");
    node.start().expect("an agent");
    // Where it begins differs from run to run, so that all steps have their turn.
    let offset = std::process::id() % stride();
    for (what, killed) in [
        ("ADD", add_killed as fn(&AgentNode, u32) -> Result<bool>),
        ("DEL", delete_killed),
    ] {
        let mut tried = 0;
        // The first one always: there may be fewer than the offset.
        let some = (2 + offset..STEPS_MAX).step_by(stride() as usize);
        for step in std::iter::once(1).chain(some) {
            let reached = killed(&node, step)
                .unwrap_or_else(|error| panic!("{what}, step {step}: {error:#}"));
            if !reached {
                break;
            }
            tried += 1;
        }
        println!("{what}: killed at {tried} steps");
        assert!(tried > 0, "{what} has no steps");
    }
}
