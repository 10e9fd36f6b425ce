//! Slices of Services in a cluster in memory.

mod changes;
mod zones;

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Endpoints, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::object::Key;
use super::super::plan::Controller;
use super::super::pods;
use super::super::testing::{Cluster, namespace, node, pod};
use super::SLICE_ENDPOINTS_MAX;

const CONTROLLERS: &[Controller] = &[super::CONTROLLER];

fn service(spec: Value) -> Service {
    let mut value = json!({
        "metadata": {"namespace": "default", "name": "web", "labels": {"team": "a"}},
        "spec": {
            "selector": {"app": "web"}, "clusterIP": "10.96.0.20", "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}],
        },
    });
    for (name, field) in spec.as_object().unwrap() {
        value["spec"][name] = field.clone();
    }
    serde_json::from_value(value).unwrap()
}

fn cluster(spec: Value) -> Cluster {
    let mut cluster = Cluster::new(CONTROLLERS);
    cluster.add(namespace("default"));
    cluster.add(node("n0"));
    cluster.add(service(spec));
    cluster
}

/// Puts the node into a zone.
fn give_zone(cluster: &mut Cluster) {
    cluster.edit::<Node>(&Key::cluster("n0"), |node| {
        let labels = node.metadata.labels.as_mut().unwrap();
        labels.insert("topology.kubernetes.io/zone".into(), "z1".into());
    });
}

/// A pod of the Service on a node, with a named port.
fn add_pod(cluster: &mut Cluster, name: &str, port: i32) -> Key {
    let mut pod = pod("default", name);
    pod.metadata.labels = Some([("app".to_string(), "web".to_string())].into());
    let spec = pod.spec.as_mut().unwrap();
    spec.node_name = Some("n0".into());
    spec.containers[0].ports =
        Some(serde_json::from_value(json!([{"name": "web", "containerPort": port}])).unwrap());
    let pod = cluster.add(pod);
    Key::of(&pod.metadata)
}

fn slices(cluster: &Cluster) -> Vec<&EndpointSlice> {
    cluster
        .snapshot
        .slices
        .values()
        .map(|slice| &**slice)
        .collect()
}

fn endpoints(cluster: &Cluster) -> Vec<&Endpoint> {
    slices(cluster)
        .into_iter()
        .flat_map(|slice| slice.endpoints.iter().flatten())
        .collect()
}

/// (ready, serving, terminating) of the only endpoint.
fn conditions(cluster: &Cluster) -> (bool, bool, bool) {
    let endpoints = endpoints(cluster);
    assert_eq!(endpoints.len(), 1);
    let conditions = endpoints[0].conditions.as_ref().unwrap();
    (
        conditions.ready.unwrap(),
        conditions.serving.unwrap(),
        conditions.terminating.unwrap(),
    )
}

#[test]
fn a_service_without_pods_has_one_empty_slice_of_its_own() {
    let mut cluster = cluster(json!({}));
    cluster.settle();
    let slices = slices(&cluster);
    assert_eq!(slices.len(), 1);
    let labels = slices[0].metadata.labels.as_ref().unwrap();
    assert_eq!(labels["kubernetes.io/service-name"], "web");
    assert_eq!(
        labels["endpointslice.kubernetes.io/managed-by"],
        "endpointslice-controller.k8s.io"
    );
    assert_eq!(labels["team"], "a");
    assert!(pods::controller_of(&slices[0].metadata).is_some_and(|owner| owner.kind == "Service"));
}

