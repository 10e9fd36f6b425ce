//! Maps and packets in memory, and builders of packets whose checksums are right: what tests stand on.

use core::cell::{Cell as Mutable, RefCell};
use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    rc::Rc,
    vec::Vec,
};

use dataplane_abi::{
    Addr, Affinity, AffinityKey, Backend, Cell, ExtentHeader, Flow, FlowKey, FragmentKey,
    FragmentPorts, FrontendKey, Lead, LocalAddress, Plain, Reason, SERVICE_DIRECT,
    SERVICE_KEEPS_CLIENTS, SERVICE_SILENT, ServiceRef, Trace, proto,
};

use crate::{
    flow::noted,
    packet::{ChecksumChange, Ip, Packet, Parsed, is_ipv6, parse},
    tables::{FlowEntry, Refused, SOURCE_UNKNOWN, Tables},
};

/// A packet as a vector.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Bytes(pub Vec<u8>);

impl Packet for Bytes {
    fn read<T: Plain>(&self, offset: usize) -> Option<T> {
        T::read_from(self.0.get(offset..)?)
    }

    fn write<T: Plain>(&mut self, offset: usize, value: &T) -> bool {
        let bytes = value.as_bytes();
        let Some(place) = self.0.get_mut(offset..offset + bytes.len()) else {
            return false;
        };
        place.copy_from_slice(bytes);
        true
    }

    fn patch_checksum(&mut self, offset: usize, change: ChecksumChange) -> bool {
        let Some(field) = self.read::<u16>(offset) else {
            return false;
        };
        self.write(offset, &change.applied_to(field))
    }

    fn resize(&mut self, len: u32) -> bool {
        self.0.resize(len as usize, 0);
        true
    }
}

/// An entry of a flow table in memory: as it was found, and the original.
pub struct MemoryEntry {
    found: Flow,
    original: Rc<Mutable<Flow>>,
}

impl MemoryEntry {
    fn change(&self, sealed: u32, change: impl FnOnce(&mut Flow)) {
        let mut flow = self.original.get();
        if Flow::have_one_seal(flow.seen, sealed) {
            change(&mut flow);
            self.original.set(flow);
        }
    }
}

impl FlowEntry for MemoryEntry {
    fn get(&self) -> &Flow {
        &self.found
    }

    fn copy(&self, key: &FlowKey, copy: &mut Flow) -> bool {
        *copy = self.original.get();
        copy.is_under(key)
    }

    fn seen(&self, key: &FlowKey, other: &FlowKey) -> Option<u32> {
        let flow = self.original.get();
        (flow.is_under(key) && flow.other == *other).then_some(flow.seen)
    }

    fn touch(&self, sealed: u32, now_s: u32, seen: u32) {
        self.change(sealed, |flow| {
            flow.last_seen_s = now_s;
            flow.seen = noted(flow.seen, seen);
        });
    }

    fn locate(&self, sealed: u32, generation: u32, slot: u32) {
        self.change(sealed, |flow| {
            flow.generation = generation;
            flow.slot = slot;
        });
    }
}

type FlowTable = RefCell<HashMap<FlowKey, Rc<Mutable<Flow>>>>;

