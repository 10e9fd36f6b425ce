//! Answers to questions for the addresses of cluster names, put in the place of the question. What is not exactly such a question is left
//! to the server: another type or class, a name that is not in the map, more than one question, an unusual EDNS record.
//!
//! The same answers as the server's (`keelway-dns`, `answer`), byte for byte but for the order of addresses and the serial. Nothing is
//! composed in memory: the name stays where it is, and records are written behind it.
//!
//! What can be said without a branch is: the verifier follows each to the end.

use dataplane_abi::{
    Addr, DNS_ADDRESSES, DNS_NAME_BYTES, DnsZone, NameAddresses, NameKey, name_key, proto,
};

use crate::{
    checksum,
    packet::{ETH_LEN, IPV4_LEN, IPV6_LEN, Packet, is_ipv6, word},
};

/// Bytes of the header of a message.
pub const HEADER_BYTES: usize = 12;
/// Room for a question's name and what follows it: a power of two, so that an index can be kept inside by a mask, which is what the
/// verifier asks for.
pub const TEXT_BYTES: usize = 512;
/// The most that is looked at behind the header: a name, and an EDNS record with some options.
pub const TEXT_BYTES_MAX: usize = 400;
/// Labels of the longest name that is looked at; those of endpoints have six with a domain of two.
const LABELS_MAX: usize = 12;
const LABEL_BYTES_MAX: usize = 63;
const UDP_LEN: usize = 8;
const DNS_PORT: u16 = 53_u16.to_be();

const A_BYTES: usize = 16;
const AAAA_BYTES: usize = 28;
const SOA_BYTES: usize = 54;
const OPT_BYTES: usize = 11;

const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const TYPE_OPT: u16 = 41;
const CLASS_IN: u16 = 1;

// No answer is ever cut, whatever the client can take.
const _: () =
    assert!(HEADER_BYTES + DNS_NAME_BYTES + 4 + DNS_ADDRESSES * AAAA_BYTES + OPT_BYTES <= 512);
const _: () = assert!(DNS_ADDRESSES.is_power_of_two() && TEXT_BYTES_MAX < TEXT_BYTES);

/// What stands behind a message's header, as words of its bytes, the first in the lowest bits.
#[derive(Clone, Debug)]
pub struct Text {
    pub words: [u64; TEXT_BYTES / 8],
}

impl Text {
    #[inline(always)]
    fn word(&self, i: usize) -> u64 {
        u64::from_le(self.words[i & (TEXT_BYTES / 8 - 1)])
    }

    #[inline(always)]
    fn byte(&self, at: usize) -> u8 {
        (self.word(at >> 3) >> ((at & 7) * 8)) as u8
    }

    #[inline(always)]
    fn number(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.byte(at), self.byte(at + 1)])
    }
}

/// What stands before a question: whose it is, and to whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Envelope {
    /// Where the message begins: behind an IPv4 header, or an IPv6 one.
    pub message_at: usize,
    pub client: Addr,
    pub server: Addr,
    client_port: u16,
    /// Bytes of the message behind its header, below [`TEXT_BYTES`].
    pub text_bytes: usize,
    /// The message's header in memory.
    header: [u16; HEADER_BYTES / 2],
}

/// Where messages begin: below [`MESSAGE_AT_LIMIT`].
const MESSAGE_AT: usize = ETH_LEN + IPV4_LEN + UDP_LEN;
const MESSAGE_AT_V6: usize = ETH_LEN + IPV6_LEN + UDP_LEN;
pub const MESSAGE_AT_LIMIT: usize = 64;
const _: () = assert!(MESSAGE_AT_V6 < MESSAGE_AT_LIMIT);

impl Envelope {
    /// Where the message's name begins.
    #[inline(always)]
    pub fn text_at(&self) -> usize {
        self.message_at + HEADER_BYTES
    }
}

