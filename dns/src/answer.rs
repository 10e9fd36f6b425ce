//! Answers composed from the zone straight into the buffer that is sent, without allocating.

use std::net::IpAddr;

use crate::name::Name;
use crate::plan::Record;
use crate::query::{Bad, HEADER_BYTES, Query, class, rtype};
use crate::zone::{Node, Zone};

/// What an operator can choose of the answers.
#[derive(Clone, Debug)]
pub struct Policy {
    pub ttl_s: u32,
    /// Names outside the zone are forwarded; otherwise they are refused.
    pub forwards: bool,
    /// The server's own bound on UDP answers (DNS flag day 2020).
    pub udp_bytes_max: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            ttl_s: 5,
            forwards: false,
            udp_bytes_max: 1232,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// Response codes that are given here (RFC 6895).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rcode {
    NoError = 0,
    FormErr = 1,
    ServFail = 2,
    NxDomain = 3,
    NotImp = 4,
    Refused = 5,
    /// Its upper bits stand in the OPT record.
    BadVers = 16,
}

impl Rcode {
    pub const ALL: [Rcode; 7] = [
        Rcode::NoError,
        Rcode::FormErr,
        Rcode::ServFail,
        Rcode::NxDomain,
        Rcode::NotImp,
        Rcode::Refused,
        Rcode::BadVers,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Rcode::NoError => "NOERROR",
            Rcode::FormErr => "FORMERR",
            Rcode::ServFail => "SERVFAIL",
            Rcode::NxDomain => "NXDOMAIN",
            Rcode::NotImp => "NOTIMP",
            Rcode::Refused => "REFUSED",
            Rcode::BadVers => "BADVERS",
        }
    }
}

/// What to do with a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send this many bytes of the buffer.
    Reply { bytes: usize, rcode: Rcode },
    /// Ask an upstream server.
    Forward,
    /// The buffer holds an answer that is one CNAME out of the zone; its target is to be asked upstream.
    Chase { bytes: usize, target: Name },
    /// Say nothing.
    Ignore,
}

const FLAG_RESPONSE: u8 = 0x80;
const FLAG_AUTHORITATIVE: u8 = 0x04;
const FLAG_TRUNCATED: u8 = 0x02;
const FLAG_RECURSION_AVAILABLE: u8 = 0x80;
/// Pointer to the name in the question (RFC 1035, 4.1.4): it stands right behind the header.
const NAME_OF_QUESTION: [u8; 2] = [0xc0, HEADER_BYTES as u8];
/// A chain of CNAMEs longer than this is a loop or a mistake.
const CNAMES_MAX: usize = 8;

/// Answers one message. `out` must hold 512 bytes at least; `turn` rotates the order of several addresses.
pub fn answer(
    zone: &Zone,
    policy: &Policy,
    message: &[u8],
    transport: Transport,
    turn: usize,
    out: &mut [u8],
) -> Verdict {
    let query = match Query::parse(message) {
        Ok(query) => query,
        Err(Bad::Ignore) => return Verdict::Ignore,
        Err(Bad::Format) => return header_only(message, Rcode::FormErr, out),
        Err(Bad::NotImplemented) => return header_only(message, Rcode::NotImp, out),
    };
    let room = match transport {
        Transport::Udp => query.udp_bytes_max(policy.udp_bytes_max),
        Transport::Tcp => usize::from(u16::MAX),
    };
    let room = room.min(out.len());
    let mut writer = Writer::start(&query, policy, &mut out[..room]);
    if query.edns.is_some_and(|edns| edns.version != 0) {
        return writer.finish(Rcode::BadVers);
    }
    if !matches!(query.class, class::IN | class::ANY)
        || matches!(query.rtype, rtype::AXFR | rtype::IXFR)
    {
        return writer.finish(Rcode::Refused);
    }
    let node = zone.find(query.name());
    let Some(apex) = apex_of(zone, policy, query.name(), node.is_some()) else {
        return if policy.forwards {
            Verdict::Forward
        } else {
            writer.finish(Rcode::Refused)
        };
    };
    if !zone.synced() {
        // A name that is missing now may exist: NXDOMAIN would be believed and cached.
        return writer.finish(Rcode::ServFail);
    }
    writer.authoritative = true;
    let at_apex = apex == query.name();
    match node {
        None if !at_apex => {
            writer.soa(zone, apex, policy.ttl_s);
            writer.finish(Rcode::NxDomain)
        }
        None => {
            if !writer.apex_record(zone, query.rtype, apex, policy.ttl_s) {
                writer.soa(zone, apex, policy.ttl_s);
            }
            writer.finish(Rcode::NoError)
        }
        Some(node) => from_node(zone, policy, &query, node, apex, turn, writer),
    }
}

