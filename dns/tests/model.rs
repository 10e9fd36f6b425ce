//! The zone against a model: whatever the watches bring, in whatever order, a name that exists is never denied, and what is
//! answered is what the objects say. The model looks at all objects for every question; it has no tree and no history.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cluster_model::{
    Change, Conditions, Dirty, Endpoint, EndpointPort, EndpointSlice, Kind, Object, ObjectKey,
    ObjectRef, Pod, Protocol, Service, Snapshot, read_manifest,
};
use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::RecordType;
use keelway_dns::answer::{Policy, Transport, Verdict, answer};
use keelway_dns::name::Name;
use keelway_dns::query::Query;
use keelway_dns::zone::{Pods, Zone, ZoneSettings};
use proptest::prelude::*;

const NAMESPACES: [&str; 2] = ["red", "blue"];

/// Everything that is in the API, by name.
#[derive(Clone, Debug, Default)]
struct Objects {
    services: BTreeMap<ObjectKey, Arc<Service>>,
    slices: BTreeMap<ObjectKey, Arc<EndpointSlice>>,
    pods: BTreeMap<ObjectKey, Arc<Pod>>,
    listed: BTreeSet<Kind>,
}

#[derive(Clone, Debug)]
enum Step {
    Service(u8, u8, Shape),
    Slice(u8, u8, u8, Vec<(u8, bool, Option<u8>)>),
    Pod(u8, u8, u8, bool),
    /// A reload, with another belief in pods.
    Settings(Pods),
    Remove(Kind, u8, u8),
    /// A new list, from which some objects are missing.
    Relist(Kind, u8),
}

#[derive(Clone, Copy, Debug)]
enum Shape {
    ClusterIp(u8),
    Headless {
        unready_too: bool,
    },
    External,
    /// An alias to the next Service, so that none leads back to itself.
    Next(u8),
    /// An alias to the address of a pod.
    OfPod(u8, u8),
}

fn step() -> impl Strategy<Value = Step> {
    let shape = prop_oneof![
        (0..4_u8).prop_map(Shape::ClusterIp),
        any::<bool>().prop_map(|unready_too| Shape::Headless { unready_too }),
        Just(Shape::External),
        (0..2_u8).prop_map(Shape::Next),
        (0..2_u8, 0..6_u8).prop_map(|(ns, number)| Shape::OfPod(ns, number)),
    ];
    let endpoint = (0..6_u8, any::<bool>(), prop::option::of(0..3_u8));
    let kind = prop::sample::select(vec![Kind::Service, Kind::EndpointSlice, Kind::Pod]);
    prop_oneof![
        3 => (0..2_u8, 0..3_u8, shape).prop_map(|(ns, name, shape)| Step::Service(ns, name, shape)),
        3 => (0..2_u8, 0..4_u8, 0..3_u8, prop::collection::vec(endpoint, 0..4))
            .prop_map(|(ns, name, of, endpoints)| Step::Slice(ns, name, of, endpoints)),
        1 => (0..2_u8, 0..3_u8, 0..6_u8, any::<bool>())
            .prop_map(|(ns, name, address, ended)| Step::Pod(ns, name, address, ended)),
        1 => prop::sample::select(vec![Pods::Disabled, Pods::Insecure, Pods::Verified]).prop_map(Step::Settings),
        1 => (kind.clone(), 0..2_u8, 0..4_u8).prop_map(|(kind, ns, name)| Step::Remove(kind, ns, name)),
        1 => (kind, any::<u8>()).prop_map(|(kind, missing)| Step::Relist(kind, missing)),
    ]
}

fn key(kind: Kind, ns: u8, name: u8) -> ObjectKey {
    let letter = match kind {
        Kind::Service => 's',
        Kind::EndpointSlice => 'e',
        _ => 'p',
    };
    ObjectKey::new(NAMESPACES[usize::from(ns)], format!("{letter}{name}"))
}

fn address(number: u8) -> IpAddr {
    if number.is_multiple_of(2) {
        [10, 244, 0, number].into()
    } else {
        [0xfd00, 0, 0, 0, 0, 0, 0, u16::from(number)].into()
    }
}

fn pod_name(ns: u8, number: u8) -> String {
    format!(
        "{}.{}.pod.cluster.local.",
        dashed(address(number)),
        NAMESPACES[usize::from(ns)]
    )
}

