//! Services as kube-proxy's rules have them: random sequences of Service, EndpointSlice and Node changes, planned and applied as the
//! agent does it, and after every step both kinds of hooks are asked by every kind of client for every address of both families. What they answer is
//! held against a model of the rules, written from the API's documentation and KEP-1669, 1860, 2086, 2433, 2447, 3015 and 3685.
//!
//! The hooks are the programs' own logic over maps in memory: nothing here needs root.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use cluster_model::*;
use dataplane_abi::{FROM_HOST, FROM_POD, FrontendKey, LEAD_GUARDED, MARKER_EXTERNAL};
use dataplane_ebpf::{
    balance::Client as Asking,
    hook::{Features, Verdict},
    memory::{Bytes, Memory, hooks},
    socket::{Caller, Outcome, destination},
};
use ipnetwork::IpNetwork;
use keelway_agent::{
    dataplane::{Op, State, Vip},
    plan::{Balancing, Batch, Here, Ledger, check, host_ports_key, plan, plan_host_ports},
};
use keelway_cni::{PortMapping, PortProtocol};
use keelway_tests::packets::{sctp, sctp_chunk, tcp, tcp_flag, udp};
use proptest::prelude::*;

const NODE: &str = "node-1";
const NODE_IP: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 11);
const POD: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 1);
const POD_INTERFACE: u32 = 7;
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

/// The two families, IPv4 first. Addresses are written as IPv4's; IPv6 has the same at the end of fd00::/96.
const FAMILIES: [bool; 2] = [true, false];

fn in_family(address: Ipv4Addr, ipv4: bool) -> IpAddr {
    if ipv4 {
        return address.into();
    }
    let [a, b, c, d] = address.octets();
    let (high, low) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, high, low).into()
}

fn here() -> Here {
    Here {
        balancing: Balancing::default(),
        node: NODE.into(),
        zone: Some("a".into()),
    }
}

// The model.

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Client {
    PodHere,
    HostHere,
    Outside,
}

