//! Which endpoints the slices' hints lead a node to, and slices that serve nobody.

use super::*;

/// An endpoint elsewhere with hints: what they say counts, not where it is.
fn hinted(ip: u8, nodes: &[&str], zones: &[&str]) -> Endpoint {
    let each = |names: &[&str]| names.iter().map(|name| Arc::from(*name)).collect();
    Endpoint {
        for_nodes: each(nodes),
        for_zones: each(zones),
        ..endpoint(ip, "node-9", "c", READY)
    }
}

#[test]
fn hints_for_nodes_come_before_those_for_zones_and_without_one_for_this_node_there_are_all() {
    let web = || service("web", 1);
    let all_hinted = vec![
        hinted(1, &["node-1", "node-2"], &["a"]),
        hinted(2, &["node-2"], &["a"]),
        hinted(3, &["node-3"], &["b"]),
    ];
    assert_eq!(chosen(web(), all_hinted).0, [1]);
    let none_for_the_node = vec![
        hinted(2, &["node-2"], &["a"]),
        hinted(3, &["node-3"], &["b"]),
    ];
    assert_eq!(chosen(web(), none_for_the_node).0, [2]);
    let none_for_the_zone = vec![hinted(3, &["node-3"], &["b"]), hinted(4, &[], &["c"])];
    assert_eq!(chosen(web(), none_for_the_zone).0, [3, 4]);
    // Each kind counts by itself.
    let one_without_node = vec![hinted(1, &["node-1"], &["b"]), hinted(2, &[], &["a"])];
    assert_eq!(chosen(web(), one_without_node).0, [2]);
}

#[test]
fn hints_count_when_every_ready_endpoint_has_one() {
    let one_without = vec![hinted(1, &[], &["a"]), endpoint(2, "node-1", "a", READY)];
    assert_eq!(chosen(service("web", 1), one_without).0, [2, 1]);
    let one_not_ready = vec![
        hinted(1, &[], &["a"]),
        hinted(2, &[], &["b"]),
        endpoint(3, "node-1", "a", NOT_READY),
        endpoint(4, "node-1", "a", TERMINATING),
    ];
    assert_eq!(chosen(service("web", 1), one_not_ready), (vec![1], vec![4]));
    // Those that terminate are asked for whatever their hints.
    let draining = vec![Endpoint {
        conditions: TERMINATING,
        ..hinted(1, &[], &["b"])
    }];
    assert_eq!(chosen(service("web", 1), draining), (vec![], vec![1]));
}

#[test]
fn what_a_service_prefers_is_for_who_writes_its_slices() {
    for traffic_distribution in [TrafficDistribution::SameNode, TrafficDistribution::SameZone] {
        let web = Service {
            traffic_distribution,
            ..service("web", 1)
        };
        let unhinted = vec![
            endpoint(1, "node-1", "a", READY),
            endpoint(2, "node-2", "b", READY),
        ];
        assert_eq!(chosen(web, unhinted).0, [1, 2]);
    }
}

#[test]
fn hints_have_no_say_with_policy_local_nor_where_the_node_has_no_zone() {
    let local = Service {
        internal_traffic_policy: TrafficPolicy::Local,
        ..service("web", 1)
    };
    let elsewhere = |ip, nodes: &[&str]| Endpoint {
        node_name: Some("node-1".into()),
        ..hinted(ip, nodes, &["b"])
    };
    let endpoints = vec![elsewhere(1, &["node-2"]), hinted(2, &["node-1"], &["a"])];
    assert_eq!(chosen(local, endpoints).0, [1]);
    let key = ObjectKey::new("default", "web");
    let slices = vec![slice(
        "web-1",
        "web",
        vec![hinted(1, &[], &["a"]), hinted(2, &[], &["b"])],
    )];
    let nowhere = Here {
        zone: None,
        ..here()
    };
    let plan = plan(&snapshot(vec![service("web", 1)], slices), &key, &nowhere);
    assert_eq!(plan.ports.values().next().unwrap().backends.active.len(), 2);
}

#[test]
fn a_slice_for_names_alone_serves_nobody() {
    let slices = vec![
        EndpointSlice {
            headless: true,
            ..slice("web-1", "web", vec![endpoint(1, "node-1", "a", READY)])
        },
        slice("web-2", "web", vec![endpoint(2, "node-2", "a", READY)]),
    ];
    let key = ObjectKey::new("default", "web");
    let active = |slices: Vec<EndpointSlice>| {
        let plan = plan(&snapshot(vec![service("web", 1)], slices), &key, &here());
        plan.ports.values().next().unwrap().backends.active.clone()
    };
    assert_eq!(active(slices.clone()), ["10.244.0.2:8080".parse().unwrap()]);
    assert_eq!(active(slices[..1].to_vec()), []);
}
