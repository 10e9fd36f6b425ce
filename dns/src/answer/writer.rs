//! Composes a message in the buffer that is sent. What does not fit is left out, and the answer marked as truncated.

use std::net::IpAddr;

use super::{Policy, Rcode, Verdict};
use crate::name::Name;
use crate::query::{HEADER_BYTES, Query, class, rtype};
use crate::zone::Told;

const FLAG_RESPONSE: u8 = 0x80;
const FLAG_AUTHORITATIVE: u8 = 0x04;
const FLAG_TRUNCATED: u8 = 0x02;
const FLAG_RECURSION_AVAILABLE: u8 = 0x80;
const FLAG_AUTHENTIC: u8 = 0x20;
const FLAG_CHECKING_DISABLED: u8 = 0x10;
/// The upper bits of a compression pointer (RFC 1035, 4.1.4), and how far one reaches.
const POINTER: u16 = 0xc000;
const POINTER_REACH: usize = 0x3fff;

pub(crate) const OPT_BYTES: usize = 11;
const RECORD_FIXED_BYTES: usize = 10;
/// Type, class, TTL and length, and then priority, weight and port: what stands before an SRV record's target.
const SRV_TARGET_AT: usize = RECORD_FIXED_BYTES + 6;

/// The name that a record belongs to.
#[derive(Clone, Copy)]
pub(super) enum Owner<'a> {
    /// The name at this place of the message.
    At(usize),
    Name(&'a [u8]),
}

/// The name in the question stands right behind the header.
pub(super) const QUESTION: Owner<'static> = Owner::At(HEADER_BYTES);

pub(crate) struct Writer<'a> {
    out: &'a mut [u8],
    at: usize,
    /// Bytes at the end that are kept for the OPT record.
    reserved: usize,
    /// Where the cluster's domain stands in the message, once it does: names below it point there.
    origin_at: Option<usize>,
    counts: [u16; 3],
    truncated: bool,
    pub(crate) authoritative: bool,
    pub(crate) authentic: bool,
    checking_disabled: bool,
    recursion_available: bool,
    udp_bytes_max: u16,
    dnssec_ok: bool,
}

/// A section of a message, in their order.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Section {
    Answer,
    Authority,
    Additional,
}

