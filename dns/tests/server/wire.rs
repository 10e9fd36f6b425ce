//! The server over real sockets, seen through hickory's messages; and the query path under hostile bytes.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use crate::support::*;
use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{RData, Record, RecordType};
use keelway_dns::answer::Transport;
use keelway_dns::metrics::Metrics;
use keelway_dns::server::at_once::{Outcome, at_once};
use keelway_dns::server::{self, REPLY_BYTES_MAX, Shared};
use keelway_dns::settings::Settings;
use keelway_dns::zone::{Pods, Zone, ZoneSettings};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

#[tokio::test]
async fn before_the_first_sync_nothing_is_denied() {
    let (shared, server) = serve(spec(&[]), &cluster(0)).await;
    let zone = shared.zone();
    shared.serve(Zone::new(ZoneSettings::of(name("cluster.local"))));
    for unknown in [
        WEB,
        "absent.prod.svc.cluster.local.",
        "7.0.96.10.in-addr.arpa.",
        "cluster.local.",
    ] {
        let reply = udp(server, &query(unknown, RecordType::A)).await;
        assert_eq!(
            reply.metadata.response_code,
            ResponseCode::ServFail,
            "{unknown}"
        );
    }
    shared.serve((*zone).clone());
    assert_eq!(
        data(&udp(server, &query(WEB, RecordType::A)).await),
        ["10.96.0.7"]
    );
}

#[tokio::test]
async fn a_headless_name_of_a_thousand_endpoints_is_truncated_and_whole_over_tcp() {
    let (_, server) = serve(spec(&[]), &cluster(1000)).await;
    let db = "db.prod.svc.cluster.local.";
    let plain = query(db, RecordType::A);
    let reply = udp(server, &plain).await;
    assert!(reply.metadata.truncation);
    assert!(reply.to_vec().expect("wire").len() <= 512);
    let wide = udp(server, &edns(db, RecordType::A, 4096)).await;
    assert!(wide.metadata.truncation && wide.edns.is_some());
    assert!(wide.answers.len() > reply.answers.len());
    let whole = tcp(server, &[plain, query(WEB, RecordType::A)]).await;
    let different: BTreeSet<String> = data(&whole[0]).into_iter().collect();
    assert_eq!((whole[0].answers.len(), different.len()), (1000, 1000));
    assert!(!whole[0].metadata.truncation);
    assert_eq!(data(&whole[1]), ["10.96.0.7"]);
    let srv = tcp(
        server,
        &[query(
            "_sql._tcp.db.prod.svc.cluster.local.",
            RecordType::SRV,
        )],
    )
    .await;
    assert_eq!(srv[0].answers.len(), 1000);
}

#[tokio::test]
async fn no_is_believed_no_longer_than_yes() {
    // A pod that starts is asked for before it is there: half a minute of "no" would hide it (CoreDNS 2434).
    let (_, server) = serve(spec(&[]), &cluster(0)).await;
    for absent in [
        "db-9.db.prod.svc.cluster.local.",
        "db.prod.svc.cluster.local.",
    ] {
        let reply = udp(server, &query(absent, RecordType::A)).await;
        assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
        let RData::SOA(soa) = &reply.authorities[0].data else {
            panic!("{:?}", reply.authorities)
        };
        assert!(soa.minimum <= 5 && reply.authorities[0].ttl <= 5, "{soa}");
    }
}

#[tokio::test]
async fn clients_that_never_use_tcp_get_what_fits() {
    // musl of before 1.2.4 and others: a truncated answer is all that they will ever see.
    let (_, server) = serve(spec(&[]), &cluster(1000)).await;
    let db = "db.prod.svc.cluster.local.";
    let reply = udp(server, &query(db, RecordType::A)).await;
    assert!(reply.metadata.truncation);
    assert!(
        reply.answers.len() >= 25,
        "{} of the 29 that fit",
        reply.answers.len()
    );
}