#[test]
fn an_endpoint_says_where_its_pod_is_and_how_it_does() {
    let mut cluster = cluster(json!({}));
    give_zone(&mut cluster);
    let key = add_pod(&mut cluster, "a", 8080);
    cluster.settle();
    assert!(endpoints(&cluster).is_empty(), "no address, no endpoint");
    cluster.set_ready(&key, false);
    cluster.settle();
    assert_eq!(conditions(&cluster), (false, false, false));
    cluster.set_ready(&key, true);
    cluster.settle();
    assert_eq!(conditions(&cluster), (true, true, false));
    let endpoint = endpoints(&cluster)[0].clone();
    assert_eq!(endpoint.node_name.as_deref(), Some("n0"));
    assert_eq!(endpoint.zone.as_deref(), Some("z1"));
    let target = endpoint.target_ref.unwrap();
    assert_eq!(
        (target.kind.as_deref(), target.name.as_deref()),
        (Some("Pod"), Some("a"))
    );
    let port = &slices(&cluster)[0].ports.as_ref().unwrap()[0];
    assert_eq!(
        (port.name.as_deref(), port.port, port.protocol.as_deref()),
        (Some("http"), Some(8080), Some("TCP"))
    );
    cluster.hold_pods = true;
    cluster.delete("a", super::super::plan::Propagation::Background);
    cluster.settle();
    assert_eq!(
        conditions(&cluster),
        (false, true, true),
        "it may finish what it serves"
    );
    cluster.finish_pods();
    cluster.settle();
    assert!(endpoints(&cluster).is_empty());
    assert_eq!(slices(&cluster).len(), 1);
}

#[test]
fn ready_endpoints_say_for_which_node_and_zone_they_are_when_the_service_asks_for_it() {
    for (distribution, zones, nodes) in [
        ("PreferSameNode", true, true),
        ("PreferClose", true, false),
        ("PreferSameZone", true, false),
    ] {
        let mut cluster = cluster(json!({"trafficDistribution": distribution}));
        give_zone(&mut cluster);
        let key = add_pod(&mut cluster, "a", 8080);
        cluster.set_ready(&key, false);
        cluster.settle();
        assert!(
            endpoints(&cluster)[0].hints.is_none(),
            "{distribution}: nobody is sent to what is not ready"
        );
        cluster.set_ready(&key, true);
        cluster.settle();
        let hints = endpoints(&cluster)[0].hints.clone().unwrap();
        let names = hints
            .for_zones
            .unwrap_or_default()
            .into_iter()
            .map(|zone| zone.name)
            .collect::<Vec<_>>();
        assert_eq!(names == ["z1"], zones, "{distribution}");
        let names = hints
            .for_nodes
            .unwrap_or_default()
            .into_iter()
            .map(|node| node.name)
            .collect::<Vec<_>>();
        assert_eq!(names == ["n0"], nodes, "{distribution}");
        // Taking the wish back takes the hints away.
        cluster.edit::<Service>(&Key::new("default", "web"), |web| {
            web.spec.as_mut().unwrap().traffic_distribution = None
        });
        cluster.settle();
        assert!(endpoints(&cluster)[0].hints.is_none());
    }
}

#[test]
fn an_ended_pod_and_a_pod_that_stops_matching_leave() {
    let mut cluster = cluster(json!({}));
    for name in ["a", "b", "c"] {
        add_pod(&mut cluster, name, 8080);
    }
    cluster.all_ready();
    cluster.settle();
    assert_eq!(endpoints(&cluster).len(), 3);
    cluster.edit::<Pod>(&Key::new("default", "a"), |pod| {
        pod.status.as_mut().unwrap().phase = Some("Succeeded".into())
    });
    cluster.edit::<Pod>(&Key::new("default", "b"), |pod| pod.metadata.labels = None);
    cluster.settle();
    let names: Vec<_> = endpoints(&cluster)
        .iter()
        .map(|one| one.target_ref.clone().unwrap().name.unwrap())
        .collect();
    assert_eq!(names, ["c"]);
}

#[test]
fn addresses_that_are_not_ready_are_published_when_asked_for() {
    let mut cluster = cluster(json!({"publishNotReadyAddresses": true, "clusterIP": "None"}));
    let key = add_pod(&mut cluster, "a", 8080);
    cluster.set_ready(&key, false);
    cluster.settle();
    assert_eq!(
        conditions(&cluster),
        (true, false, false),
        "whether it serves, its pod says"
    );
    let labels = slices(&cluster)[0].metadata.labels.as_ref().unwrap();
    assert!(labels.contains_key("service.kubernetes.io/headless"));
}

