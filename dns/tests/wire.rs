//! The server over real sockets, seen through hickory's messages; and the query path under random bytes.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use cluster_model::{Change, Dirty, Kind, Snapshot, read_manifest};
use hickory_proto::op::{Edns, Message, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, RecordType};
use keelway_dns::answer::{Policy, Transport, Verdict, answer};
use keelway_dns::forward::Forwarder;
use keelway_dns::server::{self, REPLY_BYTES_MAX, Shared};
use keelway_dns::zone::Zone;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const WEB: &str = "web.prod.svc.cluster.local.";

fn snapshot(endpoints: usize) -> Snapshot {
    let listed: Vec<String> = (0..endpoints)
        .map(|i| {
            format!(
                r#"{{"addresses":["10.244.{}.{}"],"conditions":{{"ready":true}}}}"#,
                i / 250,
                i % 250 + 1
            )
        })
        .collect();
    let manifest = format!(
        r#"[{{"kind":"Service","metadata":{{"name":"web","namespace":"prod"}},
            "spec":{{"clusterIP":"10.96.0.7","clusterIPs":["10.96.0.7"],"ports":[{{"name":"http","port":80}}]}}}},
        {{"kind":"Service","metadata":{{"name":"out","namespace":"prod"}},
            "spec":{{"type":"ExternalName","externalName":"Web.example.org"}}}},
        {{"kind":"Service","metadata":{{"name":"db","namespace":"prod"}},
            "spec":{{"clusterIP":"None","clusterIPs":["None"],"ports":[{{"name":"sql","port":1}}]}}}},
        {{"kind":"EndpointSlice","addressType":"IPv4","metadata":{{"name":"db-1","namespace":"prod",
            "labels":{{"kubernetes.io/service-name":"db"}}}},"ports":[{{"name":"sql","port":1}}],
            "endpoints":[{}]}}]"#,
        listed.join(",")
    );
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

fn zone(endpoints: usize) -> Zone {
    Zone::of(
        keelway_dns::name::Name::parse("cluster.local").expect("a name"),
        &snapshot(endpoints),
    )
}

async fn start(zone: Zone, upstreams: Vec<SocketAddr>) -> (Arc<Shared>, SocketAddr) {
    let shared = Shared::new(zone, Policy::default(), Forwarder::new(upstreams));
    let address = server::start(&shared, "127.0.0.1:0".parse().expect("an address"), 2)
        .await
        .expect("a free port");
    (shared, address)
}

fn query(name: &str, rtype: RecordType, edns: Option<u16>) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).expect("a name"), rtype));
    if let Some(bytes) = edns {
        let mut opt = Edns::new();
        opt.set_max_payload(bytes);
        message.set_edns(opt);
    }
    message
}

async fn udp(server: SocketAddr, message: &Message) -> Message {
    let wire = message.to_vec().expect("a query");
    let exchange = async {
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await?;
        socket.send_to(&wire, server).await?;
        let mut reply = vec![0; 65_535];
        let (bytes, from) = socket.recv_from(&mut reply).await?;
        assert_eq!(
            from, server,
            "the reply comes from the address that was asked"
        );
        reply.truncate(bytes);
        std::io::Result::Ok(reply)
    };
    let reply = tokio::time::timeout(Duration::from_secs(5), exchange)
        .await
        .expect("an answer")
        .expect("loopback");
    let reply = Message::from_vec(&reply).expect("a readable answer");
    assert_eq!(
        (reply.metadata.id, &reply.queries),
        (message.metadata.id, &message.queries)
    );
    reply
}

async fn tcp(server: SocketAddr, messages: &[Message]) -> Vec<Message> {
    let mut stream = TcpStream::connect(server).await.expect("TCP");
    let mut framed = Vec::new();
    for message in messages {
        let wire = message.to_vec().expect("a query");
        framed.extend((wire.len() as u16).to_be_bytes());
        framed.extend(wire);
    }
    stream.write_all(&framed).await.expect("written");
    let mut replies = Vec::new();
    for _ in messages {
        let mut reply = vec![0; usize::from(stream.read_u16().await.expect("a length"))];
        stream.read_exact(&mut reply).await.expect("an answer");
        replies.push(Message::from_vec(&reply).expect("a readable answer"));
    }
    replies
}

