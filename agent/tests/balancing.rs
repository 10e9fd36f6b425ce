//! Which Services have their backends chosen by a Maglev table, and that every node's table says the same.

use std::net::SocketAddr;

use cluster_model::*;
use keelway_agent::dataplane::maglev;
use keelway_agent::plan::{Balancing, Dsr, Here, Policy, PortKey, check, plan, plan_peers};

fn node(name: &str, balancing: Balancing) -> Here {
    Here {
        node: name.into(),
        zone: None,
        balancing,
    }
}

const BY_TABLE: Balancing = Balancing {
    maglev: true,
    table_size: 1021,
    dsr: Dsr::Off,
};

/// A Service of three endpoints, on nodes 1, 2 and 2.
fn snapshot(service: Service) -> Snapshot {
    snapshot_hinted(service, &[])
}

/// The same, with endpoints for these zones.
fn snapshot_hinted(service: Service, for_zones: &[&str]) -> Snapshot {
    let conditions = Conditions {
        ready: true,
        serving: true,
        terminating: false,
    };
    let endpoint = |last: u8, node: &str| Endpoint {
        address: [10, 244, 0, last].into(),
        conditions,
        node_name: Some(node.into()),
        zone: None,
        for_nodes: Vec::new(),
        for_zones: for_zones.iter().map(|zone| (*zone).into()).collect(),
        hostname: None,
        target: None,
    };
    let slice = EndpointSlice {
        key: ObjectKey::new("default", "web-1"),
        service: Some(service.key.clone()),
        headless: false,
        ports: vec![EndpointPort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 8080,
            app_protocol: None,
        }],
        endpoints: vec![
            endpoint(1, "node-2"),
            endpoint(2, "node-1"),
            endpoint(3, "node-2"),
        ],
        last_change: None,
        refused: Vec::new(),
    };
    let (mut snapshot, mut dirty) = (Snapshot::default(), Dirty::default());
    let objects = [
        Object::Service(service.into()),
        Object::EndpointSlice(slice.into()),
    ];
    for object in objects {
        snapshot.apply(Change::Upsert(object), &mut dirty);
    }
    snapshot
}

fn web(node_port: Option<u16>) -> Service {
    Service {
        service_type: match node_port {
            Some(_) => ServiceType::NodePort,
            None => ServiceType::ClusterIp,
        },
        cluster_ips: vec![[10, 96, 0, 1].into()],
        ports: vec![ServicePort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port,
            app_protocol: None,
        }],
        ..Service::named(ObjectKey::new("default", "web"))
    }
}

/// Entries of the table under each policy that the Service's frontends ask for.
fn entries(service: Service, here: &Here) -> Vec<(Policy, u32)> {
    let key = service.key.clone();
    let planned = plan(&snapshot(service), &key, here);
    check(&planned).unwrap();
    let ports = planned.ports.iter();
    let entry = |(key, port): (&PortKey, &keelway_agent::plan::PortPlan)| {
        (key.policy, port.backends.maglev)
    };
    ports.map(entry).collect()
}

#[test]
fn a_table_is_made_where_clients_outside_come_and_it_is_asked_for() {
    let (by_table, at_random) = (
        node("node-1", BY_TABLE),
        node("node-1", Balancing::default()),
    );
    let said = |node_port, word: &str| Service {
        balancing: Some(word.into()),
        ..web(node_port)
    };
    use Policy::{Cluster, Local};
    assert_eq!(entries(web(Some(30080)), &by_table), [(Cluster, 1021)]);
    assert_eq!(entries(web(None), &by_table), [(Cluster, 0)]);
    assert_eq!(entries(web(Some(30080)), &at_random), [(Cluster, 0)]);
    let size = maglev::SIZE_DEFAULT;
    let asked = said(Some(30080), "maglev");
    assert_eq!(entries(asked, &at_random), [(Cluster, size)]);
    assert_eq!(
        entries(said(Some(30080), "random"), &by_table),
        [(Cluster, 0)]
    );
    // A word that is none of these is as if nothing was said.
    assert_eq!(
        entries(said(Some(30080), "meglav"), &by_table),
        [(Cluster, 1021)]
    );
    let local = Service {
        external_traffic_policy: TrafficPolicy::Local,
        ..web(Some(30080))
    };
    // The one endpoint of this node needs no table; of the two of the other node one is chosen by it.
    assert_eq!(
        entries(local.clone(), &by_table),
        [(Cluster, 0), (Local, 0)]
    );
    let other = node("node-2", BY_TABLE);
    assert_eq!(entries(local, &other), [(Cluster, 0), (Local, 1021)]);
}