#[test]
fn a_headless_service_without_ports_still_names_its_pods_with_their_host_names() {
    let mut cluster = cluster(json!({"ports": null, "clusterIP": "None"}));
    let key = add_pod(&mut cluster, "a", 8080);
    cluster.edit::<Pod>(&key, |pod| {
        let spec = pod.spec.as_mut().unwrap();
        spec.hostname = Some("first".into());
        spec.subdomain = Some("web".into());
    });
    cluster.set_ready(&key, true);
    cluster.settle();
    assert_eq!(endpoints(&cluster)[0].hostname.as_deref(), Some("first"));
    assert!(slices(&cluster)[0].ports.as_ref().is_none_or(Vec::is_empty));
}

#[test]
fn a_named_target_port_may_be_another_number_in_each_pod() {
    let mut cluster =
        cluster(json!({"ports": [{"name": "http", "port": 80, "targetPort": "web"}]}));
    add_pod(&mut cluster, "a", 8080);
    add_pod(&mut cluster, "b", 9090);
    cluster.all_ready();
    cluster.settle();
    let ports: BTreeSet<_> = slices(&cluster)
        .iter()
        .map(|slice| slice.ports.as_ref().unwrap()[0].port)
        .collect();
    assert_eq!(ports, BTreeSet::from([Some(8080), Some(9090)]));
    assert_eq!(slices(&cluster).len(), 2);
}

#[test]
fn a_dual_stack_service_has_slices_of_both_families() {
    let mut cluster = cluster(json!({"ipFamilies": ["IPv4", "IPv6"]}));
    let key = add_pod(&mut cluster, "a", 8080);
    cluster.set_ready(&key, true);
    cluster.edit::<Pod>(&key, |pod| {
        pod.status.as_mut().unwrap().pod_ips.as_mut().unwrap().push(
            k8s_openapi::api::core::v1::PodIP {
                ip: "fd00::7".into(),
            },
        );
    });
    cluster.settle();
    let found: BTreeSet<(String, String)> = slices(&cluster)
        .iter()
        .flat_map(|slice| {
            slice
                .endpoints
                .iter()
                .flatten()
                .map(|one| (slice.address_type.clone(), one.addresses[0].clone()))
        })
        .collect();
    assert_eq!(found.len(), 2);
    assert!(found.contains(&("IPv6".into(), "fd00::7".into())));
}