fn addresses(message: &Message) -> Vec<String> {
    let mut texts: Vec<String> = message
        .answers
        .iter()
        .map(|record| record.data.to_string())
        .collect();
    texts.sort();
    texts
}

#[tokio::test]
async fn a_service_name_is_answered_with_authority_and_the_clients_own_spelling() {
    let (_, server) = start(zone(0), Vec::new()).await;
    let asked = query("wEb.Prod.svc.CLUSTER.local.", RecordType::A, None);
    let reply = udp(server, &asked).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
    assert!(
        reply.metadata.authoritative
            && reply.metadata.recursion_desired
            && !reply.metadata.recursion_available
    );
    assert_eq!(addresses(&reply), ["10.96.0.7"]);
    assert_eq!(
        reply.queries[0].name().to_string(),
        "wEb.Prod.svc.CLUSTER.local."
    );
    assert_eq!(reply.answers[0].ttl, 5);
}

#[tokio::test]
async fn no_data_and_no_name_are_told_apart_and_both_carry_an_soa() {
    let (_, server) = start(zone(0), Vec::new()).await;
    for (name, code) in [
        (WEB, ResponseCode::NoError),
        ("prod.svc.cluster.local.", ResponseCode::NoError),
        ("cluster.local.", ResponseCode::NoError),
        ("nobody.prod.svc.cluster.local.", ResponseCode::NXDomain),
        (
            "web.prod.svc.cluster.local.prod.svc.cluster.local.",
            ResponseCode::NXDomain,
        ),
        ("9.9.9.9.in-addr.arpa.", ResponseCode::NXDomain),
    ] {
        let reply = udp(server, &query(name, RecordType::AAAA, None)).await;
        assert_eq!(reply.metadata.response_code, code, "{name}");
        assert!(reply.answers.is_empty(), "{name}");
        assert_eq!(
            reply.authorities.first().map(|soa| soa.record_type()),
            Some(RecordType::SOA),
            "{name}"
        );
    }
}

#[tokio::test]
async fn srv_records_bring_their_addresses_along() {
    let (_, server) = start(zone(2), Vec::new()).await;
    let reply = udp(
        server,
        &query(
            "_sql._tcp.db.prod.svc.cluster.local.",
            RecordType::SRV,
            Some(1232),
        ),
    )
    .await;
    assert_eq!(reply.answers.len(), 2);
    assert_eq!(reply.additionals.len(), 2);
    let owners: Vec<_> = reply
        .additionals
        .iter()
        .map(|record| record.name.to_string())
        .collect();
    for record in &reply.answers {
        let RData::SRV(srv) = &record.data else {
            panic!("{record} is no SRV")
        };
        assert!(
            owners.contains(&srv.target.to_string()),
            "{} is in {owners:?}",
            srv.target
        );
    }
}

#[tokio::test]
async fn before_the_first_sync_nothing_is_denied() {
    let unsynced = Zone::new(keelway_dns::name::Name::parse("cluster.local").expect("a name"));
    let (shared, server) = start(unsynced, Vec::new()).await;
    assert_eq!(
        udp(server, &query(WEB, RecordType::A, None))
            .await
            .metadata
            .response_code,
        ResponseCode::ServFail
    );
    shared.zone.store(Arc::new(zone(0)));
    assert_eq!(
        addresses(&udp(server, &query(WEB, RecordType::A, None)).await),
        ["10.96.0.7"]
    );
}

#[tokio::test]
async fn an_answer_too_large_for_udp_is_truncated_and_whole_over_tcp() {
    let (_, server) = start(zone(1000), Vec::new()).await;
    let db = "db.prod.svc.cluster.local.";
    let plain = query(db, RecordType::A, None);
    let reply = udp(server, &plain).await;
    assert!(reply.metadata.truncation);
    assert!(reply.to_vec().expect("wire").len() <= 512);
    let edns = udp(server, &query(db, RecordType::A, Some(4096))).await;
    assert!(edns.metadata.truncation && edns.edns.is_some());
    assert!(edns.answers.len() > reply.answers.len());
    let whole = tcp(server, &[plain, query(WEB, RecordType::A, None)]).await;
    assert_eq!(whole[0].answers.len(), 1000);
    assert!(!whole[0].metadata.truncation);
    assert_eq!(addresses(&whole[1]), ["10.96.0.7"]);
}

