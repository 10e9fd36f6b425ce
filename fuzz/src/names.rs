//! What a DNS server takes: queries of anyone, answers of upstreams, and the file that an operator gives it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::time::Instant;

use cluster_model::{Change, Dirty, Kind, Snapshot, read_manifest};
use hickory_proto::op::Message;
use serde_json::json;

use crate::answer::{Policy, Transport, Verdict, cut};
use crate::cache::{Entry, Key};
use crate::config::files::Files;
use crate::config::read_spec_on;
use crate::config::spec::Spec;
use crate::message::{Reply, belongs};
use crate::metrics::Metrics;
use crate::name::Name;
use crate::offer;
use crate::query::{HEADER_BYTES, Query, rtype};
use crate::rules::Rules;
use crate::server::at_once::{Outcome, REPLY_BYTES_MAX, View, at_once};
use crate::server::looked::{Looked, proto_name};
use crate::zone::Zone;

/// Something of everything that may decide about a name.
const COREFILE: &str = ".:53 {
    errors
    rewrite name suffix .corp.example. .svc.cluster.local.
    hosts {
        192.0.2.9 printer.example
        2001:db8::9 printer.example
        fallthrough
    }
    autopath @kubernetes
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
    }
    transfer {
        to *
    }
    forward . 192.0.2.53
    cache 30
}
";
const RESOLV_CONF: &str = "search prod.svc.cluster.local corp.example\nnameserver 192.0.2.53\n";

fn read(text: &str) -> Result<Spec, String> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [path, resolv_conf] = ["Corefile", "resolv.conf"].map(|name| folder.path().join(name));
    fs::write(&path, text).expect("written");
    fs::write(&resolv_conf, RESOLV_CONF).expect("written");
    let spec = read_spec_on(&path, Path::new(&resolv_conf), &mut Files::default());
    spec.map_err(|error| error.to_string())
}

/// A cluster with a Service, a headless one of many endpoints, one with named endpoints, and aliases into the cluster and out of it.
fn cluster() -> Snapshot {
    let endpoints: Vec<_> = (1..=60)
        .map(|i| json!({"addresses": [format!("10.244.0.{i}")], "conditions": {"ready": true}}))
        .collect();
    let slice = |service: &str, family: &str, endpoints| {
        json!({"kind": "EndpointSlice", "addressType": family, "metadata": {"name": format!("{service}-{family}"), "namespace": "prod",
            "labels": {"kubernetes.io/service-name": service}}, "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}],
            "endpoints": endpoints})
    };
    let service = |name: &str, spec| json!({"kind": "Service", "metadata": {"name": name, "namespace": "prod"}, "spec": spec});
    let port = json!([{"name": "sql", "port": 5432, "protocol": "TCP"}]);
    let alias = |to: &str| json!({"type": "ExternalName", "externalName": to});
    let objects = json!([
        service("web", json!({"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7", "fd00::7"], "ports": port})),
        service("db", json!({"clusterIP": "None", "clusterIPs": ["None"], "ports": port})),
        service("set", json!({"clusterIP": "None", "clusterIPs": ["None"], "ports": port})),
        service("in", alias("web.prod.svc.cluster.local")),
        service("circle", alias("circle.prod.svc.cluster.local")),
        service("out", alias("www.example.org")),
        slice("db", "IPv4", json!(endpoints)),
        slice("set", "IPv6", json!([{"addresses": ["fd00:10::1"], "hostname": "a", "conditions": {"ready": true}}])),
        {"kind": "Pod", "metadata": {"name": "client", "namespace": "prod"}, "spec": {}, "status": {"podIPs": [{"ip": "127.0.0.1"}]}},
    ]);
    let (mut snapshot, mut dirty) = (Snapshot::default(), Dirty::default());
    for kind in [Kind::Service, Kind::EndpointSlice, Kind::Pod] {
        snapshot.apply(Change::Replace(kind, Vec::new()), &mut dirty);
    }
    for object in read_manifest(objects.to_string().as_bytes()).expect("a manifest") {
        snapshot.apply(Change::Upsert(object), &mut dirty);
    }
    snapshot
}

struct Server {
    rules: Rules,
    zone: Zone,
    bare: Policy,
    metrics: Metrics,
}

impl Server {
    fn start() -> Self {
        let spec = read(COREFILE).expect("a Corefile");
        let rules = Rules::new(&spec, |_| None);
        let cache = rules.blocks()[0].cache.as_ref().expect("a cache");
        let www = Name::parse("www.example.org").expect("a name");
        let message = answered(&[0, 7, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0], ADDRESS);
        let reply = Reply::read(&message, QUESTION.len(), rtype::A).expect("an answer");
        let key = Key::new(www.wire(), rtype::A, false, false);
        cache.put(&key, reply, Instant::now());
        Self {
            zone: Zone::of(spec.zone, &cluster()),
            bare: Policy::default(),
            metrics: Metrics::default(),
            rules,
        }
    }
}

thread_local! {
    static SERVER: Server = Server::start();
}