/// The maps as vectors and hash maps.
pub struct Memory {
    pub frontends: RefCell<HashMap<FrontendKey, Lead>>,
    /// Service, address and length out of 128.
    pub ranges: RefCell<Vec<(u32, Addr, u32)>>,
    pub affinities: RefCell<HashMap<AffinityKey, Affinity>>,
    pub services: RefCell<HashMap<u32, ServiceRef>>,
    pub cells: RefCell<Vec<Cell>>,
    /// Tables by the generations of their extents.
    pub maglev: RefCell<HashMap<u32, Vec<u16>>>,
    /// Single addresses on other nodes.
    pub peers: RefCell<HashMap<Addr, u64>>,
    pub local: RefCell<HashMap<Addr, LocalAddress>>,
    /// The node's addresses, and by what they leave, by where they lead.
    pub sources: RefCell<HashMap<Addr, (Addr, u32)>>,
    /// Protocols and ports, network order.
    pub kept_ports: RefCell<HashSet<(u8, u16)>>,
    pub flows: FlowTable,
    pub flows_max: usize,
    pub unreplied: FlowTable,
    pub fragments: RefCell<HashMap<FragmentKey, FragmentPorts>>,
    pub traces: RefCell<HashMap<u32, Trace>>,
    pub counters: RefCell<HashMap<Reason, u64>>,
    pub random_state: Mutable<u64>,
    pub clock_s: Mutable<u32>,
    /// What another CPU does just before a service is looked up.
    pub meanwhile: RefCell<Option<fn(&Self)>>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            frontends: RefCell::default(),
            ranges: RefCell::default(),
            affinities: RefCell::default(),
            services: RefCell::default(),
            cells: RefCell::new(Vec::from([Cell::default()])),
            maglev: RefCell::default(),
            peers: RefCell::default(),
            local: RefCell::default(),
            sources: RefCell::default(),
            kept_ports: RefCell::default(),
            flows: RefCell::default(),
            flows_max: usize::MAX,
            unreplied: RefCell::default(),
            fragments: RefCell::default(),
            traces: RefCell::default(),
            counters: RefCell::default(),
            random_state: Mutable::new(0x9e37_79b9_7f4a_7c15),
            clock_s: Mutable::new(1000),
            meanwhile: RefCell::default(),
        }
    }
}

fn socket(text: &str) -> SocketAddr {
    text.parse()
        .unwrap_or_else(|_| panic!("{text} is not an address with port"))
}

/// The address of a text.
pub fn ip(text: &str) -> Addr {
    let ip: IpAddr = text
        .parse()
        .unwrap_or_else(|_| panic!("{text} is not an address"));
    ip.into()
}

/// The mapped address of four octets.
pub fn addr(octets: [u8; 4]) -> Addr {
    Addr::from_v4_be(u32::from_ne_bytes(octets))
}

impl Memory {
    /// Gives a service port its backends, in a new extent of a new generation.
    pub fn set_service(&self, id: u32, active: &[&str], terminating: &[&str]) {
        let mut cells = self.cells.borrow_mut();
        let mut services = self.services.borrow_mut();
        let generation = services
            .get(&id)
            .map_or(1, |reference| reference.generation + 1);
        let extent = cells.len() as u32;
        let ascending = |backends: &[&str]| {
            let mut pairs = backends.windows(2);
            let descent = pairs.position(|pair| socket(pair[0]) > socket(pair[1]));
            descent.map_or(backends.len(), |last| last + 1) as u16
        };
        let total = (active.len() + terminating.len()) as u32;
        cells.push(
            ExtentHeader {
                service: id,
                generation,
                active: active.len() as u32,
                total,
                near_active: ascending(active),
                near_terminating: ascending(terminating),
                ..ExtentHeader::default()
            }
            .into(),
        );
        for (slot, backend) in (0..).zip(active.iter().chain(terminating)) {
            let at = socket(backend);
            cells.push(Backend::new(at.ip().into(), at.port().to_be(), slot).into());
        }
        services.insert(id, ServiceRef { extent, generation });
    }

    fn change_header(&self, id: u32, change: impl FnOnce(&mut ExtentHeader)) {
        let extent = self.services.borrow()[&id].extent as usize;
        let cell = &mut self.cells.borrow_mut()[extent];
        let mut header = ExtentHeader::from(*cell);
        change(&mut header);
        *cell = header.into();
    }

    /// Says that it changed where destinations lead.
    pub fn set_epoch(&self, epoch: u32) {
        let word = ServiceRef::of_epoch(epoch);
        self.services
            .borrow_mut()
            .insert(ServiceRef::EPOCH_ID, word);
    }

    /// Gives a service affinity, until its backends are set anew.
    pub fn set_affinity_timeout(&self, id: u32, seconds: u32) {
        self.change_header(id, |header| header.affinity_timeout_s = seconds);
    }

