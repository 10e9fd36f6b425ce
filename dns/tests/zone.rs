//! The zone against the specification's examples, and against itself: incremental equals full.

use std::net::IpAddr;
use std::sync::Arc;

use cluster_model::{
    Change, Conditions, Dirty, Endpoint, EndpointPort, EndpointSlice, Kind, Object, ObjectKey,
    ObjectRef, Protocol, Service, Snapshot, read_manifest,
};
use keelway_dns::Record;
use keelway_dns::name::Name;
use keelway_dns::zone::Zone;
use proptest::prelude::*;

fn origin() -> Name {
    Name::parse("cluster.local").expect("a name")
}

fn snapshot(manifest: &str) -> Snapshot {
    let mut snapshot = Snapshot::default();
    let mut dirty = Dirty::default();
    for kind in [Kind::Service, Kind::EndpointSlice] {
        snapshot.apply(Change::Replace(kind, Vec::new()), &mut dirty);
    }
    for object in read_manifest(manifest.as_bytes()).expect("a manifest") {
        snapshot.apply(Change::Upsert(object), &mut dirty);
    }
    snapshot
}

fn records(zone: &Zone, name: &str) -> Vec<Record> {
    let name = Name::parse(name).expect("a name");
    let mut records: Vec<_> = zone
        .find(name.wire())
        .into_iter()
        .flat_map(|node| node.records().cloned())
        .collect();
    records.sort();
    records
}

fn a(text: &str) -> Record {
    text.parse::<IpAddr>().expect("an address").into()
}

fn name(text: &str) -> Name {
    Name::parse(text).expect("a name")
}

const CLUSTER_IP: &str = r#"{"kind":"Service","apiVersion":"v1","metadata":{"name":"web","namespace":"prod"},
    "spec":{"clusterIP":"10.96.0.7","clusterIPs":["10.96.0.7"],
    "ports":[{"name":"http","port":80,"protocol":"TCP"},{"name":"","port":81,"protocol":"TCP"}]}}"#;

#[test]
fn a_cluster_ip_service_has_a_srv_and_ptr_records() {
    let zone = Zone::of(origin(), &snapshot(CLUSTER_IP));
    let web = "web.prod.svc.cluster.local";
    assert_eq!(records(&zone, web), [a("10.96.0.7")]);
    assert_eq!(
        records(&zone, "7.0.96.10.in-addr.arpa"),
        [Record::Ptr(name(web))]
    );
    let srv = Record::Srv {
        weight: 100,
        port: 80,
        target: name(web),
    };
    assert_eq!(
        records(&zone, "_http._tcp.web.prod.svc.cluster.local"),
        [srv]
    );
    assert_eq!(
        records(&zone, "dns-version.cluster.local"),
        [Record::Txt(b"1.1.0".to_vec())]
    );
}

#[test]
fn names_between_the_origin_and_a_service_exist_without_records() {
    let zone = Zone::of(origin(), &snapshot(CLUSTER_IP));
    for empty in [
        "svc.cluster.local",
        "prod.svc.cluster.local",
        "_tcp.web.prod.svc.cluster.local",
    ] {
        assert!(zone.find(name(empty).wire()).is_some(), "{empty}");
        assert_eq!(records(&zone, empty), []);
    }
    assert!(zone.find(name("other.svc.cluster.local").wire()).is_none());
}

const HEADLESS: &str = r#"[{"kind":"Service","apiVersion":"v1","metadata":{"name":"db","namespace":"prod"},
    "spec":{"clusterIP":"None","clusterIPs":["None"],"ports":[{"name":"sql","port":5432}]}},
    {"kind":"EndpointSlice","apiVersion":"discovery.k8s.io/v1","addressType":"IPv4",
    "metadata":{"name":"db-1","namespace":"prod","labels":{"kubernetes.io/service-name":"db"}},
    "ports":[{"name":"sql","port":5432,"protocol":"TCP"}],
    "endpoints":[{"addresses":["10.244.0.5"],"hostname":"db-0","conditions":{"ready":true}},
      {"addresses":["10.244.1.6"],"conditions":{"ready":true}},
      {"addresses":["10.244.1.7"],"conditions":{"ready":false}}]}]"#;

#[test]
fn a_headless_service_resolves_to_its_ready_endpoints_by_hostname_or_dashed_address() {
    let zone = Zone::of(origin(), &snapshot(HEADLESS));
    assert_eq!(
        records(&zone, "db.prod.svc.cluster.local"),
        [a("10.244.0.5"), a("10.244.1.6")]
    );
    assert_eq!(
        records(&zone, "db-0.db.prod.svc.cluster.local"),
        [a("10.244.0.5")]
    );
    assert_eq!(
        records(&zone, "10-244-1-6.db.prod.svc.cluster.local"),
        [a("10.244.1.6")]
    );
    assert_eq!(records(&zone, "10-244-1-7.db.prod.svc.cluster.local"), []);
    let srv = |host: &str| Record::Srv {
        weight: 50,
        port: 5432,
        target: name(&format!("{host}.db.prod.svc.cluster.local")),
    };
    let mut expected = vec![srv("db-0"), srv("10-244-1-6")];
    expected.sort();
    assert_eq!(
        records(&zone, "_sql._tcp.db.prod.svc.cluster.local"),
        expected
    );
    let ptr = Record::Ptr(name("db-0.db.prod.svc.cluster.local"));
    assert_eq!(records(&zone, "5.0.244.10.in-addr.arpa"), [ptr]);
}

