//! Maps and packets in memory, and builders of packets whose checksums are right: what tests stand on.

use core::cell::{Cell as Mutable, RefCell};
use std::{
    collections::HashMap,
    net::{SocketAddr, SocketAddrV4},
    rc::Rc,
    vec::Vec,
};

use dataplane_abi::{
    Addr, Affinity, AffinityKey, Backend, Cell, ExtentHeader, Flow, FlowKey, FragmentKey,
    FragmentPorts, FrontendKey, Lead, LocalAddress, Plain, Reason, SERVICE_SILENT, ServiceRef,
    proto,
};

use crate::{
    checksum,
    packet::{ChecksumChange, Packet},
    tables::{FlowEntry, Refused, Tables},
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
        if field == 0 && change.optional {
            return true;
        }
        let mut patched = checksum::updated(field, change.difference);
        if patched == 0 && change.optional {
            patched = 0xffff;
        }
        self.write(offset, &patched)
    }

    fn resize(&mut self, len: u32) -> bool {
        self.0.resize(len as usize, 0);
        true
    }
}

/// An entry of a flow table in memory: a copy to look at, and the original to change.
pub struct MemoryEntry {
    copy: Flow,
    original: Rc<Mutable<Flow>>,
}

impl FlowEntry for MemoryEntry {
    fn get(&self) -> &Flow {
        &self.copy
    }

    fn touch(&self, now_s: u32, seen: u32) {
        let flow = self.original.get();
        self.original.set(Flow {
            last_seen_s: now_s,
            seen: flow.seen | seen,
            ..flow
        });
    }

