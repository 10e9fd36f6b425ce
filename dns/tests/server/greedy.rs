//! Clients that ask for more than their share, and what others feel of it.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::RecordType;
use keelway_dns::cache::CacheRules;
use keelway_dns::server::Shared;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};

use crate::support::*;

const WWW: &str = "www.example.org.";
const PATIENCE: Duration = Duration::from_secs(30);

fn from(last: u8) -> SocketAddr {
    (IpAddr::from([127, 0, 0, last]), 0).into()
}

async fn ask_from(client: SocketAddr, server: SocketAddr, message: &Message) -> Message {
    let socket = UdpSocket::bind(client).await.expect("an address");
    let wire = message.to_vec().expect("a query");
    socket.send_to(&wire, server).await.expect("sent");
    next(&socket).await
}

async fn next(socket: &UdpSocket) -> Message {
    let mut reply = vec![0; 4096];
    let received = tokio::time::timeout(PATIENCE, socket.recv(&mut reply)).await;
    let bytes = received.expect("an answer").expect("loopback");
    Message::from_vec(&reply[..bytes]).expect("a readable answer")
}

/// An upstream that is silent about names that begin with an n.
async fn half_dead() -> Upstream {
    Upstream::start(|query, _| {
        let name = query.queries[0].name().to_lowercase().to_string();
        if name.starts_with('n') {
            return Vec::new();
        }
        let records = vec![address(query, 0, [192, 0, 2, 7])];
        at_once(&reply(query, ResponseCode::NoError, records))
    })
    .await
}

#[tokio::test]
async fn a_client_that_asks_what_nobody_answers_takes_nobody_elses_place() {
    let upstream = half_dead().await;
    let mut spec = spec(&[upstream.address]);
    // It does not count as down for what it does not know.
    let rules = &mut spec.blocks[0].routes[0].rules;
    (rules.failures_max, rules.concurrent_max) = (0, 200);
    let (_, server) = serve(spec, &cluster(0)).await;
    let mut greedy = Vec::new();
    for client in 10..14 {
        let socket = UdpSocket::bind(from(client)).await.expect("an address");
        for number in 0..300 {
            let asked = query(&format!("n{number}-{client}.example.org."), RecordType::A);
            let wire = asked.to_vec().expect("a query");
            socket.send_to(&wire, server).await.expect("sent");
            if number % 64 == 63 {
                // The queue of a socket is short; whoever is heard goes on being so.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        // Only what is above its share is answered at once.
        assert_eq!(
            next(&socket).await.metadata.response_code,
            ResponseCode::Refused
        );
        greedy.push(socket);
        let other = ask_from(from(2), server, &query(WWW, RecordType::A)).await;
        assert_eq!(
            other.metadata.response_code,
            ResponseCode::NoError,
            "beside {} greedy clients",
            greedy.len()
        );
    }
}

fn prefetches(shared: &Shared) -> u64 {
    shared.metrics.caching.prefetches.get()
}

/// A server over an upstream that answers once and never again.
async fn forsaken(rules: CacheRules, ttl: u32) -> (Arc<Shared>, SocketAddr, Upstream) {
    let over = Arc::new(AtomicBool::new(false));
    let upstream = Upstream::start(move |query, _| {
        if query.queries[0].query_type() != RecordType::A || over.swap(true, Ordering::SeqCst) {
            return Vec::new();
        }
        let records = vec![address(query, ttl, [192, 0, 2, 7])];
        at_once(&reply(query, ResponseCode::NoError, records))
    })
    .await;
    let mut spec = spec(&[upstream.address]);
    spec.blocks[0].cache = Some(rules);
    spec.blocks[0].routes[0].rules.patience = Duration::from_millis(300);
    let (shared, server) = serve(spec, &cluster(0)).await;
    (shared, server, upstream)
}

/// Waits until nothing is being asked.
async fn settled(shared: &Shared) {
    let end = Instant::now() + PATIENCE;
    loop {
        let settings = shared.settings();
        if settings.blocks().all(|block| block.in_flight() == 0) {
            return;
        }
        assert!(Instant::now() < end, "it goes on asking");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Holds that a flood of hits has the entry renewed once, and that the next flood, when that has failed, has not.
async fn flood_is_one_renewal(shared: &Shared, server: SocketAddr) {
    for _ in 0..2 {
        for _ in 0..300 {
            assert_eq!(
                data(&udp(server, &query(WWW, RecordType::A)).await),
                ["192.0.2.7"]
            );
        }
        assert_eq!(prefetches(shared), 1);
        settled(shared).await;
    }
}

#[tokio::test]
async fn a_flood_of_hits_on_an_entry_near_its_end_is_one_renewal() {
    let rules = CacheRules {
        prefetch_hits: 1,
        prefetch_percent: 100,
        ..CacheRules::default()
    };
    let (shared, server, upstream) = forsaken(rules, 600).await;
    flood_is_one_renewal(&shared, server).await;
    assert!(upstream.asked() < 10, "{}", upstream.asked());
}

#[tokio::test]
async fn a_flood_of_stale_hits_is_one_renewal() {
    let rules = CacheRules {
        prefetch_hits: 0,
        stale_immediately: true,
        ..CacheRules::default()
    };
    let (shared, server, _upstream) = forsaken(rules, 1).await;
    udp(server, &query(WWW, RecordType::A)).await;
    let end = Instant::now() + PATIENCE;
    while udp(server, &query(WWW, RecordType::A)).await.answers[0].ttl != 30 {
        assert!(Instant::now() < end, "it does not get stale");
    }
    flood_is_one_renewal(&shared, server).await;
}

/// Waits until the server has closed a connection of which nothing is read: with what it has not read of it left, that is a reset.
async fn let_go(stream: &TcpStream) {
    let ready = stream.ready(Interest::ERROR).await;
    assert!(ready.expect("an event").is_error());
}

#[tokio::test]
async fn peers_that_take_nothing_or_stop_midway_hold_up_nobody_and_are_let_go() {
    let (_, server) = serve(spec(&[]), &cluster(1000)).await;
    let large = query("db.prod.svc.cluster.local.", RecordType::A);
    let large = framed(&large.to_vec().expect("a query"));
    let [mut deaf, mut midway] = [Vec::new(), Vec::new()];
    for number in 0..60 {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(from(10)).expect("an address");
        socket.set_recv_buffer_size(4096).expect("less room");
        let mut stream = socket.connect(server).await.expect("TCP");
        if number % 3 == 0 {
            // 16 MB of answers: more than anything on the way holds. Questions fit into what is between, but the server stops reading them.
            stream.write_all(&large.repeat(1000)).await.expect("sent");
            deaf.push(stream);
        } else {
            let sent = [1, large.len() / 2][number % 3 - 1];
            stream.write_all(&large[..sent]).await.expect("sent");
            midway.push(stream);
        }
    }
    let all_gone = tokio::spawn(async move {
        for stream in &deaf {
            let_go(stream).await;
        }
        for mut stream in midway {
            let closed = stream.read(&mut [0]).await;
            assert!(matches!(closed, Ok(0) | Err(_)));
        }
    });
    let mut served = 0;
    while !all_gone.is_finished() {
        let asked = query(WEB, RecordType::A);
        assert_eq!(data(&udp(server, &asked).await), ["10.96.0.7"]);
        let answers = tcp(server, &[asked.clone(), asked]).await;
        assert!(answers.iter().all(|answer| data(answer) == ["10.96.0.7"]));
        served += 1;
    }
    all_gone.await.expect("every one of them was let go");
    println!("{served} rounds were served beside them");
}