fn service(key: &ObjectKey, shape: Shape) -> Arc<Service> {
    let alias = |target: &str| format!(r#"{{"type":"ExternalName","externalName":"{target}"}}"#);
    let spec = match shape {
        Shape::ClusterIp(number) => format!(
            r#"{{"clusterIP":"10.96.0.{n}","clusterIPs":["10.96.0.{n}","fd96::{n}"],"ports":[{{"name":"p","port":80}}]}}"#,
            n = number + 1
        ),
        Shape::Headless { unready_too } => format!(
            r#"{{"clusterIP":"None","clusterIPs":["None"],"publishNotReadyAddresses":{unready_too}}}"#
        ),
        Shape::External => alias("example.org"),
        Shape::Next(ns) => {
            let number: u8 = key.name[1..].parse().expect("a number");
            alias(&format!(
                "s{}.{}.svc.cluster.local",
                number + 1,
                NAMESPACES[usize::from(ns)]
            ))
        }
        Shape::OfPod(ns, number) => alias(pod_name(ns, number).trim_end_matches('.')),
    };
    let text = format!(
        r#"{{"kind":"Service","metadata":{{"namespace":"{}","name":"{}"}},"spec":{spec}}}"#,
        key.namespace, key.name
    );
    match read_manifest(text.as_bytes()).expect("a Service").remove(0) {
        Object::Service(service) => service,
        other => panic!("{other:?}"),
    }
}

fn slice(key: &ObjectKey, of: ObjectKey, endpoints: &[(u8, bool, Option<u8>)]) -> EndpointSlice {
    let endpoint = |(number, ready, hostname): &(u8, bool, Option<u8>)| Endpoint {
        address: address(*number),
        conditions: Conditions {
            ready: *ready,
            serving: *ready,
            terminating: false,
        },
        node_name: None,
        zone: None,
        hostname: hostname.map(|number| format!("h{number}").into()),
        target: None,
        for_zones: Vec::new(),
        for_nodes: Vec::new(),
    };
    EndpointSlice {
        key: key.clone(),
        service: Some(of),
        headless: false,
        ports: vec![EndpointPort {
            name: "p".into(),
            protocol: Protocol::Tcp,
            port: 80,
            app_protocol: None,
        }],
        endpoints: endpoints.iter().map(endpoint).collect(),
        refused: Vec::new(),
        last_change: None,
    }
}

impl Objects {
    /// The change that a step is, made here too.
    fn apply(&mut self, step: &Step) -> Option<Change> {
        Some(match step {
            Step::Settings(_) => return None,
            Step::Service(ns, name, shape) => {
                let key = key(Kind::Service, *ns, *name);
                let service = service(&key, *shape);
                self.services.insert(key, service.clone());
                Change::Upsert(Object::Service(service))
            }
            Step::Slice(ns, name, of, endpoints) => {
                let own = key(Kind::EndpointSlice, *ns, *name);
                let slice = Arc::new(slice(&own, key(Kind::Service, *ns, *of), endpoints));
                self.slices.insert(own, slice.clone());
                Change::Upsert(Object::EndpointSlice(slice))
            }
            Step::Pod(ns, name, number, ended) => {
                let key = key(Kind::Pod, *ns, *name);
                let pod = Arc::new(Pod {
                    key: key.clone(),
                    node_name: None,
                    ips: vec![address(*number)],
                    host_network: false,
                    own_search: false,
                    ended: *ended,
                });
                self.pods.insert(key, pod.clone());
                Change::Upsert(Object::Pod(pod))
            }
            Step::Remove(kind, ns, name) => {
                let key = key(*kind, *ns, *name);
                match kind {
                    Kind::Service => drop(self.services.remove(&key)),
                    Kind::EndpointSlice => drop(self.slices.remove(&key)),
                    _ => drop(self.pods.remove(&key)),
                }
                Change::Remove(ObjectRef { kind: *kind, key })
            }
            Step::Relist(kind, missing) => {
                self.listed.insert(*kind);
                let mut number = 0;
                let mut keep = || {
                    number += 1;
                    missing >> (number % 8) & 1 == 0
                };
                let list: Vec<Object> = match kind {
                    Kind::Service => {
                        self.services.retain(|_, _| keep());
                        self.services
                            .values()
                            .cloned()
                            .map(Object::Service)
                            .collect()
                    }
                    Kind::EndpointSlice => {
                        self.slices.retain(|_, _| keep());
                        self.slices
                            .values()
                            .cloned()
                            .map(Object::EndpointSlice)
                            .collect()
                    }
                    _ => {
                        self.pods.retain(|_, _| keep());
                        self.pods.values().cloned().map(Object::Pod).collect()
                    }
                };
                Change::Replace(*kind, list)
            }
        })
    }

    /// Where names that are aliases lead to.
    fn aliases(&self) -> BTreeMap<String, String> {
        let all = self.services.iter();
        let aliases = all.filter_map(|(key, service)| {
            let name = format!("{}.{}.svc.cluster.local.", key.name, key.namespace);
            let target = service.external_name.as_deref()?;
            Some((name, format!("{}.", target.trim_end_matches('.'))))
        });
        aliases.collect()
    }

    /// Every name with address records, with what they are. An ExternalName has none of its own.
    fn names(&self, pods: Pods) -> BTreeMap<String, BTreeSet<IpAddr>> {
        let mut names: BTreeMap<String, BTreeSet<IpAddr>> = BTreeMap::new();
        for (key, service) in &self.services {
            let base = format!("{}.{}.svc.cluster.local.", key.name, key.namespace);
            for address in &service.cluster_ips {
                names.entry(base.clone()).or_default().insert(*address);
            }
            if service.external_name.is_some() {
                names.entry(base.clone()).or_default();
            }
            let slices = self
                .slices
                .values()
                .filter(|slice| slice.service.as_ref() == Some(key));
            for endpoint in slices.flat_map(|slice| &slice.endpoints) {
                let visible = endpoint.conditions.ready || service.publish_not_ready;
                if !service.headless || !visible {
                    continue;
                }
                let own = match (&endpoint.hostname, endpoint.address) {
                    (Some(hostname), _) => hostname.to_string(),
                    (None, address) => dashed(address),
                };
                for name in [base.clone(), format!("{own}.{base}")] {
                    names.entry(name).or_default().insert(endpoint.address);
                }
            }
        }
        if pods == Pods::Insecure {
            for (ns, number) in (0..2).flat_map(|ns| (0..6).map(move |number| (ns, number))) {
                names.insert(pod_name(ns, number), [address(number)].into());
            }
        }
        let known = self.pods.values().filter(|_| pods == Pods::Verified);
        for pod in known.filter(|pod| !pod.ended) {
            let name = format!(
                "{}.{}.pod.cluster.local.",
                dashed(pod.ips[0]),
                pod.key.namespace
            );
            names.entry(name).or_default().insert(pod.ips[0]);
        }
        names
    }
}

fn dashed(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => v4.to_string().replace('.', "-"),
        IpAddr::V6(v6) => v6.segments().map(|part| format!("{part:x}")).join("-"),
    }
}

