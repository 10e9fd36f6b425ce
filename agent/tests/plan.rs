//! Plans of Services: which endpoints, in which order, and that bookkeeping by change equals planning from nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cluster_model::*;
use dataplane_abi::limits;
use keelway_agent::dataplane::{self, Lead, Op, ServiceBackends, ServiceId, Sources, State, Vip};
use keelway_agent::plan::{
    Balancing, Batch, Here, Ledger, NodeRoute, PortKey, Refusal, Route, RouteChange, Routing,
    check, diff_routes, host_ports_key, plan, plan_host_ports, plan_routes, plan_unmasqueraded,
};
use proptest::prelude::*;

#[path = "plan/hints.rs"]
mod hints;
#[path = "plan/moves.rs"]
mod moves;

fn here() -> Here {
    Here {
        balancing: Balancing::default(),
        node: "node-1".into(),
        zone: Some("a".into()),
    }
}

fn service(name: &str, ip: u8) -> Service {
    Service {
        cluster_ips: vec![[10, 96, 0, ip].into()],
        ports: vec![service_port("http", Protocol::Tcp, 80)],
        ..Service::named(ObjectKey::new("default", name))
    }
}

fn service_port(name: &str, protocol: Protocol, port: u16) -> ServicePort {
    ServicePort {
        name: name.into(),
        protocol,
        port,
        node_port: None,
        app_protocol: None,
    }
}

const READY: Conditions = Conditions {
    ready: true,
    serving: true,
    terminating: false,
};
const TERMINATING: Conditions = Conditions {
    ready: false,
    serving: true,
    terminating: true,
};
const NOT_READY: Conditions = Conditions {
    ready: false,
    serving: false,
    terminating: false,
};

fn endpoint(ip: u8, node: &str, zone: &str, conditions: Conditions) -> Endpoint {
    Endpoint {
        address: [10, 244, 0, ip].into(),
        conditions,
        node_name: Some(node.into()),
        zone: Some(zone.into()),
        hostname: None,
        target: None,
        for_zones: vec![],
        for_nodes: vec![],
    }
}

fn slice(name: &str, service: &str, endpoints: Vec<Endpoint>) -> EndpointSlice {
    EndpointSlice {
        key: ObjectKey::new("default", name),
        service: Some(ObjectKey::new("default", service)),
        headless: false,
        ports: vec![EndpointPort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 8080,
            app_protocol: None,
        }],
        endpoints,
        refused: vec![],
        last_change: None,
    }
}

fn snapshot(services: Vec<Service>, slices: Vec<EndpointSlice>) -> Snapshot {
    let (mut snapshot, mut dirty) = (Snapshot::default(), Dirty::default());
    let services = services
        .into_iter()
        .map(|one| Object::Service(Arc::new(one)))
        .collect();
    let slices = slices
        .into_iter()
        .map(|one| Object::EndpointSlice(Arc::new(one)))
        .collect();
    snapshot.apply(Change::Replace(Kind::Service, services), &mut dirty);
    snapshot.apply(Change::Replace(Kind::EndpointSlice, slices), &mut dirty);
    snapshot
}

/// The backends of the Service `web`, by the last byte of their addresses.
fn chosen(service: Service, endpoints: Vec<Endpoint>) -> (Vec<u8>, Vec<u8>) {
    let key = service.key.clone();
    let plan = plan(
        &snapshot(vec![service], vec![slice("web-1", "web", endpoints)]),
        &key,
        &here(),
    );
    check(&plan).expect("a sound plan");
    let backends = &plan.ports.values().next().expect("one port").backends;
    let last = |list: &Vec<std::net::SocketAddr>| {
        list.iter()
            .map(|backend| match backend.ip() {
                std::net::IpAddr::V4(ip) => ip.octets()[3],
                std::net::IpAddr::V6(_) => 0,
            })
            .collect()
    };
    (last(&backends.active), last(&backends.terminating))
}

