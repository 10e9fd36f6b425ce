//! What each cgroup hook does with a socket call.

use dataplane_abi::{
    Addr, FrontendKey, LEAD_GUARDED, Lead, MARKER_EXTERNAL, Reason, ServiceRef, SocketPeer,
    SocketPeers,
};

use crate::{
    balance::{self, Client, Pick, Picked},
    hook::Place,
    tables::Tables,
};

/// What becomes of a call that names a destination.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The destination stays: it is no Service's, or one without backends that the packet hooks will reject.
    Leave,
    /// It becomes the peer's backend.
    Translate(SocketPeer),
    /// The call fails with ECONNREFUSED: no packet hook is there to reject what it would send.
    Refuse,
}

/// Whose socket it is.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// Of the host's network namespace, where a loopback address means the node.
    pub is_host: bool,
    /// The packet hooks translate, and reject, what the socket hook leaves alone.
    pub packet_lb: bool,
    /// It connects a datagram socket, which will send to that address from then on without asking again.
    pub connects_datagrams: bool,
    /// The caller's address, where it is known: the node's, for the host. A pod's is not.
    pub client: Client,
}

/// Where a socket's destination leads. `known` is what the socket was given before: a datagram socket keeps its backend
/// as long as it is one.
///
/// A connected datagram socket would stay with a backend that is gone: nothing tells its owner. So these are left to the packet
/// hooks, which choose anew, where there are any on the way.
///
/// What depends on the client's address (affinity, ranges of sources) is left to the packet hooks for pods, so that there
/// is one answer; without packet hooks, `caller.client` is whatever tells clients apart, and ranges let pods in.
#[inline(always)]
pub fn destination<T: Tables>(
    tables: &T,
    caller: &Caller,
    frontend: &FrontendKey,
    known: Option<&SocketPeers>,
) -> Outcome {
    // A pod's own, whoever has every address of the node, or its loopback, at this port.
    if !caller.is_host && frontend.addr.is_loopback() {
        return Outcome::Leave;
    }
    // Of what a pod sends, the packet hooks see everything.
    if caller.connects_datagrams && caller.packet_lb && !caller.is_host {
        return Outcome::Leave;
    }
    let Some(lead) = lead(tables, caller, frontend) else {
        if !rejected_by_packet(tables, caller, frontend)
            && tables
                .frontend(&FrontendKey::marker(frontend.addr))
                .is_some()
        {
            tables.count(Reason::NoSuchPort);
            return Outcome::Refuse;
        }
        return Outcome::Leave;
    };
    if caller.connects_datagrams && rejected_by_packet(tables, caller, frontend) {
        return Outcome::Leave;
    }
    let service = lead.internal;
    if lead.flags & LEAD_GUARDED != 0 {
        if !caller.is_host && caller.packet_lb {
            return Outcome::Leave;
        }
        if caller.is_host && !tables.in_range(service, &caller.client.addr) {
            tables.count(Reason::SourceRange);
            return Outcome::Refuse;
        }
    }
    let kept = match known.and_then(|peers| given(peers, &frontend.addr, frontend.port)) {
        Some(peer) if peer.service == service => {
            let known = Picked {
                addr: peer.backend,
                port: peer.backend_port,
                generation: peer.generation,
                slot: peer.slot,
                direct: false,
                keeps_clients: false,
            };
            balance::find(tables, service, &known)
        }
        _ => None,
    };
    let backend = match kept {
        Some(backend) => backend,
        None => match balance::pick(tables, service, &caller.client) {
            Pick::Backend(backend) => backend,
            Pick::ClientUnknown => return Outcome::Leave,
            Pick::None | Pick::Silent | Pick::Torn => {
                tables.count(Reason::SocketNoBackend);
                return if rejected_by_packet(tables, caller, frontend) {
                    Outcome::Leave
                } else {
                    Outcome::Refuse
                };
            }
        },
    };
    tables.count(Reason::SocketTranslated);
    Outcome::Translate(SocketPeer {
        frontend: frontend.addr,
        backend: backend.addr,
        frontend_port: frontend.port,
        backend_port: backend.port,
        service,
        generation: backend.generation,
        slot: backend.slot,
    })
}

