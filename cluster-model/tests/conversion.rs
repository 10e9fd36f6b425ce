//! What is taken from the API's objects, and what is refused.

use std::sync::Arc;

use cluster_model::*;

fn read(item: serde_json::Value) -> Result<Object, String> {
    match read_manifest(item.to_string().as_bytes()) {
        Ok(objects) => Ok(objects.into_iter().next().expect("one object")),
        Err(error) => Err(error.to_string()),
    }
}

fn service(spec: serde_json::Value) -> Result<Service, String> {
    let object = read(serde_json::json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "web"}, "spec": spec,
    }))?;
    match object {
        Object::Service(service) => Ok(Service::clone(&service)),
        other => panic!("{other:?}"),
    }
}

fn slice(address_type: &str, endpoint: serde_json::Value) -> Result<EndpointSlice, String> {
    let object = read(serde_json::json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": address_type,
        "metadata": {"namespace": "default", "name": "web-x", "labels": {"kubernetes.io/service-name": "web"}},
        "ports": [{"name": "http", "port": 8080}, {"name": "any"}], "endpoints": [endpoint],
    }))?;
    match object {
        Object::EndpointSlice(slice) => Ok(EndpointSlice::clone(&slice)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_service_is_read_with_the_defaults_of_the_api() {
    let web = service(serde_json::json!({
        "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"], "ports": [{"port": 80}],
        "trafficDistribution": "PreferSameNode", "sessionAffinity": "ClientIP",
    }))
    .unwrap();
    assert_eq!(web.key.to_string(), "default/web");
    assert_eq!(
        web.cluster_ips,
        ["10.96.0.7".parse::<std::net::IpAddr>().unwrap()]
    );
    assert_eq!(
        (web.service_type, web.headless),
        (ServiceType::ClusterIp, false)
    );
    assert_eq!(web.traffic_distribution, TrafficDistribution::SameNode);
    assert_eq!(web.internal_traffic_policy, TrafficPolicy::Cluster);
    assert_eq!(web.affinity_timeout_s, Some(10_800));
    assert_eq!(
        (
            web.ports[0].protocol,
            web.ports[0].port,
            &*web.ports[0].name
        ),
        (Protocol::Tcp, 80, "")
    );
}

#[test]
fn headless_and_external_services_have_no_addresses() {
    assert!(
        service(serde_json::json!({"clusterIP": "None", "clusterIPs": ["None"]}))
            .unwrap()
            .headless
    );
    let external =
        service(serde_json::json!({"type": "ExternalName", "externalName": "example.net"}))
            .unwrap();
    assert_eq!(external.external_name.as_deref(), Some("example.net"));
    assert!(external.cluster_ips.is_empty() && !external.headless);
}

#[test]
fn an_address_of_a_balancer_that_proxies_is_none_of_the_services() {
    let read = |mode: Option<&str>| {
        let object = read(serde_json::json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"namespace": "default", "name": "web"},
            "spec": {"type": "LoadBalancer", "clusterIP": "10.96.0.7", "ports": [{"port": 80}]},
            "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.7", "ipMode": mode}, {"hostname": "example.net"}]}},
        }));
        match object {
            Ok(Object::Service(service)) => service.load_balancer_ips.len(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        (read(None), read(Some("VIP")), read(Some("Proxy"))),
        (1, 1, 0)
    );
}