#[test]
fn ready_endpoints_are_active_local_ones_first_and_terminating_ones_wait() {
    let endpoints = vec![
        endpoint(1, "node-2", "b", READY),
        endpoint(2, "node-1", "a", READY),
        endpoint(3, "node-2", "b", TERMINATING),
        endpoint(4, "node-2", "b", NOT_READY),
    ];
    assert_eq!(chosen(service("web", 1), endpoints), (vec![2, 1], vec![3]));
}

#[test]
fn endpoints_that_are_not_ready_count_where_the_service_says_so() {
    let web = Service {
        publish_not_ready: true,
        ..service("web", 1)
    };
    assert_eq!(
        chosen(web, vec![endpoint(4, "node-2", "b", NOT_READY)]),
        (vec![4], vec![])
    );
}

#[test]
fn internal_traffic_policy_local_never_leaves_the_node() {
    let web = Service {
        internal_traffic_policy: TrafficPolicy::Local,
        ..service("web", 1)
    };
    let endpoints = vec![
        endpoint(1, "node-1", "a", READY),
        endpoint(2, "node-2", "a", READY),
    ];
    assert_eq!(chosen(web.clone(), endpoints).0, [1]);
    assert_eq!(
        chosen(web.clone(), vec![endpoint(2, "node-2", "a", READY)]),
        (vec![], vec![])
    );
    let draining = vec![
        endpoint(1, "node-1", "a", TERMINATING),
        endpoint(2, "node-2", "a", TERMINATING),
    ];
    assert_eq!(chosen(web, draining), (vec![], vec![1]));
}

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

fn balanced() -> Service {
    Service {
        service_type: ServiceType::LoadBalancer,
        external_ips: vec![[192, 0, 2, 1].into()],
        load_balancer_ips: vec![[192, 0, 2, 2].into()],
        load_balancer_source_ranges: vec!["203.0.113.0/24".parse().unwrap()],
        ports: vec![ServicePort {
            node_port: Some(30080),
            ..service_port("http", Protocol::Tcp, 80)
        }],
        ..service("web", 1)
    }
}