/// The zone that a name belongs to, in wire format: the cluster's, or the tree of reversed addresses, of which nobody
/// else knows more when there is no upstream. `None` for names of others.
fn apex_of<'a>(zone: &'a Zone, policy: &Policy, name: &[u8], known: bool) -> Option<&'a [u8]> {
    const REVERSE: [&[u8]; 2] = [b"\x07in-addr\x04arpa\0", b"\x03ip6\x04arpa\0"];
    if zone.contains(name) {
        return Some(zone.origin().wire());
    }
    REVERSE
        .into_iter()
        .find(|apex| name.ends_with(apex) && (known || !policy.forwards))
}

fn from_node(
    zone: &Zone,
    policy: &Policy,
    query: &Query<'_>,
    node: &Node,
    apex: &[u8],
    turn: usize,
    mut writer: Writer<'_>,
) -> Verdict {
    if query.rtype == rtype::ANY {
        // RFC 8482: one small record in place of all of them.
        writer.hinfo(policy.ttl_s);
        return writer.finish(Rcode::NoError);
    }
    let mut node = node;
    let mut owner: Option<&Name> = None;
    for _ in 0..CNAMES_MAX {
        let target = node.records().find_map(|record| match record {
            Record::Cname(target) => Some(target),
            _ => None,
        });
        let Some(target) = target else { break };
        writer.record(owner, &Record::Cname(target.clone()), policy.ttl_s);
        if query.rtype == rtype::CNAME {
            return writer.finish(Rcode::NoError);
        }
        match zone.find(target.wire()) {
            Some(next) => (node, owner) = (next, Some(target)),
            None if zone.contains(target.wire()) => {
                writer.soa(zone, apex, policy.ttl_s);
                return writer.finish(Rcode::NxDomain);
            }
            None if policy.forwards => {
                let target = target.clone();
                return match writer.finish(Rcode::NoError) {
                    Verdict::Reply { bytes, .. } => Verdict::Chase { bytes, target },
                    other => other,
                };
            }
            None => return writer.finish(Rcode::NoError),
        }
    }
    let wanted = node
        .records()
        .filter(|record| type_of(record) == query.rtype);
    let count = wanted.clone().count();
    if count == 0 {
        if owner.is_none() {
            writer.soa(zone, apex, policy.ttl_s);
        }
        return writer.finish(Rcode::NoError);
    }
    let first = turn % count;
    for record in wanted.clone().skip(first).chain(wanted.clone().take(first)) {
        writer.record(owner, record, policy.ttl_s);
    }
    for record in wanted {
        if let Record::Srv { target, .. } = record {
            for address in zone.addresses(target) {
                writer.additional(target, address, policy.ttl_s);
            }
        }
    }
    writer.finish(Rcode::NoError)
}

fn type_of(record: &Record) -> u16 {
    match record {
        Record::A(_) => rtype::A,
        Record::Aaaa(_) => rtype::AAAA,
        Record::Cname(_) => rtype::CNAME,
        Record::Srv { .. } => rtype::SRV,
        Record::Ptr(_) => rtype::PTR,
        Record::Txt(_) => rtype::TXT,
    }
}

