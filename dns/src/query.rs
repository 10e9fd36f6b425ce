//! Queries as they come from the network: parsed in place, nothing is copied but the lower-case name.

use crate::name::{LABEL_BYTES_MAX, NAME_BYTES_MAX};

/// Bytes of a message's fixed header.
pub const HEADER_BYTES: usize = 12;
/// UDP answers without EDNS (RFC 1035), and the least that EDNS may ask for.
const UDP_BYTES_PLAIN: usize = 512;

/// Record types that are looked at here; any other is a number (IANA "DNS Parameters").
pub mod rtype {
    pub const A: u16 = 1;
    pub const NS: u16 = 2;
    pub const CNAME: u16 = 5;
    pub const SOA: u16 = 6;
    pub const PTR: u16 = 12;
    pub const HINFO: u16 = 13;
    pub const TXT: u16 = 16;
    pub const AAAA: u16 = 28;
    pub const SRV: u16 = 33;
    pub const OPT: u16 = 41;
    pub const IXFR: u16 = 251;
    pub const AXFR: u16 = 252;
    pub const ANY: u16 = 255;
}

/// Record classes that are looked at here.
pub mod class {
    pub const IN: u16 = 1;
    pub const ANY: u16 = 255;
}

/// A query with one question.
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    pub id: [u8; 2],
    pub recursion_desired: bool,
    /// The client validates by itself, and wants also what would not pass (RFC 4035, 3.2.2).
    pub checking_disabled: bool,
    /// The client understands the AD bit (RFC 6840, 5.7).
    pub authentic_data: bool,
    /// The question section, as the client wrote it.
    pub question: &'a [u8],
    name: [u8; NAME_BYTES_MAX],
    name_bytes: usize,
    pub rtype: u16,
    pub class: u16,
    pub edns: Option<Edns>,
}

/// What the client's OPT record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edns {
    pub udp_bytes: usize,
    pub version: u8,
    pub dnssec_ok: bool,
}

/// A message that is not answered from records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// Not a query at all: an answer to it could go round in circles.
    Ignore,
    /// A query that cannot be read.
    Format,
    /// An operation other than a query.
    NotImplemented,
}

impl<'a> Query<'a> {
    /// Parses a message.
    pub fn parse(message: &'a [u8]) -> Result<Self, Bad> {
        let header = message.get(..HEADER_BYTES).ok_or(Bad::Ignore)?;
        let (is_response, opcode) = (header[2] & 0x80 != 0, header[2] >> 3 & 0x0f);
        if is_response {
            return Err(Bad::Ignore);
        }
        if opcode != 0 {
            return Err(Bad::NotImplemented);
        }
        let count = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        if count(4) != 1 {
            return Err(Bad::Format);
        }
        let mut name = [0; NAME_BYTES_MAX];
        let name_bytes = lower_case(&message[HEADER_BYTES..], &mut name).ok_or(Bad::Format)?;
        let end = HEADER_BYTES + name_bytes + 4;
        let question = message.get(HEADER_BYTES..end).ok_or(Bad::Format)?;
        let number = |at: usize| {
            u16::from_be_bytes([question[name_bytes + at], question[name_bytes + at + 1]])
        };
        // Records before the additional section have no business in a query; then there is no looking for OPT.
        let edns = match (count(6), count(8)) {
            (0, 0) => find_edns(&message[end..], count(10))?,
            _ => None,
        };
        Ok(Self {
            id: [header[0], header[1]],
            recursion_desired: header[2] & 1 != 0,
            checking_disabled: header[3] & 0x10 != 0,
            authentic_data: header[3] & 0x20 != 0,
            question,
            name,
            name_bytes,
            rtype: number(0),
            class: number(2),
            edns,
        })
    }

    /// The name asked for, in wire format and lower case.
    pub fn name(&self) -> &[u8] {
        &self.name[..self.name_bytes]
    }

    /// Whether the client asks for DNSSEC records.
    pub fn dnssec_ok(&self) -> bool {
        self.edns.is_some_and(|edns| edns.dnssec_ok)
    }

    /// The most that an answer over UDP may take, with `limit` as the server's own bound.
    pub fn udp_bytes_max(&self, limit: usize) -> usize {
        self.edns.map_or(UDP_BYTES_PLAIN, |edns| {
            edns.udp_bytes
                .clamp(UDP_BYTES_PLAIN, limit.max(UDP_BYTES_PLAIN))
        })
    }
}

/// Copies an uncompressed name in lower case and returns its length; `None` when it is malformed.
fn lower_case(wire: &[u8], out: &mut [u8; NAME_BYTES_MAX]) -> Option<usize> {
    let mut bytes = 0;
    loop {
        let length = usize::from(*wire.get(bytes)?);
        // Longer "lengths" are compression pointers and extended labels: a question has nothing to point back to.
        if length > LABEL_BYTES_MAX {
            return None;
        }
        bytes += 1 + length;
        if length == 0 {
            break;
        }
    }
    let (to, from) = (out.get_mut(..bytes)?, wire.get(..bytes)?);
    to.copy_from_slice(from);
    // Lengths come before every letter in ASCII, so that the whole can be done at once.
    to.make_ascii_lowercase();
    Some(bytes)
}

/// Finds the OPT record among the additional ones (RFC 6891): at most one, with the root as its name.
fn find_edns(mut section: &[u8], count: u16) -> Result<Option<Edns>, Bad> {
    const FIXED_BYTES: usize = 10;
    let mut found = None;
    for _ in 0..count {
        let name_bytes = skip_name(section).ok_or(Bad::Format)?;
        let fixed = section
            .get(name_bytes..name_bytes + FIXED_BYTES)
            .ok_or(Bad::Format)?;
        let number = |at: usize| u16::from_be_bytes([fixed[at], fixed[at + 1]]);
        if number(0) == rtype::OPT {
            if found.is_some() || name_bytes != 1 {
                return Err(Bad::Format);
            }
            let dnssec_ok = fixed[6] & 0x80 != 0;
            found = Some(Edns {
                udp_bytes: usize::from(number(2)),
                version: fixed[5],
                dnssec_ok,
            });
        }
        let next = name_bytes + FIXED_BYTES + usize::from(number(8));
        section = section.get(next..).ok_or(Bad::Format)?;
    }
    Ok(found)
}

/// The length of the name at the start of `wire`, compressed or not; `None` when it is malformed.
pub fn skip_name(wire: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        match *wire.get(at)? {
            0 => return Some(at + 1),
            length if usize::from(length) <= LABEL_BYTES_MAX => at += 1 + usize::from(length),
            length if length >= 0xc0 => return Some(at + 2),
            _ => return None,
        }
    }
}