#[tokio::test]
async fn each_answer_begins_with_another_endpoint() {
    let (_, server) = serve(spec(&[]), &cluster(4)).await;
    let mut first = BTreeSet::new();
    let db = query("db.prod.svc.cluster.local.", RecordType::A);
    for _ in 0..64 {
        first.insert(udp(server, &db).await.answers[0].data.to_string());
    }
    assert_eq!(first.len(), 4);
}

#[tokio::test]
async fn foreign_names_and_transfers_are_refused_where_nothing_is_configured_for_them() {
    let (_, server) = serve(spec(&[]), &cluster(0)).await;
    for (asked, rtype) in [
        ("example.org.", RecordType::A),
        (".", RecordType::NS),
        ("cluster.local.", RecordType::AXFR),
        ("cluster.local.", RecordType::IXFR),
    ] {
        let reply = udp(server, &query(asked, rtype)).await;
        assert_eq!(
            reply.metadata.response_code,
            ResponseCode::Refused,
            "{asked} {rtype}"
        );
    }
    let reply = tcp(server, &[query("cluster.local.", RecordType::AXFR)]).await;
    assert_eq!(reply[0].metadata.response_code, ResponseCode::Refused);
}

#[tokio::test]
async fn a_peer_that_may_gets_each_zone_whole_between_two_soas() {
    let mut spec = spec(&[]);
    spec.zone.origins.push(name("other.example"));
    let cluster_spec = spec.blocks[0]
        .cluster
        .as_mut()
        .expect("it serves the cluster");
    cluster_spec.transfer = vec!["127.0.0.0/8".parse().expect("a range")];
    let (_, server) = serve(spec, &cluster(1000)).await;
    // A thousand endpoints under the Service's name and their own, and the one address.
    let forward = [2001, 1001, 1, 1, 0];
    for (zone, expected) in [
        ("cluster.local.", forward),
        ("other.example.", forward),
        ("in-addr.arpa.", [0, 0, 0, 0, 1001]),
    ] {
        let records = transferred(server, zone).await;
        let of = |rtype| {
            let records = records.iter();
            records
                .filter(|record| record.record_type() == rtype)
                .count()
        };
        let counts = [
            RecordType::A,
            RecordType::SRV,
            RecordType::CNAME,
            RecordType::TXT,
            RecordType::PTR,
        ]
        .map(of);
        assert_eq!(counts, expected, "{zone}");
        let [first, second, .., last] = &records[..] else {
            panic!("{records:?}")
        };
        assert_eq!((first.record_type(), first), (RecordType::SOA, last));
        // The name server is the one that is told to who asks for it.
        let told = udp(server, &query(zone, RecordType::NS)).await;
        assert_eq!(told.answers, std::slice::from_ref(second));
    }
}

async fn transferred(server: SocketAddr, zone: &str) -> Vec<Record> {
    let mut stream = TcpStream::connect(server).await.expect("TCP");
    let wire = edns(zone, RecordType::AXFR, 1232)
        .to_vec()
        .expect("a query");
    stream.write_all(&framed(&wire)).await.expect("written");
    let mut records = Vec::new();
    let mut soas = 0;
    while soas < 2 {
        let message = read(&mut stream).await.expect("a message of the transfer");
        assert!(message.edns.is_some(), "as it was asked");
        soas += message
            .answers
            .iter()
            .filter(|record| record.record_type() == RecordType::SOA)
            .count();
        records.extend(message.answers);
    }
    records
}