/// An answer with an error and nothing else: the question could not be read, so it is not repeated.
fn header_only(message: &[u8], rcode: Rcode, out: &mut [u8]) -> Verdict {
    out[..HEADER_BYTES].fill(0);
    out[..2].copy_from_slice(&message[..2]);
    out[2] = FLAG_RESPONSE | (message[2] & 0x79);
    out[3] = rcode as u8;
    Verdict::Reply {
        bytes: HEADER_BYTES,
        rcode,
    }
}

/// SERVFAIL for a query that could not be forwarded.
pub fn failure(policy: &Policy, message: &[u8], out: &mut [u8]) -> Verdict {
    match Query::parse(message) {
        Ok(query) => Writer::start(&query, policy, out).finish(Rcode::ServFail),
        Err(_) => Verdict::Ignore,
    }
}

/// Composes a message. What does not fit is left out, and the answer marked as truncated.
struct Writer<'a> {
    out: &'a mut [u8],
    at: usize,
    /// Bytes at the end that are kept for the OPT record.
    reserved: usize,
    answers: u16,
    authorities: u16,
    additionals: u16,
    truncated: bool,
    authoritative: bool,
    recursion_available: bool,
    udp_bytes_max: u16,
}

const OPT_BYTES: usize = 11;
const RECORD_FIXED_BYTES: usize = 10;

impl<'a> Writer<'a> {
    fn start(query: &Query<'_>, policy: &Policy, out: &'a mut [u8]) -> Self {
        out[..HEADER_BYTES].fill(0);
        out[..2].copy_from_slice(&query.id);
        out[2] = FLAG_RESPONSE | u8::from(query.recursion_desired);
        out[5] = 1;
        let at = HEADER_BYTES + query.question.len();
        out[HEADER_BYTES..at].copy_from_slice(query.question);
        Self {
            out,
            at,
            reserved: if query.edns.is_some() { OPT_BYTES } else { 0 },
            answers: 0,
            authorities: 0,
            additionals: 0,
            truncated: false,
            authoritative: false,
            recursion_available: policy.forwards,
            udp_bytes_max: policy.udp_bytes_max.min(usize::from(u16::MAX)) as u16,
        }
    }

    /// Appends all parts or, when they do not fit, nothing.
    fn append(&mut self, parts: &[&[u8]]) -> bool {
        let total: usize = parts.iter().map(|part| part.len()).sum();
        if self.at + total > self.out.len() - self.reserved {
            return false;
        }
        for part in parts {
            self.out[self.at..self.at + part.len()].copy_from_slice(part);
            self.at += part.len();
        }
        true
    }

    fn put(&mut self, owner: &[u8], rtype: u16, ttl_s: u32, data: &[&[u8]]) -> bool {
        let data_bytes: usize = data.iter().map(|part| part.len()).sum();
        let mut fixed = [0; RECORD_FIXED_BYTES];
        fixed[..2].copy_from_slice(&rtype.to_be_bytes());
        fixed[2..4].copy_from_slice(&class::IN.to_be_bytes());
        fixed[4..8].copy_from_slice(&ttl_s.to_be_bytes());
        fixed[8..].copy_from_slice(&(data_bytes as u16).to_be_bytes());
        let empty: &[u8] = &[];
        let part = |i: usize| data.get(i).copied().unwrap_or(empty);
        self.append(&[owner, &fixed, part(0), part(1), part(2), part(3), part(4)])
    }

    fn record(&mut self, owner: Option<&Name>, record: &Record, ttl_s: u32) {
        if self.truncated {
            return;
        }
        let owner = owner.map_or(&NAME_OF_QUESTION[..], Name::wire);
        let rtype = type_of(record);
        let fits = match record {
            Record::A(v4) => self.put(owner, rtype, ttl_s, &[&v4.octets()]),
            Record::Aaaa(v6) => self.put(owner, rtype, ttl_s, &[&v6.octets()]),
            Record::Cname(name) | Record::Ptr(name) => {
                self.put(owner, rtype, ttl_s, &[name.wire()])
            }
            Record::Srv {
                weight,
                port,
                target,
            } => {
                let priority = [0, 0];
                let parts = [
                    &priority[..],
                    &weight.to_be_bytes(),
                    &port.to_be_bytes(),
                    target.wire(),
                ];
                self.put(owner, rtype, ttl_s, &parts)
            }
            Record::Txt(text) => self.put(owner, rtype, ttl_s, &[&[text.len() as u8], text]),
        };
        if fits {
            self.answers += 1;
        } else {
            self.truncated = true;
        }
    }