fn near_and_far() -> Vec<Endpoint> {
    vec![
        endpoint(1, "node-1", "a", READY),
        endpoint(2, "node-2", "a", READY),
    ]
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

#[test]
fn endpoints_that_would_lead_a_node_to_itself_are_left_out() {
    let web = service("web", 1);
    let key = web.key.clone();
    let strange = [
        "127.0.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "169.254.1.1",
        "255.255.255.255",
    ];
    let mut endpoints = vec![endpoint(1, "node-1", "a", READY)];
    for address in strange {
        endpoints.push(Endpoint {
            address: address.parse().unwrap(),
            ..endpoint(0, "node-1", "a", READY)
        });
    }
    let cluster = snapshot(vec![web], vec![slice("web-1", "web", endpoints)]);
    let plan = plan(&cluster, &key, &here());
    let port = plan.ports.values().next().unwrap();
    assert_eq!((port.backends.active.len(), port.left_out), (1, 5));
}

#[test]
fn a_service_that_changes_its_type_keeps_the_ids_of_what_stays() {
    let mut ledger = Ledger::adopt(State::default());
    let mut state = State::default();
    let mut turn = |service: Service| {
        let key = service.key.clone();
        let cluster = snapshot(vec![service], vec![slice("web-1", "web", near_and_far())]);
        ledger.set(&key, plan(&cluster, &key, &here()));
        let batch = ledger.diff();
        apply(&mut state, &batch);
        ledger.applied(&batch);
        state.clone()
    };
    let local = Service {
        external_traffic_policy: TrafficPolicy::Local,
        ..balanced()
    };
    let first = turn(service("web", 1));
    let second = turn(local.clone());
    let third = turn(Service {
        service_type: ServiceType::NodePort,
        ..local
    });
    let last = turn(service("web", 1));
    assert_eq!((second.services.len(), second.frontends.len()), (2, 4));
    assert_eq!((third.services.len(), third.sources.len()), (2, 0));
    assert!(second.services.keys().eq(third.services.keys()));
    assert_eq!(first, last);
}

#[test]
fn an_endpoint_in_two_slices_is_one_backend() {
    let web = service("web", 1);
    let key = web.key.clone();
    let slices = vec![
        slice("web-1", "web", vec![endpoint(1, "node-2", "b", READY)]),
        slice(
            "web-2",
            "web",
            vec![endpoint(1, "node-2", "b", TERMINATING)],
        ),
    ];
    let plan = plan(&snapshot(vec![web], slices), &key, &here());
    check(&plan).unwrap();
    let backends = &plan.ports.values().next().unwrap().backends;
    assert_eq!((backends.active.len(), backends.terminating.len()), (1, 0));
}

#[test]
fn services_without_an_address_of_their_own_have_no_plan() {
    let headless = Service {
        headless: true,
        cluster_ips: vec![],
        ..service("web", 1)
    };
    let others = Service {
        proxy_name: Some("another".into()),
        ..service("web", 1)
    };
    for service in [headless, others] {
        let key = service.key.clone();
        assert_eq!(
            plan(&snapshot(vec![service], vec![]), &key, &here()),
            Default::default()
        );
    }
}

#[test]
fn a_service_with_more_endpoints_than_fit_is_cut_and_says_so() {
    let endpoints = (0..20_000u32)
        .map(|i| Endpoint {
            address: [10, 244, (i >> 8) as u8, i as u8].into(),
            ..endpoint(0, "node-2", "b", READY)
        })
        .collect();
    let web = service("web", 1);
    let key = web.key.clone();
    let plan = plan(
        &snapshot(vec![web], vec![slice("web-1", "web", endpoints)]),
        &key,
        &here(),
    );
    check(&plan).unwrap();
    let port = plan.ports.values().next().unwrap();
    assert_eq!((port.backends.active.len(), port.left_out), (16_383, 3_617));
}

/// Applies operations as the maps would, and insists that no packet ever sees a frontend that leads nowhere.
fn apply(state: &mut State, batch: &Batch) {
    for op in &batch.ops {
        match op {
            Op::SetService { id, backends } => {
                state.services.insert(*id, backends.clone());
            }
            Op::RemoveService { id } => {
                state.services.remove(id).expect("was there");
            }
            Op::SetSources { id, sources } if sources.is_empty() => {
                state.sources.remove(id).expect("was there");
            }
            Op::SetSources { id, sources } => {
                state.sources.insert(*id, sources.clone());
            }
            Op::SetFrontend { frontend, lead } => {
                state.frontends.insert(*frontend, *lead);
            }
            Op::RemoveFrontend { frontend } => {
                state.frontends.remove(frontend).expect("was there");
            }
            Op::SetVip { addr, kind } => {
                assert_ne!(state.vips.insert(*addr, *kind), Some(*kind));
            }
            Op::RemoveVip { addr } => {
                state.vips.remove(addr).expect("was there");
            }
            Op::RenewService { id, backends } => {
                assert_eq!(state.services.get(id), Some(backends), "as it is");
            }
            other => panic!("{other:?} is not about Services"),
        }
        for (frontend, lead) in &state.frontends {
            for id in [lead.internal, lead.external] {
                assert!(
                    state.services.contains_key(&id),
                    "{frontend} leads nowhere after {op:?}"
                );
                assert!(
                    !lead.guarded || state.sources.contains_key(&id),
                    "{frontend} lets nobody in after {op:?}"
                );
            }
        }
    }
}

/// What a packet sees: ids do not show.
type Seen = (ServiceBackends, Option<Sources>);
/// By frontend, for clients here and elsewhere, and whether it is guarded.
type Visible = BTreeMap<dataplane::Frontend, (Seen, Seen, bool)>;

fn visible(state: &State) -> (Visible, BTreeMap<std::net::IpAddr, Vip>) {
    let one = |id: &ServiceId| (state.services[id].clone(), state.sources.get(id).cloned());
    let seen = state.frontends.iter().map(|(frontend, lead)| {
        let ends = (one(&lead.internal), one(&lead.external), lead.guarded);
        (*frontend, ends)
    });
    (seen.collect(), state.vips.clone())
}

fn full(snapshot: &Snapshot, held: State) -> State {
    let mut state = held.clone();
    let mut ledger = Ledger::adopt(held);
    for service in snapshot.services() {
        ledger.set(&service.key, plan(snapshot, &service.key, &here()));
    }
    apply(&mut state, &ledger.diff());
    state
}

#[test]
fn a_new_agent_keeps_the_ids_that_it_finds_and_changes_nothing() {
    let cluster = snapshot(
        vec![service("a", 1), service("web", 2), service("c", 3)],
        vec![slice(
            "web-1",
            "web",
            vec![endpoint(1, "node-1", "a", READY)],
        )],
    );
    let state = full(&cluster, State::default());
    assert_eq!(state.services.len(), 3);
    assert_eq!(full(&cluster, state.clone()), state);

    let mut ledger = Ledger::adopt(state.clone());
    for service in cluster.services() {
        ledger.set(&service.key, plan(&cluster, &service.key, &here()));
    }
    assert_eq!(ledger.diff().ops, []);
}

#[test]
fn ids_of_another_versions_maps_stay_with_those_they_were_of() {
    let cluster = |names: &[(&str, u8)]| {
        let services = names.iter().map(|(name, ip)| service(name, *ip));
        snapshot(services.collect(), vec![])
    };
    // Made one after the other, so that the order of their ids is not that of their names.
    let before = cluster(&[("web", 2)]);
    let theirs = full(
        &cluster(&[("web", 2), ("a", 1)]),
        full(&before, State::default()),
    );
    let now = cluster(&[("a", 1), ("newcomer", 3), ("web", 2)]);
    let mut ledger = Ledger::adopt(State::default());
    ledger.inherit(theirs.frontends.clone());
    let mut ours = State::default();
    for service in now.services() {
        ledger.set(&service.key, plan(&now, &service.key, &here()));
        let batch = ledger.diff();
        apply(&mut ours, &batch);
        ledger.applied(&batch);
    }
    for (frontend, lead) in &theirs.frontends {
        assert_eq!(ours.frontends.get(frontend), Some(lead), "{frontend}");
    }
    assert_eq!(ours.services.len(), 3);
    // Later they are as free as others.
    ledger.inherit(Default::default());
    for service in now.services() {
        ledger.set(&service.key, Default::default());
    }
    apply(&mut ours, &ledger.diff());
    assert_eq!(ours, State::default());
}

#[test]
fn what_nobody_wants_any_more_is_pruned_after_a_restart() {
    let before = full(
        &snapshot(vec![service("gone", 1), service("web", 2)], vec![]),
        State::default(),
    );
    let after = full(&snapshot(vec![service("web", 2)], vec![]), before.clone());
    assert_eq!(
        (
            after.services.len(),
            after.frontends.len(),
            after.vips.len()
        ),
        (1, 1, 1)
    );
    let kept = after.services.keys().next().unwrap();
    assert!(
        before.services.contains_key(kept),
        "the survivor keeps its id"
    );
}

#[test]
fn a_frontend_that_two_services_want_belongs_to_the_first_by_name() {
    let mut ledger = Ledger::adopt(State::default());
    let cluster = snapshot(vec![service("a", 7), service("b", 7)], vec![]);
    let (a, b) = (
        ObjectKey::new("default", "a"),
        ObjectKey::new("default", "b"),
    );
    ledger.set(&b, plan(&cluster, &b, &here()));
    ledger.set(&a, plan(&cluster, &a, &here()));
    let batch = ledger.diff();
    let mut state = State::default();
    apply(&mut state, &batch);
    ledger.applied(&batch);
    let id_of = |ledger: &Ledger, key| ledger.service(key).unwrap().1[0].1;
    let lead_to = |id| Some(Lead::to(id));
    let held = |state: &State| state.frontends.values().next().copied();
    assert_eq!(held(&state), lead_to(id_of(&ledger, &a)));
    assert!(matches!(batch.refusals[..], [Refusal::Contested { .. }]));
    ledger.set(&a, Default::default());
    apply(&mut state, &ledger.diff());
    assert_eq!(held(&state), lead_to(id_of(&ledger, &b)));
}

#[test]
fn a_failed_batch_is_made_good_from_what_the_maps_hold() {
    let cluster = snapshot(vec![service("a", 1), service("b", 2)], vec![]);
    let mut ledger = Ledger::adopt(State::default());
    for service in cluster.services() {
        ledger.set(&service.key, plan(&cluster, &service.key, &here()));
    }
    let whole = ledger.diff();
    let mut state = State::default();
    apply(
        &mut state,
        &Batch {
            ops: whole.ops[..3].to_vec(),
            refusals: vec![],
        },
    );
    ledger.hold(state.clone());
    apply(&mut state, &ledger.diff());
    assert_eq!(visible(&state), visible(&full(&cluster, State::default())));
}

#[test]
fn what_there_is_no_room_for_waits_and_nobody_waits_for_it() {
    let cluster = snapshot(
        vec![service("big", 1), service("a", 2), service("b", 3)],
        vec![],
    );
    let planned = |ledger: &mut Ledger, name| {
        let key = ObjectKey::new("default", name);
        ledger.set(&key, plan(&cluster, &key, &here()));
    };
    let (mut ledger, mut state) = (Ledger::adopt(State::default()), State::default());
    planned(&mut ledger, "big");
    planned(&mut ledger, "a");
    // All but one thing finds room.
    let mut fits = ledger.diff();
    let left = fits.ops.pop().unwrap();
    apply(&mut state, &fits);
    ledger.hold(state.clone());
    ledger.park();
    assert!(ledger.is_short_of_room());
    planned(&mut ledger, "b");
    let next = ledger.diff();
    assert!(
        !next.ops.is_empty() && !next.ops.contains(&left),
        "{next:?}"
    );
    apply(&mut state, &next);
    ledger.applied(&next);
    assert!(ledger.is_short_of_room());
    ledger.resume();
    let last = ledger.diff();
    assert_eq!(last.ops, [left]);
    apply(&mut state, &last);
    ledger.applied(&last);
    assert!(!ledger.is_short_of_room());
    assert_eq!(visible(&state), visible(&full(&cluster, State::default())));
}

#[test]
fn a_service_for_which_no_id_is_left_gets_one_when_there_is() {
    // What nobody wants any more goes with the batch in which the newcomer finds nothing.
    let held = State {
        services: (1..limits::SERVICES)
            .map(|id| (ServiceId(id), ServiceBackends::default()))
            .collect(),
        ..State::default()
    };
    let (mut ledger, key) = (Ledger::adopt(held), ObjectKey::new("default", "web"));
    let cluster = snapshot(vec![service("web", 1), service("b", 2)], vec![]);
    ledger.set(&key, plan(&cluster, &key, &here()));
    let batch = ledger.diff();
    assert!(matches!(batch.refusals[..], [Refusal::NoId(_)]));
    ledger.applied(&batch);
    assert!(ledger.is_short_of_room());
    ledger.resume();
    let batch = ledger.diff();
    assert_eq!(batch.refusals, []);
    assert!(!ledger.is_short_of_room());
    assert_eq!(ledger.service(&key).unwrap().1.len(), 1);
}

fn any_service() -> impl Strategy<Value = Object> {
    let ports = prop::collection::btree_set(0usize..4, 0..3).prop_map(|set| {
        let all = [
            ("http", Protocol::Tcp, 80),
            ("web", Protocol::Tcp, 80),
            ("dns", Protocol::Udp, 53),
            ("s", Protocol::Sctp, 9),
        ];
        let mut ports: Vec<ServicePort> = set
            .into_iter()
            .map(|i| service_port(all[i].0, all[i].1, all[i].2))
            .collect();
        // The API refuses the same port and protocol twice.
        ports.dedup_by_key(|port| (port.protocol, port.port));
        ports
    });
    let exposed = (
        prop::sample::select(vec![
            ServiceType::ClusterIp,
            ServiceType::NodePort,
            ServiceType::LoadBalancer,
        ]),
        prop::sample::select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local]),
        prop::sample::select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local]),
        prop::sample::subsequence(vec![1u8, 2], 0..2),
        prop::sample::subsequence(vec!["203.0.113.0/24", "10.0.0.0/8"], 0..2),
        prop::option::of(1u32..3),
    );
    let distribution = prop::sample::select(vec![
        TrafficDistribution::Any,
        TrafficDistribution::SameNode,
        TrafficDistribution::SameZone,
    ]);
    (
        prop::sample::select(vec!["a", "b", "web"]),
        1u8..4,
        ports,
        distribution,
        any::<bool>(),
        exposed,
    )
        .prop_map(
            |(name, ip, mut ports, traffic_distribution, headless, exposed)| {
                let (service_type, internal, external, addresses, ranges, affinity_timeout_s) =
                    exposed;
                let address = |last: &u8| [192, 0, 2, *last].into();
                for port in &mut ports {
                    port.node_port = Some(30_000 + port.port);
                }
                let base = Service {
                    service_type,
                    internal_traffic_policy: internal,
                    external_traffic_policy: external,
                    external_ips: addresses.iter().map(address).collect(),
                    load_balancer_ips: addresses.iter().rev().take(1).map(address).collect(),
                    load_balancer_source_ranges: ranges
                        .iter()
                        .map(|range| range.parse().unwrap())
                        .collect(),
                    affinity_timeout_s,
                    ..service(name, ip)
                };
                let cluster_ips = if headless {
                    vec![]
                } else {
                    base.cluster_ips.clone()
                };
                Object::Service(Arc::new(Service {
                    ports,
                    traffic_distribution,
                    headless,
                    cluster_ips,
                    ..base
                }))
            },
        )
}

