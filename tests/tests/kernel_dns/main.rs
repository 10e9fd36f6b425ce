//! Answers at pods' interfaces against the server's own: whatever is asked, the program says the same as the server, byte for byte but for
//! the order of addresses and the serial, or leaves the packet as it is.

mod packets;
mod pods;
mod program;

use std::cell::Cell;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cluster_model::share::Rules;
use cluster_model::{Change, Dirty, Kind, Snapshot, read_manifest};
use dataplane_abi::{DNS_RECURSION, DnsZone};
use dataplane_ebpf::dns::{self, Answer, TEXT_BYTES, Text};
use dataplane_ebpf::memory::Bytes;
use keelway_agent::offers::Terms;
use keelway_agent::plan::names::{Domains, Names, plan_names};
use keelway_dns::answer::{Policy, Transport, Verdict, accept, answer};
use keelway_dns::name::Name;
use keelway_dns::zone::{Zone, ZoneSettings};
use proptest::prelude::*;
use proptest::sample::select;

use packets::{datagram, opened};

const DOMAINS: [&str; 2] = ["cluster.local", "corp.example"];
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const SERVER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x60, 0, 0, 0, 0, 0, 10);
/// The endpoint behind it, which sockets are given in its place.
const SERVER_POD: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 2);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 7);
const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 244, 0, 0, 0, 0, 0, 7);

const CLUSTER: &str = r#"{"items":[
  {"kind":"Service","metadata":{"name":"kube-dns","namespace":"kube-system"},"spec":{"clusterIP":"10.96.0.10",
    "clusterIPs":["10.96.0.10","fd00:60::a"],"ports":[{"name":"dns","port":53,"protocol":"UDP"}]}},
  {"kind":"EndpointSlice","addressType":"IPv4","metadata":{"name":"kube-dns-1","namespace":"kube-system","labels":{"kubernetes.io/service-name":"kube-dns"}},
    "ports":[{"name":"dns","port":53,"protocol":"UDP"}],"endpoints":[{"addresses":["10.244.1.2"]},{"addresses":["10.244.2.2"]}]},
  {"kind":"Service","metadata":{"name":"four","namespace":"prod"},"spec":{"clusterIP":"10.96.0.1","clusterIPs":["10.96.0.1"],
    "ports":[{"name":"http","port":80}]}},
  {"kind":"Service","metadata":{"name":"six","namespace":"prod"},"spec":{"clusterIP":"fd00::6","clusterIPs":["fd00::6"]}},
  {"kind":"Service","metadata":{"name":"both","namespace":"prod"},"spec":{"clusterIP":"10.96.0.2","clusterIPs":["10.96.0.2","fd00::2"]}},
  {"kind":"Service","metadata":{"name":"alias","namespace":"prod"},"spec":{"type":"ExternalName","externalName":"four.prod.svc.cluster.local"}},
  {"kind":"Service","metadata":{"name":"few","namespace":"prod"},"spec":{"clusterIP":"None","clusterIPs":["None"]}},
  {"kind":"EndpointSlice","addressType":"IPv4","metadata":{"name":"few-1","namespace":"prod","labels":{"kubernetes.io/service-name":"few"}},
    "ports":[{"name":"http","port":80}],
    "endpoints":[{"addresses":["10.0.0.1"],"hostname":"a"},{"addresses":["10.0.0.2"]},{"addresses":["10.0.0.3"],"hostname":"a"}]},
  {"kind":"EndpointSlice","addressType":"IPv6","metadata":{"name":"few-2","namespace":"prod","labels":{"kubernetes.io/service-name":"few"}},
    "endpoints":[{"addresses":["fd00::11"],"hostname":"a"}]},
  {"kind":"Service","metadata":{"name":"many","namespace":"prod"},"spec":{"clusterIP":"None","clusterIPs":["None"]}},
  {"kind":"EndpointSlice","addressType":"IPv4","metadata":{"name":"many-1","namespace":"prod","labels":{"kubernetes.io/service-name":"many"}},
    "endpoints":[{"addresses":["10.0.1.1"]},{"addresses":["10.0.1.2"]},{"addresses":["10.0.1.3"]},{"addresses":["10.0.1.4"]},{"addresses":["10.0.1.5"]}]}
]}"#;

const NAMES: [&str; 14] = [
    "four.prod.svc",
    "six.prod.svc",
    "both.prod.svc",
    "alias.prod.svc",
    "few.prod.svc",
    "a.few.prod.svc",
    "10-0-0-2.few.prod.svc",
    "many.prod.svc",
    "10-0-1-5.many.prod.svc",
    "none.prod.svc",
    "prod.svc",
    "_http._tcp.four.prod.svc",
    "kube-dns.kube-system.svc",
    "four.prod.svc.cluster.local.prod.svc",
];

struct Cluster {
    snapshot: Snapshot,
    zone: Zone,
    policy: Policy,
}

