//! A server in this process, and upstream servers that behave as a test says.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cluster_model::{Change, Dirty, Kind, Snapshot, read_manifest};
use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType, rdata};
use keelway_dns::cache::CacheRules;
use keelway_dns::config::spec::{BlockSpec, ClusterSpec, RouteSpec, ServerSpec, Spec};
use keelway_dns::forward::{ForwardRules, Order};
use keelway_dns::metrics::Metrics;
use keelway_dns::server::{self, Shared};
use keelway_dns::settings::Settings;
use keelway_dns::zone::{Zone, ZoneSettings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

pub const WEB: &str = "web.prod.svc.cluster.local.";

pub fn name(text: &str) -> keelway_dns::name::Name {
    keelway_dns::name::Name::parse(text).expect("a name")
}

/// A synced snapshot of what a manifest says.
pub fn snapshot(manifest: &str) -> Snapshot {
    let mut snapshot = Snapshot::default();
    let mut dirty = Dirty::default();
    for kind in [Kind::Service, Kind::EndpointSlice, Kind::Pod] {
        snapshot.apply(Change::Replace(kind, Vec::new()), &mut dirty);
    }
    for object in read_manifest(manifest.as_bytes()).expect("a manifest") {
        snapshot.apply(Change::Upsert(object), &mut dirty);
    }
    snapshot
}

/// A Service with an address, one that is an alias, and a headless one with so many endpoints.
pub fn cluster(endpoints: usize) -> Snapshot {
    let listed: Vec<String> = (0..endpoints)
        .map(|i| {
            format!(
                r#"{{"addresses":["10.244.{}.{}"],"conditions":{{"ready":true}}}}"#,
                i / 250,
                i % 250 + 1
            )
        })
        .collect();
    snapshot(&format!(
        r#"[{{"kind":"Service","metadata":{{"name":"web","namespace":"prod"}},
            "spec":{{"clusterIP":"10.96.0.7","clusterIPs":["10.96.0.7"],"ports":[{{"name":"http","port":80}}]}}}},
        {{"kind":"Service","metadata":{{"name":"out","namespace":"prod"}},
            "spec":{{"type":"ExternalName","externalName":"Www.example.org"}}}},
        {{"kind":"Service","metadata":{{"name":"db","namespace":"prod"}},
            "spec":{{"clusterIP":"None","clusterIPs":["None"],"ports":[{{"name":"sql","port":1}}]}}}},
        {{"kind":"EndpointSlice","addressType":"IPv4","metadata":{{"name":"db-1","namespace":"prod",
            "labels":{{"kubernetes.io/service-name":"db"}}}},"ports":[{{"name":"sql","port":1}}],
            "endpoints":[{}]}},
        {{"kind":"Pod","metadata":{{"name":"client","namespace":"prod"}},"spec":{{}},
            "status":{{"podIPs":[{{"ip":"127.0.0.1"}}]}}}}]"#,
        listed.join(",")
    ))
}

/// A configuration that serves the cluster and forwards the rest, one upstream after another.
pub fn spec(upstreams: &[SocketAddr]) -> Spec {
    let zone = ZoneSettings::of(name("cluster.local"));
    let mut block = BlockSpec::of(vec![name(".")]);
    block.cluster = Some(ClusterSpec {
        ttl_s: 5,
        fallthrough: zone.reverse.clone(),
        transfer: Vec::new(),
    });
    block.cache = Some(CacheRules::default());
    if !upstreams.is_empty() {
        block.routes.push(RouteSpec {
            zone: name("."),
            except: Vec::new(),
            servers: upstreams
                .iter()
                .map(|address| ServerSpec {
                    address: *address,
                    tls: None,
                })
                .collect(),
            rules: ForwardRules {
                order: Order::Sequential,
                ..ForwardRules::default()
            },
        });
    }
    Spec {
        zone,
        blocks: vec![block],
        port: None,
        http: Vec::new(),
        lameduck: None,
        warnings: Vec::new(),
    }
}

pub async fn serve(spec: Spec, snapshot: &Snapshot) -> (Arc<Shared>, SocketAddr) {
    serve_at("127.0.0.1:0", spec, snapshot).await
}

pub async fn serve_at(at: &str, spec: Spec, snapshot: &Snapshot) -> (Arc<Shared>, SocketAddr) {
    let metrics = Metrics::default();
    let zone = Zone::of(spec.zone.clone(), snapshot);
    let settings = Settings::build(spec, &metrics, None).expect("settings");
    let shared = Shared::new(settings, metrics);
    shared.serve(zone);
    let at = at.parse().expect("an address");
    let address = server::start(&shared, at, 2).await.expect("a free port");
    (shared, address)
}

pub fn query(name: &str, rtype: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).expect("a name"), rtype));
    message
}

pub fn edns(name: &str, rtype: RecordType, bytes: u16) -> Message {
    let mut message = query(name, rtype);
    let mut opt = Edns::new();
    opt.set_max_payload(bytes);
    message.set_edns(opt);
    message
}

