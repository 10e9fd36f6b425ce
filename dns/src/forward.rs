//! Names of others: asked of the configured upstream servers, in their order.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::{Name as ProtoName, RecordType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::answer::Transport;
use crate::name::Name;

/// How long one server may take before the next is asked.
const PATIENCE: Duration = Duration::from_secs(2);
const UDP_BYTES_MAX: usize = 4096;

/// Upstream servers; never empty.
#[derive(Clone, Debug)]
pub struct Forwarder {
    upstreams: Vec<SocketAddr>,
}

#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    #[error("query: {0}")]
    Query(String),
    #[error("upstream {server}: {source}")]
    Io {
        server: SocketAddr,
        source: io::Error,
    },
    #[error("no upstream is configured")]
    NoUpstream,
}

impl Forwarder {
    /// A forwarder to `upstreams`; `None` when there are none.
    pub fn new(upstreams: Vec<SocketAddr>) -> Option<Self> {
        if upstreams.is_empty() {
            None
        } else {
            Some(Self { upstreams })
        }
    }

    /// Forwards a query as it is and returns the first answer that belongs to it.
    pub async fn forward(
        &self,
        query: &[u8],
        transport: Transport,
    ) -> Result<Vec<u8>, ForwardError> {
        let mut last = ForwardError::NoUpstream;
        for &server in &self.upstreams {
            let asked = match transport {
                Transport::Udp => over_udp(server, query).await,
                Transport::Tcp => over_tcp(server, query).await,
            };
            match asked {
                Ok(reply) => return Ok(reply),
                Err(source) => last = ForwardError::Io { server, source },
            }
        }
        Err(last)
    }

    /// Completes an answer that ends in a CNAME with what an upstream knows of its target.
    pub async fn chase(
        &self,
        query: &[u8],
        begun: &[u8],
        target: &Name,
        transport: Transport,
    ) -> Result<Vec<u8>, ForwardError> {
        let bad = |error: &dyn std::fmt::Display| ForwardError::Query(error.to_string());
        let mut asked = Message::from_vec(query).map_err(|error| bad(&error))?;
        let mut answer = Message::from_vec(begun).map_err(|error| bad(&error))?;
        let name = ProtoName::from_ascii(target.to_string()).map_err(|error| bad(&error))?;
        for question in &mut asked.queries {
            question.set_name(name.clone());
        }
        let wire = asked.to_vec().map_err(|error| bad(&error))?;
        let reply = self.forward(&wire, transport).await?;
        let reply = Message::from_vec(&reply).map_err(|error| bad(&error))?;
        answer.metadata.response_code = reply.metadata.response_code;
        answer.metadata.truncation |= reply.metadata.truncation;
        let wanted = asked.queries.first().map(|question| question.query_type());
        answer.add_answers(reply.answers.into_iter().filter(|record| {
            let rtype = record.record_type();
            Some(rtype) == wanted || rtype == RecordType::CNAME
        }));
        if answer.metadata.response_code == ResponseCode::NXDomain {
            // The alias exists; only its target does not (RFC 6604 keeps the code of the last name).
            answer.metadata.authoritative = false;
        }
        answer.to_vec().map_err(|error| bad(&error))
    }
}

async fn over_udp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // A socket per query: a random port and a random id are what a forger has to guess (RFC 5452).
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    let (wire, id) = with_random_id(query);
    let asked = async {
        socket.send(&wire).await?;
        let mut reply = vec![0; UDP_BYTES_MAX];
        loop {
            let bytes = socket.recv(&mut reply).await?;
            if belongs(&reply[..bytes], &id, query) {
                reply.truncate(bytes);
                return io::Result::Ok(reply);
            }
        }
    };
    let mut reply = timeout(PATIENCE, asked).await??;
    reply[..2].copy_from_slice(&query[..2]);
    Ok(reply)
}

async fn over_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let (wire, id) = with_random_id(query);
    let asked = async {
        let mut stream = TcpStream::connect(server).await?;
        let mut framed = (wire.len() as u16).to_be_bytes().to_vec();
        framed.extend(&wire);
        stream.write_all(&framed).await?;
        let length = stream.read_u16().await?;
        let mut reply = vec![0; usize::from(length)];
        stream.read_exact(&mut reply).await?;
        io::Result::Ok(reply)
    };
    let mut reply = timeout(PATIENCE, asked).await??;
    if !belongs(&reply, &id, query) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the reply does not belong to the query",
        ));
    }
    reply[..2].copy_from_slice(&query[..2]);
    Ok(reply)
}

fn with_random_id(query: &[u8]) -> (Vec<u8>, [u8; 2]) {
    let id = rand::random::<u16>().to_be_bytes();
    let mut wire = query.to_vec();
    wire[..2].copy_from_slice(&id);
    (wire, id)
}

/// Whether a datagram is the answer to `query` as it was sent with `id`: a response with the same question.
fn belongs(reply: &[u8], id: &[u8; 2], query: &[u8]) -> bool {
    let is_response = reply.len() >= 12 && reply[2] & 0x80 != 0 && reply[..2] == *id;
    let same_question = || match (Message::from_vec(reply), Message::from_vec(query)) {
        (Ok(reply), Ok(query)) => reply.queries == query.queries,
        _ => false,
    };
    is_response && same_question()
}