impl<'a> Writer<'a> {
    /// Begins an answer. `out` holds 512 bytes at least, so that header and question fit.
    pub(crate) fn start(query: &Query<'_>, policy: &Policy, out: &'a mut [u8]) -> Self {
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
            origin_at: None,
            counts: [0; 3],
            truncated: false,
            authoritative: false,
            authentic: false,
            checking_disabled: query.checking_disabled,
            recursion_available: policy.recursion,
            udp_bytes_max: policy.udp_bytes_max.min(usize::from(u16::MAX)) as u16,
            dnssec_ok: query.dnssec_ok(),
        }
    }

    /// Says that the question ends in the cluster's domain, `before` bytes into it.
    pub(super) fn origin_after(&mut self, before: usize) {
        self.origin_at = Some(HEADER_BYTES + before);
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

    fn put(
        &mut self,
        section: Section,
        owner: Owner<'_>,
        rtype: u16,
        ttl_s: u32,
        data: [&[u8]; 4],
    ) -> bool {
        let data_bytes: usize = data.iter().map(|part| part.len()).sum();
        let mut fixed = [0; RECORD_FIXED_BYTES];
        fixed[..2].copy_from_slice(&rtype.to_be_bytes());
        fixed[2..4].copy_from_slice(&class::IN.to_be_bytes());
        fixed[4..8].copy_from_slice(&ttl_s.to_be_bytes());
        fixed[8..].copy_from_slice(&(data_bytes as u16).to_be_bytes());
        let pointer;
        let owner = match owner {
            Owner::At(at) => {
                pointer = (POINTER | at as u16).to_be_bytes();
                &pointer[..]
            }
            Owner::Name(wire) => wire,
        };
        let fits = self.append(&[owner, &fixed, data[0], data[1], data[2], data[3]]);
        if fits {
            self.counts[section as usize] += 1;
        }
        fits
    }

    /// Writes a record and returns where its target stands, for a CNAME to go on from.
    pub(super) fn record(
        &mut self,
        owner: Owner<'_>,
        origin: &Name,
        record: Told<'_>,
        ttl_s: u32,
    ) -> Option<usize> {
        if self.truncated {
            return None;
        }
        let none: &[u8] = &[];
        let section = Section::Answer;
        let start = self.at + owner_bytes(owner);
        let (fits, target_at) = match record {
            Told::A(v4) => {
                let data = [&v4.octets()[..], none, none, none];
                (self.put(section, owner, rtype::A, ttl_s, data), None)
            }
            Told::Aaaa(v6) => {
                let data = [&v6.octets()[..], none, none, none];
                (self.put(section, owner, rtype::AAAA, ttl_s, data), None)
            }
            Told::Cname(name) => {
                let data = [name, none, none, none];
                let fits = self.put(section, owner, rtype::CNAME, ttl_s, data);
                (fits, Some(start + RECORD_FIXED_BYTES))
            }
            Told::Ptr(name) => {
                let fits = self.put_ptr(owner, origin, name, ttl_s);
                (fits, Some(start + RECORD_FIXED_BYTES))
            }
            Told::Srv {
                weight,
                port,
                target,
            } => {
                let mut numbers = [0; 6];
                numbers[2..4].copy_from_slice(&weight.to_be_bytes());
                numbers[4..].copy_from_slice(&port.to_be_bytes());
                // The target of an SRV record is not compressed (RFC 2782).
                let data = [&numbers[..], target, origin.wire(), none];
                let fits = self.put(section, owner, rtype::SRV, ttl_s, data);
                (fits, Some(start + SRV_TARGET_AT))
            }
            Told::Txt(text) => {
                let length = [text.len() as u8];
                let data = [&length[..], text, none, none];
                (self.put(section, owner, rtype::TXT, ttl_s, data), None)
            }
        };
        self.truncated |= !fits;
        target_at.filter(|at| fits && *at <= POINTER_REACH)
    }

    fn put_ptr(&mut self, owner: Owner<'_>, origin: &Name, name: &[u8], ttl_s: u32) -> bool {
        let none: &[u8] = &[];
        if let Some(at) = self.origin_at {
            let pointer = (POINTER | at as u16).to_be_bytes();
            let data = [name, &pointer, none, none];
            return self.put(Section::Answer, owner, rtype::PTR, ttl_s, data);
        }
        let at = self.at + owner_bytes(owner) + RECORD_FIXED_BYTES + name.len();
        let data = [name, origin.wire(), none, none];
        let fits = self.put(Section::Answer, owner, rtype::PTR, ttl_s, data);
        if fits && at <= POINTER_REACH {
            self.origin_at = Some(at);
        }
        fits
    }

    /// An address of a target, as a courtesy: no truncation when it does not fit (RFC 2181, 9).
    pub(super) fn additional(&mut self, owner: Owner<'_>, address: IpAddr, ttl_s: u32) {
        let none: &[u8] = &[];
        match address {
            IpAddr::V4(v4) => {
                let data = [&v4.octets()[..], none, none, none];
                self.put(Section::Additional, owner, rtype::A, ttl_s, data)
            }
            IpAddr::V6(v6) => {
                let data = [&v6.octets()[..], none, none, none];
                self.put(Section::Additional, owner, rtype::AAAA, ttl_s, data)
            }
        };
    }

    /// One small record in place of all of a name (RFC 8482).
    pub(super) fn hinfo(&mut self, ttl_s: u32) {
        let none: &[u8] = &[];
        let data = [&b"\x07RFC8482\0"[..], none, none, none];
        self.put(Section::Answer, QUESTION, rtype::HINFO, ttl_s, data);
    }

    pub(super) fn ns(&mut self, host: [&[u8]; 2], ttl_s: u32) {
        let none: &[u8] = &[];
        let data = [host[0], host[1], none, none];
        self.truncated |= !self.put(Section::Answer, QUESTION, rtype::NS, ttl_s, data);
    }

    /// The SOA of `apex`, which stands `apex_at` bytes into the question. In the authority section it tells how long "no"
    /// holds (RFC 2308).
    pub(super) fn soa(
        &mut self,
        section: Section,
        apex_at: usize,
        origin: &Name,
        serial: u32,
        ttl_s: u32,
    ) {
        let data = soa_numbers(serial, ttl_s);
        let owner = Owner::At(HEADER_BYTES + apex_at);
        // Both names end in the cluster's domain: in the question where that is what was asked about, else in the first.
        let start = self.at + 2 + RECORD_FIXED_BYTES + NAMESERVER.len();
        let origin_at = self.origin_at.unwrap_or(start);
        let pointer = (POINTER | origin_at as u16).to_be_bytes();
        let first = match self.origin_at {
            Some(_) => &pointer[..],
            None => origin.wire(),
        };
        let fits = if start <= POINTER_REACH {
            let mut second = [0; HOSTMASTER.len() + 2];
            second[..HOSTMASTER.len()].copy_from_slice(HOSTMASTER);
            second[HOSTMASTER.len()..].copy_from_slice(&pointer);
            let parts = [NAMESERVER, first, &second, &data];
            self.put(section, owner, rtype::SOA, ttl_s, parts)
        } else {
            false
        };
        self.truncated |= !fits && section == Section::Answer;
    }

    /// A record that is already in wire format but for its owner, which is the question's name; for other parts of the server.
    pub(crate) fn raw(&mut self, rtype: u16, ttl_s: u32, data: &[u8]) {
        let none: &[u8] = &[];
        let parts = [data, none, none, none];
        self.truncated |= !self.put(Section::Answer, QUESTION, rtype, ttl_s, parts);
    }

    /// Room for more sections, before the OPT record.
    pub(crate) fn room(&self) -> usize {
        self.out.len() - self.reserved - self.at
    }

    /// Appends whole records of a section, copied from elsewhere.
    pub(crate) fn copy(&mut self, section: Section, records: u16, wire: &[u8]) -> Option<usize> {
        let at = self.at;
        self.append(&[wire]).then(|| {
            self.counts[section as usize] += records;
            at
        })
    }

    /// The message so far, to mend what was copied.
    pub(crate) fn written(&mut self) -> &mut [u8] {
        &mut self.out[..self.at]
    }

    pub(crate) fn truncate(&mut self) {
        self.truncated = true;
    }

    pub(crate) fn is_truncated(&self) -> bool {
        self.truncated
    }

    pub(crate) fn finish(mut self, rcode: Rcode) -> Verdict {
        if self.reserved > 0 {
            self.reserved = 0;
            let opt = opt(self.udp_bytes_max.into(), self.dnssec_ok, rcode);
            self.counts[Section::Additional as usize] += u16::from(self.append(&[&opt]));
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
        if self.authentic {
            self.out[3] |= FLAG_AUTHENTIC;
        }
        if self.checking_disabled {
            self.out[3] |= FLAG_CHECKING_DISABLED;
        }
        self.out[3] |= rcode as u8 & 0x0f;
        for (count, at) in self.counts.iter().zip([6, 8, 10]) {
            self.out[at..at + 2].copy_from_slice(&count.to_be_bytes());
        }
        Verdict::Reply {
            bytes: self.at,
            rcode,
        }
    }
}

/// The OPT record of an answer.
pub(crate) fn opt(udp_bytes_max: usize, dnssec_ok: bool, rcode: Rcode) -> [u8; OPT_BYTES] {
    let udp_bytes_max = u16::try_from(udp_bytes_max).unwrap_or(u16::MAX);
    let mut opt = [0; OPT_BYTES];
    opt[1..3].copy_from_slice(&rtype::OPT.to_be_bytes());
    opt[3..5].copy_from_slice(&udp_bytes_max.to_be_bytes());
    opt[5] = (rcode as u16 >> 4) as u8;
    opt[7] = if dnssec_ok { 0x80 } else { 0 };
    opt
}

fn owner_bytes(owner: Owner<'_>) -> usize {
    match owner {
        Owner::At(_) => 2,
        Owner::Name(wire) => wire.len(),
    }
}

/// First labels of the zone's name server and mailbox, as CoreDNS names them.
pub(crate) const NAMESERVER: &[u8] = b"\x02ns\x03dns";
pub(crate) const HOSTMASTER: &[u8] = b"\x0ahostmaster";

/// What follows the names in an SOA record.
pub(crate) fn soa_numbers(serial: u32, ttl_s: u32) -> [u8; 20] {
    const REFRESH_S: u32 = 7200;
    const RETRY_S: u32 = 1800;
    const EXPIRE_S: u32 = 86_400;
    let mut numbers = [0; 20];
    let all = [serial, REFRESH_S, RETRY_S, EXPIRE_S, ttl_s];
    for (to, number) in numbers.chunks_exact_mut(4).zip(all) {
        to.copy_from_slice(&number.to_be_bytes());
    }
    numbers
}

/// Where the target of the `n`th of several SRV records that stand one after another stands.
pub(super) fn srv_targets<'r>(
    start: usize,
    origin: &Name,
    records: impl Iterator<Item = Told<'r>>,
) -> impl Iterator<Item = (&'r [u8], usize)> {
    let tail = origin.wire().len();
    let targets = records.filter_map(|record| match record {
        Told::Srv { target, .. } => Some(target),
        _ => None,
    });
    targets.scan(start, move |at, target| {
        let target_at = *at + 2 + SRV_TARGET_AT;
        *at = target_at + target.len() + tail;
        (target_at <= POINTER_REACH).then_some((target, target_at))
    })
}

impl Writer<'_> {
    /// Bytes written so far.
    pub(super) fn position(&self) -> usize {
        self.at
    }
}