pub async fn try_udp(server: SocketAddr, message: &Message, patience: Duration) -> Option<Message> {
    let wire = message.to_vec().expect("a query");
    let exchange = async {
        let socket = UdpSocket::bind("127.0.0.1:0").await?;
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
    let reply = tokio::time::timeout(patience, exchange).await.ok()?;
    let reply = Message::from_vec(&reply.expect("loopback")).expect("a readable answer");
    assert_eq!(
        (reply.metadata.id, &reply.queries),
        (message.metadata.id, &message.queries)
    );
    Some(reply)
}

pub async fn udp(server: SocketAddr, message: &Message) -> Message {
    let reply = try_udp(server, message, Duration::from_secs(8)).await;
    reply.unwrap_or_else(|| panic!("no answer to {:?}", message.queries))
}

pub async fn tcp(server: SocketAddr, messages: &[Message]) -> Vec<Message> {
    let mut stream = TcpStream::connect(server).await.expect("TCP");
    let wires = messages
        .iter()
        .map(|message| message.to_vec().expect("a query"));
    let all: Vec<u8> = wires.flat_map(|wire| framed(&wire)).collect();
    stream.write_all(&all).await.expect("written");
    let mut replies = Vec::new();
    for _ in messages {
        replies.push(read(&mut stream).await.expect("an answer"));
    }
    replies
}

/// A message as TCP carries it: behind two bytes with its length.
pub fn framed(wire: &[u8]) -> Vec<u8> {
    [&(wire.len() as u16).to_be_bytes()[..], wire].concat()
}

pub async fn read(stream: &mut TcpStream) -> std::io::Result<Message> {
    let mut reply = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut reply).await?;
    Ok(Message::from_vec(&reply).expect("a readable message"))
}

/// The data of the answers, in order of their text.
pub fn data(message: &Message) -> Vec<String> {
    let mut texts: Vec<String> = message
        .answers
        .iter()
        .map(|record| record.data.to_string())
        .collect();
    texts.sort();
    texts
}

/// An upstream server that counts what it is asked and answers as it is told.
pub struct Upstream {
    pub address: SocketAddr,
    asked: Arc<AtomicUsize>,
}

/// What an upstream does with a query that came by UDP or, if `true`, TCP: the messages that it sends, each after a while.
pub type Script = dyn Fn(&Message, bool) -> Vec<(Duration, Vec<u8>)> + Send + Sync;

/// A port that is free in both transports: what the kernel gives to UDP may be another's by TCP.
async fn one_port() -> (UdpSocket, TcpListener) {
    for _ in 0..16 {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a free port");
        let address = socket.local_addr().expect("an address");
        if let Ok(listener) = TcpListener::bind(address).await {
            return (socket, listener);
        }
    }
    panic!("16 ports in a row were free for UDP and taken for TCP");
}

impl Upstream {
    pub async fn start(
        script: impl Fn(&Message, bool) -> Vec<(Duration, Vec<u8>)> + Send + Sync + 'static,
    ) -> Self {
        let script: Arc<Script> = Arc::new(script);
        let (socket, listener) = one_port().await;
        let address = socket.local_addr().expect("an address");
        let socket = Arc::new(socket);
        let asked = Arc::new(AtomicUsize::new(0));
        let (count, say) = (asked.clone(), script.clone());
        tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            while let Ok((bytes, peer)) = socket.recv_from(&mut buffer).await {
                let Ok(query) = Message::from_vec(&buffer[..bytes]) else {
                    continue;
                };
                if is_counted(&query) {
                    count.fetch_add(1, Ordering::SeqCst);
                }
                let (socket, replies) = (socket.clone(), say(&query, false));
                tokio::spawn(async move {
                    for (after, reply) in replies {
                        tokio::time::sleep(after).await;
                        let _ = socket.send_to(&reply, peer).await;
                    }
                });
            }
        });
        let count = asked.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (count, script) = (count.clone(), script.clone());
                tokio::spawn(async move {
                    while let Ok(query) = read(&mut stream).await {
                        if is_counted(&query) {
                            count.fetch_add(1, Ordering::SeqCst);
                        }
                        for (after, reply) in script(&query, true) {
                            tokio::time::sleep(after).await;
                            if stream.write_all(&framed(&reply)).await.is_err() {
                                return;
                            }
                        }
                    }
                });
            }
        });
        Self { address, asked }
    }

    /// Queries that came, without checks of health and for loops.
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

fn is_counted(query: &Message) -> bool {
    query
        .queries
        .first()
        .is_some_and(|query| !matches!(query.query_type(), RecordType::HINFO | RecordType::NS))
}

/// An answer to a query with these records, at once.
pub fn reply(query: &Message, code: ResponseCode, records: Vec<Record>) -> Message {
    let mut message = query.clone();
    message.metadata.message_type = MessageType::Response;
    message.metadata.recursion_available = true;
    message.metadata.response_code = code;
    message.edns = None;
    message.answers = records;
    message
}

/// An address record of the name that is asked about.
pub fn address(query: &Message, ttl: u32, ip: [u8; 4]) -> Record {
    let owner = query.queries[0].name().clone();
    Record::from_rdata(owner, ttl, RData::A(rdata::A(ip.into())))
}

pub fn soa(ttl: u32, minimum: u32) -> Record {
    let zone = Name::from_ascii("example.org.").expect("a name");
    let data = rdata::SOA::new(zone.clone(), zone.clone(), 1, 1, 1, 1, minimum);
    Record::from_rdata(zone, ttl, RData::SOA(data))
}

pub fn at_once(message: &Message) -> Vec<(Duration, Vec<u8>)> {
    vec![(Duration::ZERO, message.to_vec().expect("an answer"))]
}

/// An upstream with one address for every name.
pub async fn willing(ttl: u32, ip: [u8; 4]) -> Upstream {
    Upstream::start(move |query, _| {
        let records = vec![address(query, ttl, ip)];
        at_once(&reply(query, ResponseCode::NoError, records))
    })
    .await
}

/// An address where nobody answers, and nobody says so.
pub async fn silent() -> Upstream {
    Upstream::start(|_, _| Vec::new()).await
}