impl Client {
    fn address(self, ipv4: bool) -> IpAddr {
        let address = match self {
            Client::PodHere => POD,
            Client::HostHere => NODE_IP,
            Client::Outside => OUTSIDE,
        };
        in_family(address, ipv4)
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Answer {
    /// None of a Service's business.
    Nobody,
    Rejected,
    Silence,
    OneOf(BTreeSet<SocketAddr>),
}

/// By what a client reaches a port of a Service.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    ClusterIp,
    External { guarded: bool },
}

/// What kube-proxy would do.
fn expected(
    cluster: &Snapshot,
    client: Client,
    to: IpAddr,
    number: u16,
    protocol: Protocol,
) -> Answer {
    let mut served: Vec<&Arc<Service>> = cluster.services().collect();
    served.retain(|service| {
        let external_name = service.service_type == ServiceType::ExternalName;
        !service.headless && !external_name && service.proxy_name.is_none()
    });
    // Of Services that want the same, the first by name has it.
    served.sort_by(|a, b| a.key.cmp(&b.key));
    for service in &served {
        for port in service
            .ports
            .iter()
            .filter(|port| port.protocol == protocol)
        {
            if let Some(by) = reached(service, port, to, number) {
                return answer(
                    cluster,
                    service,
                    port,
                    client.address(to.is_ipv4()),
                    client,
                    by,
                );
            }
        }
    }
    let is_node = |ip: &IpAddr| cluster.nodes().any(|node| node.internal_ips.contains(ip));
    let is_service = served.iter().any(|service| {
        let has_family = |ip: &IpAddr| ip.is_ipv4() == to.is_ipv4();
        service.cluster_ips.contains(&to)
            || (service.cluster_ips.iter().any(has_family)
                && service.service_type == ServiceType::LoadBalancer
                && service.load_balancer_ips.contains(&to)
                && !is_node(&to))
    });
    if is_service {
        Answer::Rejected
    } else {
        Answer::Nobody
    }
}

fn reached(service: &Service, port: &ServicePort, to: IpAddr, number: u16) -> Option<By> {
    let has_family = |ip: &IpAddr| ip.is_ipv4() == to.is_ipv4();
    if service.cluster_ips.contains(&to) && port.port == number {
        return Some(By::ClusterIp);
    }
    // A Service has the families of its own addresses.
    if !service.cluster_ips.iter().any(has_family) {
        return None;
    }
    let balanced = service.service_type == ServiceType::LoadBalancer;
    if balanced && service.load_balancer_ips.contains(&to) && port.port == number {
        let mut ranges = service.load_balancer_source_ranges.iter();
        let guarded = ranges.any(|range| range.is_ipv4() == to.is_ipv4());
        return Some(By::External { guarded });
    }
    if service.external_ips.contains(&to) && port.port == number {
        return Some(By::External { guarded: false });
    }
    let has_node_port = balanced || service.service_type == ServiceType::NodePort;
    let is_node = to == in_family(NODE_IP, to.is_ipv4());
    (has_node_port && is_node && port.node_port == Some(number))
        .then_some(By::External { guarded: false })
}

fn answer(
    cluster: &Snapshot,
    service: &Service,
    port: &ServicePort,
    from: IpAddr,
    client: Client,
    by: By,
) -> Answer {
    if by == (By::External { guarded: true })
        && !service
            .load_balancer_source_ranges
            .iter()
            .any(|range| range.contains(from))
    {
        return Answer::Silence;
    }
    let policy = match (by, client) {
        (By::ClusterIp, _) => service.internal_traffic_policy,
        // KEP-1669's short cut: clients on a node are not bound by the external policy.
        (By::External { .. }, Client::PodHere | Client::HostHere) => TrafficPolicy::Cluster,
        (By::External { .. }, Client::Outside) => service.external_traffic_policy,
    };
    let endpoints: Vec<(SocketAddr, Endpoint)> = cluster
        .slices(&service.key)
        .iter()
        .filter(|slice| !slice.headless)
        .flat_map(|slice| {
            let numbers = slice
                .ports
                .iter()
                .filter(|one| one.name == port.name && one.protocol == port.protocol);
            numbers.flat_map(|number| {
                let at = |endpoint: &Endpoint| SocketAddr::new(endpoint.address, number.port);
                slice
                    .endpoints
                    .iter()
                    .filter(|one| one.address.is_ipv4() == from.is_ipv4())
                    .map(move |one| (at(one), one.clone()))
            })
        })
        .collect();
    let is_ready = |one: &Endpoint| one.conditions.ready || service.publish_not_ready;
    let is_draining =
        |one: &Endpoint| !is_ready(one) && one.conditions.serving && one.conditions.terminating;
    let is_here = |one: &Endpoint| one.node_name.as_deref() == Some(NODE);
    let those = |wanted: &dyn Fn(&Endpoint) -> bool| -> BTreeSet<SocketAddr> {
        let found = endpoints.iter().filter(|(_, one)| wanted(one));
        found.map(|(at, _)| *at).collect()
    };
    let mut steps: Vec<BTreeSet<SocketAddr>> = match policy {
        TrafficPolicy::Local => vec![
            those(&|one| is_ready(one) && is_here(one)),
            those(&|one| is_draining(one) && is_here(one)),
        ],
        TrafficPolicy::Cluster => {
            // KEP-2433 and KEP-3015: with a hint on every ready endpoint, those that are meant for the node, or else its zone.
            let meant = |hints: fn(&Endpoint) -> &[Arc<str>], mine: &str| {
                if those(&|one| is_ready(one) && hints(one).is_empty()).is_empty() {
                    let is_mine = |one: &Endpoint| hints(one).iter().any(|name| **name == *mine);
                    those(&|one| is_ready(one) && is_mine(one))
                } else {
                    BTreeSet::new()
                }
            };
            vec![
                meant(|one| &one.for_nodes, NODE),
                meant(|one| &one.for_zones, "a"),
                those(&is_ready),
                those(&is_draining),
            ]
        }
    };
    steps.retain(|step| !step.is_empty());
    if !steps.is_empty() {
        return Answer::OneOf(steps.swap_remove(0));
    }
    // Somewhere there is one: packets that no rule lets through are dropped, not rejected.
    if those(&|one| is_ready(one) || is_draining(one)).is_empty() {
        Answer::Rejected
    } else {
        Answer::Silence
    }
}

// The hooks over what the agent wrote.

fn maps(state: &State) -> Memory {
    let tables = Memory::default();
    for (id, backends) in &state.services {
        let list = |list: &[SocketAddr]| list.iter().map(SocketAddr::to_string).collect();
        let (active, terminating): (Vec<String>, Vec<String>) =
            (list(&backends.active), list(&backends.terminating));
        tables.set_service(id.0, &texts_of(&active), &texts_of(&terminating));
        tables.set_affinity_timeout(id.0, backends.affinity_timeout_s);
        if backends.silent {
            tables.set_silent(id.0);
        }
        if backends.keeps_clients {
            tables.set_keeps_clients(id.0);
        }
    }
    for (frontend, lead) in &state.frontends {
        let at = SocketAddr::new(frontend.addr, frontend.port).to_string();
        let flags = if lead.guarded { LEAD_GUARDED } else { 0 };
        let lead = dataplane_abi::Lead::new(lead.internal.0, lead.external.0, flags);
        tables.set_lead(&at, frontend.protocol.number(), lead);
    }
    for (vip, kind) in &state.vips {
        let flags = match kind {
            Vip::Cluster => 0,
            Vip::External => MARKER_EXTERNAL,
        };
        tables.frontends.borrow_mut().insert(
            FrontendKey::marker((*vip).into()),
            dataplane_abi::Lead::new(dataplane_abi::Lead::MARKER, 0, flags),
        );
    }
    for (id, sources) in &state.sources {
        let ranges = sources.iter().map(|range| {
            let len = u32::from(range.prefix()) + if range.is_ipv4() { 96 } else { 0 };
            (id.0, range.network().into(), len)
        });
        tables.ranges.borrow_mut().extend(ranges);
    }
    for ipv4 in FAMILIES {
        let text = |address| in_family(address, ipv4).to_string();
        tables.set_local(&text(POD), FROM_POD, POD_INTERFACE);
        tables.set_local(&text(NODE_IP), FROM_HOST, 0);
    }
    tables
}

fn texts_of(list: &[String]) -> Vec<&str> {
    list.iter().map(String::as_str).collect()
}

/// What a packet hook makes of a client's first packet.
fn by_packet(
    tables: &Memory,
    client: Client,
    port: u16,
    to: SocketAddr,
    protocol: Protocol,
) -> Answer {
    let features = Features {
        packet_lb: true,
        service_veth: true,
        masquerade: false,
        node_v4: NODE_IP.into(),
        node_v6: in_family(NODE_IP, false).into(),
        overlay: false,
        by_overlay: false,
    };
    let from = SocketAddr::new(client.address(to.is_ipv4()), port).to_string();
    let sent = match protocol {
        Protocol::Udp => udp(&from, &to.to_string(), b"x"),
        Protocol::Sctp => sctp(&from, &to.to_string(), sctp_chunk::INIT, b"x"),
        Protocol::Tcp => tcp(&from, &to.to_string(), tcp_flag::SYN, b""),
    };
    let mut packet = Bytes(sent.clone());
    let verdict = match client {
        Client::PodHere => hooks::pod_ingress(&mut packet, tables, &features, POD_INTERFACE),
        Client::HostHere => hooks::service_ingress(&mut packet, tables, &features),
        Client::Outside => hooks::uplink_ingress(&mut packet, tables, &features),
    };
    if verdict == Verdict::Drop {
        return Answer::Silence;
    }
    if packet.0 == sent {
        return Answer::Nobody;
    }
    let (next, destination, l4, icmp) = if to.is_ipv4() {
        let octets: [u8; 4] = packet.0[30..34].try_into().unwrap();
        (packet.0[23], IpAddr::from(octets), 34, 1)
    } else {
        let octets: [u8; 16] = packet.0[38..54].try_into().unwrap();
        (packet.0[20], IpAddr::from(octets), 54, 58)
    };
    let is_reset = next == 6 && packet.0[l4 + 13] & tcp_flag::RST != 0;
    if is_reset || next == icmp {
        let asker = client.address(to.is_ipv4());
        assert_eq!(destination, asker, "a refusal goes back");
        return Answer::Rejected;
    }
    let port = u16::from_be_bytes([packet.0[l4 + 2], packet.0[l4 + 3]]);
    Answer::OneOf([SocketAddr::new(destination, port)].into())
}

/// What the socket hook makes of a connect; nothing when it leaves it to the packet hooks.
fn at_socket(
    tables: &Memory,
    client: Client,
    to: SocketAddr,
    protocol: Protocol,
) -> Option<Answer> {
    let caller = Caller {
        is_host: client == Client::HostHere,
        packet_lb: true,
        connects_datagrams: false,
        client: match client {
            Client::HostHere => Asking::at(in_family(NODE_IP, to.is_ipv4()).into()),
            _ => Asking::UNKNOWN,
        },
    };
    let frontend = FrontendKey::new(to.ip().into(), to.port().to_be(), protocol.number());
    match destination(tables, &caller, &frontend, None) {
        Outcome::Leave => None,
        Outcome::Refuse => Some(Answer::Rejected),
        Outcome::Translate(peer) => {
            let at = SocketAddr::new(peer.backend.into(), u16::from_be(peer.backend_port));
            Some(Answer::OneOf([at].into()))
        }
    }
}

/// Holds the hooks to the model for every client and address.
fn compare(cluster: &Snapshot, state: &State) -> Result<(), TestCaseError> {
    let tables = maps(state);
    let ports = [80, 81, 30_080, 30_081];
    let mut from_port = 40_000;
    for to in addresses() {
        for number in ports {
            for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                let at = SocketAddr::new(to, number);
                let context = |client: Client| format!("{client:?} -> {at} {protocol}");
                for client in [Client::PodHere, Client::HostHere, Client::Outside] {
                    let wanted = expected(cluster, client, to, number, protocol);
                    from_port += 1;
                    let is_routed = state.vips.get(&to) == Some(&Vip::Cluster);
                    // The host's packets come by the hook where it routes them there.
                    if client != Client::HostHere || is_routed {
                        let got = by_packet(&tables, client, from_port, at, protocol);
                        prop_assert!(
                            agree(&wanted, &got),
                            "{}: {got:?}, not {wanted:?}, by packet",
                            context(client)
                        );
                    }
                    // No kernel asks it of sockets of SCTP.
                    if client == Client::Outside || protocol == Protocol::Sctp {
                        continue;
                    }
                    match (at_socket(&tables, client, at, protocol), &wanted) {
                        (Some(got), wanted) => {
                            // A host that would hear nothing is told at once, having no packet to drop.
                            let refused = client == Client::HostHere
                                && got == Answer::Rejected
                                && *wanted == Answer::Silence;
                            prop_assert!(
                                agree(wanted, &got) || refused,
                                "{}: {got:?}, not {wanted:?}, at the socket",
                                context(client)
                            );
                        }
                        (None, Answer::OneOf(_)) if client == Client::HostHere => {
                            let why = format!("{}: left alone", context(client));
                            return Err(TestCaseError::fail(why));
                        }
                        // What the socket leaves alone, the packet hook answered above; a host's to a balanced address is
                        // answered at the socket or not at all.
                        (None, Answer::Rejected) if client == Client::HostHere => {
                            let by_host_itself = to == in_family(NODE_IP, to.is_ipv4());
                            prop_assert!(
                                is_routed || by_host_itself,
                                "{}: left alone",
                                context(client)
                            );
                        }
                        (None, _) => {}
                    }
                }
            }
        }
    }
    Ok(())
}

