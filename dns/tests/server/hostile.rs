//! Whatever bytes come, from clients or from upstreams, by either transport: there is an answer or a deliberate silence, and the next one
//! is served.

use std::net::SocketAddr;
use std::sync::OnceLock;
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use keelway_dns::config::spec::AutopathSpec;
use keelway_dns::hosts::Hosts;
use keelway_dns::rewrite::{Match, Rewrite};
use keelway_dns::zone::Pods;
use proptest::prelude::*;
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpStream, UdpSocket};
use tokio::runtime::Runtime;

use crate::support::*;

/// How long is waited for an answer that may never come: a mangled message is dropped at times.
const SHORT: Duration = Duration::from_millis(300);

/// An upstream whose answers are mangled in a way that depends on the name.
async fn mangling() -> Upstream {
    Upstream::start(|query, _| {
        let records = vec![address(query, 1, [192, 0, 2, 7])];
        let mut wire = reply(query, ResponseCode::NoError, records)
            .to_vec()
            .expect("an answer");
        let name = query.queries[0].name().to_lowercase().to_string();
        let sum = name.bytes().fold(7_usize, |sum, byte| {
            sum.wrapping_mul(31) + usize::from(byte)
        });
        let end = 17 + name.len();
        // Behind the question, so that it is believed to be the answer.
        for turn in 0..sum % 3 {
            let at = end + sum / (turn + 2) % (wire.len() - end).max(1);
            if let Some(byte) = wire.get_mut(at) {
                *byte ^= (sum >> (turn * 8)) as u8;
            }
        }
        wire.truncate(wire.len() - sum % 5);
        vec![(Duration::ZERO, wire)]
    })
    .await
}

/// A server with something of everything.
fn server() -> &'static (Runtime, SocketAddr) {
    static SERVER: OnceLock<(Runtime, SocketAddr)> = OnceLock::new();
    SERVER.get_or_init(|| {
        let runtime = Runtime::new().expect("a runtime");
        let address = runtime.block_on(async {
            let upstream = Box::leak(Box::new(mangling().await));
            let mut spec = spec(&[upstream.address]);
            spec.zone.pods = Pods::Insecure;
            let block = &mut spec.blocks[0];
            block.routes[0].rules.patience = Duration::from_millis(200);
            block.rewrites = vec![Rewrite {
                from: Match::Suffix(".corp.example.".into()),
                to: ".svc.cluster.local.".into(),
                goes_on: false,
            }];
            block.autopath = Some(AutopathSpec::default());
            let mut hosts = Hosts::new(60);
            hosts
                .add("192.0.2.9", &["printer.example"])
                .expect("an entry");
            hosts.fallthrough = vec![name(".")];
            block.hosts = Some(hosts);
            let (shared, address) = serve(spec, &cluster(40)).await;
            Box::leak(Box::new(shared));
            address
        });
        (runtime, address)
    })
}

/// Queries as they should be, and with some bytes changed.
fn message() -> impl Strategy<Value = (Vec<u8>, bool)> {
    let label = "[a-z]{1,6}|web|db|out|prod|svc|corp|example|printer|1-2-3-4|_tcp|_sql";
    let domain = prop::sample::select(vec![
        "svc.cluster.local.",
        "prod.svc.cluster.local.",
        "prod.corp.example.",
        "example.",
        "in-addr.arpa.",
        "",
    ]);
    let rtypes = [1_u16, 28, 33, 12, 16, 255, 252, 5, 6, 65];
    (
        prop::collection::vec(label, 1..4),
        domain,
        prop::sample::select(rtypes.to_vec()),
        any::<bool>(),
        prop::collection::vec((any::<usize>(), any::<u8>()), 0..3),
    )
        .prop_map(|(labels, domain, rtype, with_edns, flips)| {
            let text = format!("{}.{domain}", labels.join("."));
            let rtype = RecordType::from(rtype);
            let asked = if with_edns {
                edns(&text, rtype, 1232)
            } else {
                query(&text, rtype)
            };
            let mut wire = asked.to_vec().expect("a query");
            let whole = flips.is_empty();
            for (at, byte) in flips {
                let at = at % wire.len();
                wire[at] = byte;
            }
            (wire, whole)
        })
}

async fn by_udp(server: SocketAddr, wire: &[u8], patience: Duration) -> Option<Vec<u8>> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
    socket.send_to(wire, server).await.expect("sent");
    let mut reply = vec![0; 65_535];
    let received = tokio::time::timeout(patience, socket.recv(&mut reply)).await;
    reply.truncate(received.ok()?.expect("loopback"));
    Some(reply)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn every_query_has_an_answer_also_where_others_are_asked((wire, whole) in message()) {
        let (runtime, server) = server();
        let patience = if whole { Duration::from_secs(20) } else { SHORT };
        let reply = runtime.block_on(by_udp(*server, &wire, patience));
        match reply {
            Some(reply) => {
                prop_assert!(reply.len() >= 12 && reply[..2] == wire[..2] && reply[2] & 0x80 != 0);
                let limit = if whole { 1232 } else { 4096 };
                prop_assert!(reply.len() <= limit);
            }
            None => prop_assert!(!whole, "no answer to {:?}", wire),
        }
    }

    #[test]
    fn a_stream_of_anything_ends_or_is_answered_and_the_next_client_is_served(
        messages in prop::collection::vec(message(), 0..4),
        rest in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let (runtime, server) = server();
        let good = runtime.block_on(async {
            let mut stream = TcpStream::connect(server).await.expect("TCP");
            let wires = messages.iter().flat_map(|(wire, _)| framed(wire));
            let bytes: Vec<u8> = wires.chain(rest).collect();
            // It may be closed in the middle.
            let _ = stream.write_all(&bytes).await;
            let _ = stream.shutdown().await;
            by_udp(*server, &query(WEB, RecordType::A).to_vec().expect("a query"), Duration::from_secs(20)).await
        });
        prop_assert!(good.is_some_and(|reply| reply[7] == 1));
    }
}
