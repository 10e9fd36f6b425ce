//! An answer that is put together of several, or found under another name than the one that was asked for.

use hickory_proto::op::{Edns, Message, MessageType, ResponseCode};
use hickory_proto::rr::{DNSClass, Name as ProtoName, RData, Record, rdata::CNAME};

use crate::answer::{Policy, Rcode, Transport, Verdict, failure, room};
use crate::name::Name;
use crate::query::{HEADER_BYTES, Query};

/// Where a header has the numbers of records behind the question.
const ANSWER_COUNT: usize = 6;

/// An answer in parts, as it is put together.
pub struct Looked {
    pub message: Message,
    /// The code of the last name of a chain.
    pub rcode: ResponseCode,
}

impl Looked {
    pub fn of(message: Message) -> Self {
        Self {
            rcode: message.metadata.response_code,
            message,
        }
    }

    pub fn extend(&mut self, part: Looked) {
        self.rcode = part.rcode;
        let mine = &mut self.message;
        mine.metadata.authentic_data &= part.message.metadata.authentic_data;
        mine.metadata.truncation |= part.message.metadata.truncation;
        mine.answers.extend(part.message.answers);
        mine.authorities = part.message.authorities;
        mine.additionals.extend(part.message.additionals);
    }

    /// This answer, with an alias from `asked` in front.
    pub fn behind(mut self, asked: &Name, found: &Name, ttl_s: u32) -> Option<Self> {
        let target = RData::CNAME(CNAME(proto_name(found)?));
        let mut alias = Record::from_rdata(proto_name(asked)?, ttl_s, target);
        alias.dns_class = DNSClass::IN;
        self.message.answers.insert(0, alias);
        Some(self)
    }

    /// Gives the records of a name that was found under another one the name that was asked for.
    pub fn rename(&mut self, found: &Name, asked: &ProtoName) {
        let Some(found) = proto_name(found) else {
            return;
        };
        for record in &mut self.message.answers {
            if record.name == found {
                record.name = asked.clone();
            }
        }
    }

    pub fn finish(
        self,
        asked: &[u8],
        query: &Query<'_>,
        policy: &Policy,
        transport: Transport,
        out: &mut [u8],
    ) -> Verdict {
        let rcode = match self.rcode {
            ResponseCode::NoError => Rcode::NoError,
            ResponseCode::NXDomain => Rcode::NxDomain,
            ResponseCode::Refused => Rcode::Refused,
            _ => Rcode::ServFail,
        };
        let room = room(query, policy, transport, out);
        // Of the query its question alone: what else the client says has been looked at, and nothing of it is repeated.
        let mut plain = asked[..HEADER_BYTES + query.question.len()].to_vec();
        plain[ANSWER_COUNT..HEADER_BYTES].fill(0);
        let Ok(client) = Message::from_vec(&plain) else {
            return failure(policy, asked, Rcode::FormErr, out);
        };
        let mut message = self.message;
        let authentic =
            message.metadata.authentic_data && (query.dnssec_ok() || query.authentic_data);
        let (truncated, authoritative) =
            (message.metadata.truncation, message.metadata.authoritative);
        message.metadata = client.metadata;
        message.metadata.truncation = truncated;
        message.metadata.authoritative = authoritative;
        message.metadata.message_type = MessageType::Response;
        message.metadata.recursion_available = policy.recursion;
        message.metadata.authentic_data = authentic;
        message.metadata.response_code = self.rcode;
        message.queries = client.queries;
        message.edns = query.edns.map(|edns| {
            let mut opt = Edns::new();
            opt.set_max_payload(policy.udp_bytes_max.min(usize::from(u16::MAX)) as u16);
            opt.set_dnssec_ok(edns.dnssec_ok);
            opt
        });
        loop {
            match message.to_vec() {
                Ok(wire) if wire.len() <= room => {
                    out[..wire.len()].copy_from_slice(&wire);
                    let bytes = wire.len();
                    return Verdict::Reply { bytes, rcode };
                }
                Ok(_) if !message.additionals.is_empty() => message.additionals.clear(),
                Ok(_) if !message.answers.is_empty() || !message.authorities.is_empty() => {
                    message.metadata.truncation = true;
                    message.authorities.clear();
                    let half = message.answers.len() / 2;
                    message.answers.truncate(half);
                }
                _ => return failure(policy, asked, Rcode::ServFail, out),
            }
        }
    }
}

pub fn proto_name(name: &Name) -> Option<ProtoName> {
    let labels = name
        .and_ancestors()
        .filter(|wire| wire.len() > 1)
        .map(|wire| &wire[1..=usize::from(wire[0])]);
    ProtoName::from_labels(labels).ok()
}
