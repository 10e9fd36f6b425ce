//! Upstream servers with habits of their own, and how they are asked.

use std::collections::BTreeSet;
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::RecordType;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpStream, UdpSocket};

use crate::support::*;

#[tokio::test]
async fn a_server_that_keeps_no_spelling_and_has_no_tcp_is_understood_all_the_same() {
    let lower = Upstream::start(|query, is_tcp| {
        if is_tcp {
            return vec![(Duration::ZERO, vec![0; 4])];
        }
        let records = vec![address(query, 0, [192, 0, 2, 7])];
        let mut message = reply(query, ResponseCode::NoError, records);
        let name = message.queries[0].name().to_lowercase();
        message.queries[0].set_name(name);
        at_once(&message)
    })
    .await;
    let (_, server) = serve(spec(&[lower.address]), &cluster(0)).await;
    for number in 0..5 {
        let asked = query(
            &format!("with-letters-{number}.example.org."),
            RecordType::A,
        );
        assert_eq!(data(&udp(server, &asked).await), ["192.0.2.7"]);
    }
}

#[tokio::test]
async fn codes_of_others_are_passed_on_as_they_are() {
    let odd =
        Upstream::start(|query, _| at_once(&reply(query, ResponseCode::NotAuth, Vec::new()))).await;
    let (_, server) = serve(spec(&[odd.address]), &cluster(0)).await;
    let answer = udp(server, &query("www.example.org.", RecordType::A)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NotAuth);
}

#[tokio::test]
async fn each_question_comes_from_a_port_of_its_own() {
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
    let upstream = socket.local_addr().expect("an address");
    let (_, server) = serve(spec(&[upstream]), &cluster(0)).await;
    const QUESTIONS: usize = 20;
    let (seen, mut asked) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        while let Ok((bytes, peer)) = socket.recv_from(&mut buffer).await {
            let asked = Message::from_vec(&buffer[..bytes]).expect("a query");
            if asked.queries[0].query_type() != RecordType::A {
                continue;
            }
            let records = vec![address(&asked, 60, [192, 0, 2, 7])];
            let wire = reply(&asked, ResponseCode::NoError, records).to_vec();
            let _ = socket.send_to(&wire.expect("an answer"), peer).await;
            let _ = seen.send((peer.port(), asked.metadata.id));
        }
    });
    for number in 0..QUESTIONS {
        udp(
            server,
            &query(&format!("n{number}.example.org."), RecordType::A),
        )
        .await;
    }
    let (mut ports, mut ids) = (BTreeSet::new(), BTreeSet::new());
    while let Ok((port, id)) = asked.try_recv() {
        ports.insert(port);
        ids.insert(id);
    }
    // By chance, two may be alike.
    assert!(
        ports.len() > QUESTIONS / 2 && ids.len() > QUESTIONS / 2,
        "{ports:?} {ids:?}"
    );
}

#[tokio::test]
async fn on_one_connection_what_takes_long_does_not_hold_up_what_does_not() {
    let slow = Upstream::start(|query, _| {
        let records = vec![address(query, 60, [192, 0, 2, 7])];
        let wire = reply(query, ResponseCode::NoError, records).to_vec();
        vec![(Duration::from_secs(1), wire.expect("an answer"))]
    })
    .await;
    let (_, server) = serve(spec(&[slow.address]), &cluster(0)).await;
    let mut stream = TcpStream::connect(server).await.expect("TCP");
    let (outside, web) = (
        query("www.example.org.", RecordType::A),
        query(WEB, RecordType::A),
    );
    for asked in [&outside, &web] {
        let wire = asked.to_vec().expect("a query");
        stream.write_all(&framed(&wire)).await.expect("sent");
    }
    for asked in [&web, &outside] {
        let answer = read(&mut stream).await.expect("an answer");
        assert_eq!(
            answer.metadata.id, asked.metadata.id,
            "{:?}",
            answer.queries
        );
    }
}