fn agree(wanted: &Answer, got: &Answer) -> bool {
    match (wanted, got) {
        (Answer::OneOf(wanted), Answer::OneOf(got)) => got.is_subset(wanted),
        _ => wanted == got,
    }
}

// The cluster and its changes.

fn addresses() -> Vec<IpAddr> {
    let mut all: Vec<Ipv4Addr> = (1..4).map(|last| [10, 96, 0, last].into()).collect();
    all.extend((1..4).map(|last| Ipv4Addr::new(192, 0, 2, last)));
    all.push(NODE_IP);
    let of = |ipv4| all.iter().map(move |address| in_family(*address, ipv4));
    FAMILIES.into_iter().flat_map(of).collect()
}

/// One family, or both, the first being the one that counts more.
fn some_families() -> impl Strategy<Value = Vec<bool>> {
    prop::sample::select(vec![
        vec![true],
        vec![false],
        vec![true, false],
        vec![false, true],
    ])
}

fn any_service() -> impl Strategy<Value = Object> {
    let policy = || prop::sample::select(vec![TrafficPolicy::Cluster, TrafficPolicy::Local]);
    let ports = prop::collection::btree_set(0usize..4, 0..4).prop_map(|chosen| {
        let all = [
            ("http", Protocol::Tcp, 80, 30_080),
            ("dns", Protocol::Udp, 80, 30_080),
            ("other", Protocol::Tcp, 81, 30_081),
            ("sctp", Protocol::Sctp, 80, 30_080),
        ];
        let port = |index: usize| {
            let (name, protocol, port, node_port) = all[index];
            ServicePort {
                name: name.into(),
                protocol,
                port,
                node_port: Some(node_port),
                app_protocol: None,
            }
        };
        chosen.into_iter().map(port).collect::<Vec<_>>()
    });
    let addresses = prop::collection::btree_set(1u8..4, 0..3);
    let ranges = vec![
        (Ipv4Addr::new(203, 0, 113, 0), 24),
        (Ipv4Addr::new(10, 0, 0, 0), 8),
        (NODE_IP, 32),
    ];
    let ranges = prop::sample::subsequence(ranges, 0..3);
    (
        (
            prop::sample::select(vec!["a", "b", "web"]),
            1u8..4,
            ports,
            some_families(),
            some_families(),
        ),
        prop::sample::select(vec![
            ServiceType::ClusterIp,
            ServiceType::NodePort,
            ServiceType::LoadBalancer,
            ServiceType::ExternalName,
        ]),
        (policy(), policy(), addresses.clone(), addresses, ranges),
        (
            prop::sample::select(vec![
                TrafficDistribution::Any,
                TrafficDistribution::SameNode,
                TrafficDistribution::SameZone,
            ]),
            prop::option::of(1u32..100),
            prop::bool::weighted(0.2),
            prop::bool::weighted(0.1),
            prop::bool::weighted(0.1),
        ),
    )
        .prop_map(
            |((name, ip, ports, families, guarded), service_type, reach, rest)| {
                let (internal, external, external_ips, balanced_ips, ranges) = reach;
                let (
                    traffic_distribution,
                    affinity_timeout_s,
                    publish_not_ready,
                    headless,
                    elsewhere,
                ) = rest;
                let in_all = |addresses: Vec<Ipv4Addr>, families: &[bool]| -> Vec<IpAddr> {
                    let of = |ipv4| addresses.iter().map(move |one| in_family(*one, ipv4));
                    families.iter().copied().flat_map(of).collect()
                };
                // Those of a family that the Service has not, too.
                let ips = |set: BTreeSet<u8>| -> Vec<IpAddr> {
                    let each = set.into_iter().map(|last| [192, 0, 2, last].into());
                    in_all(each.collect(), &FAMILIES)
                };
                let ranges = ranges.into_iter().flat_map(|(address, len)| {
                    let of = move |ipv4| {
                        let len = if ipv4 { len } else { len + 96 };
                        IpNetwork::new(in_family(address, ipv4), len).unwrap()
                    };
                    guarded.clone().into_iter().map(of)
                });
                let cluster_ips = if headless || service_type == ServiceType::ExternalName {
                    vec![]
                } else {
                    in_all(vec![[10, 96, 0, ip].into()], &families)
                };
                Object::Service(Arc::new(Service {
                    key: ObjectKey::new("default", name),
                    service_type,
                    cluster_ips,
                    headless,
                    external_name: (service_type == ServiceType::ExternalName)
                        .then(|| "example.net".into()),
                    external_ips: ips(external_ips),
                    load_balancer_ips: ips(balanced_ips),
                    refused: Vec::new(),
                    load_balancer_source_ranges: ranges.collect(),
                    ports,
                    publish_not_ready,
                    traffic_distribution,
                    affinity_timeout_s,
                    internal_traffic_policy: internal,
                    external_traffic_policy: external,
                    health_check_node_port: None,
                    proxy_name: elsewhere.then(|| "another".into()),
                    balancing: None,
                    dsr: None,
                }))
            },
        )
}

