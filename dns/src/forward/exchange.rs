//! One question and one answer: by UDP, TCP or TLS, and what makes a forger's work hard.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UdpSocket;

use crate::message::{BadReply, belongs};
use crate::query::{HEADER_BYTES, class, rtype};

/// What is asked of an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// In lower-case wire format.
    pub name: Vec<u8>,
    pub rtype: u16,
    pub dnssec_ok: bool,
    pub checking_disabled: bool,
}

/// A question as it is sent.
pub(super) struct Outgoing {
    pub wire: Vec<u8>,
    pub id: [u8; 2],
    question_bytes: usize,
}

/// Bytes of an answer that is asked for by UDP (DNS flag day 2020).
const UDP_BYTES: u16 = 1232;
/// What is read of a datagram: more than was asked for may come, and is better read than cut.
const DATAGRAM_BYTES_MAX: usize = 4096;

impl Question {
    /// Writes the question with a random id and, where the upstream keeps it, random spelling: both have to be guessed by
    /// whoever forges an answer (RFC 5452; draft-vixie-dnsext-dns0x20).
    pub(super) fn outgoing(&self, edns: bool, spell: bool) -> Outgoing {
        let id = rand::random::<u16>().to_be_bytes();
        let mut wire = vec![0; HEADER_BYTES];
        wire[..2].copy_from_slice(&id);
        const AUTHENTIC: u8 = 0x20;
        const CHECKING_DISABLED: u8 = 0x10;
        wire[2] = RECURSION_DESIRED;
        wire[3] = AUTHENTIC
            | if self.checking_disabled {
                CHECKING_DISABLED
            } else {
                0
            };
        wire[5] = 1;
        wire[11] = u8::from(edns);
        if spell {
            let mut bits = 0_u64;
            wire.extend(self.name.iter().enumerate().map(|(i, byte)| {
                if i % 64 == 0 {
                    bits = rand::random();
                }
                let upper = bits >> (i % 64) & 1 == 1;
                // Length bytes are 63 at most, below every letter.
                if upper {
                    byte.to_ascii_uppercase()
                } else {
                    *byte
                }
            }));
        } else {
            wire.extend_from_slice(&self.name);
        }
        wire.extend_from_slice(&self.rtype.to_be_bytes());
        wire.extend_from_slice(&class::IN.to_be_bytes());
        let question_bytes = wire.len() - HEADER_BYTES;
        if edns {
            wire.push(0);
            wire.extend_from_slice(&rtype::OPT.to_be_bytes());
            wire.extend_from_slice(&UDP_BYTES.to_be_bytes());
            wire.extend_from_slice(&[0, 0, if self.dnssec_ok { 0x80 } else { 0 }, 0, 0, 0]);
        }
        Outgoing {
            wire,
            id,
            question_bytes,
        }
    }

    /// Bytes of the question section.
    pub(super) fn bytes(&self) -> usize {
        self.name.len() + 4
    }
}

/// Bits of the third byte of a header.
const RECURSION_DESIRED: u8 = 0x01;

impl Outgoing {
    /// Asks for what the server knows by itself.
    pub(super) fn not_recursive(&mut self) {
        self.wire[2] &= !RECURSION_DESIRED;
    }

    pub(super) fn question(&self) -> &[u8] {
        &self.wire[HEADER_BYTES..HEADER_BYTES + self.question_bytes]
    }
}

/// What came by UDP.
pub(super) enum Received {
    Answer(Vec<u8>),
    /// The right answer but for its spelling: of a server that does not keep it, or of a forger.
    Suspect,
}

/// Asks by UDP, from a socket and so a port of its own. Datagrams that do not belong to the question are passed over.
pub(super) async fn by_udp(server: SocketAddr, outgoing: &Outgoing) -> io::Result<Received> {
    let any: SocketAddr = match server {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    socket.send(&outgoing.wire).await?;
    loop {
        socket.readable().await?;
        if let Some(received) = next_of(&socket, outgoing)? {
            return Ok(received);
        }
    }
}

/// What there is of an answer. The buffer is no part of a question that waits: thousands of them would be most of this process.
fn next_of(socket: &UdpSocket, outgoing: &Outgoing) -> io::Result<Option<Received>> {
    let mut buffer = [0; DATAGRAM_BYTES_MAX];
    let bytes = match socket.try_recv(&mut buffer) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
        received => received?,
    };
    let reply = &buffer[..bytes];
    Ok(match belongs(reply, outgoing.id, outgoing.question()) {
        Ok(()) => Some(Received::Answer(reply.to_vec())),
        Err(BadReply::OtherSpelling) => Some(Received::Suspect),
        Err(_) => None,
    })
}

/// Asks over a stream, with the two bytes of length that TCP has in front of a message.
pub(super) async fn by_stream(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin + ?Sized),
    outgoing: &Outgoing,
) -> io::Result<Vec<u8>> {
    let mut framed = (outgoing.wire.len() as u16).to_be_bytes().to_vec();
    framed.extend_from_slice(&outgoing.wire);
    stream.write_all(&framed).await?;
    stream.flush().await?;
    let length = stream.read_u16().await?;
    let mut reply = vec![0; usize::from(length)];
    stream.read_exact(&mut reply).await?;
    Ok(reply)
}
