//! The zone's records against the specification's examples.

use std::net::IpAddr;

use cluster_model::{Change, Dirty, Kind, Snapshot, read_manifest};
use keelway_dns::Record;
use keelway_dns::name::{Name, Relative};
use keelway_dns::zone::{Zone, ZoneSettings};

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
        .find(&name)
        .into_iter()
        .flat_map(|node| node.records().map(Record::from))
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

/// A name below the cluster's domain, without it.
fn relative(text: &str) -> Relative {
    let labels = text.rsplit('.');
    labels.fold(Relative::origin(), |name, label| {
        name.child(label, 15).expect("a name")
    })
}

const CLUSTER_IP: &str = r#"{"kind":"Service","apiVersion":"v1","metadata":{"name":"web","namespace":"prod"},
    "spec":{"clusterIP":"10.96.0.7","clusterIPs":["10.96.0.7"],
    "ports":[{"name":"http","port":80,"protocol":"TCP"},{"name":"","port":81,"protocol":"TCP"}]}}"#;

#[test]
fn a_cluster_ip_service_has_a_srv_and_ptr_records() {
    let zone = Zone::of(ZoneSettings::of(origin()), &snapshot(CLUSTER_IP));
    let web = "web.prod.svc.cluster.local";
    assert_eq!(records(&zone, web), [a("10.96.0.7")]);
    assert_eq!(
        records(&zone, "7.0.96.10.in-addr.arpa"),
        [Record::Ptr(relative("web.prod.svc"))]
    );
    let srv = Record::Srv {
        weight: 100,
        port: 80,
        target: relative("web.prod.svc"),
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
    let zone = Zone::of(ZoneSettings::of(origin()), &snapshot(CLUSTER_IP));
    for empty in [
        "svc.cluster.local",
        "prod.svc.cluster.local",
        "_tcp.web.prod.svc.cluster.local",
    ] {
        assert!(zone.find(&name(empty)).is_some(), "{empty}");
        assert_eq!(records(&zone, empty), []);
    }
    assert!(zone.find(&name("other.svc.cluster.local")).is_none());
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
    let zone = Zone::of(ZoneSettings::of(origin()), &snapshot(HEADLESS));
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
        target: relative(&format!("{host}.db.prod.svc")),
    };
    let mut expected = vec![srv("db-0"), srv("10-244-1-6")];
    expected.sort();
    assert_eq!(
        records(&zone, "_sql._tcp.db.prod.svc.cluster.local"),
        expected
    );
    let ptr = Record::Ptr(relative("db-0.db.prod.svc"));
    assert_eq!(records(&zone, "5.0.244.10.in-addr.arpa"), [ptr]);
}

#[test]
fn a_headless_service_without_ready_endpoints_does_not_exist() {
    let none = HEADLESS.replace("\"ready\":true", "\"ready\":false");
    let zone = Zone::of(ZoneSettings::of(origin()), &snapshot(&none));
    assert!(zone.find(&name("db.prod.svc.cluster.local")).is_none());
    let published = none.replace(
        "\"clusterIP\":\"None\"",
        "\"clusterIP\":\"None\",\"publishNotReadyAddresses\":true",
    );
    let zone = Zone::of(ZoneSettings::of(origin()), &snapshot(&published));
    assert_eq!(records(&zone, "db.prod.svc.cluster.local").len(), 3);
}

#[test]
fn an_external_name_is_a_cname() {
    let manifest = r#"{"kind":"Service","apiVersion":"v1","metadata":{"name":"out","namespace":"prod"},
        "spec":{"type":"ExternalName","externalName":"example.org"}}"#;
    let zone = Zone::of(ZoneSettings::of(origin()), &snapshot(manifest));
    assert_eq!(
        records(&zone, "out.prod.svc.cluster.local"),
        [Record::Cname(name("example.org"))]
    );
}

#[test]
fn a_hostname_that_is_no_label_takes_nothing_else_away() {
    let long = HEADLESS.replace("\"db-0\"", &format!("\"{}\"", "x".repeat(70)));
    let zone = Zone::of(ZoneSettings::of(origin()), &snapshot(&long));
    assert_eq!(
        records(&zone, "db.prod.svc.cluster.local"),
        [a("10.244.0.5"), a("10.244.1.6")]
    );
    assert_eq!(
        records(&zone, "10-244-1-6.db.prod.svc.cluster.local").len(),
        1
    );
}

#[test]
fn several_domains_have_the_same_names() {
    let mut settings = ZoneSettings::of(origin());
    settings.origins.push(name("k8s.example.org"));
    let zone = Zone::of(settings, &snapshot(CLUSTER_IP));
    for domain in ["cluster.local", "k8s.example.org"] {
        assert_eq!(
            records(&zone, &format!("web.prod.svc.{domain}")),
            [a("10.96.0.7")]
        );
    }
    assert!(zone.find(&name("web.prod.svc.example.org")).is_none());
}

#[test]
fn an_address_that_two_pods_seem_to_have_belongs_to_neither() {
    // A pod that has ended keeps its address in the API while another one uses it (CoreDNS 3765).
    let pod = |name: &str, namespace: &str, more: &str| {
        format!(
            r#"{{"kind":"Pod","metadata":{{"name":"{name}","namespace":"{namespace}"}},"spec":{{}},
                "status":{{"podIPs":[{{"ip":"10.244.0.9"}}]{more}}}}}"#
        )
    };
    let namespace = |manifest: &str| {
        let zone = Zone::of(ZoneSettings::of(origin()), &snapshot(manifest));
        let address = "10.244.0.9".parse().expect("an address");
        zone.namespace_of(address)
            .map(|namespace| namespace.to_string())
    };
    let (new, old) = (pod("new", "red", ""), pod("old", "blue", ""));
    assert_eq!(namespace(&new).as_deref(), Some("red"));
    assert_eq!(namespace(&format!("[{new},{old}]")), None);
    for (spec, known) in [
        (
            r#"{"dnsPolicy":"ClusterFirst","dnsConfig":{"options":[{"name":"ndots","value":"2"}]}}"#,
            true,
        ),
        (r#"{"dnsConfig":{"searches":["corp.example"]}}"#, false),
        (
            r#"{"dnsPolicy":"None","dnsConfig":{"nameservers":["10.96.0.10"]}}"#,
            false,
        ),
        (r#"{"dnsPolicy":"Default"}"#, false),
    ] {
        let own = new.replace(r#""spec":{}"#, &format!(r#""spec":{spec}"#));
        assert_eq!(
            namespace(&own).is_some(),
            known,
            "a search path of its own: {spec}"
        );
    }
    let ended = pod("old", "blue", r#","phase":"Succeeded""#);
    assert_eq!(
        namespace(&format!("[{new},{ended}]")).as_deref(),
        Some("red")
    );
}