    /// Addresses of a target, as a courtesy: no truncation when they do not fit (RFC 2181, 9).
    fn additional(&mut self, owner: &Name, address: IpAddr, ttl_s: u32) {
        let fits = match address {
            IpAddr::V4(v4) => self.put(owner.wire(), rtype::A, ttl_s, &[&v4.octets()]),
            IpAddr::V6(v6) => self.put(owner.wire(), rtype::AAAA, ttl_s, &[&v6.octets()]),
        };
        self.additionals += u16::from(fits);
    }

    fn hinfo(&mut self, ttl_s: u32) {
        self.answers +=
            u16::from(self.put(&NAME_OF_QUESTION, rtype::HINFO, ttl_s, &[b"\x07RFC8482\0"]));
    }

    /// SOA or NS of the apex itself; false when another type is asked for.
    fn apex_record(&mut self, zone: &Zone, rtype: u16, apex: &[u8], ttl_s: u32) -> bool {
        match rtype {
            rtype::SOA => {
                self.answers += u16::from(self.put_soa(zone, apex, ttl_s));
                true
            }
            rtype::NS => {
                let fits = self.put(
                    apex,
                    rtype::NS,
                    ttl_s,
                    &[b"\x02ns\x03dns", zone.origin().wire()],
                );
                self.answers += u16::from(fits);
                true
            }
            _ => false,
        }
    }

    /// The SOA that tells how long "no" holds (RFC 2308).
    fn soa(&mut self, zone: &Zone, apex: &[u8], ttl_s: u32) {
        if self.put_soa(zone, apex, ttl_s) {
            self.authorities += 1;
        }
    }

    fn put_soa(&mut self, zone: &Zone, apex: &[u8], ttl_s: u32) -> bool {
        const REFRESH_S: u32 = 7200;
        const RETRY_S: u32 = 1800;
        const EXPIRE_S: u32 = 86_400;
        let mut numbers = [0; 20];
        for (to, number) in
            numbers
                .chunks_exact_mut(4)
                .zip([zone.serial(), REFRESH_S, RETRY_S, EXPIRE_S, ttl_s])
        {
            to.copy_from_slice(&number.to_be_bytes());
        }
        let origin = zone.origin().wire();
        let data = [
            &b"\x02ns\x03dns"[..],
            origin,
            b"\x0ahostmaster",
            origin,
            &numbers,
        ];
        self.put(apex, rtype::SOA, ttl_s, &data)
    }

    fn finish(mut self, rcode: Rcode) -> Verdict {
        if self.reserved > 0 {
            self.reserved = 0;
            let mut opt = [0; OPT_BYTES];
            opt[1..3].copy_from_slice(&rtype::OPT.to_be_bytes());
            opt[3..5].copy_from_slice(&self.udp_bytes_max.to_be_bytes());
            opt[5] = (rcode as u16 >> 4) as u8;
            self.additionals += u16::from(self.append(&[&opt]));
        }
        if self.authoritative && !matches!(rcode, Rcode::ServFail | Rcode::Refused) {
            self.out[2] |= FLAG_AUTHORITATIVE;
        }
        if self.truncated {
            self.out[2] |= FLAG_TRUNCATED;
        }
        if self.recursion_available {
            self.out[3] |= FLAG_RECURSION_AVAILABLE;
        }
        self.out[3] |= rcode as u8 & 0x0f;
        for (at, count) in [
            (6, self.answers),
            (8, self.authorities),
            (10, self.additionals),
        ] {
            self.out[at..at + 2].copy_from_slice(&count.to_be_bytes());
        }
        Verdict::Reply {
            bytes: self.at,
            rcode,
        }
    }
}
