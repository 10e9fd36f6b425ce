//! Clients that ask for more than their share: what they get is bounded, and the others do not feel it. In a network of addresses that are
//! not the loopback's, since nobody can forge those.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use keelway_tests::process::eventually;
use keelway_tests::sandbox::{Sandbox, ip, is_root};

use crate::support::{NOERROR, Server, api, framed, question, service_name};

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const HOSTILE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 1, 1));
const FRIENDLY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 2, 1));
const PATIENCE: Duration = Duration::from_secs(2);
const TRUNCATED: u8 = 0x02;

/// A namespace with these addresses and a server in it. Every tenth name has as many addresses as there are endpoints.
fn start(endpoints: usize, arguments: &[&str]) -> (Sandbox, Server, impl Sized + use<>) {
    let sandbox = Sandbox::enter().expect("namespaces");
    for address in [SERVER.into(), HOSTILE, FRIENDLY] {
        ip(&format!("address add {address}/32 dev lo")).expect("an address");
    }
    let (api, folder, kubeconfig) = api(20, endpoints);
    let listen = SocketAddr::from((SERVER, 53)).to_string();
    let server = Server::start_at(
        &listen,
        &kubeconfig,
        &[&["--threads", "1"], arguments].concat(),
    );
    server.wait_ready();
    (sandbox, server, (api, folder))
}

fn client(from: IpAddr, server: &Server) -> UdpSocket {
    let client = UdpSocket::bind((from, 0)).expect("a socket");
    client.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    client.connect(server.address).expect("connected");
    client
}

/// A query that takes answers of 1232 bytes.
fn with_edns(name: &str) -> Vec<u8> {
    let mut wire = question(7, name);
    wire[11] = 1;
    wire.extend([0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
    wire
}

fn exchange(client: &UdpSocket, query: &[u8]) -> Option<Vec<u8>> {
    client.send(query).expect("sent");
    let mut reply = vec![0; 4096];
    let bytes = client.recv(&mut reply).ok()?;
    reply.truncate(bytes);
    Some(reply)
}

fn metric(server: &Server, name: &str) -> u64 {
    let metrics = server.http("/metrics").expect("metrics");
    let line = metrics.lines().find_map(|line| line.strip_prefix(name));
    line.expect("the metric").trim().parse().expect("a number")
}

#[test]
fn long_answers_to_one_address_are_bounded_and_whoever_really_asked_gets_them_by_tcp() {
    if !is_root("hostile") {
        return;
    }
    const BYTES_S: usize = 20_000;
    let (_sandbox, server, _kept) = start(60, &["--amplification", &BYTES_S.to_string()]);
    let query = with_edns(&service_name(9));
    let hostile = client(HOSTILE, &server);
    let (mut sent, mut received) = (0, 0);
    let cut = loop {
        let reply = exchange(&hostile, &query).expect("an answer");
        (sent, received) = (sent + query.len(), received + reply.len());
        if reply[2] & TRUNCATED != 0 {
            break reply;
        }
        assert!(received < 100 * BYTES_S, "no bound");
    };
    // Question, flags and OPT as ever, and nothing that a victim would feel.
    assert_eq!(cut.len(), query.len());
    assert_eq!(
        (cut[3] & 15, cut[5], cut[7], cut[9], cut[11]),
        (NOERROR, 1, 0, 0, 1)
    );
    assert!(received > sent + BYTES_S, "a burst is allowed");
    assert!(metric(&server, "keelway_dns_rate_limited_total") > 0);
    // Others get theirs in full.
    let other = exchange(&client(FRIENDLY, &server), &query).expect("an answer");
    assert_eq!((other[2] & TRUNCATED, other[7]), (0, 60));
    // And by TCP everyone does.
    let mut stream = TcpStream::connect(server.address).expect("a connection");
    stream.write_all(&framed(&query)).expect("sent");
    let mut length = [0; 2];
    stream.read_exact(&mut length).expect("a length");
    let mut whole = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut whole).expect("an answer");
    assert_eq!((whole[2] & TRUNCATED, whole[7]), (0, 60));
}

#[test]
fn a_client_that_floods_is_held_back_and_another_one_is_answered() {
    if !is_root("hostile") {
        return;
    }
    let (_sandbox, server, _kept) = start(2, &[]);
    // Somebody has to be there whom it hurts, and be known before nearly nothing of it is heard any more.
    let friendly = client(FRIENDLY, &server);
    let query = question(8, &service_name(4));
    assert!(exchange(&friendly, &query).is_some());
    let stop = Arc::new(AtomicBool::new(false));
    let flood = |_| {
        let (stop, socket) = (stop.clone(), client(HOSTILE, &server));
        let query = question(9, &service_name(3));
        thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                // Refused while the queue is full: that is what it is for.
                let _ = socket.send(&query);
            }
        })
    };
    let floods: Vec<_> = (0..2).map(flood).collect();
    eventually("the flood to be held back", Duration::from_secs(60), || {
        exchange(&friendly, &query);
        match metric(&server, "keelway_dns_held_back_total") {
            0 => Err("not yet".to_owned()),
            _ => Ok(()),
        }
    });
    for _ in 0..200 {
        // As resolvers do: a second try where the first is lost.
        let reply = (0..5)
            .find_map(|_| exchange(&friendly, &query))
            .expect("an answer during the flood");
        assert_eq!((reply[3] & 15, reply[7]), (NOERROR, 1));
    }
    assert!(metric(&server, "keelway_dns_queue_drops_total") > 0);
    stop.store(true, Ordering::Relaxed);
    for flood in floods {
        flood.join().expect("a flood");
    }
}
