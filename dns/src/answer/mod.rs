//! Answers about the cluster, composed from the zone straight into the buffer that is sent, without allocating.

mod rcode;
mod writer;

pub use rcode::Rcode;
pub(crate) use writer::{HOSTMASTER, NAMESERVER, OPT_BYTES, Section, Writer, opt, soa_numbers};

use crate::name::{Name, in_any};
use crate::query::{Bad, HEADER_BYTES, Query, class, rtype};
use crate::zone::{Node, Place, PodName, Told, Zone};
use writer::{Owner, QUESTION, srv_targets};

/// What an operator can choose of the answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Time to live of the cluster's records, and of "no" about them.
    pub ttl_s: u32,
    /// Names outside the zone are asked for elsewhere, and answers say so (the RA bit).
    pub recursion: bool,
    /// Zones of ours in which what is missing may exist elsewhere.
    pub fallthrough: Vec<Name>,
    /// The server's own bound on UDP answers (DNS flag day 2020).
    pub udp_bytes_max: usize,
    /// Others than the zone know names of the cluster, and are asked first: what an alias leads to is looked up as if it had been asked
    /// for.
    pub others_first: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            ttl_s: 5,
            recursion: false,
            fallthrough: Vec::new(),
            udp_bytes_max: 1232,
            others_first: false,
        }
    }
}

impl Policy {
    fn falls_through(&self, name: &[u8]) -> bool {
        self.recursion && in_any(name, &self.fallthrough)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// What to do with a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send this many bytes of the buffer.
    Reply { bytes: usize, rcode: Rcode },
    /// The zone has nothing to say about it.
    Elsewhere,
    /// The buffer holds an answer that ends in a CNAME whose target is to be looked up by itself: it is out of the zone, or not among
    /// its records.
    Chase { bytes: usize, target: Name },
    /// Say nothing.
    Ignore,
}

/// A chain of CNAMEs longer than this is a loop or a mistake.
pub(crate) const CNAMES_MAX: usize = 8;

/// Reads a message; where that is impossible, or the question is none that anyone here answers, says what to do instead.
/// `out` must hold 512 bytes at least.
pub fn accept<'m>(
    message: &'m [u8],
    policy: &Policy,
    out: &mut [u8],
) -> Result<Query<'m>, Verdict> {
    let query = match Query::parse(message) {
        Ok(query) => query,
        Err(Bad::Ignore) => return Err(Verdict::Ignore),
        Err(Bad::Format) => return Err(header_only(message, Rcode::FormErr, out)),
        Err(Bad::NotImplemented) => return Err(header_only(message, Rcode::NotImp, out)),
    };
    if query.edns.is_some_and(|edns| edns.version != 0) {
        return Err(Writer::start(&query, policy, out).finish(Rcode::BadVers));
    }
    if !matches!(query.class, class::IN | class::ANY) || query.rtype == rtype::IXFR {
        return Err(Writer::start(&query, policy, out).finish(Rcode::Refused));
    }
    Ok(query)
}

/// Bytes that an answer may take.
pub fn room(query: &Query<'_>, policy: &Policy, transport: Transport, out: &[u8]) -> usize {
    let room = match transport {
        Transport::Udp => query.udp_bytes_max(policy.udp_bytes_max),
        Transport::Tcp => usize::from(u16::MAX),
    };
    room.min(out.len())
}