fn cluster() -> Cluster {
    let (mut snapshot, mut dirty) = (Snapshot::default(), Dirty::default());
    for kind in [Kind::Service, Kind::EndpointSlice] {
        snapshot.apply(Change::Replace(kind, Vec::new()), &mut dirty);
    }
    for object in read_manifest(CLUSTER.as_bytes()).expect("a manifest") {
        snapshot.apply(Change::Upsert(object), &mut dirty);
    }
    let mut settings = ZoneSettings::of(origins()[0].clone());
    settings.origins = origins();
    Cluster {
        zone: Zone::of(settings, &snapshot),
        snapshot,
        policy: Policy {
            recursion: true,
            ..Policy::default()
        },
    }
}

/// What the server would say of itself.
fn terms() -> Terms {
    let policy = Policy::default();
    Terms {
        rules: Rules {
            origins: DOMAINS.map(|domain| format!("{domain}.")).to_vec(),
            ttl_s: policy.ttl_s,
            udp_bytes_max: policy.udp_bytes_max as u16,
            recursion: true,
            endpoint_pod_names: false,
        },
        addresses: vec![SERVER_POD.into()],
    }
}

fn origins() -> Vec<Name> {
    DOMAINS
        .iter()
        .map(|domain| Name::parse(domain).expect("a name"))
        .collect()
}

impl Cluster {
    /// What the server answers at once from the cluster; `None` where it asks others.
    fn answer(&self, query: &[u8], turn: usize) -> Option<Vec<u8>> {
        let mut out = vec![0; 4096];
        let verdict = match accept(query, &self.policy, &mut out) {
            Ok(parsed) => answer(
                &self.zone,
                &self.policy,
                &parsed,
                Transport::Udp,
                turn,
                &mut out,
            ),
            Err(verdict) => verdict,
        };
        match verdict {
            Verdict::Reply { bytes, .. } => Some(out[..bytes].to_vec()),
            _ => None,
        }
    }
}

/// A reply with its addresses in order and without the serial: the question, the answers, the rest.
fn normal(reply: &[u8]) -> (Vec<u8>, Vec<Vec<u8>>, Vec<u8>) {
    let name = reply[12..]
        .iter()
        .position(|byte| *byte == 0)
        .expect("a name");
    let end = 12 + name + 5;
    let record = if reply[end - 3] == 28 { 28 } else { 16 };
    let answers = usize::from(reply[7]) * record;
    let mut all: Vec<Vec<u8>> = reply[end..end + answers]
        .chunks(record)
        .map(<[u8]>::to_vec)
        .collect();
    all.sort();
    let mut rest = reply[end + answers..].to_vec();
    if reply[9] == 1 {
        rest[34..38].fill(0);
    }
    (reply[..end].to_vec(), all, rest)
}

fn query() -> impl Strategy<Value = Vec<u8>> {
    let name = (select(&NAMES[..]), select(&DOMAINS[..]), any::<u64>()).prop_map(
        |(name, domain, case)| {
            let text = format!("{name}.{domain}");
            let mut wire = Vec::new();
            for label in text.split('.') {
                wire.push(label.len() as u8);
                wire.extend(label.bytes());
            }
            wire.push(0);
            for (i, byte) in wire.iter_mut().enumerate() {
                if case >> (i % 64) & 1 == 1 {
                    *byte = byte.to_ascii_uppercase();
                }
            }
            wire
        },
    );
    let usual = |odd: u8| prop_oneof![9 => Just(0_u8), 1 => Just(odd)];
    let edns = prop_oneof![
        3 => Just(vec![]),
        3 => Just(vec![0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]),
        1 => Just(vec![0, 0, 41, 0, 0, 0, 0, 0x80, 0, 0, 0]),
        1 => Just(vec![0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 12, 0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]),
        1 => Just(vec![0, 0, 41, 4, 208, 0, 1, 0, 0, 0, 0]),
        1 => Just(vec![0, 0, 16, 0, 1, 0, 0, 0, 0, 0, 1, 0]),
        1 => Just(vec![0, 0, 41, 4]),
    ];
    let rtype = prop_oneof![4 => Just(1_u16), 4 => Just(28), 1 => select(&[5_u16, 16, 33, 255, 6, 252, 65][..])];
    let class = prop_oneof![9 => Just(1_u16), 1 => select(&[255_u16, 3][..])];
    let flags = (usual(0x80), usual(0x28), any::<bool>(), any::<bool>());
    let extra = prop_oneof![9 => Just(vec![]), 1 => proptest::collection::vec(any::<u8>(), 1..20)];
    (any::<u16>(), name, rtype, class, edns, flags, extra).prop_map(
        |(id, name, rtype, class, edns, (response, opcode, rd, cd), extra)| {
            let mut wire = id.to_be_bytes().to_vec();
            wire.extend([
                response | opcode | u8::from(rd),
                u8::from(cd) << 4,
                0,
                1,
                0,
                0,
                0,
                0,
                0,
            ]);
            wire.push(u8::from(!edns.is_empty()));
            wire.extend(name);
            wire.extend(rtype.to_be_bytes());
            wire.extend(class.to_be_bytes());
            wire.extend(edns);
            wire.extend(extra);
            wire
        },
    )
}

