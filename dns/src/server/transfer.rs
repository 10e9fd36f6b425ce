//! The whole zone, for those who may have it (AXFR, RFC 5936): SOA, every record, SOA, in as many messages as that takes. One message at
//! a time is in memory, and the next is made when the peer has taken it.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::Mutex;

use super::tcp::{framed, send as send_framed};
use super::{Shared, State};
use crate::answer::NAMESERVER;
use crate::answer::{HOSTMASTER, OPT_BYTES, Rcode, Verdict, failure, nameserver, opt, soa_numbers};
use crate::name::{Name, before};
use crate::query::{HEADER_BYTES, Query, class, rtype};
use crate::zone::{Told, Zone};

/// Bytes of one message: far below what fits, so that a receiver has something to do early.
const MESSAGE_BYTES: usize = 16 * 1024;
/// A message of that, one record more, and the OPT record.
const ROOM: usize = 3 * MESSAGE_BYTES;

type Stream = Mutex<OwnedWriteHalf>;

/// Answers a transfer query: with the zone, or with a refusal where the peer or the name is not the right one, or too many are at it.
///
/// # Errors
/// When the peer does not take what it has asked for.
pub(super) async fn send(
    shared: &Shared,
    message: &[u8],
    peer: IpAddr,
    stream: &Stream,
) -> io::Result<()> {
    let refuse = |rcode| {
        let mut out = vec![0; 512];
        match failure(&shared.bare, message, rcode, &mut out) {
            Verdict::Reply { bytes, .. } => framed(&out[..bytes]),
            _ => Vec::new(),
        }
    };
    let state = shared.state.load_full();
    let Ok(query) = Query::parse(message) else {
        return Ok(());
    };
    let apex = state.zone.place(query.name());
    let is_apex = apex.is_some_and(|place| place.before.is_empty());
    let mut peers = state.settings.transfer_peers();
    if !is_apex || !peers.any(|range| range.contains(peer)) {
        return send_framed(stream, &refuse(Rcode::Refused)).await;
    }
    if !state.zone.synced() || !state.zone.pods_synced() {
        return send_framed(stream, &refuse(Rcode::ServFail)).await;
    }
    let Some(_place) = shared.limits.transfer(peer) else {
        return send_framed(stream, &refuse(Rcode::Refused)).await;
    };
    Transfer::of(&state, &query, stream).zone(&state).await
}

struct Transfer<'a> {
    query: &'a Query<'a>,
    stream: &'a Stream,
    ttl_s: u32,
    udp_bytes_max: usize,
    message: Vec<u8>,
    count: u16,
}

impl<'a> Transfer<'a> {
    fn of(state: &State, query: &'a Query<'a>, stream: &'a Stream) -> Self {
        let block = state.settings.block(query.name());
        let policy = block.map(|block| block.policy.clone()).unwrap_or_default();
        Self {
            query,
            stream,
            ttl_s: policy.ttl_s,
            udp_bytes_max: policy.udp_bytes_max,
            message: Vec::with_capacity(ROOM),
            count: 0,
        }
    }

    async fn zone(mut self, state: &Arc<State>) -> io::Result<()> {
        let zone: &Zone = &state.zone;
        let Some(place) = zone.place(self.query.name()) else {
            return Ok(());
        };
        let (apex, reverse) = (place.apex, place.reverse);
        let origin = if reverse { zone.origin() } else { apex };
        let soa = [
            NAMESERVER,
            origin.wire(),
            HOSTMASTER,
            origin.wire(),
            &soa_numbers(zone.serial(), self.ttl_s),
        ]
        .concat();
        self.record(apex.wire(), rtype::SOA, &soa).await?;
        let ns = [nameserver(zone), origin.wire()].concat();
        self.record(apex.wire(), rtype::NS, &ns).await?;
        for (name, node) in zone.owners(reverse) {
            if reverse && before(name, apex.wire()).is_none() {
                continue;
            }
            let owner = if reverse {
                name.to_vec()
            } else {
                [name, origin.wire()].concat()
            };
            for record in node.records() {
                let (kind, data) = told(record, origin);
                self.record(&owner, kind, &data).await?;
            }
        }
        self.record(apex.wire(), rtype::SOA, &soa).await?;
        self.flush().await
    }

    async fn record(&mut self, owner: &[u8], kind: u16, data: &[u8]) -> io::Result<()> {
        if self.message.len() + owner.len() + data.len() > MESSAGE_BYTES {
            self.flush().await?;
        }
        let message = &mut self.message;
        if message.is_empty() {
            message.resize(HEADER_BYTES, 0);
            message[..2].copy_from_slice(&self.query.id);
            // A response with authority, with the question in it, as the first message must have it.
            message[2] = 0x84;
            message[5] = 1;
            message.extend_from_slice(self.query.question);
        }
        message.extend_from_slice(owner);
        message.extend(kind.to_be_bytes());
        message.extend(class::IN.to_be_bytes());
        message.extend(self.ttl_s.to_be_bytes());
        message.extend((data.len() as u16).to_be_bytes());
        message.extend_from_slice(data);
        self.count += 1;
        Ok(())
    }

    async fn flush(&mut self) -> io::Result<()> {
        if self.count > 0 {
            self.message[6..8].copy_from_slice(&self.count.to_be_bytes());
            if let Some(edns) = self.query.edns {
                let opt: [u8; OPT_BYTES] = opt(self.udp_bytes_max, edns.dnssec_ok, Rcode::NoError);
                self.message.extend(opt);
                self.message[11] = 1;
            }
            send_framed(self.stream, &framed(&self.message)).await?;
        }
        self.message.clear();
        self.count = 0;
        Ok(())
    }
}

/// Type and data of a record, whose names are below `origin`.
fn told(record: Told<'_>, origin: &Name) -> (u16, Vec<u8>) {
    match record {
        Told::A(v4) => (rtype::A, v4.octets().to_vec()),
        Told::Aaaa(v6) => (rtype::AAAA, v6.octets().to_vec()),
        Told::Cname(target) => (rtype::CNAME, target.to_vec()),
        Told::Ptr(target) => (rtype::PTR, [target, origin.wire()].concat()),
        Told::Srv {
            weight,
            port,
            target,
        } => {
            let numbers = [weight.to_be_bytes(), port.to_be_bytes()].concat();
            let data = [&[0, 0][..], &numbers, target, origin.wire()].concat();
            (rtype::SRV, data)
        }
        Told::Txt(text) => (rtype::TXT, [&[text.len() as u8][..], text].concat()),
    }
}