fn ask(zone: &Zone, name: &str, rtype: RecordType) -> Message {
    let mut query = Message::query();
    let asked = hickory_proto::rr::Name::from_ascii(name).expect("a name");
    query.add_query(hickory_proto::op::Query::query(asked, rtype));
    let wire = query.to_vec().expect("a query");
    let query = Query::parse(&wire).expect("a query");
    let mut out = vec![0; 65_535];
    match answer(
        zone,
        &Policy::default(),
        &query,
        Transport::Tcp,
        0,
        &mut out,
    ) {
        Verdict::Reply { bytes, .. } => {
            Message::from_vec(&out[..bytes]).expect("a readable answer")
        }
        // As the server goes on.
        Verdict::Chase { bytes, target } => {
            let mut message = Message::from_vec(&out[..bytes]).expect("a readable answer");
            let rest = ask(zone, &target.to_string(), rtype);
            message.metadata.response_code = rest.metadata.response_code;
            message.answers.extend(rest.answers);
            message.authorities = rest.authorities;
            message
        }
        other => panic!("{name}: {other:?}"),
    }
}

/// Names to ask about: all that may exist, those above them, and some that never do.
fn questions() -> Vec<String> {
    let mut names = vec![
        "cluster.local.".to_owned(),
        "svc.cluster.local.".into(),
        "pod.cluster.local.".into(),
        "nobody.svc.cluster.local.".into(),
    ];
    for ns in NAMESPACES {
        names.push(format!("{ns}.svc.cluster.local."));
        names.push(format!("{ns}.pod.cluster.local."));
        for number in 0..6 {
            names.push(format!(
                "{}.{ns}.pod.cluster.local.",
                dashed(address(number))
            ));
        }
        for service in 0..3 {
            let base = format!("s{service}.{ns}.svc.cluster.local.");
            names.extend((0..3).map(|host| format!("h{host}.{base}")));
            names.extend((0..6).map(|number| format!("{}.{base}", dashed(address(number)))));
            names.push(format!("_tcp.{base}"));
            names.push(format!("www.example.org.{base}"));
            names.push(base);
        }
    }
    names
}

