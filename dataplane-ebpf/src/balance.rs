//! Choosing a backend of a service port, and finding one again.

use dataplane_abi::{
    Addr, Affinity, AffinityKey, Backend, ExtentHeader, Flow, FlowKey, Reason, SERVICE_DIRECT,
    SERVICE_KEEPS_CLIENTS, SERVICE_SILENT, ServiceRef, limits,
};

use crate::{
    follow::{NO_SERVICE, is_vip, lead},
    hook::same,
    packet::word,
    socket::epoch,
    tables::{Tables, Turn},
};

/// A backend and where it was found.
#[derive(Clone, Copy, Debug)]
pub struct Picked {
    pub addr: Addr,
    /// Network order.
    pub port: u16,
    pub generation: u32,
    pub slot: u32,
    /// Its node may answer clients outside directly.
    pub direct: bool,
    /// A process of the node is to see clients outside as they are.
    pub keeps_clients: bool,
}

impl Picked {
    /// None yet.
    pub const NONE: Self = Self {
        addr: Addr { words: [0, 0] },
        port: 0,
        generation: 0,
        slot: 0,
        direct: false,
        keeps_clients: false,
    };

    /// Where a packet goes anyway, for a flow of no service.
    #[inline(always)]
    pub fn go_directly(&mut self, key: &FlowKey) {
        self.addr = key.dst;
        self.port = key.dport;
        self.generation = 0;
        self.slot = 0;
        self.direct = false;
        self.keeps_clients = false;
    }

    /// None yet.
    #[inline(always)]
    const fn none(client: &Client) -> Self {
        Self {
            addr: client.addr,
            port: 0,
            generation: 0,
            slot: 0,
            direct: false,
            keeps_clients: false,
        }
    }
}

/// What choosing came to.
#[derive(Clone, Copy, Debug)]
pub enum Pick {
    Backend(Picked),
    /// The service port has none, or is gone.
    None,
    /// It has some on other nodes, to which its traffic policy leads nobody.
    Silent,
    /// It has affinity to a client that is not known here.
    ClientUnknown,
    /// Its backends changed twice while they were read.
    Torn,
}

/// Who asks, for services with affinity, or with a Maglev table.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    pub addr: Addr,
    /// Its port and the one it asks for, network order both, as a word of memory.
    ports: u32,
    /// False when the address is not known.
    pub known: bool,
    /// Its flow may come by any node, each of which is to choose the same backend, where the service asks for that.
    outside: bool,
}

impl Client {
    #[inline(always)]
    pub const fn at(addr: Addr) -> Self {
        Self {
            addr,
            ports: 0,
            known: true,
            outside: false,
        }
    }

    /// A client outside, by the key of its packet.
    #[inline(always)]
    pub const fn outside(key: &FlowKey) -> Self {
        Self {
            addr: key.src,
            ports: word(key.sport, key.dport),
            known: true,
            outside: true,
        }
    }

    pub const UNKNOWN: Self = Self {
        addr: Addr { words: [0, 0] },
        ports: 0,
        known: false,
        outside: false,
    };
}

/// A number that any node makes alike of a client outside, or of its flow: any bit of it depends on all of these. The address that
/// was asked is not among them: a NodePort is asked at whichever node.
#[inline(always)]
const fn spread(client: &Client, by_address: bool) -> u32 {
    let ports = if by_address {
        0
    } else {
        u32::from_be(client.ports)
    };
    let mut hash = mixed(u64::from_be(client.addr.words[0]) ^ ports as u64);
    hash = mixed(hash ^ u64::from_be(client.addr.words[1]));
    (hash >> 32) as u32
}