fn any_slice() -> impl Strategy<Value = Object> {
    let place = prop::sample::select(vec![(NODE, "a"), ("node-2", "a"), ("node-3", "b")]);
    // The pod that asks, the node that asks, other pods, and something outside the cluster.
    let address = prop::sample::select(vec![
        POD,
        NODE_IP,
        [10, 244, 0, 2].into(),
        [10, 244, 1, 2].into(),
        [10, 244, 2, 2].into(),
        [198, 51, 100, 7].into(),
    ]);
    let conditions =
        (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(ready, serving, terminating)| {
            Conditions {
                ready: ready && !terminating,
                serving,
                terminating,
            }
        });
    // As controllers give them; one of five says something of its own, or nothing.
    let hints = prop::option::weighted(0.2, prop::collection::vec(0usize..3, 0..3));
    let endpoint = (address, place, conditions, hints.clone(), hints).prop_map(
        |(address, (node, zone), conditions, nodes, zones)| {
            let said = |said: Option<Vec<usize>>, names: [&str; 3], own: &str| match said {
                Some(said) => said.into_iter().map(|at| names[at].into()).collect(),
                None => vec![own.into()],
            };
            Endpoint {
                address: IpAddr::V4(address),
                conditions,
                node_name: Some(node.into()),
                zone: Some(zone.into()),
                hostname: None,
                target: None,
                for_zones: said(zones, ["a", "b", "c"], zone),
                for_nodes: said(nodes, [NODE, "node-2", "node-3"], node),
            }
        },
    );
    // By which hints the slice's controller writes, if by any.
    let written = prop::sample::select(vec![(false, false), (false, true), (true, true)]);
    (
        prop::sample::select(vec!["s1", "s2", "s3"]),
        prop::sample::select(vec!["a", "b", "web"]),
        prop::collection::vec(endpoint, 0..4),
        (any::<bool>(), written, prop::bool::weighted(0.1)),
    )
        .prop_map(|(name, service, mut endpoints, rest)| {
            let (ipv4, (by_node, by_zone), headless) = rest;
            for endpoint in &mut endpoints {
                if !by_node {
                    endpoint.for_nodes.clear();
                }
                if !by_zone {
                    endpoint.for_zones.clear();
                }
                if let IpAddr::V4(address) = endpoint.address {
                    endpoint.address = in_family(address, ipv4);
                }
            }
            let port = |name: &str, protocol, port| EndpointPort {
                name: name.into(),
                protocol,
                port,
                app_protocol: None,
            };
            Object::EndpointSlice(Arc::new(EndpointSlice {
                key: ObjectKey::new("default", name),
                service: Some(ObjectKey::new("default", service)),
                headless,
                ports: vec![
                    port("http", Protocol::Tcp, 8080),
                    port("dns", Protocol::Udp, 5353),
                    port("other", Protocol::Tcp, 9090),
                    port("sctp", Protocol::Sctp, 9999),
                ],
                endpoints,
                refused: vec![],
                last_change: None,
            }))
        })
}

