//! What is kept, lost and refused when Services are made and changed.

use super::super::testing::told_with_defaults;
use super::*;

#[test]
fn ports_get_a_protocol_and_a_target() {
    let mut service = json!({"spec": {"ports": [{"port": 80}, {"port": 53, "protocol": "UDP", "targetPort": "dns"}]}});
    Service.default(&mut service);
    assert_eq!(
        service["spec"]["ports"][0],
        json!({"port": 80, "protocol": "TCP", "targetPort": 80})
    );
    assert_eq!(service["spec"]["ports"][1]["targetPort"], "dns");
    assert_eq!(service["spec"]["type"], "ClusterIP");
}

#[test]
fn a_type_that_changes_takes_along_what_only_it_can_have() {
    let mut old = json!({"spec": {
        "type": "LoadBalancer", "loadBalancerClass": "example.com/a", "ports": [{"port": 80, "nodePort": 30000}],
    }});
    Service.default(&mut old);
    let mut service = old.clone();
    service["spec"]["type"] = "ClusterIP".into();
    Service.default(&mut service);
    Service.prepare_update(&mut service, &old);
    let mut errors = Vec::new();
    Service.validate(&service, &mut errors);
    assert!(errors.is_empty(), "{errors:?}");
    // What is set anew is wrong, and is said to be.
    service["spec"]["loadBalancerClass"] = "example.com/b".into();
    Service.prepare_update(&mut service, &old);
    Service.validate(&service, &mut errors);
    assert_eq!(errors.len(), 1, "{errors:?}");
}

#[test]
fn a_service_that_becomes_a_name_loses_its_policy_for_clients_outside() {
    let mut old = json!({"spec": {"type": "NodePort", "ports": [{"port": 80, "nodePort": 30000}]}});
    Service.default(&mut old);
    let mut service = old.clone();
    service["spec"]["type"] = "ExternalName".into();
    service["spec"]["externalName"] = "example.com".into();
    Service.default(&mut service);
    Service.prepare_update(&mut service, &old);
    let mut errors = Vec::new();
    Service.validate(&service, &mut errors);
    assert!(errors.is_empty(), "{errors:?}");
    // What is set anew is wrong, and is said to be.
    service["spec"]["externalTrafficPolicy"] = "Local".into();
    Service.prepare_update(&mut service, &old);
    Service.validate(&service, &mut errors);
    assert_eq!(errors.len(), 1, "{errors:?}");
}

#[test]
fn a_balancers_port_for_health_stays() {
    let balanced = |port: u16, policy: &str| {
        json!({"spec": {"type": "LoadBalancer", "ports": [{"port": 80}],
            "externalTrafficPolicy": policy, "healthCheckNodePort": port}})
    };
    let faults = |new: &Value| {
        let mut errors = Vec::new();
        Service.validate_update(new, &balanced(30222, "Local"), &mut errors);
        errors
            .into_iter()
            .map(|error| error.field)
            .collect::<Vec<_>>()
    };
    let field = "spec.healthCheckNodePort";
    assert!(!faults(&balanced(30222, "Local")).contains(&field.to_owned()));
    assert!(faults(&balanced(30333, "Local")).contains(&field.to_owned()));
    assert!(!faults(&balanced(0, "Cluster")).contains(&field.to_owned()));
}

#[test]
fn what_does_not_go_with_the_type_is_refused() {
    let told = |spec: Value| told_with_defaults(&Service, json!({ "spec": spec }));
    assert_eq!(told(json!({"ports": [{"port": 80}]})), Vec::<String>::new());
    assert_eq!(told(json!({})), ["spec.ports: Required value"]);
    assert_eq!(
        told(
            json!({"ports": [{"port": 80, "name": "a", "nodePort": 30000}, {"port": 80, "name": "a", "targetPort": "-x"}],
            "loadBalancerSourceRanges": ["10.0.0.0/8"], "externalIPs": ["127.0.0.1"]})
        ),
        [
            "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
            "spec.ports[1].name: Duplicate value: \"a\"",
            "spec.ports[1].targetPort: Invalid value: \"-x\": must not begin or end with a hyphen",
            r#"spec.ports[1]: Duplicate value: {"port":80,"protocol":"TCP"}"#,
            r#"spec.externalIPs[0]: Invalid value: "127.0.0.1": may not be in the loopback range (127.0.0.0/8, ::1/128)"#,
            "spec.loadBalancerSourceRanges: Forbidden: may only be used when `type` is 'LoadBalancer'",
        ]
    );
    assert_eq!(
        told(json!({"type": "ExternalName"})),
        ["spec.externalName: Required value"]
    );
}

