//! Reading packets. [`Packet`] is the seam: a socket buffer in the kernel, a vector in tests.

mod ipv4;
pub(crate) mod ipv6;

use dataplane_abi::{FlowKey, FragmentKey, Plain, proto};

use crate::{crc32c, reject, translate};

/// Length of an Ethernet header; the IP header lies behind it.
pub const ETH_LEN: usize = 14;
/// Length of an IPv4 header without options.
pub const IPV4_LEN: usize = 20;
/// Length of an IPv6 header without extensions.
pub const IPV6_LEN: usize = 40;
/// Offset of its addresses.
pub(crate) const IPV6_ADDRESSES: usize = 8;

/// Offsets of transport headers are below this: what four extension headers of the greatest length come to.
const L4_MASK: usize = (1 << 14) - 1;

const ETHERTYPE_OFFSET: usize = 12;
const ETHERTYPE_IPV4: u16 = u16::from_ne_bytes([0x08, 0x00]);
const ETHERTYPE_IPV6: u16 = u16::from_ne_bytes([0x86, 0xdd]);

/// Types of ICMP messages (RFC 792), and of ICMPv6 (RFC 4443).
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST_V6: u8 = 128;
const ECHO_REPLY_V6: u8 = 129;

/// Offset in a TCP header of its own length; flags follow.
const TCP_WORDS: usize = 12;

/// TCP flag bits.
pub mod tcp_flag {
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const ACK: u8 = 16;
}

/// Length of SCTP's common header (RFC 9260): ports, verification tag, checksum; chunks follow.
pub const SCTP_LEN: usize = 12;
/// Offset of that checksum.
pub(crate) const SCTP_CHECKSUM: usize = 8;

/// Types of SCTP's chunks.
pub mod sctp_chunk {
    pub const DATA: u8 = 0;
    pub const INIT: u8 = 1;
    pub const INIT_ACK: u8 = 2;
    pub const ABORT: u8 = 6;
    pub const SHUTDOWN: u8 = 7;
    pub const SHUTDOWN_ACK: u8 = 8;
    pub const SHUTDOWN_COMPLETE: u8 = 14;
}

/// A packet that starts with an Ethernet header.
pub trait Packet: Sized {
    /// The bytes at `offset`, as they lie in memory, when the packet has them.
    fn read<T: Plain>(&self, offset: usize) -> Option<T>;

    /// Replaces the bytes at `offset`; false when the packet is too short or cannot be written.
    #[must_use]
    fn write<T: Plain>(&mut self, offset: usize, value: &T) -> bool;
    /// As [`Packet::write`], where no checksum of the packet changes against what is written: a sum over all of it that hardware has told
    /// (CHECKSUM_COMPLETE) does.
    #[must_use]
    #[inline(always)]
    fn put<T: Plain>(&mut self, offset: usize, value: &T) -> bool {
        self.write(offset, value)
    }

    /// Corrects the TCP, UDP or ICMP checksum at `offset` for a change of what it covers.
    #[must_use]
    fn patch_checksum(&mut self, offset: usize, change: ChecksumChange) -> bool;

    /// [`crc32c::change`], made where it costs least: its steps are many.
    fn crc32c_change(&self, difference: u32, len: u32) -> u32 {
        crc32c::change(difference, len)
    }

    /// Makes the packet `len` bytes long, filling with zeros or cutting at the end.
    #[must_use]
    fn resize(&mut self, len: u32) -> bool;

    /// [`translate::translate`] and [`reject::reject`]: functions of the packet, so that a kernel's can be judged by themselves, once for
    /// all that call them.
    #[must_use]
    fn translate<const V6: bool>(&mut self, ip: &Ip, to: &FlowKey) -> bool {
        translate::translate::<V6, Self>(self, ip, to)
    }
    #[must_use]
    fn refuse<const V6: bool>(&mut self, ip: &Ip) -> bool {
        reject::reject::<V6, Self>(self, ip)
    }
}

/// A change to account for in a transport checksum.
#[derive(Clone, Copy, Debug)]
pub struct ChecksumChange {
    /// [`crate::checksum::difference`] of the words that changed.
    pub difference: u32,
    /// The words are of the pseudo header (addresses). A checksum that hardware is yet to complete holds those only.
    pub pseudo_header: bool,
    /// Zero means "none" and stays (UDP over IPv4).
    pub optional: bool,
}

impl ChecksumChange {
    /// What a whole checksum becomes.
    #[inline(always)]
    pub fn applied_to(self, field: u16) -> u16 {
        if field == 0 && self.optional {
            return 0;
        }
        match crate::checksum::updated(field, self.difference) {
            0 if self.optional => 0xffff,
            patched => patched,
        }
    }
}

