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

#[path = "plan/changes.rs"]
mod changes;
#[path = "plan/hints.rs"]
mod hints;
#[path = "plan/ledger.rs"]
mod ledger;
#[path = "plan/moves.rs"]
mod moves;
#[path = "plan/nodes.rs"]
mod nodes;
#[path = "plan/order.rs"]
mod order;
#[path = "plan/reached.rs"]
mod reached;

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