/// Queries that a resolver would send: these are answered, if the name has addresses and not too many.
fn is_plain(query: &[u8]) -> bool {
    let name = query[12..]
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or_default();
    let rest = &query[12 + name + 1..];
    let edns = &rest[4..];
    query[2] & 0xf8 == 0
        && matches!(rest[..4], [0, 1 | 28, 0, 1])
        && (edns.is_empty() && query[11] == 0
            || edns.len() == 11 && edns[..3] == [0, 0, 41] && edns[6] == 0)
}

fn has_few_addresses(query: &[u8]) -> bool {
    let text = String::from_utf8_lossy(query).to_ascii_lowercase();
    [
        "\u{4}four\u{4}prod\u{3}svc\u{7}c",
        "\u{4}four\u{4}prod\u{3}svc\u{4}c",
        "\u{3}six",
        "both",
        "\u{3}few",
        "kube-dns",
    ]
    .iter()
    .any(|part| text.contains(part))
        && !text.contains("_http")
        // Names that spell an address are the server's.
        && !text.contains("10-0-")
        && text.matches("\u{4}prod").count() < 2
}

fn check(cluster: &Cluster, query: &[u8], answered: Option<&[u8]>) -> Result<(), TestCaseError> {
    match answered {
        Some(reply) => {
            let server = cluster.answer(query, 0).expect("the server answers too");
            prop_assert_eq!(normal(reply), normal(&server));
        }
        None => prop_assert!(
            !(is_plain(query) && has_few_addresses(query)),
            "it was left to the server"
        ),
    }
    Ok(())
}

fn names(cluster: &Cluster, domains: &Domains) -> Names {
    cluster
        .snapshot
        .services()
        .flat_map(|service| plan_names(domains, &cluster.snapshot, &service.key))
        .collect()
}

fn domains() -> Domains {
    Domains::new(&terms().rules, [3, 5]).expect("names")
}

/// The answer to a packet: as the program has it, over memory.
fn in_memory(names: &Names, packet: &[u8], turn: u32) -> Option<Vec<u8>> {
    let mut bytes = Bytes(packet.to_vec());
    let envelope = dns::open(&bytes, packet.len())?;
    let mut text = Text {
        words: [0xeeee_eeee_eeee_eeee; TEXT_BYTES / 8],
    };
    let asked = &packet[envelope.text_at()..];
    for (at, byte) in asked.iter().enumerate() {
        let shift = at % 8 * 8;
        text.words[at / 8] &= !(0xff << shift);
        text.words[at / 8] |= u64::from(*byte) << shift;
    }
    let name_bytes = match dns::name_bytes(&text) {
        0 => return None,
        bytes => bytes,
    };
    let question = dns::question(&text, name_bytes, &envelope)?;
    let (key, name_sum) = dns::key(&text, name_bytes, [3, 5]);
    let answer = Answer {
        question,
        name_bytes,
        name_sum,
        found: names.get(&key)?,
        zone: &DnsZone {
            seed: [3, 5],
            serial: 1,
            ttl_s: 5,
            udp_bytes: 1232,
            flags: DNS_RECURSION,
        },
        turn,
    };
    assert!(dns::put(&mut bytes, &envelope, &answer));
    Some(bytes.0)
}

#[test]
fn the_library_answers_as_the_server_does() {
    let cluster = cluster();
    let names = names(&cluster, &domains());
    let answered = Cell::new(0);
    proptest!(ProptestConfig::with_cases(4000), |(query in query(), v6 in any::<bool>(), turn in any::<u32>())| {
        let reply = in_memory(&names, &asked(&query, v6), turn);
        let reply = reply.as_deref().map(|packet| opened(packet, v6)).transpose()?;
        answered.set(answered.get() + usize::from(reply.is_some()));
        check(&cluster, &query, reply)?;
    });
    assert!(answered.get() > 500, "{}", answered.get());
}

/// A query of the client to the server, in a frame.
fn asked(query: &[u8], v6: bool) -> Vec<u8> {
    let (from, to): (IpAddr, IpAddr) = if v6 {
        (CLIENT_V6.into(), SERVER_V6.into())
    } else {
        (CLIENT.into(), SERVER.into())
    };
    datagram(from, to, query)
}

proptest! {
    #[test]
    fn any_bytes_are_a_question_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..1500), plain in any::<bool>(), v6 in any::<bool>()) {
        let mut bytes = bytes;
        if plain && bytes.len() > 12 {
            bytes[2..12].copy_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 1]);
        }
        let _ = in_memory(&Names::new(), &asked(&bytes, v6), 0);
        let _ = in_memory(&Names::new(), &bytes, 0);
    }
}