fn any_slice() -> impl Strategy<Value = Object> {
    let node = prop::sample::select(vec![("node-1", "a"), ("node-2", "a"), ("node-3", "b")]);
    let condition = prop::sample::select(vec![READY, TERMINATING, NOT_READY]);
    let one = (1u8..6, node, condition, any::<bool>()).prop_map(
        |(ip, (node, zone), conditions, hinted)| Endpoint {
            for_zones: hinted.then(|| zone.into()).into_iter().collect(),
            ..endpoint(ip, node, zone, conditions)
        },
    );
    (
        prop::sample::select(vec!["s1", "s2", "s3"]),
        prop::sample::select(vec!["a", "b", "web"]),
        prop::collection::vec(one, 0..4),
    )
        .prop_map(|(name, service, endpoints)| {
            Object::EndpointSlice(Arc::new(slice(name, service, endpoints)))
        })
}

fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => any_service().prop_map(Change::Upsert),
        4 => any_slice().prop_map(Change::Upsert),
        1 => any_service().prop_map(|object| Change::Remove(object.reference())),
        1 => any_slice().prop_map(|object| Change::Remove(object.reference())),
    ]
}

proptest! {
    /// Planning dirty keys only, batch by batch and across restarts of the agent, ends where planning everything from
    /// nothing ends.
    #[test]
    fn incremental_equals_full(batches in prop::collection::vec((prop::collection::vec(any_change(), 1..5), 0u8..8), 1..10)) {
        let (mut snapshot, mut state) = (Snapshot::default(), State::default());
        let mut ledger = Ledger::adopt(State::default());
        for (changes, dice) in batches {
            let mut dirty = Dirty::default();
            for change in changes {
                snapshot.apply(change, &mut dirty);
            }
            if dice == 0 {
                // The agent is killed, and a new one plans everything.
                state = full(&snapshot, state);
                ledger = Ledger::adopt(state.clone());
                for service in snapshot.services() {
                    ledger.set(&service.key, plan(&snapshot, &service.key, &here()));
                }
                prop_assert_eq!(ledger.diff().ops, vec![]);
                continue;
            }
            for key in &dirty.services {
                let wish = plan(&snapshot, key, &here());
                check(&wish).map_err(|violation| TestCaseError::fail(violation.to_string()))?;
                ledger.set(key, wish);
            }
            let batch = ledger.diff();
            apply(&mut state, &batch);
            ledger.applied(&batch);
            prop_assert_eq!(&ledger.held().frontends, &state.frontends);
            prop_assert_eq!(ledger.diff().ops, vec![]);
        }
        prop_assert_eq!(visible(&state), visible(&full(&snapshot, State::default())));
        let leads = state.frontends.values();
        prop_assert!(leads.clone().all(|lead| lead.internal.0 != 0 && lead.external.0 != 0));
        // Nothing is left of what no frontend leads to.
        let used: BTreeSet<ServiceId> = leads.flat_map(|lead| [lead.internal, lead.external]).collect();
        prop_assert_eq!(used, state.services.keys().copied().collect::<BTreeSet<_>>());
        prop_assert!(state.sources.keys().all(|id| state.services.contains_key(id)));
    }
}