/// A balancer's Service as it is stored, with all that one can have.
fn balanced() -> Value {
    let mut service = json!({
        "spec": {
            "type": "LoadBalancer", "loadBalancerClass": "example.com/a", "selector": {"app": "web"},
            "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"], "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack",
            "externalTrafficPolicy": "Local", "healthCheckNodePort": 30009, "sessionAffinity": "ClientIP",
            "ports": [{"name": "http", "port": 80, "nodePort": 30001}, {"name": "tls", "port": 443, "nodePort": 30002}],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}, "conditions": [{"type": "A"}]},
    });
    Service.default(&mut service);
    service
}

/// A service after a write that makes `new` of it, and what is wrong with that.
fn written(old: &Value, mut new: Value) -> (Value, Vec<String>) {
    new["status"] = old["status"].clone();
    Service.prepare_update(&mut new, old);
    Service.default(&mut new);
    let mut errors = Vec::new();
    Service.validate(&new, &mut errors);
    Service.validate_update(&new, old, &mut errors);
    let told = errors.iter().map(ToString::to_string).collect();
    (new, told)
}

#[test]
fn each_type_keeps_what_it_can_have_of_a_balancers() {
    let old = balanced();
    let everywhere = ["ports", "selector", "sessionAffinity", "type"];
    let inside = [
        "clusterIP",
        "clusterIPs",
        "internalTrafficPolicy",
        "ipFamilies",
        "ipFamilyPolicy",
    ];
    for (kind, more, node_ports) in [
        (
            "NodePort",
            [&inside[..], &["externalTrafficPolicy"]].concat(),
            true,
        ),
        ("ClusterIP", inside.to_vec(), false),
        ("ExternalName", vec!["externalName"], false),
    ] {
        let mut new = old.clone();
        new["spec"]["type"] = kind.into();
        if kind == "ExternalName" {
            new["spec"]["externalName"] = "example.com".into();
        }
        let (service, told) = written(&old, new);
        assert_eq!(told, [""; 0], "{kind}");
        let spec = service["spec"].as_object().unwrap();
        let kept: BTreeSet<&str> = spec.keys().map(String::as_str).collect();
        let mut expected: BTreeSet<&str> = everywhere.iter().chain(&more).copied().collect();
        expected.insert("sessionAffinityConfig");
        assert_eq!(kept, expected, "{kind}");
        assert_eq!(spec["ports"][0].get("nodePort").is_some(), node_ports);
        // The addresses were the balancer's; what else is said of the Service stays.
        assert_eq!(service["status"]["loadBalancer"], json!({}), "{kind}");
        assert_eq!(service["status"]["conditions"][0]["type"], "A");

        // And back, by who says nothing but what he wants: what is missing is given anew.
        let mut wish =
            json!({"spec": {"type": "LoadBalancer", "ports": [{"name": "http", "port": 80}]}});
        // What the allocator would fill in.
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
            let field = format!("/spec/{field}");
            if let Some(given) = service.pointer(&field) {
                wish.set(&field, given.clone());
            }
        }
        let (back, told) = written(&service, wish);
        assert_eq!(told, [""; 0], "{kind}");
        let number = back.int("/spec/ports/0/nodePort");
        assert_eq!(number, if node_ports { 30001 } else { 0 }, "{kind}");
        assert_eq!(back["spec"]["externalTrafficPolicy"], "Cluster");
        assert_eq!(back["status"]["loadBalancer"], json!({}), "{kind}");
    }
}

#[test]
fn who_leaves_out_a_number_that_was_given_keeps_it() {
    let old = balanced();
    let replaced = |ports: Value| {
        let mut new = old.clone();
        new["spec"]["ports"] = ports;
        new["spec"].remove("/healthCheckNodePort");
        let (service, told) = written(&old, new);
        assert_eq!(told, [""; 0]);
        assert_eq!(service["spec"]["healthCheckNodePort"], 30009);
        let ports = service.items("/spec/ports").iter();
        ports.map(|port| port.int("/nodePort")).collect::<Vec<_>>()
    };
    for (ports, expected) in [
        // By its name, whatever else of it changes.
        (
            json!([{"name": "http", "port": 8080}, {"name": "tls", "port": 443, "protocol": "UDP"}]),
            vec![30001, 30002],
        ),
        (
            json!([{"name": "web", "port": 80}, {"name": "tls", "port": 443}]),
            vec![0, 30002],
        ),
        // Not when another one has it now.
        (
            json!([{"name": "http", "port": 80}, {"name": "tls", "port": 443, "nodePort": 30001}]),
            vec![0, 30001],
        ),
    ] {
        assert_eq!(replaced(ports.clone()), expected, "{ports}");
    }
}