#[tokio::test]
async fn pods_are_believed_or_verified_or_unknown() {
    let cases = [
        (Pods::Disabled, [ResponseCode::NXDomain; 3]),
        (
            Pods::Insecure,
            [
                ResponseCode::NoError,
                ResponseCode::NoError,
                ResponseCode::NXDomain,
            ],
        ),
        (
            Pods::Verified,
            [
                ResponseCode::NoError,
                ResponseCode::NXDomain,
                ResponseCode::NXDomain,
            ],
        ),
    ];
    let names = [
        "127-0-0-1.prod.pod.cluster.local.",
        "10-9-8-7.prod.pod.cluster.local.",
        "nonsense.prod.pod.cluster.local.",
    ];
    for (pods, codes) in cases {
        let mut spec = spec(&[]);
        spec.zone.pods = pods;
        let (_, server) = serve(spec, &cluster(0)).await;
        for (asked, code) in names.iter().zip(codes) {
            let reply = udp(server, &query(asked, RecordType::A)).await;
            assert_eq!(reply.metadata.response_code, code, "{pods:?} {asked}");
            assert_eq!(
                reply.answers.len(),
                usize::from(code == ResponseCode::NoError)
            );
        }
    }
}

#[tokio::test]
async fn a_client_that_says_nothing_keeps_nobody_from_being_served() {
    let (_, server) = serve(spec(&[]), &cluster(0)).await;
    // More connections than one client may have: the last are closed, others are served.
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(server).await.expect("TCP"));
    }
    let mut half = TcpStream::connect(server).await.expect("TCP");
    let _ = half.write_all(&[0]).await;
    assert_eq!(
        data(&udp(server, &query(WEB, RecordType::A)).await),
        ["10.96.0.7"]
    );
    let mut byte = [0];
    let mut closed = 0;
    for stream in silent.iter_mut().skip(128) {
        let read = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut byte)).await;
        closed += usize::from(!matches!(read, Err(_) | Ok(Ok(1..))));
    }
    assert!(
        closed >= 70,
        "{closed} of 72 connections too many were closed"
    );
    drop(silent);
    drop(half);
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let attempt = tokio::spawn(async move { tcp(server, &[query(WEB, RecordType::A)]).await });
        if attempt.await.is_ok() {
            break;
        }
        assert!(Instant::now() < end, "places do not come back");
    }
}

#[tokio::test]
async fn everything_that_has_come_is_answered_before_the_server_ends() {
    let slow = Upstream::start(|query, _| {
        let message = reply(
            query,
            ResponseCode::NoError,
            vec![address(query, 60, [192, 0, 2, 7])],
        );
        vec![(
            Duration::from_millis(300),
            message.to_vec().expect("an answer"),
        )]
    })
    .await;
    let (shared, server) = serve(spec(&[slow.address]), &cluster(0)).await;
    let clients: Vec<_> = (0..200)
        .map(|i| {
            tokio::spawn(async move {
                let foreign = format!("n{i}.example.org.");
                let asked = if i % 2 == 0 { foreign.as_str() } else { WEB };
                udp(server, &query(asked, RecordType::A))
                    .await
                    .answers
                    .len()
            })
        })
        .collect();
    let end = Instant::now() + Duration::from_secs(30);
    while slow.asked() < 100 {
        assert!(Instant::now() < end);
        tokio::task::yield_now().await;
    }
    shared.stop();
    shared.drain(Duration::from_secs(5)).await;
    for client in clients {
        assert_eq!(client.await.expect("an answered client"), 1);
    }
}

fn server(pods: Pods) -> std::sync::Arc<Shared> {
    let mut spec = spec(&["127.0.0.1:9".parse().expect("an address")]);
    spec.zone.pods = pods;
    let metrics = Metrics::default();
    let zone = Zone::of(spec.zone.clone(), &cluster(40));
    let settings = Settings::build(spec, &metrics, None).expect("settings");
    let shared = Shared::new(settings, metrics);
    shared.serve(zone);
    shared
}

