//! Packets that nobody would send, through the loaded programs and through the same logic on the host: both come to the same verdict,
//! packet and counts. What holds of the one (see `hook_fuzz.rs` in dataplane-ebpf) so holds of the other.

use std::collections::BTreeMap;

use dataplane_abi::{FROM_HOST, FROM_POD, LEAD_GUARDED, Lead as RawLead, Reason};
use dataplane_ebpf::{
    hook::{Features, Verdict},
    memory::{Bytes, Memory, addr, hooks},
};
use keelway_agent::dataplane::{
    PacketProgram::{self, PodEgress, PodIngress, ServiceIngress, UplinkEgress, UplinkIngress},
    Protocol, Run,
};
use keelway_tests::sandbox::{Sandbox, is_root};

use crate::{
    A, B,
    family::Family,
    opened,
    rows::{DROP, PASS, REDIRECT},
    state,
};

const PACKETS: usize = 6_000;

/// Numbers that are the same in every run (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as usize % limit
    }
}

fn packet(numbers: &mut Numbers, family: Family) -> Vec<u8> {
    let ends = [
        "10.0.0.11:4000",
        "10.0.0.11:8080",
        "10.0.0.12:8080",
        "10.96.0.1:80",
        "10.96.0.1:81",
        "198.18.0.1:30080",
        "198.18.0.1:30081",
        "203.0.113.9:5000",
        "192.0.2.1:80",
        "169.254.77.77:4000",
    ];
    let (src, dst) = (
        ends[numbers.below(ends.len())],
        ends[numbers.below(ends.len())],
    );
    let payload: Vec<u8> = (0..numbers.below(60))
        .map(|_| numbers.below(256) as u8)
        .collect();
    let mut packet = match numbers.below(7) {
        0 | 1 => family.tcp(src, dst, numbers.below(32) as u8, &payload),
        2 => family.udp(src, dst, &payload),
        3 => family.echo(src, dst),
        4 | 5 => family.sctp(src, dst, numbers.below(16) as u8, &payload),
        _ => family.port_unreachable(src, &family.udp(dst, src, &payload)),
    };
    match numbers.below(3) {
        0 => {}
        1 => {
            for _ in 0..=numbers.below(3) {
                let at = 12 + numbers.below(packet.len() - 12);
                packet[at] = numbers.below(256) as u8;
            }
        }
        // The kernel runs programs on no packet that ends within its IP header.
        _ => packet.truncate(family.l4() + numbers.below(packet.len() + 1 - family.l4())),
    }
    packet
}

/// The same state as [`state`] writes, in memory.
fn memory(family: Family, backend: &str) -> Memory {
    let tables = Memory::default();
    let ip = |v4: &str| family.ip(v4).to_string();
    let at = |v4: &str| family.text(v4);
    tables.set_local(&ip("10.0.0.11"), FROM_POD, A);
    tables.set_local(&ip("10.0.0.12"), FROM_POD, B);
    tables.set_local(&ip("198.18.0.1"), FROM_HOST, 0);
    tables.set_service(1, &[&at(backend)], &[]);
    tables.set_service(2, &[&at(backend)], &[]);
    tables.set_service(3, &[], &[]);
    tables.set_silent(3);
    for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(Protocol::number) {
        tables.set_frontend(&at("10.96.0.1:80"), protocol, 1);
        tables.set_lead(&at("0.0.0.0:30080"), protocol, RawLead::new(1, 1, 0));
        if protocol != Protocol::Tcp.number() {
            tables.set_lead(&at("10.96.0.2:80"), protocol, RawLead::new(2, 2, 0));
        }
        if protocol == Protocol::Sctp.number() {
            continue;
        }
        tables.set_lead(&at("0.0.0.0:30081"), protocol, RawLead::new(1, 3, 0));
        let guarded = RawLead::new(1, 1, LEAD_GUARDED);
        tables.set_lead(&at("192.0.2.1:80"), protocol, guarded);
    }
    tables.set_vip(&ip("192.0.2.1"));
    let ranges = [
        (1, family.ip("203.0.113.0").into(), 96 + 24),
        (0, family.ip("10.0.0.0").into(), 96 + 8),
    ];
    tables.ranges.borrow_mut().extend(ranges);
    tables
}

fn features(masquerade: bool) -> Features {
    Features {
        packet_lb: true,
        service_veth: true,
        masquerade,
        node_v4: addr([198, 18, 0, 1]),
        node_v6: Family::V6.ip("198.18.0.1").into(),
        overlay: false,
        by_overlay: false,
    }
}