    /// Gives a service a Maglev table, until its backends are set anew.
    pub fn set_maglev(&self, id: u32, table: &[u16]) {
        let generation = self.services.borrow()[&id].generation;
        self.change_header(id, |header| header.maglev = table.len() as u32);
        self.maglev.borrow_mut().insert(generation, table.into());
    }

    /// Lets clients outside be answered directly, until a service's backends are set anew.
    pub fn set_direct(&self, id: u32) {
        self.change_header(id, |header| header.flags |= SERVICE_DIRECT);
    }

    /// Lets clients outside keep their addresses at processes of the node, until a service's backends are set anew.
    pub fn set_keeps_clients(&self, id: u32) {
        self.change_header(id, |header| header.flags |= SERVICE_KEEPS_CLIENTS);
    }

    /// Makes a service silent without backends, until these are set anew.
    pub fn set_silent(&self, id: u32) {
        self.change_header(id, |header| header.flags |= SERVICE_SILENT);
    }

    /// Lets an address and port lead to a service port for all, and marks the address.
    pub fn set_frontend(&self, at: &str, protocol: u8, id: u32) {
        self.set_vip(&socket(at).ip().to_string());
        self.set_lead(at, protocol, Lead::new(id, id, 0));
    }

    /// Lets an address and port, or a port of every address of the node, lead to service ports.
    pub fn set_lead(&self, at: &str, protocol: u8, lead: Lead) {
        let at = socket(at);
        self.frontends.borrow_mut().insert(
            FrontendKey::new(at.ip().into(), at.port().to_be(), protocol),
            lead,
        );
    }

    /// Marks an address as a Service's.
    pub fn set_vip(&self, at: &str) {
        self.frontends
            .borrow_mut()
            .insert(FrontendKey::marker(ip(at)), Lead::new(Lead::MARKER, 0, 0));
    }

    pub fn set_local(&self, at: &str, kind: u32, ifindex: u32) {
        self.local.borrow_mut().insert(
            ip(at),
            LocalAddress {
                kind,
                ifindex,
                mac: [0; 6],
                pad: [0; 2],
            },
        );
    }

    pub fn counted(&self, reason: Reason) -> u64 {
        self.counters.borrow().get(&reason).copied().unwrap_or(0)
    }
}

fn entry(table: &FlowTable, key: &FlowKey) -> Option<MemoryEntry> {
    table.borrow().get(key).map(|original| MemoryEntry {
        found: original.get(),
        original: original.clone(),
    })
}

impl Tables for Memory {
    type Entry = MemoryEntry;

    fn frontend(&self, key: &FrontendKey) -> Option<Lead> {
        self.frontends.borrow().get(key).copied()
    }

    fn in_range(&self, service: u32, addr: &Addr) -> bool {
        let bits = |addr: &Addr| u128::from_be_bytes(addr.octets());
        self.ranges.borrow().iter().any(|(owner, range, len)| {
            let differ = bits(addr) ^ bits(range);
            *owner == service && differ.checked_shr(128 - len).unwrap_or(0) == 0
        })
    }

    fn affinity(&self, key: &AffinityKey) -> Option<Affinity> {
        self.affinities.borrow().get(key).copied()
    }

    fn set_affinity(&self, key: &AffinityKey, affinity: &Affinity) {
        self.affinities.borrow_mut().insert(*key, *affinity);
    }

    fn service(&self, id: u32) -> Option<ServiceRef> {
        let meanwhile = self.meanwhile.borrow_mut().take();
        if let Some(change) = meanwhile {
            change(self);
        }
        self.services.borrow().get(&id).copied()
    }

    fn cell(&self, index: u32) -> Option<Cell> {
        self.cells.borrow().get(index as usize).copied()
    }

    fn maglev(&self, generation: u32, position: u32) -> Option<u16> {
        let tables = self.maglev.borrow();
        tables.get(&generation)?.get(position as usize).copied()
    }

