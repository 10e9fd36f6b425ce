//! The nodes of a zone as the bytes that they are kept in: how many names are below, and records by who contributed them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::name::{Name, Relative};
use crate::plan::Record;

/// A record as it is kept; names are in wire format, relative ones without the origin that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told<'a> {
    A(Ipv4Addr),
    Aaaa(Ipv6Addr),
    Cname(&'a [u8]),
    Srv {
        weight: u16,
        port: u16,
        target: &'a [u8],
    },
    Ptr(&'a [u8]),
    /// One character string.
    Txt(&'a [u8]),
}

impl From<IpAddr> for Told<'_> {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => Told::A(v4),
            IpAddr::V6(v6) => Told::Aaaa(v6),
        }
    }
}

impl From<Told<'_>> for Record {
    fn from(told: Told<'_>) -> Self {
        match told {
            Told::A(v4) => Record::A(v4),
            Told::Aaaa(v6) => Record::Aaaa(v6),
            Told::Cname(target) => Record::Cname(Name::from_wire(target)),
            Told::Srv {
                weight,
                port,
                target,
            } => Record::Srv {
                weight,
                port,
                target: Relative::from_wire(target),
            },
            Told::Ptr(target) => Record::Ptr(Relative::from_wire(target)),
            Told::Txt(text) => Record::Txt(text.into()),
        }
    }
}

const A: u8 = 1;
const AAAA: u8 = 2;
const CNAME: u8 = 3;
const SRV: u8 = 4;
const PTR: u8 = 5;
const TXT: u8 = 6;

/// Adds a record. Names and strings have 255 bytes at most.
fn put(out: &mut Vec<u8>, record: &Record) {
    let (kind, text) = match record {
        Record::A(v4) => {
            out.push(A);
            return out.extend(v4.octets());
        }
        Record::Aaaa(v6) => {
            out.push(AAAA);
            return out.extend(v6.octets());
        }
        Record::Srv {
            weight,
            port,
            target,
        } => {
            out.push(SRV);
            out.extend(weight.to_be_bytes());
            out.extend(port.to_be_bytes());
            out.push(target.wire().len() as u8);
            return out.extend_from_slice(target.wire());
        }
        Record::Cname(target) => (CNAME, target.wire()),
        Record::Ptr(target) => (PTR, target.wire()),
        Record::Txt(text) => (TXT, &text[..]),
    };
    out.extend([kind, text.len() as u8]);
    out.extend_from_slice(text);
}

/// The records of one object at one name, as they are kept.
pub fn pack(records: &[Record]) -> Vec<u8> {
    let mut out = Vec::new();
    for record in records {
        put(&mut out, record);
    }
    out
}

/// Reads records one after another.
#[derive(Clone)]
pub struct Records<'a>(&'a [u8]);

impl<'a> Records<'a> {
    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*bytes)
    }

    fn text(&mut self) -> Option<&'a [u8]> {
        let [length] = self.bytes()?;
        let (text, rest) = self.0.split_at_checked(usize::from(length))?;
        self.0 = rest;
        Some(text)
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Told<'a>;

    fn next(&mut self) -> Option<Told<'a>> {
        let [kind] = self.bytes()?;
        Some(match kind {
            A => Told::A(self.bytes::<4>()?.into()),
            AAAA => Told::Aaaa(self.bytes::<16>()?.into()),
            CNAME => Told::Cname(self.text()?),
            SRV => Told::Srv {
                weight: u16::from_be_bytes(self.bytes()?),
                port: u16::from_be_bytes(self.bytes()?),
                target: self.text()?,
            },
            PTR => Told::Ptr(self.text()?),
            _ => Told::Txt(self.text()?),
        })
    }
}

/// What one object contributed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Set<'a> {
    /// The object's number.
    pub by: u32,
    pub packed: &'a [u8],
}

impl<'a> Set<'a> {
    pub fn records(self) -> Records<'a> {
        Records(self.packed)
    }
}

/// Reads what objects contributed one after another.
#[derive(Clone)]
pub struct Sets<'a>(&'a [u8]);

impl<'a> Iterator for Sets<'a> {
    type Item = Set<'a>;

    fn next(&mut self) -> Option<Set<'a>> {
        let (by, rest) = self.0.split_first_chunk()?;
        let (length, rest) = rest.split_first_chunk()?;
        let (packed, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        self.0 = rest;
        let by = u32::from_le_bytes(*by);
        Some(Set { by, packed })
    }
}

/// One name of the tree: with records, or only because there is something below it (RFC 8020).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Node<'a> {
    /// Names with records below this one.
    pub(super) below: u32,
    sets: &'a [u8],
}

impl<'a> Node<'a> {
    pub(super) fn read(bytes: &'a [u8]) -> Self {
        match bytes.split_first_chunk() {
            Some((below, sets)) => Self {
                below: u32::from_le_bytes(*below),
                sets,
            },
            None => Self {
                below: 0,
                sets: &[],
            },
        }
    }

    /// Says how many names with records are below a node, where it is kept.
    pub(super) fn set_below(bytes: &mut [u8], below: u32) {
        if let Some(there) = bytes.first_chunk_mut() {
            *there = below.to_le_bytes();
        }
    }

    /// A node with these.
    pub(super) fn write(below: u32, sets: impl Iterator<Item = Set<'a>>) -> Vec<u8> {
        let mut out = below.to_le_bytes().to_vec();
        for set in sets {
            out.extend(set.by.to_le_bytes());
            out.extend((set.packed.len() as u32).to_le_bytes());
            out.extend_from_slice(set.packed);
        }
        out
    }

    /// What each object contributed: two Services may share an endpoint, and so a PTR name.
    pub(super) fn sets(self) -> Sets<'a> {
        Sets(self.sets)
    }

    /// The records of this name, each once.
    pub fn records(self) -> impl Iterator<Item = Told<'a>> + Clone {
        self.sets().enumerate().flat_map(move |(i, set)| {
            let told = move |record| {
                self.sets()
                    .take(i)
                    .any(|set| set.records().any(|other| other == record))
            };
            set.records().filter(move |record| !told(*record))
        })
    }

    /// Whether the name exists only because of what is below it.
    pub fn is_empty(self) -> bool {
        self.sets.is_empty()
    }

    pub(super) fn is_unused(self) -> bool {
        self.below == 0 && self.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_what_was_put_and_each_is_told_once() {
        let target = Relative::origin().child("web", 15).expect("a name");
        let all = [
            Record::A(Ipv4Addr::new(10, 0, 0, 1)),
            Record::Aaaa(Ipv6Addr::LOCALHOST),
            Record::Cname(Name::parse("a.example").expect("a name")),
            Record::Srv {
                weight: 3,
                port: 443,
                target: target.clone(),
            },
            Record::Ptr(target),
            Record::Txt(b"1.1.0".to_vec()),
        ];
        let (packed, again) = (pack(&all), pack(&all[1..3]));
        let sets = [
            Set {
                by: 1,
                packed: &packed,
            },
            Set {
                by: 7,
                packed: &again,
            },
        ];
        let mut bytes = Node::write(2, sets.into_iter());
        Node::set_below(&mut bytes, 3);
        let node = Node::read(&bytes);
        assert_eq!(node.below, 3);
        assert!(node.sets().eq(sets));
        let told: Vec<Record> = node.records().map(Record::from).collect();
        assert_eq!(told, all);
    }
}
