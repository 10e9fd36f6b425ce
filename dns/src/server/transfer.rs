//! The whole zone, for those who may have it (AXFR, RFC 5936): SOA, every record, SOA, in as many messages as that takes.

use std::net::IpAddr;

use super::Shared;
use crate::answer::{HOSTMASTER, NAMESERVER, Rcode, Verdict, failure, soa_numbers};
use crate::name::{Name, before};
use crate::query::{HEADER_BYTES, Query, class, rtype};
use crate::zone::{Told, Zone};

/// Bytes of one message: far below what fits, so that a receiver has something to do early.
const MESSAGE_BYTES: usize = 16 * 1024;

/// The messages that answer a transfer query, one of refusal where the peer or the name is not the right one.
pub fn messages(shared: &Shared, message: &[u8], peer: IpAddr) -> Vec<Vec<u8>> {
    let (zone, settings) = (shared.zone.load(), shared.settings.load());
    let refuse = |rcode| {
        let mut out = vec![0; 512];
        match failure(&shared.bare, message, rcode, &mut out) {
            Verdict::Reply { bytes, .. } => vec![out[..bytes].to_vec()],
            _ => Vec::new(),
        }
    };
    let Ok(query) = Query::parse(message) else {
        return Vec::new();
    };
    let apex = zone
        .place(query.name())
        .filter(|place| place.before.is_empty());
    let (Some(apex), true) = (
        apex,
        settings.transfer_peers().any(|range| range.contains(peer)),
    ) else {
        return refuse(Rcode::Refused);
    };
    if !zone.synced() || !zone.pods_synced() {
        return refuse(Rcode::ServFail);
    }
    let ttl_s = settings
        .block(query.name())
        .map_or(5, |block| block.policy.ttl_s);
    let mut transfer = Transfer {
        query: &query,
        ttl_s,
        messages: Vec::new(),
        count: 0,
    };
    let origin = if apex.reverse {
        zone.origin()
    } else {
        apex.apex
    };
    let soa = [
        NAMESERVER,
        origin.wire(),
        HOSTMASTER,
        origin.wire(),
        &soa_numbers(zone.serial(), ttl_s),
    ]
    .concat();
    transfer.record(apex.apex.wire(), rtype::SOA, &soa);
    let ns = [NAMESERVER, origin.wire()].concat();
    transfer.record(apex.apex.wire(), rtype::NS, &ns);
    transfer.zone(&zone, apex.apex, origin, apex.reverse);
    transfer.record(apex.apex.wire(), rtype::SOA, &soa);
    transfer.messages
}

struct Transfer<'a> {
    query: &'a Query<'a>,
    ttl_s: u32,
    messages: Vec<Vec<u8>>,
    count: u16,
}

impl Transfer<'_> {
    fn zone(&mut self, zone: &Zone, apex: &Name, origin: &Name, reverse: bool) {
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
                match record {
                    Told::A(v4) => self.record(&owner, rtype::A, &v4.octets()),
                    Told::Aaaa(v6) => self.record(&owner, rtype::AAAA, &v6.octets()),
                    Told::Cname(target) => self.record(&owner, rtype::CNAME, target),
                    Told::Ptr(target) => {
                        let data = [target, origin.wire()].concat();
                        self.record(&owner, rtype::PTR, &data);
                    }
                    Told::Srv {
                        weight,
                        port,
                        target,
                    } => {
                        let numbers = [weight.to_be_bytes(), port.to_be_bytes()].concat();
                        let data = [&[0, 0][..], &numbers, target, origin.wire()].concat();
                        self.record(&owner, rtype::SRV, &data);
                    }
                    Told::Txt(text) => {
                        let data = [&[text.len() as u8][..], text].concat();
                        self.record(&owner, rtype::TXT, &data);
                    }
                }
            }
        }
    }

    fn record(&mut self, owner: &[u8], kind: u16, data: &[u8]) {
        let full = |message: &Vec<u8>| message.len() + owner.len() + data.len() > MESSAGE_BYTES;
        if self.messages.last().is_none_or(full) {
            let mut message = vec![0; HEADER_BYTES];
            message[..2].copy_from_slice(&self.query.id);
            // A response with authority, with the question in it, as the first message must have it.
            message[2] = 0x84;
            message[5] = 1;
            message.extend_from_slice(self.query.question);
            self.messages.push(message);
            self.count = 0;
        }
        let Some(message) = self.messages.last_mut() else {
            return;
        };
        message.extend_from_slice(owner);
        message.extend(kind.to_be_bytes());
        message.extend(class::IN.to_be_bytes());
        message.extend(self.ttl_s.to_be_bytes());
        message.extend((data.len() as u16).to_be_bytes());
        message.extend_from_slice(data);
        self.count += 1;
        message[6..8].copy_from_slice(&self.count.to_be_bytes());
    }
}