    fn peer(&self, addr: &Addr) -> Option<u64> {
        self.peers.borrow().get(addr).copied()
    }

    fn local(&self, addr: &Addr) -> Option<LocalAddress> {
        self.local.borrow().get(addr).copied()
    }

    fn source_towards<const V6: bool>(&self, _src: &Addr, dst: &Addr, source: &mut Addr) -> u32 {
        match self.sources.borrow().get(dst) {
            Some((found, by)) => {
                *source = *found;
                *by
            }
            None => SOURCE_UNKNOWN,
        }
    }

    fn is_kept_port(&self, protocol: u8, port: u16) -> bool {
        self.kept_ports.borrow().contains(&(protocol, port))
    }

    fn keep_port(&self, protocol: u8, port: u16) {
        self.kept_ports.borrow_mut().insert((protocol, port));
    }

    fn flow(&self, key: &FlowKey) -> Option<MemoryEntry> {
        entry(&self.flows, key)
    }

    fn insert_flow(&self, key: &FlowKey, flow: &Flow) -> Result<(), Refused> {
        let mut flows = self.flows.borrow_mut();
        if flows.len() >= self.flows_max && !flows.contains_key(key) {
            return Err(Refused::Full);
        }
        flows.insert(*key, Rc::new(Mutable::new(*flow)));
        Ok(())
    }

    fn remove_flow(&self, key: &FlowKey) {
        self.flows.borrow_mut().remove(key);
    }

    fn unreplied(&self, key: &FlowKey) -> Option<MemoryEntry> {
        entry(&self.unreplied, key)
    }

    fn insert_unreplied(&self, key: &FlowKey, flow: &Flow, replace: bool) -> Result<(), Refused> {
        let mut unreplied = self.unreplied.borrow_mut();
        if !replace && unreplied.contains_key(key) {
            return Err(Refused::Exists);
        }
        unreplied.insert(*key, Rc::new(Mutable::new(*flow)));
        Ok(())
    }

    fn remove_unreplied(&self, key: &FlowKey) {
        self.unreplied.borrow_mut().remove(key);
    }

    fn trace(&self, at: u32) -> Trace {
        self.traces.borrow().get(&at).copied().unwrap_or_default()
    }

    fn leave_service(&self, at: u32, now_s: u32) {
        self.traces.borrow_mut().entry(at).or_default().service_s = now_s;
    }

    fn leave_direct(&self, at: u32, tuple: u64, now_s: u32) {
        let mut traces = self.traces.borrow_mut();
        let trace = traces.entry(at).or_default();
        (trace.direct, trace.direct_s) = (tuple, now_s);
    }

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentPorts> {
        self.fragments.borrow().get(key).copied()
    }

    fn insert_fragment(&self, key: &FragmentKey, ports: &FragmentPorts) {
        self.fragments.borrow_mut().insert(*key, *ports);
    }

    fn count(&self, reason: Reason) {
        *self.counters.borrow_mut().entry(reason).or_default() += 1;
    }

    fn random(&self) -> u32 {
        // Xorshift: tests repeat.
        let mut state = self.random_state.get();
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        self.random_state.set(state);
        (state >> 32) as u32
    }

    fn now_s(&self) -> u32 {
        self.clock_s.get()
    }
}