#[test]
fn slices_of_other_managers_are_left_alone_and_services_without_selector_get_none() {
    let mut cluster = cluster(json!({"selector": null}));
    let foreign: EndpointSlice = serde_json::from_value(json!({
        "metadata": {"namespace": "default", "name": "mine", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "endpoints": [{"addresses": ["192.0.2.1"]}], "ports": [],
    }))
    .unwrap();
    cluster.add(foreign);
    cluster.settle();
    assert_eq!(slices(&cluster).len(), 1);
    cluster.edit::<Service>(&Key::new("default", "web"), |web| {
        web.spec.as_mut().unwrap().selector = Some([("app".to_string(), "web".to_string())].into());
    });
    cluster.settle();
    assert_eq!(slices(&cluster).len(), 2);
}

#[test]
fn one_more_pod_rewrites_one_slice_of_many() {
    let mut cluster = cluster(json!({}));
    for index in 0..250 {
        add_pod(&mut cluster, &format!("p{index:03}"), 8080);
    }
    cluster.all_ready();
    cluster.settle();
    let sizes: Vec<usize> = slices(&cluster)
        .iter()
        .map(|slice| slice.endpoints.as_ref().unwrap().len())
        .collect();
    assert_eq!((sizes.len(), sizes.iter().sum::<usize>()), (3, 250));
    let versions = |cluster: &Cluster| -> BTreeSet<String> {
        slices(cluster)
            .iter()
            .map(|slice| slice.metadata.resource_version.clone().unwrap())
            .collect()
    };
    let before = versions(&cluster);
    let key = add_pod(&mut cluster, "new", 8080);
    cluster.set_ready(&key, true);
    cluster.settle();
    assert_eq!(before.intersection(&versions(&cluster)).count(), 2);
    assert_eq!(endpoints(&cluster).len(), 251);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever pods do, the slices end with exactly the pods that have an address, each once, in slices that are not too large.
    #[test]
    fn slices_hold_each_pod_once(steps in prop::collection::vec((0u8..6, 0usize..240), 1..300)) {
        let mut cluster = cluster(json!({}));
        for (step, which) in steps {
            let name = format!("p{which}");
            let key = Key::new("default", &name);
            let known = cluster.snapshot.pods.contains(&key);
            match step {
                0 | 1 if !known => { add_pod(&mut cluster, &name, 8080); }
                2 | 3 => cluster.set_ready(&key, which % 5 > 0),
                4 if known => cluster.delete_now(&name),
                _ => for _ in 0..which % 4 { cluster.step(); },
            }
        }
        cluster.settle();
        let wanted: BTreeSet<String> = cluster.snapshot.pods.values()
            .filter_map(|pod| pod.status.as_ref()?.pod_ip.clone()).collect();
        let found: Vec<String> = endpoints(&cluster).iter().map(|one| one.addresses[0].clone()).collect();
        prop_assert_eq!(found.len(), wanted.len());
        prop_assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), wanted);
        let sizes: Vec<usize> = slices(&cluster).iter().map(|slice| slice.endpoints.as_ref().unwrap().len()).collect();
        prop_assert!(sizes.iter().all(|size| *size <= SLICE_ENDPOINTS_MAX));
        prop_assert!(sizes.len() == 1 || sizes.iter().all(|size| *size > 0), "{:?}", sizes);
    }
}

const ALL: &[Controller] = &[super::CONTROLLER, super::SUBSETS, super::MIRRORING];

fn subsets(cluster: &Cluster, name: &str) -> Value {
    let found = cluster.snapshot.endpoints.get(&Key::new("default", name));
    json!(found.map(|endpoints| endpoints.subsets.clone().unwrap_or_default()))
}

#[test]
fn endpoints_say_the_same_as_slices_and_go_with_the_service() {
    let mut cluster = Cluster::new(ALL);
    cluster.add(namespace("default"));
    cluster.add(service(json!({})));
    cluster.settle();
    assert_eq!(subsets(&cluster, "web"), json!([]), "there from the start");
    let keys = [
        add_pod(&mut cluster, "a", 8080),
        add_pod(&mut cluster, "b", 8080),
    ];
    cluster.set_ready(&keys[0], true);
    cluster.set_ready(&keys[1], false);
    cluster.settle();
    let found = subsets(&cluster, "web");
    assert_eq!(found[0]["addresses"][0]["targetRef"]["name"], "a");
    assert_eq!(found[0]["addresses"][0]["nodeName"], "n0");
    assert_eq!(found[0]["notReadyAddresses"][0]["targetRef"]["name"], "b");
    assert_eq!(
        found[0]["ports"],
        json!([{"name": "http", "port": 8080, "protocol": "TCP"}])
    );
    let endpoints = cluster.snapshot.endpoints.values().next().unwrap().clone();
    assert_eq!(endpoints.metadata.labels.as_ref().unwrap()["team"], "a");
    assert!(
        endpoints
            .metadata
            .annotations
            .as_ref()
            .unwrap()
            .contains_key(super::TRIGGER_TIME)
    );
    assert!(slices(&cluster).iter().all(|slice| {
        slice.metadata.labels.as_ref().unwrap()[super::MANAGED_BY_LABEL] == super::MANAGER
    }));
    cluster.delete_now("web");
    cluster.settle();
    assert_eq!(subsets(&cluster, "web"), json!(null));
}