/// A node, one of whose addresses may be a balancer's.
fn any_node() -> impl Strategy<Value = Object> {
    prop::option::of(1u8..4).prop_map(|balanced| {
        let mut own = vec![Ipv4Addr::new(198, 18, 0, 12)];
        own.extend(balanced.map(|last| Ipv4Addr::new(192, 0, 2, last)));
        let of = |ipv4| own.iter().map(move |address| in_family(*address, ipv4));
        let internal_ips = FAMILIES.into_iter().flat_map(of).collect();
        Object::Node(Arc::new(Node {
            name: "node-2".into(),
            internal_ips,
            pod_cidrs: vec![],
            zone: None,
            leaving: false,
        }))
    })
}

fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => any_service().prop_map(Change::Upsert),
        5 => any_slice().prop_map(Change::Upsert),
        1 => any_node().prop_map(Change::Upsert),
        1 => any_service().prop_map(|object| Change::Remove(object.reference())),
        1 => any_slice().prop_map(|object| Change::Remove(object.reference())),
    ]
}

fn apply(state: &mut State, batch: &Batch) {
    for op in &batch.ops {
        match op {
            Op::SetService { id, backends } => {
                state.services.insert(*id, backends.clone());
            }
            Op::RemoveService { id } => {
                state.services.remove(id);
            }
            Op::SetSources { id, sources } => {
                state.sources.insert(*id, sources.clone());
                state.sources.retain(|_, sources| !sources.is_empty());
            }
            Op::SetFrontend { frontend, lead } => {
                state.frontends.insert(*frontend, *lead);
            }
            Op::RemoveFrontend { frontend } => {
                state.frontends.remove(frontend);
            }
            Op::SetVip { addr, kind } => {
                state.vips.insert(*addr, *kind);
            }
            Op::RemoveVip { addr } => {
                state.vips.remove(addr);
            }
            Op::RenewService { .. } => {}
            other => panic!("{other:?} is not about Services"),
        }
    }
}