/// The checksum of bytes, of which an odd last one counts as if a zero followed (RFC 1071), after `initial`.
fn sum(bytes: &[u8], initial: u32) -> u16 {
    let mut total = initial as u64;
    for pair in bytes.chunks(2) {
        total += u16::from_ne_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]) as u64;
    }
    while total >> 16 != 0 {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

/// Sum of the pseudo header of a packet without options or extensions, with `len` bytes of transport.
fn pseudo(packet: &[u8], len: usize) -> u32 {
    let (addresses, protocol) = if is_v6(packet) {
        (22..54, packet[20])
    } else {
        (26..34, packet[23])
    };
    let mut bytes = Vec::from(&packet[addresses]);
    bytes.extend([0, protocol]);
    bytes.extend((len as u16).to_be_bytes());
    !sum(&bytes, 0) as u32
}

fn is_v6(packet: &[u8]) -> bool {
    packet[12..14] == [0x86, 0xdd]
}

/// Length of the headers before the transport's, without options or extensions.
fn headers_len(packet: &[u8]) -> usize {
    if is_v6(packet) { 54 } else { 34 }
}

/// Ethernet and IP headers of the family of the addresses, and what follows.
fn framed(src: SocketAddr, dst: SocketAddr, protocol: u8, transport: &[u8]) -> Vec<u8> {
    // To the loopback's hardware address: by that interface the kernel runs programs for tests, and a frame for another machine is none
    // of ours.
    let mut packet = Vec::from([0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1]);
    match (src.ip(), dst.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            packet.extend([8, 0, 0x45, 0]);
            packet.extend((20 + transport.len() as u16).to_be_bytes());
            packet.extend([0x12, 0x34, 0, 0, 64, protocol, 0, 0]);
            packet.extend(src.octets());
            packet.extend(dst.octets());
            let header = sum(&packet[14..34], 0);
            packet[24..26].copy_from_slice(&header.to_ne_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            packet.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            packet.extend((transport.len() as u16).to_be_bytes());
            packet.extend([protocol, 64]);
            packet.extend(src.octets());
            packet.extend(dst.octets());
        }
        _ => panic!("{src} and {dst} are of two families"),
    }
    packet.extend(transport);
    packet
}

/// Writes the checksum of a transport into its field at `at`, with the pseudo header where it has one.
fn summed(mut packet: Vec<u8>, at: usize, with_pseudo: bool, zero_is_none: bool) -> Vec<u8> {
    let headers = headers_len(&packet);
    let initial = if with_pseudo {
        pseudo(&packet, packet.len() - headers)
    } else {
        0
    };
    let field = match sum(&packet[headers..], initial) {
        0 if zero_is_none => [0xff, 0xff],
        field => field.to_ne_bytes(),
    };
    packet[headers + at..headers + at + 2].copy_from_slice(&field);
    packet
}

/// A TCP segment over IP over Ethernet, sequence number 0x01020304, acknowledgement number 0x05060708.
pub fn tcp(src: &str, dst: &str, flags: u8, payload: &[u8]) -> Vec<u8> {
    let (src, dst) = (socket(src), socket(dst));
    let mut segment = Vec::from(src.port().to_be_bytes());
    segment.extend(dst.port().to_be_bytes());
    segment.extend([1, 2, 3, 4, 5, 6, 7, 8, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(payload);
    summed(framed(src, dst, proto::TCP, &segment), 16, true, false)
}

/// A UDP datagram over IP over Ethernet.
pub fn udp(src: &str, dst: &str, payload: &[u8]) -> Vec<u8> {
    let (src, dst) = (socket(src), socket(dst));
    let mut datagram = Vec::from(src.port().to_be_bytes());
    datagram.extend(dst.port().to_be_bytes());
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    summed(framed(src, dst, proto::UDP, &datagram), 6, true, true)
}

/// The CRC32c of a message, bit by bit.
pub fn crc32c(message: &[u8]) -> u32 {
    !message.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ *byte as u32, |crc, _| match crc & 1 {
            0 => crc >> 1,
            _ => crc >> 1 ^ 0x82f6_3b78,
        })
    })
}

/// An SCTP packet over IP over Ethernet, of one chunk.
pub fn sctp(src: &str, dst: &str, chunk: u8, value: &[u8]) -> Vec<u8> {
    let (src, dst) = (socket(src), socket(dst));
    let mut packet = Vec::from(src.port().to_be_bytes());
    packet.extend(dst.port().to_be_bytes());
    packet.extend([1, 2, 3, 4, 0, 0, 0, 0, chunk, 0]);
    packet.extend((4 + value.len() as u16).to_be_bytes());
    packet.extend(value);
    packet.resize(packet.len().next_multiple_of(4), 0);
    let sum = crc32c(&packet);
    packet[8..12].copy_from_slice(&sum.to_le_bytes());
    framed(src, dst, proto::SCTP, &packet)
}