#[test]
fn every_node_leads_an_entry_to_the_same_endpoint_though_its_own_come_first() {
    let of = |name: &str| -> (Vec<SocketAddr>, Vec<SocketAddr>) {
        let service = web(Some(30080));
        let key = service.key.clone();
        let planned = plan(&snapshot(service), &key, &node(name, BY_TABLE));
        let backends = &planned.ports.iter().next().unwrap().1.backends;
        let table = maglev::table(&backends.active, backends.maglev);
        let entries = table
            .iter()
            .map(|place| backends.active[usize::from(*place)]);
        (backends.active.clone(), entries.collect())
    };
    let [(one, first), (two, second)] = ["node-1", "node-2"].map(of);
    assert_ne!(one, two);
    assert_eq!(first, second);
}

#[test]
fn many_backends_have_a_table_of_more_entries_than_asked_for() {
    let least = Balancing {
        maglev: true,
        table_size: 251,
        dsr: Dsr::Off,
    };
    let mut service = web(Some(30080));
    let key = service.key.clone();
    service.balancing = None;
    let mut snapshot = snapshot(service);
    let slice = snapshot.slices(&key)[0].clone();
    let mut many = (*slice).clone();
    let first = many.endpoints[0].clone();
    many.endpoints = (0..200)
        .map(|last| Endpoint {
            address: [10, 244, 1, last].into(),
            ..first.clone()
        })
        .collect();
    let change = Change::Upsert(Object::EndpointSlice(many.into()));
    snapshot.apply(change, &mut Dirty::default());
    let planned = plan(&snapshot, &key, &node("node-1", least));
    check(&planned).unwrap();
    let port = planned.ports.iter().next().unwrap().1;
    assert_eq!(port.backends.maglev, 4093);
}

/// Whether clients outside are answered directly, and by how large a table.
fn direct(service: Service, dsr: Dsr) -> Vec<(bool, u32)> {
    direct_of(service, &[], dsr)
}

fn direct_of(service: Service, for_zones: &[&str], dsr: Dsr) -> Vec<(bool, u32)> {
    let here = node(
        "node-1",
        Balancing {
            dsr,
            ..Balancing::default()
        },
    );
    let key = service.key.clone();
    let planned = plan(&snapshot_hinted(service, for_zones), &key, &here);
    check(&planned).unwrap();
    let ports = planned.ports.iter();
    ports
        .map(|(_, port)| (port.backends.direct, port.backends.maglev))
        .collect()
}

#[test]
fn clients_are_answered_directly_where_every_node_can_choose_alike() {
    let size = maglev::SIZE_DEFAULT;
    let said = |word: &str| Service {
        dsr: Some(word.into()),
        ..web(Some(30080))
    };
    assert_eq!(direct(web(Some(30080)), Dsr::On), [(true, size)]);
    assert_eq!(direct(web(Some(30080)), Dsr::Annotated), [(false, 0)]);
    assert_eq!(direct(said("on"), Dsr::Annotated), [(true, size)]);
    assert_eq!(direct(said("off"), Dsr::On), [(false, 0)]);
    assert_eq!(direct(said("on"), Dsr::Off), [(false, 0)]);
    assert_eq!(direct(web(None), Dsr::On), [(false, 0)]);
    let sticky = Service {
        affinity_timeout_s: Some(60),
        ..web(Some(30080))
    };
    assert_eq!(direct(sticky, Dsr::On), [(false, 0)]);
    // Nodes of other zones would choose among others.
    let near = direct_of(web(Some(30080)), &["b"], Dsr::On);
    assert_eq!(near, [(false, 0)]);
    let local = Service {
        external_traffic_policy: TrafficPolicy::Local,
        ..web(Some(30080))
    };
    assert_eq!(direct(local, Dsr::On), [(false, 0), (false, 0)]);
}

#[test]
fn other_nodes_addresses_are_where_the_overlay_leads_to_them() {
    let address = |last: u8| std::net::IpAddr::from([198, 18, 0, last]);
    let node = |number: u8, name: &str| Node {
        name: name.into(),
        internal_ips: vec![
            address(number),
            format!("fd00:18::{number}").parse().unwrap(),
        ],
        pod_cidrs: vec![
            format!("10.244.{number}.0/24").parse().unwrap(),
            format!("fd00:244:{number}::/64").parse().unwrap(),
        ],
        zone: None,
        leaving: false,
    };
    let (mut snapshot, mut dirty) = (Snapshot::default(), Dirty::default());
    for object in [node(1, "node-1"), node(2, "node-2")] {
        snapshot.apply(Change::Upsert(Object::Node(object.into())), &mut dirty);
    }
    let peers = plan_peers(&snapshot, "node-1");
    let ranges: Vec<String> = peers.keys().map(ToString::to_string).collect();
    let wanted = [
        "10.244.2.0/24",
        "198.18.0.2/32",
        "fd00:18::2/128",
        "fd00:244:2::/64",
    ];
    assert_eq!(ranges, wanted);
    assert!(
        peers
            .values()
            .all(|mac| *mac == [0x0a, 0x6d, 198, 18, 0, 2])
    );
    assert!(plan_peers(&snapshot, "node-9").is_empty());
}