    fn locate(&self, generation: u32, slot: u32) {
        self.original.set(Flow {
            generation,
            slot,
            ..self.original.get()
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
    pub local: RefCell<HashMap<Addr, LocalAddress>>,
    pub flows: FlowTable,
    pub flows_max: usize,
    pub unreplied: FlowTable,
    pub fragments: RefCell<HashMap<FragmentKey, FragmentPorts>>,
    pub counters: RefCell<HashMap<Reason, u64>>,
    pub random_state: Mutable<u64>,
    pub clock_s: Mutable<u32>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            frontends: RefCell::default(),
            ranges: RefCell::default(),
            affinities: RefCell::default(),
            services: RefCell::default(),
            cells: RefCell::new(Vec::from([Cell::default()])),
            local: RefCell::default(),
            flows: RefCell::default(),
            flows_max: usize::MAX,
            unreplied: RefCell::default(),
            fragments: RefCell::default(),
            counters: RefCell::default(),
            random_state: Mutable::new(0x9e37_79b9_7f4a_7c15),
            clock_s: Mutable::new(1000),
        }
    }
}

fn socket(text: &str) -> SocketAddrV4 {
    match text.parse() {
        Ok(SocketAddr::V4(v4)) => v4,
        _ => panic!("{text} is not an IPv4 address with port"),
    }
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
        let total = (active.len() + terminating.len()) as u32;
        cells.push(
            ExtentHeader {
                service: id,
                generation,
                active: active.len() as u32,
                total,
                ..ExtentHeader::default()
            }
            .into(),
        );
        for (slot, backend) in (0..).zip(active.iter().chain(terminating)) {
            let at = socket(backend);
            cells.push(Backend::new((*at.ip()).into(), at.port().to_be(), slot).into());
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

    /// Gives a service affinity, until its backends are set anew.
    pub fn set_affinity_timeout(&self, id: u32, seconds: u32) {
        self.change_header(id, |header| header.affinity_timeout_s = seconds);
    }

    /// Makes a service silent without backends, until these are set anew.
    pub fn set_silent(&self, id: u32) {
        self.change_header(id, |header| header.flags |= SERVICE_SILENT);
    }

    /// Lets an address and port lead to a service port for all, and marks the address.
    pub fn set_frontend(&self, at: &str, protocol: u8, id: u32) {
        self.set_vip(socket(at).ip().octets());
        self.set_lead(at, protocol, Lead::new(id, id, 0));
    }

    /// Lets an address and port, or a port of every address of the node, lead to service ports.
    pub fn set_lead(&self, at: &str, protocol: u8, lead: Lead) {
        let at = socket(at);
        self.frontends.borrow_mut().insert(
            FrontendKey::new((*at.ip()).into(), at.port().to_be(), protocol),
            lead,
        );
    }

    /// Marks an address as a Service's.
    pub fn set_vip(&self, octets: [u8; 4]) {
        self.frontends.borrow_mut().insert(
            FrontendKey::marker(addr(octets)),
            Lead::new(Lead::MARKER, 0, 0),
        );
    }

    pub fn set_local(&self, octets: [u8; 4], kind: u32, ifindex: u32) {
        self.local.borrow_mut().insert(
            addr(octets),
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
        copy: original.get(),
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
        self.services.borrow().get(&id).copied()
    }

    fn cell(&self, index: u32) -> Option<Cell> {
        self.cells.borrow().get(index as usize).copied()
    }

    fn local(&self, addr: &Addr) -> Option<LocalAddress> {
        self.local.borrow().get(addr).copied()
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

/// Sum of the pseudo header of an IPv4 packet with `len` bytes of transport.
fn pseudo(packet: &[u8], len: usize) -> u32 {
    let mut bytes = Vec::from(&packet[26..34]);
    bytes.extend([0, packet[23]]);
    bytes.extend((len as u16).to_be_bytes());
    !sum(&bytes, 0) as u32
}

fn ipv4(src: SocketAddrV4, dst: SocketAddrV4, protocol: u8, transport: &[u8]) -> Vec<u8> {
    // To the loopback's hardware address: by that interface the kernel runs programs for tests, and a frame for another machine is none
    // of ours.
    let mut packet = Vec::from([0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1, 8, 0]);
    packet.extend([0x45, 0]);
    packet.extend((20 + transport.len() as u16).to_be_bytes());
    packet.extend([0x12, 0x34, 0, 0, 64, protocol, 0, 0]);
    packet.extend(src.ip().octets());
    packet.extend(dst.ip().octets());
    let header = sum(&packet[14..34], 0);
    packet[24..26].copy_from_slice(&header.to_ne_bytes());
    packet.extend(transport);
    packet
}

/// A TCP segment over IPv4 over Ethernet, sequence number 0x01020304, acknowledgement number 0x05060708.
pub fn tcp(src: &str, dst: &str, flags: u8, payload: &[u8]) -> Vec<u8> {
    let (src, dst) = (socket(src), socket(dst));
    let mut segment = Vec::from(src.port().to_be_bytes());
    segment.extend(dst.port().to_be_bytes());
    segment.extend([1, 2, 3, 4, 5, 6, 7, 8, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(payload);
    let mut packet = ipv4(src, dst, proto::TCP, &segment);
    let field = sum(&packet[34..], pseudo(&packet, segment.len()));
    packet[50..52].copy_from_slice(&field.to_ne_bytes());
    packet
}

/// A UDP datagram over IPv4 over Ethernet.
pub fn udp(src: &str, dst: &str, payload: &[u8]) -> Vec<u8> {
    let (src, dst) = (socket(src), socket(dst));
    let mut datagram = Vec::from(src.port().to_be_bytes());
    datagram.extend(dst.port().to_be_bytes());
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    let mut packet = ipv4(src, dst, proto::UDP, &datagram);
    let field = sum(&packet[34..], pseudo(&packet, datagram.len()));
    packet[40..42].copy_from_slice(&if field == 0 {
        [0xff, 0xff]
    } else {
        field.to_ne_bytes()
    });
    packet
}

/// An ICMP message over IPv4 over Ethernet; ports of the addresses are not used.
pub fn icmp(src: &str, dst: &str, kind: u8, code: u8, body: &[u8]) -> Vec<u8> {
    let mut message = Vec::from([kind, code, 0, 0]);
    message.extend(body);
    let field = sum(&message, 0);
    message[2..4].copy_from_slice(&field.to_ne_bytes());
    ipv4(socket(src), socket(dst), proto::ICMP, &message)
}

/// Whether the checksums of a whole IPv4 packet without options are right: the header's, and TCP's, UDP's or ICMP's.
pub fn checksums_are_right(packet: &[u8]) -> bool {
    // A sum over data that holds its own checksum is all ones, of which the complement is zero.
    let transport = &packet[34..14 + u16::from_be_bytes([packet[16], packet[17]]) as usize];
    let initial = match packet[23] {
        proto::TCP | proto::UDP => pseudo(packet, transport.len()),
        _ => 0,
    };
    let unchecked_udp = packet[23] == proto::UDP && transport[6..8] == [0, 0];
    sum(&packet[14..34], 0) == 0 && (unchecked_udp || sum(transport, initial) == 0)
}