/// Answers a query from the zone. `turn` rotates the order of several records.
pub fn answer(
    zone: &Zone,
    policy: &Policy,
    query: &Query<'_>,
    transport: Transport,
    turn: usize,
    out: &mut [u8],
) -> Verdict {
    let Some(place) = zone.place(query.name()) else {
        return Verdict::Elsewhere;
    };
    let node = zone.node(&place);
    let missing = match node {
        Some(node) => place.reverse && node.is_empty(),
        None => zone.pod(&place) == PodName::No && (place.reverse || !place.before.is_empty()),
    };
    // Of a name that has records here nobody knows better; of reversed addresses others may know also those in between.
    if missing && policy.falls_through(query.name()) {
        return if zone.synced() {
            Verdict::Elsewhere
        } else {
            let room = room(query, policy, transport, out);
            Writer::start(query, policy, &mut out[..room]).finish(Rcode::ServFail)
        };
    }
    let room = room(query, policy, transport, out);
    let mut writer = Writer::start(query, policy, &mut out[..room]);
    if !zone.may_deny(&place) {
        // A name that is missing now may exist: NXDOMAIN would be believed and cached.
        return writer.finish(Rcode::ServFail);
    }
    if query.rtype == rtype::AXFR {
        return writer.finish(Rcode::Refused);
    }
    writer.authoritative = true;
    if !place.reverse {
        writer.origin_after(place.before.len());
    }
    let answering = Answering {
        zone,
        policy,
        place,
        rtype: query.rtype,
        turn,
    };
    if place.before.is_empty() {
        return answering.apex(writer);
    }
    match (node, zone.pod(&place)) {
        (Some(node), _) => answering.at_node(node, writer),
        (None, PodName::Address(address)) => {
            let record = Told::from(address);
            if type_of(record) == query.rtype {
                writer.record(QUESTION, place.apex, record, policy.ttl_s);
            } else {
                answering.no(&mut writer);
            }
            writer.finish(Rcode::NoError)
        }
        (None, PodName::Parent) => {
            answering.no(&mut writer);
            writer.finish(Rcode::NoError)
        }
        (None, PodName::No) => {
            answering.no(&mut writer);
            writer.finish(Rcode::NxDomain)
        }
    }
}

struct Answering<'a> {
    zone: &'a Zone,
    policy: &'a Policy,
    place: Place<'a>,
    rtype: u16,
    turn: usize,
}

/// The Service that NS records name, where it exists; it is called so in every cluster, whoever serves it.
const DNS_SERVICE: &[u8] = b"\x08kube-dns\x0bkube-system\x03svc";

impl Answering<'_> {
    /// The SOA that goes with "no".
    fn no(&self, writer: &mut Writer<'_>) {
        self.soa(writer, Section::Authority);
    }

    fn soa(&self, writer: &mut Writer<'_>, section: Section) {
        writer.soa(
            section,
            self.place.before.len(),
            self.domain(),
            self.zone.serial(),
            self.policy.ttl_s,
        );
    }

    /// The cluster's domain that names in this answer end in.
    fn domain(&self) -> &Name {
        if self.place.reverse {
            self.zone.origin()
        } else {
            self.place.apex
        }
    }

    fn apex(&self, mut writer: Writer<'_>) -> Verdict {
        match self.rtype {
            rtype::SOA => self.soa(&mut writer, Section::Answer),
            rtype::NS => {
                let host = nameserver(self.zone);
                writer.ns([host, self.domain().wire()], self.policy.ttl_s);
            }
            rtype::ANY => writer.hinfo(self.policy.ttl_s),
            _ => self.no(&mut writer),
        }
        writer.finish(Rcode::NoError)
    }

    fn at_node(&self, node: Node<'_>, mut writer: Writer<'_>) -> Verdict {
        let (zone, ttl_s) = (self.zone, self.policy.ttl_s);
        if self.rtype == rtype::ANY && !node.is_empty() {
            writer.hinfo(ttl_s);
            return writer.finish(Rcode::NoError);
        }
        let mut node = node;
        let mut owner = QUESTION;
        let mut aliased = false;
        let mut passed: [&[u8]; CNAMES_MAX] = [&[]; CNAMES_MAX];
        for at in 0..CNAMES_MAX {
            let target = node.records().find_map(|record| match record {
                Told::Cname(target) => Some((record, target)),
                _ => None,
            });
            let Some((record, target)) = target else {
                break;
            };
            // An alias that leads back leads to no data, and is told once: a record twice is none (RFC 2181, 5).
            if passed[..at].contains(&target) {
                break;
            }
            passed[at] = target;
            let target_at = writer.record(owner, self.domain(), record, ttl_s);
            if self.rtype == rtype::CNAME {
                return writer.finish(Rcode::NoError);
            }
            aliased = true;
            owner = target_at.map_or(Owner::Name(target), Owner::At);
            let place = zone.place(target).filter(|place| !place.reverse);
            match place {
                Some(place)
                    if let Some(next) = zone.node(&place)
                        && zone.may_deny(&place)
                        && !self.policy.others_first =>
                {
                    node = next;
                }
                // Whether it exists, others may know better: the rules for a name that is asked for decide, not those for an alias.
                Some(_) => return chase(writer, target),
                None if self.policy.recursion => return chase(writer, target),
                None => return writer.finish(Rcode::NoError),
            }
        }
        let wanted = node
            .records()
            .filter(|record| type_of(*record) == self.rtype);
        let count = wanted.clone().count();
        if count == 0 {
            // With a chain that does not end in data, SOA says as much (RFC 2308, 2.2).
            if !aliased || !writer.is_truncated() {
                self.no(&mut writer);
            }
            return writer.finish(Rcode::NoError);
        }
        let first = self.turn % count;
        let rotated = || wanted.clone().skip(first).chain(wanted.clone().take(first));
        let start = writer.position();
        for record in rotated() {
            writer.record(owner, self.domain(), record, ttl_s);
        }
        if self.rtype == rtype::SRV && !writer.is_truncated() && !aliased {
            for (target, at) in srv_targets(start, self.domain(), rotated()) {
                for address in zone.addresses(target) {
                    writer.additional(Owner::At(at), address, ttl_s);
                }
            }
        }
        writer.finish(Rcode::NoError)
    }
}