fn node(name: &str, ip: u8, range: &str) -> Object {
    Object::Node(Arc::new(Node {
        name: name.into(),
        internal_ips: vec![[198, 18, 0, ip].into()],
        pod_cidrs: vec![range.parse().unwrap()],
        zone: None,
        leaving: false,
    }))
}

#[test]
fn pods_keep_their_addresses_in_the_cluster_and_where_it_is_configured() {
    let (mut snapshot, mut dirty) = (Snapshot::default(), Dirty::default());
    let nodes = vec![
        node("node-1", 11, "10.244.1.0/24"),
        node("node-2", 12, "10.244.2.0/24"),
    ];
    snapshot.apply(Change::Replace(Kind::Node, nodes), &mut dirty);
    // A range may be written with bits after its prefix.
    let configured = ["10.96.0.0/16", "192.0.2.7/24"].map(|range| range.parse().unwrap());
    let wanted = [
        "10.244.1.0/24",
        "10.244.2.0/24",
        "198.18.0.11/32",
        "198.18.0.12/32",
        "169.254.0.0/16",
        "fe80::/10",
        "10.96.0.0/16",
        "192.0.2.0/24",
    ];
    let wanted = wanted.map(|range| range.parse().unwrap()).into();
    assert_eq!(plan_unmasqueraded(&snapshot, configured), wanted);
}