#[test]
fn a_label_says_that_another_proxy_serves_a_service() {
    let labelled = |labels: serde_json::Value| {
        let object = read(serde_json::json!({
            "apiVersion": "v1", "kind": "Service", "spec": {"clusterIP": "10.96.0.7", "ports": [{"port": 80}]},
            "metadata": {"namespace": "default", "name": "web", "labels": labels},
        }));
        match object {
            Ok(Object::Service(service)) => service.proxy_name.as_deref().map(str::to_owned),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(labelled(serde_json::json!({"app": "web"})), None);
    let proxy = serde_json::json!({"service.kubernetes.io/service-proxy-name": "other"});
    assert_eq!(labelled(proxy).as_deref(), Some("other"));
    // That label is for slices: kube-proxy 1.35 and later look for it there alone.
    let none = serde_json::json!({"service.kubernetes.io/headless": ""});
    assert_eq!(labelled(none), None);
}

#[test]
fn a_label_says_that_a_slice_is_for_names_alone() {
    for (label, headless) in [
        ("service.kubernetes.io/headless", true),
        // Of a Service this says who serves it; slices have it only as what is copied from there.
        ("service.kubernetes.io/service-proxy-name", false),
    ] {
        let object = read(serde_json::json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"namespace": "default", "name": "web-x", "labels": {"kubernetes.io/service-name": "web", label: ""}},
            "ports": [], "endpoints": [],
        }));
        match object {
            Ok(Object::EndpointSlice(slice)) => assert_eq!(slice.headless, headless, "{label}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn malformed_services_are_refused_by_the_name_of_the_field() {
    let cases = [
        (
            serde_json::json!({"clusterIPs": ["10.96.0.300"]}),
            "spec.clusterIPs[0]: \"10.96.0.300\" is not an IP address",
        ),
        (
            serde_json::json!({"clusterIPs": ["0.0.0.0"]}),
            "unspecified",
        ),
        (
            serde_json::json!({"ports": [{"port": 70000}]}),
            "spec.ports[0].port: 70000 is not a port",
        ),
        (
            serde_json::json!({"ports": [{"port": 1}, {"port": 2}]}),
            "spec.ports[1].name: \"\" is there twice",
        ),
        (
            serde_json::json!({"ports": [{"port": 1, "protocol": "ICMP"}]}),
            "spec.ports[0].protocol",
        ),
        (serde_json::json!({"type": "Magic"}), "spec.type"),
        (
            serde_json::json!({"type": "ExternalName"}),
            "spec.externalName",
        ),
        (
            serde_json::json!({"internalTrafficPolicy": "local"}),
            "spec.internalTrafficPolicy",
        ),
        (
            serde_json::json!({"loadBalancerSourceRanges": ["10.0.0.0/33"]}),
            "spec.loadBalancerSourceRanges[0]",
        ),
    ];
    for (spec, expected) in cases {
        let error = service(spec.clone()).expect_err(&spec.to_string());
        assert!(
            error.contains("Service default/web: ") && error.contains(expected),
            "{error}"
        );
    }
}

#[test]
fn addresses_outside_that_no_packet_can_be_sent_to_are_left_out_and_the_others_serve() {
    let spec = serde_json::json!({"externalIPs": ["224.0.0.1", "::ffff:192.0.2.1", "192.0.2.2", "nowhere"]});
    let service = service(spec).expect("a Service");
    // One address has one form, as a map has one key for it.
    let usable: [std::net::IpAddr; 2] = ["192.0.2.1", "192.0.2.2"].map(|ip| ip.parse().unwrap());
    assert_eq!(service.external_ips, usable);
    let [multicast, none] = &service.refused[..] else {
        panic!("{:?}", service.refused);
    };
    assert!(multicast.contains("spec.externalIPs[0]") && multicast.contains("multicast"));
    assert!(none.contains("spec.externalIPs[3]"), "{none}");
}

#[test]
fn absent_conditions_mean_ready_and_serving() {
    let one = slice("IPv4", serde_json::json!({"addresses": ["10.244.1.2"]})).unwrap();
    assert_eq!(
        one.endpoints[0].conditions,
        Conditions {
            ready: true,
            serving: true,
            terminating: false
        }
    );
    let one = slice(
        "IPv4",
        serde_json::json!({"addresses": ["10.244.1.2"], "conditions": {"ready": false}}),
    )
    .unwrap();
    assert_eq!(
        one.endpoints[0].conditions,
        Conditions {
            ready: false,
            serving: true,
            terminating: false
        }
    );
    assert_eq!(one.service.as_ref().unwrap().to_string(), "default/web");
    assert_eq!(one.ports.len(), 1, "a port without a number is for others");
}

#[test]
fn malformed_slices_are_refused() {
    let error = slice("FQDN", serde_json::json!({"addresses": ["example.net"]})).unwrap_err();
    assert!(
        error.contains("EndpointSlice default/web-x: ") && error.contains("addressType"),
        "{error}"
    );
}

#[test]
fn endpoints_that_nothing_can_be_sent_to_are_left_out_by_name() {
    for (addresses, expected) in [
        (vec![], "endpoints[0].addresses: is empty"),
        (vec!["fd00::1"], "not of the slice's addressType"),
        (vec!["010.1.2.3"], "is not an IP address"),
        (vec!["127.0.0.1"], "is a loopback address"),
        (vec!["169.254.1.2"], "is a link-local address"),
        (vec!["224.0.0.1"], "is a multicast address"),
        (vec!["255.255.255.255"], "is the broadcast address"),
        (vec!["0.0.0.0"], "is the unspecified address"),
    ] {
        let one = slice("IPv4", serde_json::json!({"addresses": addresses})).unwrap();
        assert!(one.endpoints.is_empty(), "{expected}");
        let [refused] = one.refused.as_slice() else {
            panic!("{:?}", one.refused)
        };
        assert!(refused.contains(expected), "{refused}");
    }
}

#[test]
fn endpoints_share_the_texts_that_they_have_in_common() {
    let endpoint = |address: &str, node: &str| {
        serde_json::json!({
            "addresses": [address], "nodeName": node, "zone": "a", "hints": {"forZones": [{"name": "a"}, {}], "forNodes": null},
            "targetRef": {"kind": "Pod", "namespace": "default", "name": address},
        })
    };
    let object = read(serde_json::json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"namespace": "default", "name": "web-x"},
        "endpoints": [endpoint("10.0.0.1", "n1"), endpoint("10.0.0.2", "n1"), endpoint("10.0.0.3", "n2")],
    }));
    let Ok(Object::EndpointSlice(slice)) = object else {
        panic!("{object:?}")
    };
    let [first, second, third] = &slice.endpoints[..] else {
        panic!("{slice:?}")
    };
    let same = |a: &Option<Arc<str>>, b: &Option<Arc<str>>| {
        Arc::ptr_eq(a.as_ref().unwrap(), b.as_ref().unwrap())
    };
    assert!(same(&first.node_name, &second.node_name) && same(&first.zone, &third.zone));
    assert_eq!(third.node_name.as_deref(), Some("n2"));
    assert_eq!(third.for_zones, ["a".into()]);
    assert!(third.for_nodes.is_empty());
    let target = third.target.as_ref().unwrap();
    assert!(Arc::ptr_eq(&target.key.namespace, &slice.key.namespace));
    assert_eq!((&*target.kind, &*target.key.name), ("Pod", "10.0.0.3"));
}

#[test]
fn a_node_needs_proper_pod_ranges() {
    let node = |cidr: &str| {
        read(serde_json::json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1"}, "spec": {"podCIDRs": [cidr]},
            "status": {"addresses": [{"type": "Hostname", "address": "node-1"}, {"type": "InternalIP", "address": "198.18.0.11"}]},
        }))
    };
    match node("10.244.1.0/24").unwrap() {
        Object::Node(node) => assert_eq!(node.internal_ips.len(), 1),
        other => panic!("{other:?}"),
    }
    for bad in ["10.244.1.0", "10.244.1.7/24", "10.244.1.0/40", "pods"] {
        assert!(
            node(bad)
                .unwrap_err()
                .contains("Node node-1: spec.podCIDRs[0]"),
            "{bad}"
        );
    }
}

#[test]
fn one_bad_item_rejects_the_manifest() {
    let list = serde_json::json!({"kind": "List", "items": [
        {"kind": "Node", "metadata": {"name": "a"}}, {"kind": "Secret", "metadata": {"name": "b"}}]});
    assert!(
        read_manifest(list.to_string().as_bytes())
            .unwrap_err()
            .to_string()
            .contains("item 1: kind \"Secret\"")
    );
    assert!(read_manifest(b"{").is_err());
}