#[test]
fn a_headless_service_without_ready_endpoints_does_not_exist() {
    let none = HEADLESS.replace("\"ready\":true", "\"ready\":false");
    let zone = Zone::of(origin(), &snapshot(&none));
    assert!(
        zone.find(name("db.prod.svc.cluster.local").wire())
            .is_none()
    );
    let published = none.replace(
        "\"clusterIP\":\"None\"",
        "\"clusterIP\":\"None\",\"publishNotReadyAddresses\":true",
    );
    let zone = Zone::of(origin(), &snapshot(&published));
    assert_eq!(records(&zone, "db.prod.svc.cluster.local").len(), 3);
}

#[test]
fn an_external_name_is_a_cname() {
    let manifest = r#"{"kind":"Service","apiVersion":"v1","metadata":{"name":"out","namespace":"prod"},
        "spec":{"type":"ExternalName","externalName":"example.org"}}"#;
    let zone = Zone::of(origin(), &snapshot(manifest));
    assert_eq!(
        records(&zone, "out.prod.svc.cluster.local"),
        [Record::Cname(name("example.org"))]
    );
}

#[derive(Clone, Debug)]
enum Step {
    Service {
        service: u8,
        headless: bool,
        port: u16,
    },
    Slice {
        slice: u8,
        service: u8,
        addresses: Vec<(u8, bool, bool)>,
    },
    RemoveService(u8),
    RemoveSlice(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let address = (0..6_u8, any::<bool>(), any::<bool>());
    prop_oneof![
        (0..4_u8, any::<bool>(), 1..4_u16).prop_map(|(service, headless, port)| Step::Service {
            service,
            headless,
            port
        }),
        (0..5_u8, 0..4_u8, prop::collection::vec(address, 0..4)).prop_map(
            |(slice, service, addresses)| Step::Slice {
                slice,
                service,
                addresses
            }
        ),
        (0..4_u8).prop_map(Step::RemoveService),
        (0..5_u8).prop_map(Step::RemoveSlice),
    ]
}

fn change(step: Step) -> Change {
    let key = |kind: char, number: u8| ObjectKey::new("ns", format!("{kind}{number}"));
    match step {
        Step::Service {
            service,
            headless,
            port,
        } => {
            let ip = if headless {
                "None".into()
            } else {
                format!("10.96.0.{}", service + 1)
            };
            let json = format!(
                r#"{{"kind":"Service","metadata":{{"name":"s{service}","namespace":"ns"}},
                "spec":{{"clusterIP":"{ip}","clusterIPs":["{ip}"],"ports":[{{"name":"p{port}","port":{port}}}]}}}}"#
            );
            Change::Upsert(read_manifest(json.as_bytes()).expect("a Service").remove(0))
        }
        Step::Slice {
            slice,
            service,
            addresses,
        } => {
            let endpoint = |(address, ready, named): (u8, bool, bool)| Endpoint {
                address: IpAddr::from([10, 244, 0, address + 1]),
                conditions: Conditions {
                    ready,
                    serving: ready,
                    terminating: false,
                },
                node_name: None,
                zone: None,
                hostname: named.then(|| format!("h{address}").into()),
                target: None,
                for_zones: Vec::new(),
                for_nodes: Vec::new(),
            };
            let port = EndpointPort {
                name: "p1".into(),
                protocol: Protocol::Tcp,
                port: 80,
                app_protocol: None,
            };
            Change::Upsert(Object::EndpointSlice(Arc::new(EndpointSlice {
                key: key('e', slice),
                service: Some(key('s', service)),
                ports: vec![port],
                endpoints: addresses.into_iter().map(endpoint).collect(),
            })))
        }
        Step::RemoveService(service) => Change::Remove(ObjectRef {
            kind: Kind::Service,
            key: key('s', service),
        }),
        Step::RemoveSlice(slice) => Change::Remove(ObjectRef {
            kind: Kind::EndpointSlice,
            key: key('e', slice),
        }),
    }
}

proptest! {
    #[test]
    fn an_updated_zone_equals_one_made_anew(steps in prop::collection::vec(step(), 1..40)) {
        let mut snapshot = Snapshot::default();
        let mut zone = Zone::new(origin());
        for step in steps {
            let mut dirty = Dirty::default();
            snapshot.apply(change(step), &mut dirty);
            zone.update(&snapshot, &dirty);
            prop_assert!(zone.same_records(&Zone::of(origin(), &snapshot)));
        }
        let keys: Vec<_> = snapshot.services().map(|service: &Arc<Service>| service.key.clone()).collect();
        for key in keys {
            let mut dirty = Dirty::default();
            snapshot.apply(Change::Remove(ObjectRef { kind: Kind::Service, key }), &mut dirty);
            zone.update(&snapshot, &dirty);
        }
        prop_assert!(zone.same_records(&Zone::new(origin())), "nothing is left of what is gone");
    }
}