fn on_the_host(
    tables: &Memory,
    features: &Features,
    program: PacketProgram,
    packet: &[u8],
) -> (Verdict, Vec<u8>) {
    let mut packet = Bytes(packet.to_vec());
    let verdict = match program {
        PodIngress => hooks::pod_ingress(&mut packet, tables, features, A),
        PodEgress => hooks::answer(&mut packet, tables, features),
        UplinkIngress => hooks::uplink_ingress(&mut packet, tables, features),
        UplinkEgress => hooks::uplink_egress(&mut packet, tables, features),
        ServiceIngress => hooks::service_ingress(&mut packet, tables, features),
    };
    (verdict, packet.0)
}

#[test]
fn the_loaded_programs_do_what_their_logic_does_on_the_host() {
    if !is_root("random packets") {
        return;
    }
    for family in Family::ALL {
        for masquerade in [false, true] {
            compare_all(family, masquerade);
        }
    }
}

fn compare_all(family: Family, masquerade: bool) {
    let sandbox = Sandbox::enter().unwrap();
    let mut dataplane = opened(&sandbox, masquerade);
    // One backend, on this node: but for ports (see below) nothing is left to chance.
    let backend = "10.0.0.12:8080";
    let backends = family.backends(&[backend], &[]);
    dataplane.apply(&state(family, &backends)).unwrap();
    let tables = memory(family, backend);
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for number in 0..PACKETS {
        let program = PacketProgram::ALL[numbers.below(PacketProgram::ALL.len())];
        let before = packet(&mut numbers, family);
        let run = dataplane.run(program, &before, A, 1).unwrap();
        let on_the_host = on_the_host(&tables, &features(masquerade), program, &before);
        let place = format!("{family:?} {number}: {} of {before:02x?}", program.name());
        compare(program, &run, on_the_host, &place);
    }
    let loaded: BTreeMap<Reason, u64> = dataplane.counters().unwrap().into_iter().collect();
    // Where a route was asked for, the kernel may have none.
    for (reason, count) in loaded
        .iter()
        .filter(|(reason, _)| **reason != Reason::NoRoute)
    {
        let name = reason.name();
        assert_eq!(*count, tables.counted(*reason), "{family:?}: {name}");
    }
    assert!(loaded[&Reason::ServiceTranslated] > 50 && loaded[&Reason::Malformed] > 50);
    assert_eq!(loaded[&Reason::Masqueraded] > 50, masquerade);
}

fn compare(program: PacketProgram, run: &Run, on_the_host: (Verdict, Vec<u8>), place: &str) {
    let (verdict, after) = on_the_host;
    let agree = match verdict {
        Verdict::Pass => run.verdict == PASS,
        Verdict::Drop => run.verdict == DROP,
        Verdict::Route => matches!(run.verdict, REDIRECT | DROP),
        // Into a pod nothing is redirected from the host's side.
        Verdict::Peer(_) | Verdict::Host | Verdict::Overlay => {
            run.verdict == REDIRECT || (program == PodEgress && run.verdict == PASS)
        }
    };
    assert!(agree, "{place}: {}, not {verdict:?}", run.verdict);
    if verdict != Verdict::Drop {
        // The frame's own addresses are the entry points' business.
        if !differ_by_a_taken_port(&run.packet, &after) {
            assert_eq!(run.packet[12..], after[12..], "{place}");
        }
    }
}

/// Whether two packets, or what they quote, have but another source port of those taken at random where the client's own leads to
/// the backend already, and so another checksum, which is two words of SCTP's: the kernel's numbers are not ours.
fn differ_by_a_taken_port(loaded: &[u8], here: &[u8]) -> bool {
    let is_taken = |word: &[u8]| matches!(word, [high, _] if (0x20..0x60).contains(high));
    let words = |packet: &[u8]| {
        packet[14..]
            .chunks(2)
            .map(<[u8]>::to_vec)
            .collect::<Vec<_>>()
    };
    let different: Vec<(Vec<u8>, Vec<u8>)> = words(loaded)
        .into_iter()
        .zip(words(here))
        .filter(|(a, b)| a != b)
        .collect();
    let ports = different.iter().filter(|(a, b)| is_taken(a) && is_taken(b));
    loaded.len() == here.len() && different.len() <= 3 && ports.count() > 0
}