/// Plans some Services, or all that there are, and brings the maps to it.
fn settle(cluster: &Snapshot, ledger: &mut Ledger, state: &mut State, keys: &BTreeSet<ServiceKey>) {
    for key in keys {
        let wish = plan(cluster, key, &here());
        check(&wish).expect("a sound plan");
        ledger.set(key, wish);
    }
    let batch = ledger.diff();
    apply(state, &batch);
    ledger.applied(&batch);
}

/// What clients see of a state: ids do not show.
fn visible(state: &State) -> BTreeMap<String, String> {
    let one = |id| {
        format!(
            "{:?} from {:?}",
            state.services.get(id),
            state.sources.get(id)
        )
    };
    let frontends = state.frontends.iter().map(|(frontend, lead)| {
        let ends = format!(
            "{} | {} | {}",
            one(&lead.internal),
            one(&lead.external),
            lead.guarded
        );
        (frontend.to_string(), ends)
    });
    let vips = state
        .vips
        .iter()
        .map(|(vip, kind)| (vip.to_string(), format!("{kind:?}")));
    frontends.chain(vips).collect()
}

#[test]
fn ports_of_the_node_lead_to_their_pod_by_each_protocol_and_family_and_at_the_address_that_they_name()
 {
    let mapping = |host_port, protocol, host_ip: Option<IpAddr>| PortMapping {
        host_port,
        container_port: 8080,
        protocol,
        host_ip,
    };
    let mut mappings = vec![
        mapping(80, PortProtocol::Tcp, None),
        mapping(80, PortProtocol::Udp, None),
        mapping(81, PortProtocol::Sctp, None),
    ];
    let elsewhere = Ipv4Addr::new(198, 18, 0, 99);
    for ipv4 in FAMILIES {
        mappings.push(mapping(
            82,
            PortProtocol::Udp,
            Some(in_family(NODE_IP, ipv4)),
        ));
        mappings.push(mapping(
            83,
            PortProtocol::Udp,
            Some(in_family(elsewhere, ipv4)),
        ));
    }
    let pod = Ipv4Addr::new(10, 244, 0, 2);
    let (mut ledger, mut state) = (Ledger::adopt(State::default()), State::default());
    let wish = plan_host_ports("kw1", &FAMILIES.map(|ipv4| in_family(pod, ipv4)), &mappings);
    check(&wish).expect("a sound plan");
    ledger.set(&host_ports_key("kw1"), wish);
    apply(&mut state, &ledger.diff());
    let tables = maps(&state);
    let mut from_port = 40_000;
    for ipv4 in FAMILIES {
        let there = SocketAddr::new(in_family(pod, ipv4), 8080);
        for (number, protocol, leads) in [
            (80, Protocol::Tcp, true),
            (80, Protocol::Udp, true),
            (80, Protocol::Sctp, false),
            (81, Protocol::Sctp, true),
            (81, Protocol::Udp, false),
            (82, Protocol::Udp, true),
            // At an address of another node's.
            (83, Protocol::Udp, false),
        ] {
            let at = SocketAddr::new(in_family(NODE_IP, ipv4), number);
            for client in [Client::Outside, Client::PodHere] {
                from_port += 1;
                let got = by_packet(&tables, client, from_port, at, protocol);
                let wanted = match leads {
                    true => Answer::OneOf([there].into()),
                    false => Answer::Nobody,
                };
                assert_eq!(got, wanted, "{client:?} -> {at} {protocol}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn both_hooks_answer_as_kube_proxy_would_after_every_change(
        steps in prop::collection::vec((prop::collection::vec(any_change(), 1..5), 0u8..8), 1..10),
    ) {
        let (mut cluster, mut state) = (Snapshot::default(), State::default());
        let mut ledger = Ledger::adopt(State::default());
        for (changes, dice) in steps {
            let mut dirty = Dirty::default();
            for change in changes {
                cluster.apply(change, &mut dirty);
            }
            let all: BTreeSet<ServiceKey> = cluster.services().map(|service| service.key.clone()).collect();
            let mut keys: BTreeSet<ServiceKey> = dirty.services.iter().cloned().collect();
            if dice == 0 {
                // The agent is killed, and another one goes on with what it left.
                ledger = Ledger::adopt(state.clone());
                keys = all.clone();
            } else if !dirty.nodes.is_empty() {
                keys.extend(all.iter().cloned());
            }
            settle(&cluster, &mut ledger, &mut state, &keys);
            compare(&cluster, &state)?;
            let mut fresh = State::default();
            settle(&cluster, &mut Ledger::adopt(State::default()), &mut fresh, &all);
            prop_assert_eq!(visible(&state), visible(&fresh));
        }
    }
}
