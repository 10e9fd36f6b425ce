//! What a server does when its configuration changes, and what others see of it meanwhile.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster_model::{Change, Dirty, Kind, Snapshot};
use hickory_proto::rr::RecordType;
use keelway_dns::metrics::Metrics;
use keelway_dns::server::Shared;
use keelway_dns::settings::Settings;
use keelway_dns::zone::{Pods, Zone};
use keelway_dns::{health, hosts::Hosts};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use crate::support::*;

/// A cluster of which pods are not known.
fn without_pods() -> Snapshot {
    let mut snapshot = Snapshot::default();
    for kind in [Kind::Service, Kind::EndpointSlice] {
        snapshot.apply(Change::Replace(kind, Vec::new()), &mut Dirty::default());
    }
    snapshot
}

#[tokio::test]
async fn a_reload_that_asks_for_pods_does_not_take_a_ready_server_away() {
    let mut verified = spec(&[]);
    verified.zone.pods = Pods::Verified;
    let zone = || Zone::of(verified.zone.clone(), &without_pods());
    let build = || {
        let settings = Settings::build(verified.clone(), &Metrics::default(), None);
        settings.expect("settings")
    };
    // One that begins like this is not ready: nobody relies on it yet.
    let fresh = Shared::new(build(), Metrics::default());
    assert!(fresh.unready().is_some_and(|why| why.contains("Endpoint")));
    fresh.serve(zone());
    assert!(fresh.unready().is_some_and(|why| why.contains("Pods")));
    let (shared, server) = serve(spec(&[]), &cluster(0)).await;
    assert_eq!(shared.unready(), None);
    shared.configure(zone().into(), build().into());
    assert_eq!(shared.unready(), None);
    let pod = "10-0-0-1.prod.pod.cluster.local.";
    let answer = udp(server, &query(pod, RecordType::A)).await;
    assert_eq!(
        answer.metadata.response_code,
        hickory_proto::op::ResponseCode::ServFail
    );
    shared.stop();
    assert_eq!(shared.unready(), Some("stopping"));
}

#[tokio::test]
async fn zone_and_settings_are_of_one_configuration_for_every_answer() {
    // The upstream denies everything, as those of the world do with names of a cluster.
    let upstream = Upstream::start(|query, _| {
        let mut denial = reply(query, hickory_proto::op::ResponseCode::NXDomain, Vec::new());
        denial.authorities = vec![soa(60, 60)];
        at_once(&denial)
    })
    .await;
    let old = spec(&[upstream.address]);
    let mut new = old.clone();
    new.zone.origins.push(name("other.example"));
    // That the new settings are in effect shows by the TTL.
    new.blocks[0].cluster.as_mut().expect("a cluster").ttl_s = 7;
    let (shared, server) = serve(old.clone(), &cluster(0)).await;
    let other = query("web.prod.svc.other.example.", RecordType::A);
    let web = query(WEB, RecordType::A);
    for round in 0..200 {
        let of = if round % 2 == 0 { &new } else { &old };
        let settings = Settings::build(of.clone(), &shared.metrics, Some(&shared.settings()));
        let zone = Zone::of(of.zone.clone(), &cluster(0));
        shared.configure(zone.into(), settings.expect("settings").into());
        let state = shared.state();
        assert_eq!(state.zone.settings(), state.settings.zone());
        drop(state);
        if round % 2 == 0 {
            assert_eq!(udp(server, &web).await.answers[0].ttl, 7);
            assert_eq!(data(&udp(server, &other).await), ["10.96.0.7"]);
        }
    }
}