/// The finalizer of MurmurHash3, whose constants are known to spread well.
#[inline(always)]
const fn mixed(word: u64) -> u64 {
    let mut word = word ^ 0x9e37_79b9_7f4a_7c15;
    word = (word ^ (word >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    word = (word ^ (word >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    word ^ (word >> 33)
}

/// How many places [`search`] looks at, around where the backend was, before it bisects. Backends are sorted, so that each one added or
/// removed moves others by one place.
const FIND_MAX: u32 = 24;
/// How often it halves what is left, until nothing is.
const HALVES_MAX: u32 = limits::BACKENDS_PER_SERVICE.ilog2() + 2;

/// Reads where a service's backends are. The reference and the header must agree: an extent is reused only after a grace
/// period, so they disagree only when this CPU was held up for that long between two loads.
#[inline(always)]
fn extent<T: Tables>(tables: &T, service: u32) -> Result<Option<(ServiceRef, ExtentHeader)>, Torn> {
    let Some(reference) = tables.service(service) else {
        return Ok(None);
    };
    if reference.generation == 0 {
        return Ok(None);
    }
    let Some(cell) = tables.cell(reference.extent) else {
        return Err(Torn);
    };
    let header = ExtentHeader::from(cell);
    if header.service != service || header.generation != reference.generation {
        return Err(Torn);
    }
    Ok(Some((reference, header)))
}

struct Torn;

/// A backend for a new flow: the one that the client had, where the service asks for that; else any active one, or any
/// terminating one when none is active.
#[inline(always)]
pub fn pick<T: Tables>(tables: &T, service: u32, client: &Client) -> Pick {
    let mut picked = Picked::none(client);
    let came_to = choose(tables, service, client, &mut picked);
    pick_of(came_to, picked)
}

/// As [`pick`], for the client that sent a packet: `outside` the node, or on it. What it came to, and the backend in `picked`. For
/// [`Tables::choose`] alone, which is what the verifier judges once.
#[inline(always)]
pub fn choose_for<T: Tables>(
    tables: &T,
    service: u32,
    key: &FlowKey,
    outside: bool,
    picked: &mut Picked,
) -> u32 {
    let client = if outside {
        Client::outside(key)
    } else {
        Client::at(key.src)
    };
    choose(tables, service, &client, picked)
}

#[inline(always)]
fn pick_of(came_to: u32, picked: Picked) -> Pick {
    match came_to {
        CHOSEN => Pick::Backend(picked),
        NONE => Pick::None,
        SILENT => Pick::Silent,
        CLIENT_UNKNOWN => Pick::ClientUnknown,
        _ => Pick::Torn,
    }
}

/// What choosing came to: a number, since only such come back from a function in a register.
pub const CHOSEN: u32 = 0;
pub const NONE: u32 = 1;
pub const SILENT: u32 = 2;
const CLIENT_UNKNOWN: u32 = 3;
const TORN: u32 = 4;

#[inline(always)]
fn choose<T: Tables>(tables: &T, service: u32, client: &Client, picked: &mut Picked) -> u32 {
    let mut attempt = 0;
    while attempt < 2 {
        attempt += 1;
        let (reference, header) = match extent(tables, service) {
            Ok(Some(found)) => found,
            Ok(None) => return NONE,
            Err(Torn) => continue,
        };
        let candidates = if header.active > 0 {
            header.active
        } else {
            header.total
        };
        if candidates == 0 {
            return if header.flags & SERVICE_SILENT != 0 {
                SILENT
            } else {
                NONE
            };
        }
        if header.affinity_timeout_s != 0 {
            return choose_again(tables, client, &reference, &header, candidates, picked);
        }
        // A table that is not there was another generation's a moment ago.
        let is_last = attempt == 2;
        if draw(
            tables, client, &reference, &header, candidates, is_last, picked,
        ) {
            return CHOSEN;
        }
    }
    TORN
}

/// One of the first `candidates` backends: the one that the service's Maglev table has for a client outside, else any. Without the
/// table, any only where `is_last`. False when there is none.
///
/// Here and below what was found goes where it is wanted field by field: a copy of the whole is a loop over bytes, and takes stack.
#[inline(always)]
fn draw<T: Tables>(
    tables: &T,
    client: &Client,
    reference: &ServiceRef,
    header: &ExtentHeader,
    candidates: u32,
    is_last: bool,
    picked: &mut Picked,
) -> bool {
    if header.active == 0 {
        tables.count(Reason::TerminatingUsed);
    }
    // Multiply and shift instead of a remainder: no division, and no bias worth the name below 2^16 backends.
    let share = |number: u32, of: u32| ((number as u64 * of as u64) >> 32) as u32;
    let mut slot = u32::MAX;
    if client.outside && header.maglev != 0 && header.active != 0 {
        let number = spread(client, header.affinity_timeout_s != 0);
        match tables.maglev(header.generation, share(number, header.maglev)) {
            Some(entry) => slot = entry as u32,
            None if is_last => {}
            None => return false,
        }
    }
    if slot >= candidates {
        slot = share(tables.random(), candidates);
    }
    let Some(cell) = tables.cell(reference.extent.wrapping_add(1).wrapping_add(slot)) else {
        return false;
    };
    let backend = Backend::from(cell);
    picked.addr = backend.addr.again();
    picked.port = backend.port;
    picked.generation = reference.generation;
    picked.slot = backend.slot;
    picked.direct = header.flags & SERVICE_DIRECT != 0;
    picked.keeps_clients = header.flags & SERVICE_KEEPS_CLIENTS != 0;
    true
}

/// The backend that the client had, while it is one of the candidates and the client came back in time; else another, which is
/// remembered.
#[inline(always)]
fn choose_again<T: Tables>(
    tables: &T,
    client: &Client,
    reference: &ServiceRef,
    header: &ExtentHeader,
    candidates: u32,
    picked: &mut Picked,
) -> u32 {
    if !client.known {
        return CLIENT_UNKNOWN;
    }
    let key = AffinityKey::new(client.addr, header.service);
    let now_s = tables.now_s();
    let mut kept = false;
    if let Some(had) = tables.affinity(&key)
        && now_s.wrapping_sub(had.last_seen_s) <= header.affinity_timeout_s
    {
        picked.addr = had.backend.again();
        picked.port = had.port;
        picked.generation = reference.generation;
        picked.direct = false;
        picked.keeps_clients = header.flags & SERVICE_KEEPS_CLIENTS != 0;
        picked.slot = search(tables, reference, header, &had.backend, had.port, had.slot);
        kept = picked.slot < candidates;
    }
    if kept {
        tables.count(Reason::AffinityKept);
    } else if !draw(tables, client, reference, header, candidates, true, picked) {
        return TORN;
    }
    let affinity = Affinity {
        backend: picked.addr.again(),
        port: picked.port,
        pad: 0,
        last_seen_s: now_s,
        slot: picked.slot,
        pad2: 0,
    };
    tables.set_affinity(&key, &affinity);
    CHOSEN
}

/// How a client came to what it asked: from outside the node, and by an address of the node.
pub const FROM_OUTSIDE: u32 = 1;
pub const AT_HOST: u32 = 2;

/// Whether what a client asks leads to a service.
#[inline(always)]
fn leads_to<T: Tables>(tables: &T, asked: &FlowKey, came: u32, service: u32) -> bool {
    match lead(tables, asked, came & AT_HOST != 0) {
        Some(lead) if came & FROM_OUTSIDE != 0 => lead.external == service,
        Some(lead) => lead.internal == service,
        None => false,
    }
}

/// Where the backend of a client's flow is now: generation, which is never 0, and slot in one number, since only such come back from a
/// function in a register; 0 when it is not among the service's backends any more, or what the client asked, under `asked`, leads to
/// another service by now. The agent gives a service another generation when either changes, so that nothing is looked up while neither
/// does. A flow of no service has the epoch for a generation, and 0 for its place. For [`Tables::seek`] alone, as above.
#[inline(always)]
pub fn seek<T: Tables>(tables: &T, flow: &Flow, asked: &FlowKey, came: u32) -> u64 {
    if flow.service == NO_SERVICE {
        // Before what is looked up: see the function.
        let epoch = epoch(tables);
        let asks = is_vip(tables, &asked.dst) || lead(tables, asked, came & AT_HOST != 0).is_some();
        return if asks { 0 } else { (epoch as u64) << 32 };
    }
    let known = Picked {
        addr: flow.other.src,
        port: flow.other.sport,
        generation: flow.generation,
        slot: flow.slot,
        direct: false,
        keeps_clients: false,
    };
    match find(tables, flow.service, &known) {
        Some(found)
            if found.generation == flow.generation
                || leads_to(tables, asked, came, flow.service) =>
        {
            (found.generation as u64) << 32 | found.slot as u64
        }
        _ => 0,
    }
}

/// Where a service's backend is now, or nothing when it is not among its backends any more.
#[inline(always)]
pub fn find<T: Tables>(tables: &T, service: u32, known: &Picked) -> Option<Picked> {
    let Ok(Some((reference, header))) = extent(tables, service) else {
        return None;
    };
    if reference.generation == known.generation {
        return Some(*known);
    }
    let slot = search(
        tables,
        &reference,
        &header,
        &known.addr,
        known.port,
        known.slot,
    );
    (slot != NOT_FOUND).then_some(Picked {
        generation: reference.generation,
        slot,
        ..*known
    })
}

/// No slot.
const NOT_FOUND: u32 = u32::MAX;

/// The slot of a backend in an extent; [`NOT_FOUND`] when it is not there.
#[inline(always)]
fn search<T: Tables>(
    tables: &T,
    reference: &ServiceRef,
    header: &ExtentHeader,
    addr: &Addr,
    port: u16,
    slot: u32,
) -> u32 {
    let first = if header.total <= FIND_MAX {
        0
    } else {
        slot.saturating_sub(FIND_MAX / 2)
    };
    let cells = reference.extent.wrapping_add(1);
    let mut near = Near {
        wanted: addr.again(),
        cell: cells.wrapping_add(first),
        left: header.total.saturating_sub(first),
        slot: NOT_FOUND,
        port,
    };
    tables.repeat(FIND_MAX, &mut near);
    if near.slot != NOT_FOUND {
        return near.slot;
    }
    if header.total <= FIND_MAX {
        return NOT_FOUND;
    }
    // A long extent is four runs, each in ascending order: active ones of this node, others, and those that terminate likewise.
    let mut first = 0;
    let mut run = 0;
    while run < 4 {
        let end = match run {
            0 => header.near_active as u32,
            1 => header.active,
            2 => header.active.wrapping_add(header.near_terminating as u32),
            _ => header.total,
        };
        let (low, high) = (cells.wrapping_add(first), cells.wrapping_add(end));
        let slot = tables.bisect(low, high, addr, port);
        if slot != NOT_FOUND {
            return slot;
        }
        first = end;
        run += 1;
    }
    NOT_FOUND
}

/// Looking for a backend from one place on.
struct Near {
    wanted: Addr,
    cell: u32,
    left: u32,
    /// Where it is, once that is known.
    slot: u32,
    port: u16,
}

impl<T: Tables> Turn<T> for Near {
    #[inline(always)]
    fn turn(&mut self, tables: &T) -> bool {
        if self.left == 0 {
            return false;
        }
        let Some(cell) = tables.cell(self.cell) else {
            return false;
        };
        let backend = Backend::from(cell);
        if backend.port == self.port && same(&backend.addr, &self.wanted) {
            self.slot = backend.slot;
            return false;
        }
        self.cell = self.cell.wrapping_add(1);
        self.left -= 1;
        true
    }
}

/// The slot of a backend among cells from `low` to before `high`, which are in ascending order; [`NOT_FOUND`] when it is not there. For
/// [`Tables::bisect`] alone, as above.
#[inline(always)]
pub fn bisect<T: Tables>(tables: &T, low: u32, high: u32, addr: &Addr, port: u16) -> u32 {
    let mut halves = Halves {
        wanted: order(addr, port),
        low,
        high,
        slot: NOT_FOUND,
    };
    tables.repeat(HALVES_MAX, &mut halves);
    halves.slot
}

/// By what backends are in ascending order.
#[inline(always)]
const fn order(addr: &Addr, port: u16) -> (u64, u64, u16) {
    let [first, second] = addr.words;
    (
        u64::from_be(first),
        u64::from_be(second),
        u16::from_be(port),
    )
}

/// Looking for a backend in what is left of cells in ascending order.
struct Halves {
    wanted: (u64, u64, u16),
    low: u32,
    high: u32,
    /// Where it is, once that is known.
    slot: u32,
}

impl<T: Tables> Turn<T> for Halves {
    #[inline(always)]
    fn turn(&mut self, tables: &T) -> bool {
        if self.low >= self.high {
            return false;
        }
        let middle = self.low.wrapping_add(self.high) >> 1;
        let Some(cell) = tables.cell(middle) else {
            return false;
        };
        let backend = Backend::from(cell);
        let there = order(&backend.addr, backend.port);
        if there == self.wanted {
            self.slot = backend.slot;
            return false;
        }
        if there < self.wanted {
            self.low = middle.wrapping_add(1);
        } else {
            self.high = middle;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Memory, addr};

    fn picked(tables: &Memory, service: u32) -> Option<Addr> {
        match pick(tables, service, &Client::UNKNOWN) {
            Pick::Backend(picked) => Some(picked.addr),
            Pick::None => None,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_active_backend_is_picked_and_no_terminating_one() {
        let tables = Memory::default();
        tables.set_service(
            7,
            &["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"],
            &["10.0.0.4:80"],
        );
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..200 {
            seen.insert(picked(&tables, 7).unwrap());
        }
        assert_eq!(
            seen.into_iter().collect::<Vec<_>>(),
            [1, 2, 3].map(|n| addr([10, 0, 0, n]))
        );
    }

    #[test]
    fn terminating_backends_serve_when_no_active_one_is_left() {
        let tables = Memory::default();
        tables.set_service(7, &[], &["10.0.0.4:80"]);
        assert_eq!(picked(&tables, 7), Some(addr([10, 0, 0, 4])));
        assert_eq!(tables.counted(Reason::TerminatingUsed), 1);
    }

    #[test]
    fn a_service_without_backends_and_one_that_is_gone_pick_none() {
        let tables = Memory::default();
        tables.set_service(7, &[], &[]);
        assert_eq!(picked(&tables, 7), None);
        assert_eq!(picked(&tables, 8), None);
    }

    #[test]
    fn a_client_of_a_service_with_affinity_comes_back_to_its_backend_in_time() {
        let tables = Memory::default();
        let backends = ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80"];
        tables.set_service(7, &backends, &[]);
        tables.set_affinity_timeout(7, 60);
        assert!(matches!(
            pick(&tables, 7, &Client::UNKNOWN),
            Pick::ClientUnknown
        ));
        let ask = |client: u8| match pick(&tables, 7, &Client::at(addr([10, 0, 9, client]))) {
            Pick::Backend(picked) => picked.addr,
            other => panic!("{other:?}"),
        };
        let first: Vec<Addr> = (0..20).map(&ask).collect();
        assert!(first.iter().any(|backend| *backend != first[0]));
        for _ in 0..5 {
            tables.clock_s.set(tables.clock_s.get() + 50);
            assert_eq!((0..20).map(&ask).collect::<Vec<_>>(), first);
        }
        tables.clock_s.set(tables.clock_s.get() + 61);
        assert_ne!((0..20).map(&ask).collect::<Vec<_>>(), first);
    }

    fn key(client: u8, port: u16, asked: [u8; 4]) -> FlowKey {
        let (sport, dport) = (port.to_be(), 80u16.to_be());
        FlowKey::new(addr([203, 0, 113, client]), addr(asked), sport, dport, 6)
    }

    #[test]
    fn a_table_decides_for_clients_outside_alone_and_alike_at_every_node() {
        let tables = Memory::default();
        let backends = ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"];
        tables.set_service(7, &backends, &[]);
        // All of a table leads to one backend.
        tables.set_maglev(7, &[2; 251]);
        let ask = |client: &Client| match pick(&tables, 7, client) {
            Pick::Backend(picked) => picked.slot,
            other => panic!("{other:?}"),
        };
        for port in 0..100 {
            assert_eq!(ask(&Client::outside(&key(9, port, [198, 18, 0, 1]))), 2);
        }
        let inside = Client::at(addr([10, 0, 9, 9]));
        assert!((0..100).any(|_| ask(&inside) != 2));
        // The entries of different flows are different ones, whichever node is asked.
        tables.set_maglev(7, &[0, 1, 2].repeat(2000));
        let of = |node: u8| -> Vec<u32> {
            let flows = (0..90u16).map(|port| key(port as u8 % 7, port, [198, 18, 0, node]));
            flows.map(|key| ask(&Client::outside(&key))).collect()
        };
        let (first, second) = (of(1), of(2));
        assert_eq!(first, second);
        for slot in 0..3 {
            let share = first.iter().filter(|chosen| **chosen == slot).count();
            assert!((15..=45).contains(&share), "{slot}: {share} of 90");
        }
    }

    #[test]
    fn affinity_and_a_table_lead_a_client_alike_from_all_its_ports_at_every_node() {
        let table = [0, 1, 2, 3].repeat(1000);
        let ask = |client: u8, port: u16| {
            // Each node's own memory of clients is empty.
            let tables = Memory::default();
            let backends = ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80"];
            tables.set_service(7, &backends, &[]);
            tables.set_affinity_timeout(7, 60);
            tables.set_maglev(7, &table);
            match pick(
                &tables,
                7,
                &Client::outside(&key(client, port, [198, 18, 0, 1])),
            ) {
                Pick::Backend(picked) => picked.slot,
                other => panic!("{other:?}"),
            }
        };
        let mut chosen = std::collections::BTreeSet::new();
        for client in 0..20 {
            chosen.insert(ask(client, 1));
            assert_eq!(ask(client, 1), ask(client, 2));
        }
        assert!(chosen.len() > 1);
    }

    #[test]
    fn a_service_whose_table_is_missing_or_wrong_is_served_all_the_same() {
        let tables = Memory::default();
        tables.set_service(7, &["10.0.0.1:80"], &["10.0.0.2:80"]);
        let client = Client::outside(&key(9, 1, [198, 18, 0, 1]));
        tables.set_maglev(7, &[1; 251]);
        assert!(matches!(pick(&tables, 7, &client), Pick::Backend(picked) if picked.slot == 0));
        tables.maglev.borrow_mut().clear();
        assert!(matches!(pick(&tables, 7, &client), Pick::Backend(picked) if picked.slot == 0));
        tables.set_service(7, &[], &["10.0.0.2:80"]);
        tables.set_maglev(7, &[1; 251]);
        assert!(matches!(pick(&tables, 7, &client), Pick::Backend(picked) if picked.slot == 0));
    }

    #[test]
    fn affinity_ends_with_its_backend_and_is_none_to_a_terminating_one() {
        let tables = Memory::default();
        let client = Client::at(addr([10, 0, 9, 9]));
        let ask = || match pick(&tables, 7, &client) {
            Pick::Backend(picked) => picked.addr,
            other => panic!("{other:?}"),
        };
        let affine = |active: &[&str], terminating: &[&str]| {
            tables.set_service(7, active, terminating);
            tables.set_affinity_timeout(7, 60);
        };
        affine(&["10.0.0.1:80"], &[]);
        assert_eq!(ask(), addr([10, 0, 0, 1]));
        affine(&["10.0.0.2:80"], &["10.0.0.1:80"]);
        assert_eq!(ask(), addr([10, 0, 0, 2]));
        affine(&["10.0.0.1:80", "10.0.0.2:80"], &[]);
        assert_eq!(ask(), addr([10, 0, 0, 2]));
        affine(&["10.0.0.1:80"], &[]);
        assert_eq!(ask(), addr([10, 0, 0, 1]));
    }

    #[test]
    fn an_extent_of_another_owner_is_never_read() {
        let tables = Memory::default();
        tables.set_service(7, &["10.0.0.1:80"], &[]);
        let stale = tables.service(7).unwrap();
        tables.services.borrow_mut().insert(8, stale);
        assert!(matches!(pick(&tables, 8, &Client::UNKNOWN), Pick::Torn));
        tables.services.borrow_mut().insert(
            7,
            ServiceRef {
                generation: stale.generation + 1,
                ..stale
            },
        );
        assert!(matches!(pick(&tables, 7, &Client::UNKNOWN), Pick::Torn));
    }

    #[test]
    fn a_backend_that_moved_is_found_and_one_that_left_is_not() {
        let tables = Memory::default();
        tables.set_service(7, &["10.0.0.1:80", "10.0.0.2:80"], &[]);
        let known = Picked {
            addr: addr([10, 0, 0, 2]),
            port: 80u16.to_be(),
            generation: tables.service(7).unwrap().generation,
            slot: 1,
            direct: false,
            keeps_clients: false,
        };
        tables.set_service(7, &["10.0.0.2:80", "10.0.0.3:80"], &[]);
        assert_eq!(find(&tables, 7, &known).map(|p| p.slot), Some(0));
        tables.set_service(7, &["10.0.0.3:80"], &["10.0.0.2:80"]);
        assert_eq!(find(&tables, 7, &known).map(|p| p.slot), Some(1));
        tables.set_service(7, &["10.0.0.2:81"], &[]);
        assert!(find(&tables, 7, &known).is_none());
    }

    #[test]
    fn a_backend_of_a_large_service_is_found_after_others_left_before_it() {
        let tables = Memory::default();
        let all: Vec<String> = (0..200).map(|n| format!("10.0.1.{n}:80")).collect();
        let set = |list: &[String]| {
            let list: Vec<&str> = list.iter().map(String::as_str).collect();
            tables.set_service(7, &list, &[]);
        };
        set(&all);
        let generation = tables.service(7).unwrap().generation;
        for slot in [0, 5, 60, 199] {
            let known = Picked {
                addr: addr([10, 0, 1, slot as u8]),
                port: 80u16.to_be(),
                generation,
                slot,
                direct: false,
                keeps_clients: false,
            };
            set(&all);
            assert_eq!(find(&tables, 7, &known).map(|p| p.slot), Some(slot));
            let gone = slot.min(10);
            set(&all[gone as usize..]);
            assert_eq!(find(&tables, 7, &known).map(|p| p.slot), Some(slot - gone));
        }
    }

    #[test]
    fn a_backend_of_a_large_service_is_found_however_many_come_and_go_at_once() {
        let tables = Memory::default();
        let at = |n: u32| format!("10.0.{}.{}:80", n >> 8, n & 255);
        // Those of the node come first, and either kind is in order by itself.
        let listed = |numbers: &[u32]| -> Vec<String> {
            let mut sorted = numbers.to_vec();
            sorted.sort_by_key(|n| (n % 7 != 0, *n));
            sorted.into_iter().map(at).collect()
        };
        let all: Vec<u32> = (0..2000).collect();
        let (active, terminating) = (listed(&all[500..1500]), listed(&all[..500]));
        fn texts(list: &[String]) -> Vec<&str> {
            list.iter().map(String::as_str).collect()
        }
        tables.set_service(7, &texts(&active), &texts(&terminating));
        let slots: Vec<&String> = active.iter().chain(&terminating).collect();
        for number in 0..2000 {
            let name = at(number);
            let known = Picked {
                addr: addr([10, 0, (number >> 8) as u8, number as u8]),
                port: 80u16.to_be(),
                generation: 0,
                // Anywhere: it was there before very many came or went.
                slot: (number * 31) % 3000,
                direct: false,
                keeps_clients: false,
            };
            let wanted = slots.iter().position(|one| **one == name);
            let found = find(&tables, 7, &known).map(|picked| picked.slot as usize);
            assert_eq!(found, wanted, "{name}");
        }
    }
}