fn outcome(message: &[u8], out: &mut [u8]) -> Outcome {
    thread_local! {
        static SERVER: std::sync::Arc<Shared> = server(Pods::Insecure);
    }
    SERVER.with(|shared| {
        let state = shared.state();
        let view = shared.view(&state, Instant::now());
        let client = IpAddr::from([127, 0, 0, 1]);
        at_once(&view, message, client, Transport::Udp, 7, out)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_never_panic_and_never_overflow(message in prop::collection::vec(any::<u8>(), 0..600)) {
        let mut out = [0; REPLY_BYTES_MAX];
        if let Outcome::Reply { bytes, .. } = outcome(&message, &mut out) {
            prop_assert!((12..=1232).contains(&bytes));
            prop_assert_eq!(&out[..2], &message[..2]);
        }
    }

    #[test]
    fn every_well_formed_query_gets_a_readable_answer(
        labels in prop::collection::vec("[a-z_]{1,8}|web|db|out|prod|svc|pod|1-2-3-4|_tcp|_sql|\\PC{1,12}", 0..5),
        inside in any::<bool>(),
        rtype in any::<u16>(),
        bytes in prop::option::of(any::<u16>()),
        flips in prop::collection::vec((0_usize..90, any::<u8>()), 0..3),
    ) {
        let domain = if inside { "svc.cluster.local." } else { "" };
        let text = format!("{}.{domain}", labels.join("."));
        let text = if labels.is_empty() { "cluster.local.".to_owned() } else { text };
        prop_assume!(hickory_proto::rr::Name::from_ascii(&text).is_ok());
        let asked = match bytes {
            Some(bytes) => edns(&text, RecordType::from(rtype), bytes),
            None => query(&text, RecordType::from(rtype)),
        };
        let mut wire = asked.to_vec().expect("a query");
        for (at, byte) in &flips {
            let at = at % wire.len();
            wire[at] = *byte;
        }
        let mut out = [0; REPLY_BYTES_MAX];
        match outcome(&wire, &mut out) {
            Outcome::Reply { bytes: told, .. } => {
                let most = usize::from(bytes.unwrap_or(512)).clamp(512, 1232);
                prop_assert!(!flips.is_empty() || told <= most, "{told} bytes for {most}");
                let reply = Message::from_vec(&out[..told]);
                prop_assert!(!flips.is_empty() || reply.is_ok(), "{:?}", reply);
            }
            Outcome::Slow => {}
            Outcome::Ignore => prop_assert!(!flips.is_empty()),
        }
    }
}

#[tokio::test]
async fn a_server_at_all_addresses_answers_both_families() {
    let (_, server) = serve_at("[::]:0", spec(&[]), &cluster(0)).await;
    let four = SocketAddr::from(([127, 0, 0, 1], server.port()));
    let query = query(WEB, RecordType::A);
    assert_eq!(data(&udp(four, &query).await), ["10.96.0.7"]);
    let by_tcp = tcp(four, std::slice::from_ref(&query)).await;
    assert_eq!(data(&by_tcp[0]), ["10.96.0.7"]);
    let six = tokio::net::UdpSocket::bind("[::1]:0").await;
    let six = six.expect("a socket");
    let to = SocketAddr::from((Ipv6Addr::LOCALHOST, server.port()));
    six.send_to(&query.to_vec().expect("a query"), to)
        .await
        .expect("sent");
    let mut reply = [0; 512];
    let (bytes, from) = six.recv_from(&mut reply).await.expect("an answer");
    let answer = Message::from_vec(&reply[..bytes]).expect("a message");
    assert_eq!((data(&answer), from), (vec!["10.96.0.7".to_owned()], to));
}

#[tokio::test]
async fn a_server_whose_port_is_anothers_takes_no_datagram_of_it() {
    // Sockets for UDP may share a port with the other server's, so that one that is opened first has a part of what comes until the server
    // ends. Here nobody shares, so that whichever is tried first fails.
    let (_udp, _tcp, address) = loop {
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = tcp.local_addr().expect("an address");
        if let Ok(udp) = std::net::UdpSocket::bind(address) {
            break (udp, tcp, address);
        }
    };
    let metrics = Metrics::default();
    let settings = Settings::build(spec(&[]), &metrics, None).expect("settings");
    let error = server::start(&Shared::new(settings, metrics), address, 1).await;
    let error = error.expect_err("a port of others").to_string();
    assert!(error.starts_with("tcp"), "{error}");
}