/// What the socket was given for a destination, while that leads where it led and the backends of its service are the same: what
/// [`destination`] would come to, for a small part of the cost.
#[inline(always)]
pub fn again<'a, T: Tables>(
    tables: &T,
    known: &'a SocketPeers,
    addr: &Addr,
    port: u16,
) -> Option<&'a SocketPeer> {
    if known.epoch != epoch(tables) {
        return None;
    }
    let peer = given(known, addr, port)?;
    let now = tables.service(peer.service)?;
    // No generation is what is to be looked up anew, and what a service has that is gone.
    (peer.generation != 0 && now.generation == peer.generation).then_some(peer)
}

/// When it last changed where destinations lead; to be read before one is looked up that is to be remembered.
#[inline(always)]
pub fn epoch<T: Tables>(tables: &T) -> u32 {
    let word = tables.service(ServiceRef::EPOCH_ID);
    word.map_or(0, ServiceRef::epoch)
}

/// Has what a socket was given before an epoch looked up again before it is used again.
#[inline(always)]
pub fn renew(peers: &mut SocketPeers, epoch: u32) {
    if peers.epoch == epoch {
        return;
    }
    peers.epoch = epoch;
    let mut slot = 0;
    while slot < SocketPeers::SLOTS {
        peers.peers[slot].generation = 0;
        slot += 1;
    }
}

/// Where a destination leads, when it is a frontend: the address and port, or the port of every address of the node.
#[inline(always)]
fn lead<T: Tables>(tables: &T, caller: &Caller, frontend: &FrontendKey) -> Option<Lead> {
    let found = tables.frontend(frontend);
    if found.is_some() {
        return found;
    }
    let is_node = if frontend.addr.is_loopback() {
        caller.is_host
    } else {
        Place::of(tables, &frontend.addr).is_host()
    };
    if is_node {
        tables.frontend(&frontend.on_every_address())
    } else {
        None
    }
}

/// Whether a packet hook sees what the socket would send to the frontend: all that pods send, and what the host sends to
/// addresses that it routes into the service veth.
#[inline(always)]
fn rejected_by_packet<T: Tables>(tables: &T, caller: &Caller, frontend: &FrontendKey) -> bool {
    if !caller.is_host || !caller.packet_lb {
        return caller.packet_lb;
    }
    match tables.frontend(&FrontendKey::marker(frontend.addr)) {
        Some(marker) => marker.flags & MARKER_EXTERNAL == 0,
        None => false,
    }
}

/// What the socket was given for a frontend.
#[inline(always)]
fn given<'a>(peers: &'a SocketPeers, addr: &Addr, port: u16) -> Option<&'a SocketPeer> {
    peers
        .peers
        .iter()
        .find(|peer| peer.service != 0 && peer.frontend_port == port && same(&peer.frontend, addr))
}

/// What a socket was given that hears from a backend, its address and port in network order.
#[inline(always)]
pub fn asked<'a>(peers: &'a SocketPeers, addr: &Addr, port: u16) -> Option<&'a SocketPeer> {
    peers.peers.iter().find(|peer| is_backend(peer, addr, port))
}

/// Whether it is from the backend that it was given that a socket hears.
#[inline(always)]
pub fn is_backend(peer: &SocketPeer, addr: &Addr, port: u16) -> bool {
    peer.service != 0 && peer.backend_port == port && same(&peer.backend, addr)
}

/// Notes what a socket is given: over what it was given for the same frontend, else over the oldest.
#[inline(always)]
pub fn remember(peers: &mut SocketPeers, peer: &SocketPeer) {
    let mut slot = 0;
    while slot < SocketPeers::SLOTS {
        let old = &mut peers.peers[slot];
        if old.service != 0
            && old.frontend_port == peer.frontend_port
            && same(&old.frontend, &peer.frontend)
        {
            *old = *peer;
            return;
        }
        slot += 1;
    }
    // Masked, so that the verifier sees the bound.
    peers.peers[peers.next as usize & (SocketPeers::SLOTS - 1)] = *peer;
    peers.next = peers.next.wrapping_add(1);
}

const _: () = assert!(SocketPeers::SLOTS.is_power_of_two());