fn check(zone: &Zone, objects: &Objects, pods: Pods) -> Result<(), TestCaseError> {
    let synced = [Kind::Service, Kind::EndpointSlice]
        .iter()
        .all(|kind| objects.listed.contains(kind));
    let pods_synced = pods != Pods::Verified || objects.listed.contains(&Kind::Pod);
    let (exist, aliases) = (objects.names(pods), objects.aliases());
    for asked in questions() {
        let v4 = ask(zone, &asked, RecordType::A);
        let v6 = ask(zone, &asked, RecordType::AAAA);
        // An alias is answered as what it leads to is.
        let mut name = asked;
        while let Some(target) = aliases
            .get(&name)
            .filter(|target| target.ends_with(".local."))
        {
            name.clone_from(target);
        }
        let is_pod = name.ends_with(".pod.cluster.local.") || name == "pod.cluster.local.";
        if !synced || (is_pod && !pods_synced) {
            prop_assert_eq!(
                v4.metadata.response_code,
                ResponseCode::ServFail,
                "{}",
                name
            );
            continue;
        }
        let below = format!(".{name}");
        let exists = exist.contains_key(&name)
            || exist.keys().any(|other| other.ends_with(&below))
            || name == "cluster.local."
            // Named ports are below a Service with an address.
            || (name.starts_with("_tcp.") && {
                let records = exist.get(&name[5..]);
                records.is_some_and(|addresses| !addresses.is_empty())
            });
        let code = if exists {
            ResponseCode::NoError
        } else {
            ResponseCode::NXDomain
        };
        prop_assert_eq!(v4.metadata.response_code, code, "{}: {:?}", name, exist);
        prop_assert_eq!(v6.metadata.response_code, code, "{}", name);
        let told: BTreeSet<IpAddr> = [&v4, &v6]
            .into_iter()
            .flat_map(|message| &message.answers)
            .filter_map(|record| record.data.ip_addr())
            .collect();
        let records = v4.answers.len() + v6.answers.len();
        let expected = exist.get(&name).cloned().unwrap_or_default();
        prop_assert_eq!(&told, &expected, "{}", name);
        let alias = v4
            .answers
            .iter()
            .any(|record| record.record_type() == RecordType::CNAME);
        prop_assert!(
            alias || records == expected.len(),
            "{}: each address once",
            name
        );
        for message in [&v4, &v6]
            .into_iter()
            .filter(|message| message.answers.is_empty())
        {
            let soa = message
                .authorities
                .first()
                .map(|record| record.record_type());
            prop_assert_eq!(
                soa,
                Some(RecordType::SOA),
                "{}: no is said with an SOA",
                name
            );
        }
    }
    Ok(())
}

fn settings(pods: Pods) -> ZoneSettings {
    let mut settings = ZoneSettings::of(Name::parse("cluster.local").expect("a name"));
    settings.pods = pods;
    settings
}

proptest! {
    #[test]
    fn no_sequence_of_watch_events_makes_a_wrong_answer(
        steps in prop::collection::vec(prop::collection::vec(step(), 1..6), 1..12),
    ) {
        let mut snapshot = Snapshot::default();
        let mut pods = Pods::Verified;
        let mut zone = Zone::new(settings(pods));
        let mut objects = Objects::default();
        for batch in steps {
            let mut dirty = Dirty::default();
            for step in batch {
                if let Some(change) = objects.apply(&step) {
                    snapshot.apply(change, &mut dirty);
                }
                if let Step::Settings(new) = step {
                    pods = new;
                    zone = Zone::of(settings(pods), &snapshot);
                }
            }
            zone.update(&snapshot, &dirty);
            check(&zone, &objects, pods)?;
            prop_assert!(zone.same_records(&Zone::of(settings(pods), &snapshot)), "incremental equals full");
        }
        for kind in [Kind::Service, Kind::EndpointSlice, Kind::Pod] {
            let mut dirty = Dirty::default();
            snapshot.apply(Change::Replace(kind, Vec::new()), &mut dirty);
            zone.update(&snapshot, &dirty);
        }
        prop_assert!(zone.same_records(&Zone::new(settings(pods))), "nothing is left of what is gone");
    }
}
