//! Where each address of a Service leads clients here and clients elsewhere.

use super::*;

/// Where each frontend of the Service `web` leads, clients here and clients elsewhere: the last bytes of the active backends.
fn leads(service: Service, endpoints: Vec<Endpoint>) -> BTreeMap<String, (Vec<u8>, Vec<u8>)> {
    let key = service.key.clone();
    let cluster = snapshot(vec![service], vec![slice("web-1", "web", endpoints)]);
    let plan = plan(&cluster, &key, &here());
    check(&plan).expect("a sound plan");
    let last = |port: &PortKey| {
        let backends = &plan.ports[port].backends;
        let last = |at: &std::net::SocketAddr| match at.ip() {
            std::net::IpAddr::V4(v4) => v4.octets()[3],
            std::net::IpAddr::V6(_) => 0,
        };
        backends.active.iter().map(last).collect::<Vec<u8>>()
    };
    let one = |(frontend, route): (&dataplane::Frontend, &Route)| {
        let guard = if route.guarded { " guarded" } else { "" };
        let ends = (last(&route.internal), last(&route.external));
        (format!("{frontend}{guard}"), ends)
    };
    plan.frontends.iter().map(one).collect()
}

#[test]
fn traffic_policies_choose_for_clients_here_and_elsewhere_each_for_itself() {
    let names = [
        "0.0.0.0:30080 TCP",
        "10.96.0.1:80 TCP",
        "192.0.2.1:80 TCP",
        "192.0.2.2:80 TCP guarded",
    ];
    let (all, near) = (vec![1u8, 2], vec![1u8]);
    for (internal, external) in [(false, false), (true, false), (false, true), (true, true)] {
        let policy = |local| match local {
            true => TrafficPolicy::Local,
            false => TrafficPolicy::Cluster,
        };
        let web = Service {
            internal_traffic_policy: policy(internal),
            external_traffic_policy: policy(external),
            ..balanced()
        };
        let of = |local| if local { near.clone() } else { all.clone() };
        let found = leads(web, near_and_far());
        assert_eq!(found.keys().collect::<Vec<_>>(), names);
        for (name, ends) in &found {
            // Clients on this node reach external addresses as if the policy were Cluster.
            let wanted = match name.starts_with("10.96") {
                true => (of(internal), of(internal)),
                false => (all.clone(), of(external)),
            };
            assert_eq!(
                *ends, wanted,
                "{name}, internal {internal}, external {external}"
            );
        }
    }
}

#[test]
fn the_type_of_a_service_says_which_addresses_it_has() {
    let count = |service_type, cluster_ips: &[&str]| {
        let cluster_ips = cluster_ips.iter().map(|ip| ip.parse().unwrap()).collect();
        let web = Service {
            service_type,
            cluster_ips,
            ..balanced()
        };
        leads(web, near_and_far()).len()
    };
    assert_eq!(count(ServiceType::ClusterIp, &["10.96.0.1"]), 2);
    assert_eq!(count(ServiceType::NodePort, &["10.96.0.1"]), 3);
    assert_eq!(count(ServiceType::LoadBalancer, &["10.96.0.1"]), 4);
    // A NodePort in each family that the Service has; addresses of others are left out.
    assert_eq!(count(ServiceType::NodePort, &["10.96.0.1", "fd00::1"]), 5);
    assert_eq!(count(ServiceType::LoadBalancer, &["fd00::1"]), 2);
}

#[test]
fn a_load_balancers_address_is_a_services_unless_it_is_a_nodes() {
    let web = balanced();
    let key = web.key.clone();
    let mut cluster = snapshot(vec![web], vec![]);
    let vips = |cluster: &Snapshot| -> BTreeMap<_, Vip> {
        plan(cluster, &key, &here()).vips.into_iter().collect()
    };
    let (own, given) = ([10, 96, 0, 1].into(), [192, 0, 2, 2].into());
    assert_eq!(
        vips(&cluster),
        BTreeMap::from([(own, Vip::Cluster), (given, Vip::External)])
    );
    let node = Object::Node(Arc::new(Node {
        name: "node-7".into(),
        internal_ips: vec![given],
        pod_cidrs: vec![],
        zone: None,
        leaving: false,
    }));
    cluster.apply(Change::Upsert(node), &mut Dirty::default());
    assert_eq!(vips(&cluster), BTreeMap::from([(own, Vip::Cluster)]));
}

#[test]
fn without_an_endpoint_here_policy_local_is_silent_and_without_any_it_rejects() {
    let web = Service {
        internal_traffic_policy: TrafficPolicy::Local,
        ..service("web", 1)
    };
    let key = web.key.clone();
    for (endpoints, silent) in [
        (vec![], false),
        (vec![endpoint(2, "node-2", "a", NOT_READY)], false),
        (vec![endpoint(2, "node-2", "a", READY)], true),
        (vec![endpoint(2, "node-2", "a", TERMINATING)], true),
        (vec![endpoint(2, "node-1", "a", TERMINATING)], false),
    ] {
        let cluster = snapshot(vec![web.clone()], vec![slice("web-1", "web", endpoints)]);
        let plan = plan(&cluster, &key, &here());
        assert_eq!(plan.ports.values().next().unwrap().backends.silent, silent);
    }
}