#[test]
fn endpoints_are_bounded_and_prefer_what_is_ready() {
    let mut cluster = Cluster::new(&[super::SUBSETS]);
    cluster.add(namespace("default"));
    cluster.add(service(json!({})));
    for index in 0..1003 {
        let key = add_pod(&mut cluster, &format!("p{index:04}"), 8080);
        cluster.set_ready(&key, index >= 3);
    }
    cluster.settle();
    let found = subsets(&cluster, "web");
    assert_eq!(found[0]["addresses"].as_array().unwrap().len(), 1000);
    assert_eq!(found[0]["notReadyAddresses"], json!(null));
    let endpoints = cluster.snapshot.endpoints.values().next().unwrap();
    assert_eq!(
        endpoints.metadata.annotations.as_ref().unwrap()[super::subsets::OVER_CAPACITY],
        "truncated"
    );
}

fn custom(name: &str, subsets: Value) -> Endpoints {
    serde_json::from_value(json!({
        "metadata": {"namespace": "default", "name": name, "labels": {"kept": "by-hand"}}, "subsets": subsets,
    }))
    .unwrap()
}

#[test]
fn endpoints_kept_by_hand_are_mirrored() {
    let mut cluster = Cluster::new(ALL);
    cluster.add(namespace("default"));
    cluster.add(service(json!({"selector": null})));
    let subset = json!([{
        "addresses": [{"ip": "10.1.2.3"}, {"ip": "fd00::3"}], "notReadyAddresses": [{"ip": "10.1.2.4"}],
        "ports": [{"name": "http", "port": 9000, "protocol": "TCP"}],
    }]);
    cluster.add(custom("web", subset));
    cluster.settle();
    let mut families: Vec<_> = slices(&cluster)
        .iter()
        .map(|slice| {
            (
                slice.address_type.clone(),
                slice.endpoints.as_ref().unwrap().len(),
            )
        })
        .collect();
    families.sort();
    assert_eq!(families, [("IPv4".to_string(), 2), ("IPv6".to_string(), 1)]);
    let labels = slices(&cluster)[0].metadata.labels.clone().unwrap();
    assert_eq!(
        labels[super::MANAGED_BY_LABEL],
        "endpointslicemirroring-controller.k8s.io"
    );
    assert_eq!(
        (&*labels["kept"], &*labels["kubernetes.io/service-name"]),
        ("by-hand", "web")
    );
    cluster.edit::<Endpoints>(&Key::new("default", "web"), |endpoints| {
        endpoints.subsets = custom("web", json!([{"addresses": [{"ip": "10.9.9.9"}]}])).subsets;
    });
    cluster.settle();
    let found: Vec<_> = endpoints(&cluster)
        .iter()
        .map(|one| one.addresses.clone())
        .collect();
    assert_eq!(found, [["10.9.9.9"]]);
    cluster.edit::<Endpoints>(&Key::new("default", "web"), |endpoints| {
        let labels = endpoints.metadata.labels.as_mut().unwrap();
        labels.insert(
            "endpointslice.kubernetes.io/skip-mirror".into(),
            "true".into(),
        );
    });
    cluster.settle();
    assert!(slices(&cluster).is_empty());
}

#[test]
fn endpoints_without_a_service_stay_and_are_not_mirrored() {
    let mut cluster = Cluster::new(ALL);
    cluster.add(namespace("default"));
    cluster.add(custom(
        "early",
        json!([{"addresses": [{"ip": "10.1.2.3"}]}]),
    ));
    cluster.settle();
    assert!(slices(&cluster).is_empty());
    assert_eq!(
        subsets(&cluster, "early")[0]["addresses"][0]["ip"],
        "10.1.2.3"
    );
}