#[test]
fn a_balancer_that_is_given_no_node_ports_keeps_those_that_it_has() {
    let mut old = balanced();
    old["spec"]["allocateLoadBalancerNodePorts"] = false.into();
    let mut labelled = old.clone();
    labelled["metadata"] = json!({"labels": {"a": "b"}});
    let mut ungiving = balanced();
    ungiving["spec"]["allocateLoadBalancerNodePorts"] = false.into();
    for (before, after) in [(&old, labelled), (&balanced(), ungiving)] {
        let (service, told) = written(before, after);
        assert_eq!(told, [""; 0]);
        assert_eq!(service["spec"]["ports"], before["spec"]["ports"]);
        assert!(!wants_node_ports(&service));
    }
}

#[test]
fn what_a_new_type_cannot_have_is_refused_where_it_was_set_anew() {
    let old = balanced();
    let told = |change: &dyn Fn(&mut Value)| {
        let mut new = old.clone();
        new["spec"]["type"] = "ClusterIP".into();
        change(&mut new["spec"]);
        written(&old, new).1
    };
    for (field, value, why) in [
        (
            "healthCheckNodePort",
            json!(30010),
            "spec.healthCheckNodePort: Invalid value: 30010: may only be set when `type` is 'LoadBalancer' and \
             `externalTrafficPolicy` is 'Local'",
        ),
        (
            "allocateLoadBalancerNodePorts",
            json!(false),
            "spec.allocateLoadBalancerNodePorts: Forbidden: may only be used when `type` is 'LoadBalancer'",
        ),
        (
            "externalTrafficPolicy",
            json!("Cluster"),
            "spec.externalTrafficPolicy: Invalid value: \"Cluster\": may only be set for externally-accessible services",
        ),
    ] {
        assert_eq!(told(&|spec| spec[field] = value.clone()), [why]);
    }
    let node_ports = told(&|spec| spec["ports"][0]["nodePort"] = 30099.into());
    assert_eq!(node_ports.len(), 2, "{node_ports:?}");
    let mut fresh = json!({"spec": {"ports": [{"port": 80}], "externalTrafficPolicy": "Local"}});
    assert_eq!(told_with_defaults(&Service, fresh.clone()).len(), 1);
    // Outside, a ClusterIP is reached by addresses of others.
    fresh["spec"]["externalIPs"] = json!(["192.0.2.1"]);
    assert_eq!(told_with_defaults(&Service, fresh), [""; 0]);
}

#[test]
fn addresses_that_no_router_carries_and_the_kubelets_port_are_not_served() {
    let told = |spec: Value| told_with_defaults(&Service, json!({ "spec": spec }));
    let external = |ip: &str| told(json!({"ports": [{"port": 80}], "externalIPs": [ip]}));
    for (ip, range) in [
        ("224.0.0.251", "link-local multicast range"),
        ("ff02::fb", "link-local multicast range"),
        ("::ffff:127.0.0.1", "loopback range"),
        ("169.254.1.1", "link-local range"),
    ] {
        let told = external(ip);
        assert!(told.len() == 1 && told[0].contains(range), "{ip}: {told:?}");
    }
    assert_eq!(external("192.0.2.1"), [""; 0]);
    assert_eq!(
        told(json!({"type": "LoadBalancer", "ports": [{"port": 10250}]})),
        [
            "spec.ports[0].port: Invalid value: 10250: may not expose port 10250 externally since it is used by kubelet"
        ]
    );
}

#[test]
fn a_balancer_that_is_late_gives_no_address_to_what_is_none() {
    let told = |kind: &str| {
        let mut service = balanced();
        service["spec"]["type"] = kind.into();
        let mut errors = Vec::new();
        validate_status(&service, &mut errors);
        errors.len()
    };
    assert_eq!((told("LoadBalancer"), told("ClusterIP")), (0, 1));
}