/// A query by UDP or TCP, as the first byte says: there is an answer that can be read and is no longer than its client takes, or others have
/// to be asked; silence is for what is no query.
pub fn dns_query(input: &[u8]) {
    let Some((choice, message)) = input.split_first() else {
        return;
    };
    let (transport, room) = match choice & 1 {
        0 => (Transport::Udp, REPLY_BYTES_MAX),
        _ => (Transport::Tcp, usize::from(u16::MAX)),
    };
    let mut out = vec![0; room];
    let outcome = SERVER.with(|server| {
        let view = View {
            zone: &server.zone,
            rules: &server.rules,
            bare: &server.bare,
            caching: &server.metrics.caching,
            now: Instant::now(),
        };
        let client = IpAddr::from(Ipv4Addr::LOCALHOST);
        let turn = usize::from(*choice);
        at_once(&view, message, client, transport, turn, &mut out)
    });
    let query = Query::parse(message);
    match outcome {
        Outcome::Reply { bytes, .. } => {
            let limit = match (&query, transport) {
                (Ok(query), Transport::Udp) => query.udp_bytes_max(REPLY_BYTES_MAX),
                (Ok(_), Transport::Tcp) => room,
                (Err(_), _) => HEADER_BYTES,
            };
            assert!(bytes <= limit, "{bytes} bytes");
            out.truncate(bytes);
            readable(message, &out);
            let bytes = cut(message, &mut out);
            readable(message, &out[..bytes]);
        }
        Outcome::Slow => assert!(query.is_ok()),
        Outcome::Ignore => assert!(message.len() < HEADER_BYTES || message[2] & RESPONSE != 0),
    }
}

const RESPONSE: u8 = 0x80;

/// Holds that a reply is one to a message, and can be read.
fn readable(message: &[u8], reply: &[u8]) {
    assert_eq!(reply[..2], message[..2]);
    assert!(reply[2] & RESPONSE != 0);
    if let Err(error) = Message::from_vec(reply) {
        panic!("{error}: {reply:?}");
    }
    if let Ok(query) = Query::parse(message) {
        assert!(reply[HEADER_BYTES..].starts_with(query.question));
    }
}

/// What an upstream is asked, in the tests of its answers, and how clients spell and bound that: without EDNS, and with it.
const QUESTION: &[u8] = b"\x03www\x07example\x03org\0\0\x01\0\x01";
const SPELLED: &[u8] = b"\x03wWw\x07eXamPle\x03ORG\0\0\x01\0\x01";
const ADDRESS: &[u8] = &[0xc0, 12, 0, 1, 0, 1, 0, 0, 1, 44, 0, 4, 192, 0, 2, 1];
const PLAIN: &[u8] = &[0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
const EXTENDED: &[u8] = &[0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
const OPT: &[u8] = &[0, 0, 41, 0x03, 0x20, 0, 0, 0x80, 0, 0, 0];

/// A message that has the question where it belongs.
fn answered(header: &[u8; HEADER_BYTES], rest: &[u8]) -> Vec<u8> {
    [header, QUESTION, rest].concat()
}

/// An upstream's answer: as it is, and with the question where it belongs. It is refused, or passed on within what a client takes: by its
/// own bytes, and as part of an answer that is put together.
pub fn dns_reply(input: &[u8]) {
    let mut messages = vec![input.to_vec()];
    if let Some((header, rest)) = input.split_first_chunk::<HEADER_BYTES>() {
        messages.push(answered(header, rest));
    }
    let asked = [[PLAIN, SPELLED, &[]], [EXTENDED, SPELLED, OPT]].map(|parts| parts.concat());
    let (policy, now) = (Policy::default(), Instant::now());
    let www = Name::parse("www.example.org").expect("a name");
    let alias = Name::parse("web.corp.example").expect("a name");
    for message in messages {
        let _ = belongs(&message, [0, 7], QUESTION);
        let Ok(reply) = Reply::read(&message, QUESTION.len(), rtype::A) else {
            continue;
        };
        let entry = Entry::fleeting(reply, now);
        for (asked, transport) in asked
            .iter()
            .flat_map(|asked| [(asked, Transport::Udp), (asked, Transport::Tcp)])
        {
            let query = Query::parse(asked).expect("a query");
            let most = match transport {
                Transport::Udp => query.udp_bytes_max(policy.udp_bytes_max),
                Transport::Tcp => usize::from(u16::MAX),
            };
            let mut out = vec![0; usize::from(u16::MAX)];
            let verdict = entry.compose(&query, &policy, transport, now, 3, &mut out);
            passed_on(asked, &verdict, most, &out);
            let Ok(part) = entry.message(QUESTION, now) else {
                continue;
            };
            let mut looked = Looked::of(part.clone());
            looked.rename(&www, &proto_name(&alias).expect("a name"));
            let looked = looked.behind(&alias, &www, 5);
            let mut looked = looked.expect("names");
            looked.extend(Looked::of(part));
            let verdict = looked.finish(asked, &query, &policy, transport, &mut out);
            passed_on(asked, &verdict, most, &out);
            let Verdict::Reply { bytes, .. } = verdict else {
                continue;
            };
            readable(asked, &out[..bytes]);
        }
    }
}

/// Holds that something is said to a message, no longer than its client takes.
fn passed_on(asked: &[u8], verdict: &Verdict, most: usize, out: &[u8]) {
    let Verdict::Reply { bytes, .. } = verdict else {
        panic!("nothing is said to {asked:?}");
    };
    assert!(*bytes <= most, "{bytes} bytes");
    assert_eq!(out[..2], asked[..2]);
    assert!(out[2] & RESPONSE != 0 && out[HEADER_BYTES..*bytes].starts_with(SPELLED));
}

/// A Corefile: an error, or a configuration that can be put to work and is the same when it is read again.
pub fn corefile(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    // Nothing else of this machine is read.
    let leads_away = |(at, _): (usize, &str)| {
        !text[at + 1..].starts_with(|c: char| c == '/' || c.is_ascii_digit())
    };
    if text.match_indices('/').any(leads_away) {
        return;
    }
    let Ok(spec) = read(text) else { return };
    assert_eq!(read(text).as_ref(), Ok(&spec));
    let _ = offer::rules(&spec);
    let _ = Rules::new(&spec, |_| None);
}