#[inline(always)]
fn same(a: &Addr, b: &Addr) -> bool {
    a.words[0] == b.words[0] && a.words[1] == b.words[1]
}

#[cfg(test)]
mod tests {
    use dataplane_abi::proto;

    use super::*;
    use crate::memory::{Memory, addr};

    const VIP: [u8; 4] = [10, 96, 0, 10];
    const POD: Caller = Caller {
        is_host: false,
        packet_lb: true,
        connects_datagrams: false,
        client: Client::UNKNOWN,
    };
    const POD_WITHOUT_PACKETS: Caller = Caller {
        packet_lb: false,
        ..POD
    };

    fn dns() -> FrontendKey {
        FrontendKey::new(addr(VIP), 53u16.to_be(), proto::UDP)
    }

    fn translated(outcome: Outcome) -> SocketPeer {
        match outcome {
            Outcome::Translate(peer) => peer,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_service_address_becomes_a_backend_and_its_answers_seem_to_come_from_it() {
        let tables = Memory::default();
        tables.set_service(3, &["10.0.0.5:5353"], &[]);
        tables.set_frontend("10.96.0.10:53", proto::UDP, 3);
        let peer = translated(destination(&tables, &POD, &dns(), None));
        assert_eq!(
            (peer.backend, peer.backend_port),
            (addr([10, 0, 0, 5]), 5353u16.to_be())
        );
        let mut peers = SocketPeers::default();
        remember(&mut peers, &peer);
        assert_eq!(
            asked(&peers, &peer.backend, peer.backend_port)
                .map(|peer| (peer.frontend, peer.frontend_port)),
            Some((addr(VIP), 53u16.to_be()))
        );
        assert_eq!(asked(&peers, &peer.backend, 54u16.to_be()), None);
    }

    #[test]
    fn other_addresses_are_left() {
        assert_eq!(
            destination(&Memory::default(), &POD, &dns(), None),
            Outcome::Leave
        );
        assert_eq!(
            destination(&Memory::default(), &POD_WITHOUT_PACKETS, &dns(), None),
            Outcome::Leave
        );
    }

    #[test]
    fn without_backends_the_packet_hooks_reject_or_the_call_is_refused() {
        let tables = Memory::default();
        tables.set_service(3, &[], &[]);
        tables.set_frontend("10.96.0.10:53", proto::UDP, 3);
        assert_eq!(destination(&tables, &POD, &dns(), None), Outcome::Leave);
        assert_eq!(
            destination(&tables, &POD_WITHOUT_PACKETS, &dns(), None),
            Outcome::Refuse
        );
    }

    #[test]
    fn an_unknown_port_of_a_service_address_is_refused_when_no_packet_hook_would_reject_it() {
        let tables = Memory::default();
        tables.set_vip("10.96.0.10");
        assert_eq!(destination(&tables, &POD, &dns(), None), Outcome::Leave);
        assert_eq!(
            destination(&tables, &POD_WITHOUT_PACKETS, &dns(), None),
            Outcome::Refuse
        );
    }

    #[test]
    fn a_datagram_socket_keeps_its_backend_until_it_is_gone() {
        let tables = Memory::default();
        let backends = ["10.0.0.1:53", "10.0.0.2:53", "10.0.0.3:53", "10.0.0.4:53"];
        tables.set_service(3, &backends, &[]);
        tables.set_frontend("10.96.0.10:53", proto::UDP, 3);
        let mut peers = SocketPeers::default();
        let first = translated(destination(&tables, &POD, &dns(), None));
        remember(&mut peers, &first);
        for _ in 0..50 {
            assert_eq!(
                translated(destination(&tables, &POD, &dns(), Some(&peers))).backend,
                first.backend
            );
        }
        tables.set_service(3, &["10.0.0.9:53"], &[]);
        assert_eq!(
            translated(destination(&tables, &POD, &dns(), Some(&peers))).backend,
            addr([10, 0, 0, 9])
        );
    }

    #[test]
    fn what_was_given_is_given_again_until_backends_or_frontends_change() {
        let tables = Memory::default();
        tables.set_epoch(1);
        tables.set_service(3, &["10.0.0.1:53", "10.0.0.2:53"], &[]);
        tables.set_service(4, &["10.0.0.3:53"], &[]);
        tables.set_frontend("10.96.0.10:53", proto::UDP, 3);
        tables.set_frontend("10.96.0.11:53", proto::UDP, 4);
        let other = at("10.96.0.11:53", proto::UDP);
        let mut peers = SocketPeers::default();
        let give = |peers: &mut SocketPeers, key: &FrontendKey| {
            let epoch = epoch(&tables);
            let peer = translated(destination(&tables, &POD, key, Some(peers)));
            renew(peers, epoch);
            remember(peers, &peer);
            peer
        };
        let again = |peers: &SocketPeers, key: &FrontendKey| {
            again(&tables, peers, &key.addr, key.port).copied()
        };
        // Nothing is known of a socket that was given nothing.
        assert_eq!(again(&peers, &dns()), None);
        let first = give(&mut peers, &dns());
        assert_eq!(again(&peers, &dns()), Some(first));
        assert_eq!(again(&peers, &other), None);
        let second = give(&mut peers, &other);
        // The backends of one change: the other is given again.
        tables.set_service(4, &["10.0.0.4:53"], &[]);
        assert_eq!(again(&peers, &dns()), Some(first));
        assert_eq!(again(&peers, &other), None);
        assert_ne!(give(&mut peers, &other).backend, second.backend);
        // A frontend goes, and both are looked up; looking up one does not make the other known.
        tables.frontends.borrow_mut().remove(&other);
        tables.set_epoch(2);
        assert_eq!(again(&peers, &dns()), None);
        assert_eq!(give(&mut peers, &dns()).backend, first.backend);
        assert!(again(&peers, &dns()).is_some());
        assert_eq!(again(&peers, &other), None);
        assert_eq!(
            destination(&tables, &POD, &other, Some(&peers)),
            Outcome::Leave
        );
        // A Service that is gone has no generation, and neither has what is to be looked up anew.
        let gone = ServiceRef::default();
        tables.services.borrow_mut().insert(3, gone);
        assert_eq!(again(&peers, &dns()), None);
        tables.frontends.borrow_mut().remove(&dns());
        tables.set_frontend("10.96.0.11:53", proto::UDP, 4);
        tables.set_epoch(3);
        give(&mut peers, &other);
        assert_eq!(again(&peers, &dns()), None);
    }

    const HOST: Caller = Caller {
        is_host: true,
        client: Client::at(Addr::from_v4_be(u32::from_ne_bytes([198, 18, 0, 1]))),
        ..POD
    };

    fn at(text: &str, protocol: u8) -> FrontendKey {
        let at: std::net::SocketAddr = text.parse().unwrap();
        FrontendKey::new(at.ip().into(), at.port().to_be(), protocol)
    }

    #[test]
    fn connected_datagram_sockets_are_left_to_packet_hooks_where_there_are_any() {
        let tables = Memory::default();
        tables.set_service(3, &["10.0.0.5:5353"], &[]);
        tables.set_frontend("10.96.0.10:53", proto::UDP, 3);
        tables.set_lead("0.0.0.0:30053", proto::UDP, Lead::new(3, 3, 0));
        let connecting = |caller: Caller| Caller {
            connects_datagrams: true,
            ..caller
        };
        let left = |caller| destination(&tables, &connecting(caller), &dns(), None);
        assert_eq!(left(POD), Outcome::Leave);
        assert_eq!(left(HOST), Outcome::Leave);
        translated(left(POD_WITHOUT_PACKETS));
        // No packet hook is on the host's way to its own ports.
        let own = at("127.0.0.1:30053", proto::UDP);
        translated(destination(&tables, &connecting(HOST), &own, None));
    }

    #[test]
    fn node_ports_are_on_every_address_of_the_node_and_on_the_hosts_loopback() {
        let tables = Memory::default();
        tables.set_service(3, &["10.0.0.5:8080"], &[]);
        tables.set_service(4, &["[fd00::5]:8080"], &[]);
        tables.set_local("198.18.0.1", dataplane_abi::FROM_HOST, 0);
        tables.set_local("fd00:18::1", dataplane_abi::FROM_HOST, 0);
        tables.set_lead("0.0.0.0:30080", proto::TCP, Lead::new(3, 9, 0));
        tables.set_lead("[::]:30080", proto::TCP, Lead::new(4, 9, 0));
        for (asked, backend, pods_too) in [
            ("198.18.0.1:30080", "10.0.0.5", true),
            ("[fd00:18::1]:30080", "fd00::5", true),
            ("127.0.0.1:30080", "10.0.0.5", false),
            ("127.1.2.3:30080", "10.0.0.5", false),
            ("[::1]:30080", "fd00::5", false),
        ] {
            let key = at(asked, proto::TCP);
            let peer = translated(destination(&tables, &HOST, &key, None));
            assert_eq!(peer.backend, crate::memory::ip(backend), "{asked}");
            let pod = destination(&tables, &POD, &key, None);
            assert_eq!(matches!(pod, Outcome::Translate(_)), pods_too, "{asked}");
        }
        // Another node's, another port, another protocol.
        for (asked, protocol) in [
            ("198.18.0.2:30080", proto::TCP),
            ("198.18.0.1:30081", proto::TCP),
            ("198.18.0.1:30080", proto::UDP),
        ] {
            let outcome = destination(&tables, &HOST, &at(asked, protocol), None);
            assert_eq!(outcome, Outcome::Leave, "{asked}");
        }
    }

    #[test]
    fn a_pods_loopback_and_unspecified_address_are_its_own() {
        let tables = Memory::default();
        tables.set_service(3, &["10.0.0.5:8080"], &[]);
        for every in ["0.0.0.0:80", "[::]:80", "127.0.0.1:80", "[::1]:80"] {
            tables.set_lead(every, proto::TCP, Lead::new(3, 3, 0));
        }
        for asked in [
            "0.0.0.0:80",
            "[::]:80",
            "127.0.0.1:80",
            "127.0.0.2:80",
            "[::1]:80",
        ] {
            let key = at(asked, proto::TCP);
            translated(destination(&tables, &HOST, &key, None));
            for pod in [POD, POD_WITHOUT_PACKETS] {
                let outcome = destination(&tables, &pod, &key, None);
                assert_eq!(outcome, Outcome::Leave, "{asked}");
            }
        }
    }

    #[test]
    fn what_depends_on_a_pods_address_is_left_to_the_packet_hooks() {
        let tables = Memory::default();
        tables.set_service(3, &["10.0.0.5:53", "10.0.0.6:53"], &[]);
        tables.set_affinity_timeout(3, 60);
        tables.set_frontend("10.96.0.10:53", proto::UDP, 3);
        assert_eq!(destination(&tables, &POD, &dns(), None), Outcome::Leave);
        let host = translated(destination(&tables, &HOST, &dns(), None)).backend;
        for _ in 0..20 {
            let again = translated(destination(&tables, &HOST, &dns(), None)).backend;
            assert_eq!(again, host);
        }
        tables.set_service(4, &["10.0.0.5:53"], &[]);
        tables.set_lead("192.0.2.1:53", proto::UDP, Lead::new(4, 4, LEAD_GUARDED));
        let guarded = at("192.0.2.1:53", proto::UDP);
        assert_eq!(destination(&tables, &POD, &guarded, None), Outcome::Leave);
        assert_eq!(destination(&tables, &HOST, &guarded, None), Outcome::Refuse);
        let range = (4, crate::memory::ip("198.18.0.0"), 96 + 24);
        tables.ranges.borrow_mut().push(range);
        translated(destination(&tables, &HOST, &guarded, None));
    }

    #[test]
    fn the_oldest_peer_is_forgotten_first() {
        let mut peers = SocketPeers::default();
        let peer = |n: u8| SocketPeer {
            frontend: addr([10, 96, 0, n]),
            backend: addr([10, 0, 0, n]),
            service: 1,
            ..SocketPeer::default()
        };
        for n in 0..=SocketPeers::SLOTS as u8 {
            remember(&mut peers, &peer(n));
        }
        assert_eq!(asked(&peers, &addr([10, 0, 0, 0]), 0), None);
        for n in 1..=SocketPeers::SLOTS as u8 {
            assert!(asked(&peers, &addr([10, 0, 0, n]), 0).is_some());
        }
    }
}
