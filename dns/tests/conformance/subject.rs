//! The server under test, by its address and no more.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use cluster_model::{Change, Dirty, Kind, Snapshot, read_manifest};
use hickory_proto::op::{Edns, Message, Query};
use hickory_proto::rr::{Name, RecordType};
use keelway_dns::config::spec::{BlockSpec, ClusterSpec, Spec};
use keelway_dns::metrics::Metrics;
use keelway_dns::server::{self, Shared};
use keelway_dns::settings::Settings;
use keelway_dns::zone::{Zone, ZoneSettings};

const PATIENCE: Duration = Duration::from_secs(5);

pub struct Subject {
    pub address: SocketAddr,
    pub domain: String,
    _runtime: Option<tokio::runtime::Runtime>,
}

impl Subject {
    pub fn obtain() -> Self {
        let domain = std::env::var("KEELWAY_DNS_DOMAIN").unwrap_or("cluster.local".into());
        if let Ok(text) = std::env::var("KEELWAY_DNS_SUBJECT") {
            let address = text.parse().expect("KEELWAY_DNS_SUBJECT is ADDRESS:PORT");
            return Self {
                address,
                domain,
                _runtime: None,
            };
        }
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let address = runtime.block_on(ours());
        Self {
            address,
            domain,
            _runtime: Some(runtime),
        }
    }

    /// An absolute name from one whose domain is left open.
    pub fn name(&self, text: &str) -> String {
        text.replace("DOMAIN", &self.domain)
    }

    pub fn query(&self, name: &str, rtype: RecordType) -> Message {
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        let name = Name::from_ascii(self.name(name)).expect("a name");
        message.add_query(Query::query(name, rtype));
        message
    }

    pub fn udp(&self, query: &[u8]) -> Result<Vec<u8>, String> {
        let failed = |error: std::io::Error| format!("UDP: {error}");
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(failed)?;
        socket.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        socket.connect(self.address).map_err(failed)?;
        socket.send(query).map_err(failed)?;
        let mut reply = vec![0; 65_535];
        let bytes = socket.recv(&mut reply).map_err(failed)?;
        reply.truncate(bytes);
        Ok(reply)
    }

    pub fn ask(&self, query: &Message) -> Result<Message, String> {
        let wire = query.to_vec().expect("a query");
        let reply = self.udp(&wire)?;
        let reply =
            Message::from_vec(&reply).map_err(|error| format!("an unreadable answer: {error}"))?;
        if reply.metadata.id != query.metadata.id || reply.queries != query.queries {
            return Err("the answer belongs to another question".into());
        }
        Ok(reply)
    }

    /// Asks by UDP, and by TCP when the answer is truncated: as any resolver does.
    pub fn resolve(&self, name: &str, rtype: RecordType) -> Result<Message, String> {
        let mut query = self.query(name, rtype);
        let mut edns = Edns::new();
        edns.set_max_payload(1232);
        query.set_edns(edns);
        let reply = self.ask(&query)?;
        if reply.metadata.truncation {
            return Ok(self.tcp(&[query])?.remove(0));
        }
        Ok(reply)
    }

    /// Sends all queries on one connection before it reads any answer; answers may come in any order.
    pub fn tcp(&self, queries: &[Message]) -> Result<Vec<Message>, String> {
        let failed = |error: std::io::Error| format!("TCP: {error}");
        let mut stream = TcpStream::connect(self.address).map_err(failed)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        let mut framed = Vec::new();
        for query in queries {
            let wire = query.to_vec().expect("a query");
            framed.extend((wire.len() as u16).to_be_bytes());
            framed.extend(wire);
        }
        stream.write_all(&framed).map_err(failed)?;
        let mut replies = Vec::new();
        for _ in queries {
            replies.push(read_message(&mut stream).map_err(failed)?);
        }
        let in_order = queries.iter().map(|query| {
            let mut all = replies.iter();
            let own = all.find(|reply| reply.metadata.id == query.metadata.id);
            own.cloned()
                .ok_or("a query of several was not answered".to_owned())
        });
        in_order.collect()
    }
}

pub fn read_message(stream: &mut TcpStream) -> std::io::Result<Message> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut wire = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut wire)?;
    Message::from_vec(&wire).map_err(std::io::Error::other)
}

/// Our own server over the fixture.
async fn ours() -> SocketAddr {
    let mut snapshot = Snapshot::default();
    let mut dirty = Dirty::default();
    for kind in [Kind::Service, Kind::EndpointSlice] {
        snapshot.apply(Change::Replace(kind, Vec::new()), &mut dirty);
    }
    let manifest = include_bytes!("cluster.json");
    for object in read_manifest(manifest).expect("a manifest") {
        snapshot.apply(Change::Upsert(object), &mut dirty);
    }
    let root = keelway_dns::name::Name::parse(".").expect("the root");
    let zone = ZoneSettings::of(keelway_dns::name::Name::parse("cluster.local").expect("a name"));
    let mut block = BlockSpec::of(vec![root]);
    block.cluster = Some(ClusterSpec {
        ttl_s: 5,
        fallthrough: Vec::new(),
        transfer: Vec::new(),
    });
    let spec = Spec {
        zone: zone.clone(),
        blocks: vec![block],
        port: None,
        http: Vec::new(),
        lameduck: None,
        warnings: Vec::new(),
    };
    let metrics = Metrics::default();
    let settings = Settings::build(spec, &metrics, None).expect("settings");
    let shared = Shared::new(settings, metrics);
    shared.serve(Zone::of(zone, &snapshot));
    server::start(&shared, (Ipv4Addr::LOCALHOST, 0).into(), 2)
        .await
        .expect("a free port")
}