/// Reads what stands before a question: a whole UDP datagram to port 53 without IP options, a query of the usual kind, with one
/// question, no records, and EDNS at most behind it. `packet_bytes` is the whole packet's length.
#[inline(always)]
pub fn open<P: Packet>(packet: &P, packet_bytes: usize) -> Option<Envelope> {
    let (at, client, server, protocol) = if is_ipv6(packet) {
        let addresses = packet.read::<[[u16; 8]; 2]>(ETH_LEN + 8)?;
        let next: u8 = packet.read(ETH_LEN + 6)?;
        (
            MESSAGE_AT_V6,
            address(addresses[0]),
            address(addresses[1]),
            next,
        )
    } else {
        let version: u8 = packet.read(ETH_LEN)?;
        let fragment = u16::from_be(packet.read(ETH_LEN + 6)?) & 0x3fff;
        if version != 0x45 || fragment != 0 {
            return None;
        }
        let protocol: u8 = packet.read(ETH_LEN + 9)?;
        let [a, b, c, d]: [u16; 4] = packet.read(ETH_LEN + 12)?;
        (
            MESSAGE_AT,
            Addr::from_v4_be(word(a, b)),
            Addr::from_v4_be(word(c, d)),
            protocol,
        )
    };
    let [source, destination, length, _]: [u16; 4] = packet.read(at - UDP_LEN)?;
    if protocol != proto::UDP || destination != DNS_PORT {
        return None;
    }
    let header: [u16; 6] = packet.read(at)?;
    let bytes = u16::from_be(length) as usize;
    // Padding behind the datagram would be taken for part of it. A name, a type and a class are the least.
    if at - UDP_LEN + bytes != packet_bytes || bytes < UDP_LEN + HEADER_BYTES + 5 {
        return None;
    }
    let text_bytes = bytes - UDP_LEN - HEADER_BYTES;
    let [_, flags, questions, answers, authorities, more] = header;
    let [kind, _] = flags.to_ne_bytes();
    let is_plain = kind & 0xf8 == 0
        && questions == 1_u16.to_be()
        && answers | authorities == 0
        && u16::from_be(more) <= 1;
    (is_plain && text_bytes <= TEXT_BYTES_MAX).then_some(Envelope {
        message_at: at,
        client,
        server,
        client_port: source,
        text_bytes,
        header,
    })
}

/// An address in halves of words, as packets are aligned.
#[inline(always)]
fn address(halves: [u16; 8]) -> Addr {
    let long = |at: usize| {
        let (first, second) = (
            word(halves[at], halves[at + 1]).to_ne_bytes(),
            word(halves[at + 2], halves[at + 3]).to_ne_bytes(),
        );
        u64::from_ne_bytes([
            first[0], first[1], first[2], first[3], second[0], second[1], second[2], second[3],
        ])
    };
    Addr {
        words: [long(0), long(4)],
    }
}

/// Bytes of the name that a text begins with, its root label included; 0 when it is none.
#[inline(always)]
pub fn name_bytes(text: &Text) -> usize {
    let mut at = 0;
    for _ in 0..LABELS_MAX {
        let length = text.byte(at) as usize;
        at += 1 + length;
        if length == 0 {
            return if at > DNS_NAME_BYTES { 0 } else { at };
        }
        if length > LABEL_BYTES_MAX {
            return 0;
        }
    }
    0
}

/// A question that may be answered here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Question {
    /// For AAAA rather than A.
    pub v6: bool,
    pub edns: bool,
    /// The bit of an EDNS record by which DNSSEC is asked for, in its place.
    pub dnssec_ok: u8,
}

/// Reads what follows a question's name; `None` when it is the server's to answer.
#[inline(always)]
pub fn question(text: &Text, name_bytes: usize, envelope: &Envelope) -> Option<Question> {
    let v6 = match text.number(name_bytes) {
        TYPE_A => false,
        TYPE_AAAA => true,
        _ => return None,
    };
    if text.number(name_bytes + 2) != CLASS_IN {
        return None;
    }
    let mut end = name_bytes + 4;
    let edns = envelope.header[5] != 0;
    let mut dnssec_ok = 0;
    if edns {
        // The root's name, the type, version 0. What the options are does not matter to the server either.
        let whole = end + OPT_BYTES <= envelope.text_bytes
            && text.byte(end) == 0
            && text.number(end + 1) == TYPE_OPT
            && text.byte(end + 6) == 0;
        if !whole {
            return None;
        }
        dnssec_ok = text.byte(end + 7) & 0x80;
        end += OPT_BYTES + text.number(end + 9) as usize;
    }
    (end == envelope.text_bytes).then_some(Question {
        v6,
        edns,
        dnssec_ok,
    })
}

/// What a name is found by, and the sum of its words as they lie in memory.
#[inline(always)]
pub fn key(text: &Text, name_bytes: usize, seed: [u64; 2]) -> (NameKey, u32) {
    let mut sum = 0_u64;
    let key = name_key(
        seed,
        name_bytes,
        |i| text.word(i),
        |word| sum += (word >> 32) + (word & 0xffff_ffff),
    );
    // At most 32 words of 33 bits: a carry more is all that is left.
    let folded = (sum >> 32) + (sum & 0xffff_ffff);
    (key, (folded >> 32) as u32 + folded as u32)
}

/// The number of addresses that answer a question.
#[inline(always)]
pub fn answers(question: &Question, found: &NameAddresses) -> usize {
    // Never more than there is room for. Nothing says so here: the compiler would take away the masks that tell the verifier.
    if question.v6 {
        found.v6_count as usize
    } else {
        found.v4_count as usize
    }
}