#[tokio::test]
async fn foreign_names_any_transfers_and_odd_classes_are_handled_politely() {
    let (_, server) = start(zone(0), Vec::new()).await;
    let refused = udp(server, &query("example.org.", RecordType::A, Some(1232))).await;
    assert_eq!(refused.metadata.response_code, ResponseCode::Refused);
    assert_eq!(
        udp(server, &query("cluster.local.", RecordType::AXFR, None))
            .await
            .metadata
            .response_code,
        ResponseCode::Refused
    );
    let any = udp(server, &query(WEB, RecordType::ANY, None)).await;
    assert_eq!(
        any.answers.first().map(|record| record.record_type()),
        Some(RecordType::HINFO)
    );
    let mut chaos = query(WEB, RecordType::TXT, None);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(
        udp(server, &chaos).await.metadata.response_code,
        ResponseCode::Refused
    );
}

#[tokio::test]
async fn with_an_upstream_foreign_names_and_cname_targets_are_asked_there() {
    // The upstream is this same server with another zone: what it says is known.
    let manifest = r#"{"kind":"Service","metadata":{"name":"web","namespace":"x"},
        "spec":{"clusterIP":"192.0.2.7","clusterIPs":["192.0.2.7"],"ports":[{"port":80}]}}"#;
    let mut other = Snapshot::default();
    let mut dirty = Dirty::default();
    for kind in [Kind::Service, Kind::EndpointSlice] {
        other.apply(Change::Replace(kind, Vec::new()), &mut dirty);
    }
    for object in read_manifest(manifest.as_bytes()).expect("a manifest") {
        other.apply(Change::Upsert(object), &mut dirty);
    }
    let domain = keelway_dns::name::Name::parse("example.org").expect("a name");
    let (_, upstream) = start(Zone::of(domain, &other), Vec::new()).await;
    let dead = UdpSocket::bind("127.0.0.1:0")
        .and_then(|socket| socket.local_addr())
        .expect("a port that is free again");
    let (_, server) = start(zone(0), vec![dead, upstream]).await;
    let reply = udp(
        server,
        &query("web.x.svc.example.org.", RecordType::A, None),
    )
    .await;
    assert_eq!(addresses(&reply), ["192.0.2.7"]);
    let missing = udp(server, &query("web.example.org.", RecordType::A, None)).await;
    assert_eq!(missing.metadata.response_code, ResponseCode::NXDomain);
    let alias = udp(
        server,
        &query("out.prod.svc.cluster.local.", RecordType::A, None),
    )
    .await;
    assert_eq!(
        alias.answers.first().map(|record| record.record_type()),
        Some(RecordType::CNAME)
    );
}

proptest! {
    #[test]
    fn random_bytes_never_panic_and_never_overflow(message in prop::collection::vec(any::<u8>(), 0..600)) {
        let zone = zone(3);
        let mut out = [0; REPLY_BYTES_MAX];
        if let Verdict::Reply { bytes, .. } = answer(&zone, &Policy::default(), &message, Transport::Udp, 0, &mut out) {
            prop_assert!((12..=1232).contains(&bytes));
            prop_assert_eq!(&out[..2], &message[..2]);
        }
    }

    #[test]
    fn every_well_formed_query_gets_a_readable_answer(
        labels in prop::collection::vec("[a-z_]{1,8}|web|db|prod|svc", 0..4),
        inside in any::<bool>(),
        rtype in any::<u16>(),
        edns in prop::option::of(any::<u16>()),
        flip in prop::option::of((12_usize..60, any::<u8>())),
    ) {
        let zone = zone(40);
        let domain = if inside { "svc.cluster.local." } else { "" };
        let name = format!("{}.{domain}", labels.join("."));
        let name = if labels.is_empty() { "cluster.local.".to_owned() } else { name };
        let mut wire = query(&name, RecordType::from(rtype), edns).to_vec().expect("a query");
        let mut out = [0; REPLY_BYTES_MAX];
        let untouched = flip.is_none();
        if let Some((at, byte)) = flip {
            let at = at % wire.len();
            wire[at.max(12)] = byte;
        }
        match answer(&zone, &Policy::default(), &wire, Transport::Udp, 7, &mut out) {
            Verdict::Reply { bytes, .. } => {
                let reply = Message::from_vec(&out[..bytes]);
                prop_assert!(!untouched || reply.is_ok(), "{:?}", reply);
            }
            other => prop_assert!(!untouched, "{other:?}"),
        }
    }
}
