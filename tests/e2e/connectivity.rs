//! What `keelway status --connectivity` tells of the ways between nodes.

use std::time::Duration;

use keelway_tests::cluster::{Cluster, keelway};
use keelway_tests::process::{Finished, eventually, run};
use serde_json::Value;

fn status(cluster: &Cluster, more: &[&str]) -> Finished {
    let keelway = keelway().display().to_string();
    let command = [
        keelway.as_str(),
        "status",
        "--name",
        &cluster.name,
        "--connectivity",
    ];
    cluster.run(&[&command, more].concat(), &[])
}

/// Whether all is well, and for each pair of nodes its way and latency.
fn pairs(cluster: &Cluster) -> (bool, Vec<(String, String, Value, Value)>) {
    let finished = status(cluster, &["--output", "json"]);
    let all: Value = serde_json::from_str(&finished.stdout)
        .unwrap_or_else(|error| panic!("no status: {error}: {finished}"));
    let pairs = all[0]["connectivity"]["pairs"].as_array().cloned();
    let name = |name: &Value| name.as_str().unwrap_or_default().to_owned();
    let pairs = pairs.unwrap_or_default().into_iter().map(|pair| {
        let (way, latency) = (pair["way"].clone(), pair["latencyUs"].clone());
        (name(&pair["from"]), name(&pair["to"]), way, latency)
    });
    (finished.success, pairs.collect())
}

pub fn every_pair_of_nodes_is_told_with_its_latency(cluster: &Cluster) {
    let nodes = cluster.workers().len();
    let whole = || {
        eventually("every pair, directly", Duration::from_secs(30), || {
            let (ok, pairs) = pairs(cluster);
            let direct = pairs
                .iter()
                .all(|(_, _, way, latency)| way == "direct" && latency.is_u64());
            (ok && direct && pairs.len() == nodes * (nodes - 1))
                .then_some(())
                .ok_or_else(|| format!("{ok}: {pairs:?}"))
        });
    };
    whole();
    let text = status(cluster, &[]).ok();
    assert!(text.contains("-> ") && text.contains(" us"), "{text}");

    // A node that is cut off is named by every pair that it is of, and by no other.
    let (_, control_plane) = cluster.control_plane();
    let (cut, _) = cluster.workers().remove(nodes - 1);
    let link = |state: &str| {
        let namespace = format!("--net=/proc/{control_plane}/ns/net");
        let set = ["nsenter", &namespace, "ip", "link", "set", &cut, state];
        run(&set, &[], 10).ok();
    };
    link("down");
    eventually("its pairs are silent", Duration::from_secs(30), || {
        let (ok, pairs) = pairs(cluster);
        let right = pairs
            .iter()
            .all(|(from, to, _, latency)| latency.is_null() == (*from == cut || *to == cut));
        (!ok && right && pairs.len() == nodes * (nodes - 1))
            .then_some(())
            .ok_or_else(|| format!("{ok}: {pairs:?}"))
    });
    link("up");
    whole();
}