/// Everything that an answer is made of.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    pub question: Question,
    pub name_bytes: usize,
    /// Sum of the name's words.
    pub name_sum: u32,
    pub found: &'a NameAddresses,
    pub zone: &'a DnsZone,
    /// Says which address comes first.
    pub turn: u32,
}

/// Where the next record goes, and the sum of those before it.
struct Cursor<'a, P> {
    packet: &'a mut P,
    at: usize,
    sum: u32,
}

impl<P: Packet> Cursor<'_, P> {
    #[inline(always)]
    fn put<const N: usize>(&mut self, record: &[u8; N]) -> bool {
        let written = self.packet.write(self.at, record);
        self.at += N;
        let mut i = 0;
        while i + 1 < N {
            self.sum += u16::from_ne_bytes([record[i], record[i + 1]]) as u32;
            i += 2;
        }
        if N % 2 == 1 {
            self.sum += u16::from_ne_bytes([record[N - 1], 0]) as u32;
        }
        written
    }
}

/// Puts an answer in the place of its question. False when the packet could not be written, and is nobody's then: the client asks
/// again.
#[inline(always)]
pub fn put<P: Packet>(packet: &mut P, envelope: &Envelope, answer: &Answer<'_>) -> bool {
    let Answer {
        question,
        name_bytes,
        found,
        zone,
        ..
    } = *answer;
    let count = answers(&question, found);
    let records = match count {
        0 => SOA_BYTES,
        _ if question.v6 => count * AAAA_BYTES,
        _ => count * A_BYTES,
    };
    let opt = if question.edns { OPT_BYTES } else { 0 };
    let begun = name_bytes + 4;
    let message_bytes = HEADER_BYTES + begun + records + opt;
    if !packet.resize((envelope.message_at + message_bytes) as u32) {
        return false;
    }
    let rtype = if question.v6 { TYPE_AAAA } else { TYPE_A };
    let mut out = Cursor {
        packet,
        at: envelope.text_at() + begun,
        // The class follows the type.
        sum: rtype.to_be() as u32 + CLASS_IN.to_be() as u32,
    };
    let none = (count == 0) as u16;
    let put = if count == 0 {
        out.put(&soa(HEADER_BYTES + found.before as usize, zone))
    } else if question.v6 {
        put_records(&mut out, answer, count, |found, at, ttl| {
            aaaa(&found.v6[at], ttl)
        })
    } else {
        put_records(&mut out, answer, count, |found, at, ttl| {
            a(found.v4[at], ttl)
        })
    };
    if !put {
        return false;
    }
    if question.edns {
        let [high, low] = (zone.udp_bytes as u16).to_be_bytes();
        let dnssec_ok = question.dnssec_ok;
        if !out.put(&[0, 0, TYPE_OPT as u8, high, low, 0, 0, dnssec_ok, 0, 0, 0]) {
            return false;
        }
    }
    let header = header(&envelope.header, [count as u16, none], zone);
    let mut sum = answer.name_sum as u64;
    for word in header {
        sum += word as u64;
    }
    // Behind a name of odd length, words begin in the middle of the message's.
    let rest = !checksum::over(&[], out.sum) as u32;
    let shift = (name_bytes as u32 & 1) * 8;
    sum += ((rest << shift | rest >> (16 - shift)) & 0xffff) as u64;
    packet.write(envelope.message_at, &header)
        && put_headers(packet, envelope, (UDP_LEN + message_bytes) as u16, sum)
}

/// Puts records of all addresses of a name, `count` of them, beginning with any.
#[inline(always)]
fn put_records<P: Packet, const N: usize>(
    out: &mut Cursor<'_, P>,
    answer: &Answer<'_>,
    count: usize,
    record: impl Fn(&NameAddresses, usize, [u8; 4]) -> [u8; N],
) -> bool {
    let ttl = answer.zone.ttl_s.to_be_bytes();
    // Far from where it would overflow.
    let first = (answer.turn & 0xffff) as usize;
    for i in 0..DNS_ADDRESSES {
        if i >= count {
            break;
        }
        let at = ((first + i) % count) & (DNS_ADDRESSES - 1);
        if !out.put(&record(answer.found, at, ttl)) {
            return false;
        }
    }
    true
}

/// The header of an answer with so many answers and authorities: authoritative, RD and CD as they were asked with.
#[inline(always)]
fn header(asked: &[u16; 6], [answers, authorities]: [u16; 2], zone: &DnsZone) -> [u16; 6] {
    let [id, flags, questions, _, _, more] = *asked;
    let [first, second] = flags.to_ne_bytes();
    let flags = u16::from_ne_bytes([0x84 | (first & 1), zone.flags as u8 | (second & 0x10)]);
    [
        id,
        flags,
        questions,
        answers.to_be(),
        authorities.to_be(),
        more,
    ]
}