#[test]
fn routes_lead_to_other_nodes_and_close_the_own_range() {
    let (mut snapshot, mut dirty) = (Snapshot::default(), Dirty::default());
    let nodes = vec![
        node("node-1", 11, "10.244.1.0/24"),
        node("node-2", 12, "10.244.2.0/24"),
        node("thief", 13, "10.244.1.0/24"),
    ];
    snapshot.apply(Change::Replace(Kind::Node, nodes), &mut dirty);
    let routes = plan_routes(&snapshot, "node-1", Routing::Direct, &BTreeSet::new()).routes;
    let own = NodeRoute::Own {
        range: "10.244.1.0/24".parse().unwrap(),
    };
    let pods = NodeRoute::Pods {
        range: "10.244.2.0/24".parse().unwrap(),
        node: [198, 18, 0, 12].into(),
    };
    assert_eq!(routes, BTreeSet::from([own, pods]));

    let moved = NodeRoute::Pods {
        range: "10.244.2.0/24".parse().unwrap(),
        node: [198, 18, 0, 99].into(),
    };
    assert_eq!(
        diff_routes(&BTreeSet::from([own, moved]), &routes),
        [RouteChange::Replace(pods)]
    );
    assert_eq!(
        diff_routes(&routes, &BTreeSet::from([own])),
        [RouteChange::Remove(pods)]
    );
    assert_eq!(diff_routes(&routes, &routes), []);
}