async fn http(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    let request = format!("GET {path} HTTP/1.1\r\nHost: dns\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut response = String::new();
    let read = stream.read_to_string(&mut response);
    let read = tokio::time::timeout(Duration::from_secs(30), read).await;
    read.expect("an answer, and the end").expect("readable");
    response
}

#[tokio::test]
async fn idle_connections_keep_nobody_from_the_health_of_a_server() {
    let (shared, _) = serve(spec(&[]), &cluster(0)).await;
    let address = health::start(shared, "127.0.0.1:0".parse().expect("an address"))
        .await
        .expect("a free port");
    let mut idle = Vec::new();
    for client in 0..200_u8 {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket
            .bind(([127, 0, 1, client % 4], 0).into())
            .expect("an address");
        idle.push(socket.connect(address).await.expect("a connection"));
    }
    for path in [
        "/readyz",
        "/metrics",
        "/explain?name=web.prod.svc.cluster.local",
    ] {
        let response = http(address, path).await;
        assert!(response.starts_with("HTTP/1.1 200"), "{path}: {response}");
    }
    // Those above their clients' shares were closed at once.
    let mut closed = 0;
    for stream in &mut idle {
        let mut byte = [0];
        let read = tokio::time::timeout(Duration::from_millis(1), stream.read(&mut byte)).await;
        closed += usize::from(matches!(read, Ok(Ok(0) | Err(_))));
    }
    assert!(closed >= 200 - 64, "{closed} closed");
}

#[tokio::test]
async fn a_drained_server_takes_no_connection_and_answers_what_has_come_by_those_it_has() {
    let upstream = Upstream::start(|query, _| {
        let records = vec![address(query, 60, [192, 0, 2, 7])];
        let message = reply(query, hickory_proto::op::ResponseCode::NoError, records);
        let wire = message.to_vec().expect("an answer");
        vec![(Duration::from_millis(700), wire)]
    })
    .await;
    let (shared, server) = serve(spec(&[upstream.address]), &cluster(0)).await;
    let mut idle = TcpStream::connect(server).await.expect("a connection");
    let busy = tokio::spawn(async move {
        let asked = [query("www.example.org.", RecordType::A)];
        tcp(server, &asked).await
    });
    let end = Instant::now() + Duration::from_secs(30);
    while upstream.asked() == 0 {
        assert!(Instant::now() < end);
        tokio::task::yield_now().await;
    }
    let drained: Arc<Shared> = shared.clone();
    let drain = tokio::spawn(async move { drained.drain(Duration::from_secs(20)).await });
    assert_eq!(data(&busy.await.expect("a client")[0]), ["192.0.2.7"]);
    let mut byte = [0];
    let read = tokio::time::timeout(Duration::from_secs(5), idle.read(&mut byte)).await;
    assert_eq!(read.expect("closed").expect("in good order"), 0);
    drain.await.expect("it ends");
    assert!(TcpStream::connect(server).await.is_err(), "nobody listens");
}

#[tokio::test]
async fn a_table_of_hosts_is_about_its_zones_and_never_in_the_way_of_other_reversed_addresses() {
    let upstream = willing(60, [192, 0, 2, 7]).await;
    let mut hosts = Hosts::new(60);
    hosts
        .add("192.0.2.9", &["printer.example.org"])
        .expect("an entry");
    hosts.zones = vec![name("example.org")];
    let mut spec = spec(&[upstream.address]);
    spec.blocks[0].hosts = Some(hosts);
    let (_, server) = serve(spec, &cluster(0)).await;
    let code = async |asked: &str, rtype| {
        let answer = udp(server, &query(asked, rtype)).await;
        (answer.metadata.response_code.to_str(), data(&answer))
    };
    let good = |data: &str| ("No Error", vec![data.to_owned()]);
    assert_eq!(
        code("printer.example.org.", RecordType::A).await,
        good("192.0.2.9")
    );
    // Elsewhere, without any fallthrough.
    assert_eq!(code(WEB, RecordType::A).await, good("10.96.0.7"));
    assert_eq!(code("www.example.", RecordType::A).await, good("192.0.2.7"));
    assert_eq!(
        code("7.0.96.10.in-addr.arpa.", RecordType::PTR).await,
        good(WEB)
    );
    assert_eq!(
        code("9.2.0.192.in-addr.arpa.", RecordType::PTR).await,
        good("printer.example.org.")
    );
    let (other, _) = code("www.example.org.", RecordType::A).await;
    assert_eq!(
        other, "Server Failure",
        "no SOA says how long a denial would hold"
    );
}