/// An A record of the question's name.
#[inline(always)]
fn a(address: u32, ttl: [u8; 4]) -> [u8; A_BYTES] {
    let [a, b, c, d] = address.to_ne_bytes();
    let [t, t1, t2, t3] = ttl;
    [0xc0, 12, 0, 1, 0, 1, t, t1, t2, t3, 0, 4, a, b, c, d]
}

/// An AAAA record of the question's name.
#[inline(always)]
fn aaaa(address: &Addr, ttl: [u8; 4]) -> [u8; AAAA_BYTES] {
    let [t, t1, t2, t3] = ttl;
    let [a, b, c, d, e, f, g, h] = address.words[0].to_ne_bytes();
    let [i, j, k, l, m, n, o, p] = address.words[1].to_ne_bytes();
    [
        0xc0, 12, 0, 28, 0, 1, t, t1, t2, t3, 0, 16, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p,
    ]
}

/// The SOA of the cluster's domain, which stands at a place of the message.
#[inline(always)]
fn soa(domain_at: usize, zone: &DnsZone) -> [u8; SOA_BYTES] {
    // Where the TTL, the two names' ends, the serial and the TTL of "no" go.
    let mut record = *b"\0\0\0\x06\0\x01\0\0\0\0\0\x2a\x02ns\x03dns\0\0\x0ahostmaster\0\0\
        \0\0\0\0\0\0\x1c\x20\0\0\x07\x08\0\x01\x51\x80\0\0\0\0";
    let domain = (0xc000 | domain_at as u16).to_be_bytes();
    let (ttl, serial) = (zone.ttl_s.to_be_bytes(), zone.serial.to_be_bytes());
    let mut i = 0;
    while i < 2 {
        record[i] = domain[i];
        record[19 + i] = domain[i];
        record[32 + i] = domain[i];
        i += 1;
    }
    let mut i = 0;
    while i < 4 {
        record[6 + i] = ttl[i];
        record[34 + i] = serial[i];
        record[50 + i] = ttl[i];
        i += 1;
    }
    record
}

/// IP and UDP headers of an answer. `sum` is that of the message's words.
#[inline(always)]
fn put_headers<P: Packet>(packet: &mut P, envelope: &Envelope, udp_len: u16, sum: u64) -> bool {
    let Envelope { client, server, .. } = *envelope;
    let mut udp = [DNS_PORT, envelope.client_port, udp_len.to_be(), 0];
    if envelope.message_at == MESSAGE_AT_V6 {
        udp[3] = udp_checksum_v6(&client, &server, &udp, sum);
        // The length, UDP, and a fresh hop limit.
        packet.write(
            ETH_LEN + 4,
            &[udp_len.to_be(), u16::from_ne_bytes([proto::UDP, 64])],
        ) && packet.write(ETH_LEN + 8, &[server.words, client.words])
            && packet.write(ETH_LEN + IPV6_LEN, &udp)
    } else {
        // UDP over IPv4 may go without a checksum.
        packet.write(ETH_LEN, &ipv4_header(&server, &client, udp_len))
            && packet.write(ETH_LEN + IPV4_LEN, &udp)
    }
}

/// An IPv4 header without options in front of `len` bytes, from one address to another.
#[inline(always)]
fn ipv4_header(src: &Addr, dst: &Addr, len: u16) -> [u16; 10] {
    // The last four bytes, which are all that such an address has.
    let halves = |addr: &Addr| {
        let [.., a, b, c, d] = addr.octets();
        [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
    };
    let ([src_0, src_1], [dst_0, dst_1]) = (halves(src), halves(dst));
    let mut header = [
        u16::from_ne_bytes([0x45, 0]),
        (IPV4_LEN as u16 + len).to_be(),
        0,
        0x4000_u16.to_be(),
        u16::from_ne_bytes([64, proto::UDP]),
        0,
        src_0,
        src_1,
        dst_0,
        dst_1,
    ];
    header[5] = checksum::over(&header, 0);
    header
}

/// The UDP checksum of a datagram over IPv6, as it lies in memory. `sum` is that of the message's words.
#[inline(always)]
fn udp_checksum_v6(client: &Addr, server: &Addr, udp: &[u16; 4], mut sum: u64) -> u16 {
    for address in [client, server] {
        for word in address.words {
            sum += (word >> 32) + (word & 0xffff_ffff);
        }
    }
    // The length counts twice: in the pseudo header, and in the UDP header.
    sum += udp[0] as u64 + udp[1] as u64 + 2 * udp[2] as u64;
    sum += u16::from_ne_bytes([0, proto::UDP]) as u64;
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16 & 0xffff) + (sum & 0xffff) + (sum >> 32);
    match checksum::over(&[], sum as u32) {
        // Zero would say that there is none.
        0 => 0xffff,
        checksum => checksum,
    }
}