/// Whether a packet is a fragment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fragment {
    Whole,
    /// Has the transport header.
    First,
    /// Has none: ports in the key are 0.
    Later,
}

/// Whether a packet is an ICMP echo.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Echo {
    None,
    /// Its identifier is the key's source port; the other is 0.
    Request,
    /// Its identifier is the key's destination port; the other is 0.
    Reply,
}

/// A packet's coordinates.
#[derive(Clone, Copy, Debug)]
pub struct Ip {
    /// Ports are 0 where the protocol has none or the fragment does not hold them.
    pub key: FlowKey,
    /// Offset of the transport header; see [`Ip::l4`].
    l4: usize,
    pub fragment: Fragment,
    /// Identification, network order; 16 bits in IPv4.
    pub id: u32,
    /// TCP's flags, and SCTP's chunks in TCP's terms; 0 for other protocols.
    pub tcp_flags: u8,
    /// IPv4 header checksum as it lies in memory; 0 for IPv6, which has none.
    pub checksum: u16,
    /// Bytes from the start of the IP header on, host order; 0 for an IPv6 packet that does not say.
    pub total_len: u32,
    pub echo: Echo,
}

/// What a packet turned out to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Parsed {
    /// Its coordinates are known.
    Ip,
    /// Neither IPv4 nor IPv6, or not of the family that was asked for: left alone.
    Other,
    /// IP by its type, but its headers are cut short or contradict themselves.
    Malformed,
}

/// Whether a packet says that it is IPv6.
#[inline(always)]
pub fn is_ipv6<P: Packet>(packet: &P) -> bool {
    packet.read::<u16>(ETHERTYPE_OFFSET) == Some(ETHERTYPE_IPV6)
}

/// Reads the headers of a packet of one family into `ip`.
#[inline(always)]
pub fn parse<const V6: bool, P: Packet>(packet: &P, ip: &mut Ip) -> Parsed {
    let parsed = match packet.read::<u16>(ETHERTYPE_OFFSET) {
        Some(ETHERTYPE_IPV4) if !V6 => ipv4::parse(packet, ip),
        Some(ETHERTYPE_IPV6) if V6 => ipv6::parse(packet, ip),
        _ => return Parsed::Other,
    };
    match parsed {
        Some(()) => Parsed::Ip,
        None => Parsed::Malformed,
    }
}

/// What is read of a transport header; nothing of protocols without ports.
#[derive(Clone, Copy)]
struct Transport {
    ports: [u16; 2],
    tcp_flags: u8,
    echo: Echo,
    /// Bytes that the header has at least.
    needed: usize,
}

impl Transport {
    const NONE: Self = Self {
        ports: [0; 2],
        tcp_flags: 0,
        echo: Echo::None,
        needed: 0,
    };
}

#[inline(always)]
fn transport<const V6: bool, P: Packet>(
    packet: &P,
    l4: usize,
    protocol: u8,
    fragment: Fragment,
) -> Option<Transport> {
    let mut read = Transport::NONE;
    if matches!(fragment, Fragment::Later) {
        return Some(read);
    }
    match protocol {
        proto::TCP => {
            read.ports = packet.read(l4)?;
            // The rest of a TCP header may lie in the next fragment, but no sender does that: RFC 1858, 8 bytes least.
            read.tcp_flags = packet.read::<u8>(l4 + 13)?;
            read.needed = 20;
        }
        proto::UDP => {
            read.ports = packet.read(l4)?;
            read.needed = 8;
        }
        proto::SCTP => {
            read.ports = packet.read(l4)?;
            // The first chunk is the only one, or says what the packet is about. Two bytes: see `icmp::is_discovery`.
            let [chunk, _flags] = packet.read::<[u8; 2]>(l4 + SCTP_LEN)?;
            read.tcp_flags = in_tcp_terms(chunk);
            read.needed = SCTP_LEN + 4;
        }
        _ if protocol == proto::icmp(V6) => {
            (read.ports, read.echo) = echo::<V6, P>(packet, l4);
        }
        _ => {}
    }
    Some(read)
}

/// Whether Services are spoken over a protocol.
#[inline(always)]
pub(crate) const fn has_ports(protocol: u8) -> bool {
    matches!(protocol, proto::TCP | proto::UDP | proto::SCTP)
}