/// The name server that NS records name, below the cluster's domain.
pub(crate) fn nameserver(zone: &Zone) -> &'static [u8] {
    if zone.has(DNS_SERVICE) {
        DNS_SERVICE
    } else {
        NAMESERVER
    }
}

/// An answer that goes on elsewhere, unless there is no room for that.
fn chase(writer: Writer<'_>, target: &[u8]) -> Verdict {
    let whole = !writer.is_truncated();
    match writer.finish(Rcode::NoError) {
        Verdict::Reply { bytes, .. } if whole => Verdict::Chase {
            bytes,
            target: Name::from_wire(target),
        },
        other => other,
    }
}

fn type_of(record: Told<'_>) -> u16 {
    match record {
        Told::A(_) => rtype::A,
        Told::Aaaa(_) => rtype::AAAA,
        Told::Cname(_) => rtype::CNAME,
        Told::Srv { .. } => rtype::SRV,
        Told::Ptr(_) => rtype::PTR,
        Told::Txt(_) => rtype::TXT,
    }
}

/// An answer with an error and nothing else: the question could not be read, so it is not repeated.
fn header_only(message: &[u8], rcode: Rcode, out: &mut [u8]) -> Verdict {
    out[..HEADER_BYTES].fill(0);
    out[..2].copy_from_slice(&message[..2]);
    out[2] = 0x80 | (message[2] & 0x79);
    out[3] = rcode as u8;
    Verdict::Reply {
        bytes: HEADER_BYTES,
        rcode,
    }
}

/// Takes everything out of a reply but what says that there is more of it by TCP. Returns the bytes that are left.
pub fn cut(message: &[u8], reply: &mut [u8]) -> usize {
    let flags = [reply[2], reply[3]];
    let Ok(query) = Query::parse(message) else {
        return reply.len();
    };
    let mut out = [0; 512];
    let mut writer = Writer::start(&query, &Policy::default(), &mut out);
    writer.truncate();
    let Verdict::Reply { bytes, .. } = writer.finish(Rcode::NoError) else {
        return reply.len();
    };
    out[2] |= flags[0];
    out[3] = flags[1];
    let bytes = bytes.min(reply.len());
    reply[..bytes].copy_from_slice(&out[..bytes]);
    bytes
}

/// An answer without records, for a query that can't be served.
pub fn failure(policy: &Policy, message: &[u8], rcode: Rcode, out: &mut [u8]) -> Verdict {
    match Query::parse(message) {
        Ok(query) => Writer::start(&query, policy, out).finish(rcode),
        Err(_) => Verdict::Ignore,
    }
}