/// An ICMP message of the family of the addresses over Ethernet; ports of the addresses are not used.
pub fn icmp(src: &str, dst: &str, kind: u8, code: u8, body: &[u8]) -> Vec<u8> {
    let (src, dst) = (socket(src), socket(dst));
    let mut message = Vec::from([kind, code, 0, 0]);
    message.extend(body);
    let protocol = if src.is_ipv4() {
        proto::ICMP
    } else {
        proto::ICMPV6
    };
    summed(
        framed(src, dst, protocol, &message),
        2,
        src.is_ipv6(),
        false,
    )
}

/// Whether the checksums of a whole packet without options or extensions are right: an IPv4 header's, and TCP's, UDP's, SCTP's or
/// ICMP's.
pub fn checksums_are_right(packet: &[u8]) -> bool {
    // A sum over data that holds its own checksum is all ones, of which the complement is zero.
    let headers = headers_len(packet);
    let (len, protocol) = if is_v6(packet) {
        (
            40 + u16::from_be_bytes([packet[18], packet[19]]),
            packet[20],
        )
    } else {
        (u16::from_be_bytes([packet[16], packet[17]]), packet[23])
    };
    let transport = &packet[headers..14 + len as usize];
    let is_right = is_v6(packet) || sum(&packet[14..34], 0) == 0;
    if protocol == proto::SCTP {
        let (ports, rest) = transport.split_at(8);
        let (field, rest) = rest.split_at(4);
        let sum = crc32c(&[ports, &[0; 4], rest].concat());
        return is_right && field == sum.to_le_bytes();
    }
    let initial = match protocol {
        proto::TCP | proto::UDP | proto::ICMPV6 => pseudo(packet, transport.len()),
        _ => 0,
    };
    let unchecked_udp = protocol == proto::UDP && transport[6..8] == [0, 0];
    is_right && (unchecked_udp || sum(transport, initial) == 0)
}

/// The coordinates of a packet of either family.
pub fn parsed(packet: &Bytes) -> (Parsed, Ip) {
    let mut ip = Ip::NONE;
    let parsed = match is_ipv6(packet) {
        true => parse::<true, _>(packet, &mut ip),
        false => parse::<false, _>(packet, &mut ip),
    };
    (parsed, ip)
}

/// The hooks for packets of either family, as the programs have them.
pub mod hooks {
    use super::Memory;
    use crate::{
        hook::{self, Features, Notes, Verdict},
        memory::Bytes,
        packet::is_ipv6,
    };

    macro_rules! of_either_family {
        ($($name:ident($($arg:ident: $type:ty),*);)*) => { $(
            pub fn $name(packet: &mut Bytes, tables: &Memory, features: &Features $(, $arg: $type)*) -> Verdict {
                let mut notes = Notes::NONE;
                match is_ipv6(packet) {
                    true => hook::$name::<true, _, _>(packet, tables, features, &mut notes $(, $arg)*),
                    false => hook::$name::<false, _, _>(packet, tables, features, &mut notes $(, $arg)*),
                }
            }
        )* };
    }
    of_either_family! {
        pod_ingress(ifindex: u32);
        uplink_ingress();
        answer();
        service_ingress();
    }

    /// As the program has it, which looks at few packets.
    pub fn uplink_egress(packet: &mut Bytes, tables: &Memory, features: &Features) -> Verdict {
        let may_be_answer = match is_ipv6(packet) {
            true => hook::may_be_answer::<true, _, _>(packet, tables),
            false => hook::may_be_answer::<false, _, _>(packet, tables),
        };
        match may_be_answer {
            true => answer(packet, tables, features),
            false => Verdict::Pass,
        }
    }
}