/// The identifier of the ICMP echo at `l4` in the place of a port, and what it is.
#[inline(always)]
pub(crate) fn echo<const V6: bool, P: Packet>(packet: &P, l4: usize) -> ([u16; 2], Echo) {
    // Type and code, checksum, identifier.
    let message = packet.read::<[u16; 3]>(l4).unwrap_or([u16::MAX; 3]);
    let [kind, _code] = message[0].to_ne_bytes();
    let (request, reply) = if V6 {
        (ECHO_REQUEST_V6, ECHO_REPLY_V6)
    } else {
        (ECHO_REQUEST, ECHO_REPLY)
    };
    if kind == request {
        ([message[2], 0], Echo::Request)
    } else if kind == reply {
        ([0, message[2]], Echo::Reply)
    } else {
        ([0, 0], Echo::None)
    }
}

/// What a chunk of SCTP is to an association, as the flags of the segment that is the same to a TCP connection.
#[inline(always)]
const fn in_tcp_terms(chunk: u8) -> u8 {
    match chunk {
        sctp_chunk::INIT => tcp_flag::SYN,
        sctp_chunk::INIT_ACK => tcp_flag::SYN | tcp_flag::ACK,
        sctp_chunk::ABORT => tcp_flag::RST,
        sctp_chunk::SHUTDOWN | sctp_chunk::SHUTDOWN_ACK | sctp_chunk::SHUTDOWN_COMPLETE => {
            tcp_flag::FIN | tcp_flag::ACK
        }
        _ => tcp_flag::ACK,
    }
}

/// Two 16-bit words of memory as one of 32 bits of memory.
#[inline(always)]
pub const fn word(first: u16, second: u16) -> u32 {
    let (a, b) = (first.to_ne_bytes(), second.to_ne_bytes());
    u32::from_ne_bytes([a[0], a[1], b[0], b[1]])
}

impl Ip {
    /// Of no packet yet.
    pub const NONE: Self = Self {
        key: FlowKey::NONE,
        l4: 0,
        fragment: Fragment::Whole,
        id: 0,
        tcp_flags: 0,
        checksum: 0,
        total_len: 0,
        echo: Echo::None,
    };

    /// Offset of the transport header. Where it was read back from memory, the verifier knows of no bound but this.
    #[inline(always)]
    pub fn l4(&self) -> usize {
        self.l4 & L4_MASK
    }

    /// The key under which the datagram's ports are remembered.
    #[inline(always)]
    pub fn fragment_key(&self) -> FragmentKey {
        FragmentKey {
            src: self.key.src,
            dst: self.key.dst,
            id: self.id,
            proto: self.key.proto,
            pad: 0,
            pad2: 0,
        }
    }

    /// Whether it is of a connection, which has a beginning and an end.
    #[inline(always)]
    pub fn is_of_connection(&self) -> bool {
        matches!(self.key.proto, proto::TCP | proto::SCTP)
    }

    /// Whether Services are spoken over the packet's protocol.
    #[inline(always)]
    pub fn has_ports(&self) -> bool {
        has_ports(self.key.proto)
    }

    #[inline(always)]
    pub fn is_echo(&self) -> bool {
        !matches!(self.echo, Echo::None)
    }

    /// Whether it may be the first of a flow: an opening of a connection, or any datagram, of which none is said to be the first.
    #[inline(always)]
    pub fn may_be_first(&self) -> bool {
        self.key.proto == proto::UDP || self.is_syn()
    }

    /// Bytes of its headers, from the IP header on, where they are those of each packet that hardware cuts it into.
    #[inline(always)]
    pub fn headers_len<P: Packet>(&self, packet: &P) -> Option<u32> {
        let transport = match self.key.proto {
            proto::TCP => {
                // Two bytes: see `icmp::is_discovery`. The upper half of the first counts words of the header.
                let [words, _flags] = packet.read::<[u8; 2]>(self.l4() + TCP_WORDS)?;
                (words as u32 & 0xf0) >> 2
            }
            proto::UDP => 8,
            _ => return None,
        };
        Some((self.l4() - ETH_LEN) as u32 + transport)
    }

    /// Whether it is a TCP segment that acknowledges, and does nothing else.
    #[inline(always)]
    pub fn is_bare_ack<P: Packet>(&self, packet: &P) -> bool {
        const OTHERS: u8 = tcp_flag::SYN | tcp_flag::FIN | tcp_flag::RST;
        if self.key.proto != proto::TCP
            || self.tcp_flags & (OTHERS | tcp_flag::ACK) != tcp_flag::ACK
        {
            return false;
        }
        let headers = self.headers_len(packet);
        matches!(self.fragment, Fragment::Whole) && headers == Some(self.total_len)
    }

    /// Whether it opens a connection.
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.is_of_connection() && self.tcp_flags & (tcp_flag::SYN | tcp_flag::ACK) == tcp_flag::SYN
    }
}

#[cfg(test)]
mod tests;
