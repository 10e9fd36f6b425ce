//! The hot path allocates nothing: names of the cluster, what does not exist, and what is in the cache.

mod memory;
mod sys;

use std::net::IpAddr;
use std::time::Instant;

use cluster_model::{Change, Dirty, Kind, Snapshot, read_manifest};
use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RecordType};
use keelway_dns::answer::Transport;
use keelway_dns::cache::{CacheRules, Key};
use keelway_dns::config::spec::{BlockSpec, ClusterSpec, RouteSpec, ServerSpec, Spec};
use keelway_dns::forward::ForwardRules;
use keelway_dns::message::Reply;
use keelway_dns::metrics::Metrics;
use keelway_dns::server::at_once::{Outcome, at_once};
use keelway_dns::server::{REPLY_BYTES_MAX, Shared};
use keelway_dns::settings::Settings;
use keelway_dns::zone::{Pods, Zone, ZoneSettings};

#[global_allocator]
static ALLOCATOR: sys::Counting = sys::Counting;

const MANIFEST: &str = r#"[
    {"kind":"Service","metadata":{"name":"web","namespace":"prod"},
     "spec":{"clusterIP":"10.96.0.7","clusterIPs":["10.96.0.7","fd96::7"],"ports":[{"name":"http","port":80}]}},
    {"kind":"Service","metadata":{"name":"db","namespace":"prod"},"spec":{"clusterIP":"None","clusterIPs":["None"]}},
    {"kind":"Service","metadata":{"name":"inside","namespace":"prod"},
     "spec":{"type":"ExternalName","externalName":"web.prod.svc.cluster.local"}},
    {"kind":"EndpointSlice","addressType":"IPv4","metadata":{"name":"db-1","namespace":"prod",
     "labels":{"kubernetes.io/service-name":"db"}},"ports":[{"name":"sql","port":1}],
     "endpoints":[{"addresses":["10.244.0.1"],"hostname":"db-0"},{"addresses":["10.244.0.2"]}]}]"#;

fn wire(name: &str, rtype: RecordType) -> Vec<u8> {
    let mut message = Message::query();
    message.add_query(Query::query(Name::from_ascii(name).expect("a name"), rtype));
    message.to_vec().expect("a query")
}

fn parts() -> (Settings, Zone) {
    let mut snapshot = Snapshot::default();
    let mut dirty = Dirty::default();
    for kind in [Kind::Service, Kind::EndpointSlice] {
        snapshot.apply(Change::Replace(kind, Vec::new()), &mut dirty);
    }
    for object in read_manifest(MANIFEST.as_bytes()).expect("a manifest") {
        snapshot.apply(Change::Upsert(object), &mut dirty);
    }
    let name = |text| keelway_dns::name::Name::parse(text).expect("a name");
    let mut zone = ZoneSettings::of(name("cluster.local"));
    zone.pods = Pods::Insecure;
    let mut block = BlockSpec::of(vec![name(".")]);
    block.cluster = Some(ClusterSpec {
        ttl_s: 5,
        fallthrough: zone.reverse.clone(),
        transfer: Vec::new(),
    });
    block.cache = Some(CacheRules::default());
    block.routes.push(RouteSpec {
        zone: name("."),
        except: Vec::new(),
        servers: vec![ServerSpec {
            address: "127.0.0.1:9".parse().expect("an address"),
            tls: None,
        }],
        rules: ForwardRules::default(),
    });
    let spec = Spec {
        zone: zone.clone(),
        blocks: vec![block],
        port: None,
        http: Vec::new(),
        lameduck: None,
        warnings: Vec::new(),
    };
    let settings = Settings::build(spec, &Metrics::default(), None).expect("settings");
    (settings, Zone::of(zone, &snapshot))
}

#[test]
fn the_hot_path_allocates_nothing() {
    let (settings, zone) = parts();
    let cached = wire("www.example.org.", RecordType::A);
    let mut reply = cached.clone();
    (reply[2], reply[3], reply[7]) = (0x81, 0x80, 1);
    reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4, 192, 0, 2, 1]);
    let question = keelway_dns::query::Query::parse(&cached).expect("a query");
    let reply = Reply::read(&reply, question.question.len(), question.rtype).expect("an answer");
    let block = settings
        .block(question.name())
        .expect("the block of everything");
    let cache = block.cache.as_ref().expect("it has a cache");
    cache.put(&Key::of(&question), reply, Instant::now());

    let shared = Shared::new(settings, Metrics::default());
    shared.serve(zone);
    let state = shared.state();
    let view = shared.view(&state, Instant::now());
    let mut out = [0; REPLY_BYTES_MAX];
    let queries = [
        (
            "a name with an address",
            wire("web.prod.svc.cluster.local.", RecordType::A),
        ),
        (
            "both families",
            wire("web.prod.svc.cluster.local.", RecordType::AAAA),
        ),
        (
            "no data",
            wire("web.prod.svc.cluster.local.", RecordType::MX),
        ),
        (
            "no such name",
            wire("www.example.org.prod.svc.cluster.local.", RecordType::A),
        ),
        (
            "a headless name",
            wire("db.prod.svc.cluster.local.", RecordType::A),
        ),
        (
            "SRV with additional records",
            wire("_sql._tcp.db.prod.svc.cluster.local.", RecordType::SRV),
        ),
        (
            "a reversed address",
            wire("7.0.96.10.in-addr.arpa.", RecordType::PTR),
        ),
        (
            "an alias within the cluster",
            wire("inside.prod.svc.cluster.local.", RecordType::A),
        ),
        (
            "a pod's name",
            wire("10-0-0-1.prod.pod.cluster.local.", RecordType::A),
        ),
        ("the apex", wire("cluster.local.", RecordType::SOA)),
        ("a cached name", cached),
        ("nonsense", vec![1; 40]),
    ];
    for (what, query) in queries {
        let ask = |out: &mut [u8], turn| {
            let client = IpAddr::from([127, 0, 0, 1]);
            at_once(&view, &query, client, Transport::Udp, turn, out)
        };
        // Labels of metrics are made once.
        let answered = ask(&mut out, 0);
        assert!(
            matches!(answered, Outcome::Reply { .. }),
            "{what}: {answered:?}"
        );
        let before = sys::count();
        for turn in 0..100 {
            ask(&mut out, turn);
        }
        assert_eq!(sys::count() - before, 0, "{what}");
    }
}
