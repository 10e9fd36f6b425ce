//! The loaded program, reached as pods' packets reach it.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use cluster_model::{Change, Dirty, Kind, ObjectRef, ServiceKey};
use dataplane_abi::{DnsZone, FrontendKey, NameAddresses, NameKey, name_key, proto};
use keelway_agent::dataplane::{Config, Dataplane, PacketProgram, Run};
use keelway_agent::names::KernelNames;
use keelway_agent::offers::Terms;
use keelway_tests::process::eventually;
use keelway_tests::sandbox::{Sandbox, is_root};
use proptest::prelude::*;

use crate::packets::{datagram, opened};
use crate::{CLIENT, SERVER, SERVER_POD, asked, check, cluster, query, terms};

const REDIRECT: i32 = 7;

fn plain(name: &[u8]) -> Vec<u8> {
    let mut query = vec![0, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    query.extend(name);
    query.extend([0, 1, 0, 1]);
    query
}

const FOUR: &[u8] = b"\x04four\x04prod\x03svc\x07cluster\x05local\0";
const FEW: &[u8] = b"\x03few\x04prod\x03svc\x07cluster\x05local\0";
const NONE: &[u8] = b"\x04none\x04prod\x03svc\x07cluster\x05local\0";

fn dataplane(sandbox: &Sandbox, kernel_dns: bool) -> Dataplane {
    Dataplane::open(&Config {
        kernel_dns,
        ..Config::new(sandbox.pin_root())
    })
    .expect("the data plane")
}

fn run(dataplane: &Dataplane, packet: &[u8]) -> Run {
    dataplane
        .run(PacketProgram::PodIngress, packet, 1, 1)
        .expect("it runs")
}

#[test]
fn the_program_answers_as_the_server_does() {
    if !is_root("kernel_dns") {
        return;
    }
    let sandbox = Sandbox::enter().expect("namespaces");
    let mut dataplane = dataplane(&sandbox, true);
    let cluster = cluster();
    let mut names = KernelNames::new(dataplane.load_names().expect("the program loads"));
    names
        .settle(&cluster.snapshot, Some(terms()))
        .expect("the maps are written");
    let answered = Cell::new([0; 2]);
    proptest!(ProptestConfig::with_cases(4000), |(query in query(), v6 in any::<bool>())| {
        let packet = asked(&query, v6);
        let run = run(&dataplane, &packet);
        if run.verdict == REDIRECT {
            let mut counts = answered.get();
            counts[usize::from(v6)] += 1;
            answered.set(counts);
            check(&cluster, &query, Some(opened(&run.packet, v6)?))?;
        } else {
            prop_assert_eq!(&run.packet, &packet, "a packet that is left is left alone");
            check(&cluster, &query, None)?;
        }
    });
    assert!(
        answered.get().iter().all(|count| *count > 250),
        "{answered:?}"
    );
    let counts = names.counts().expect("counters");
    assert!(counts.iter().all(|count| *count > 50), "{counts:?}");
    // The order of addresses differs from answer to answer.
    let query = plain(FEW);
    let packet = asked(&query, false);
    let mut firsts: Vec<u8> = (0..64)
        .map(|_| run(&dataplane, &packet).packet)
        .map(|packet| packet[42 + query.len() + 15])
        .collect();
    firsts.sort_unstable();
    firsts.dedup();
    assert_eq!(firsts, [1, 2, 3]);
    let nanoseconds = |packet: &[u8]| {
        let mean = dataplane.run(PacketProgram::PodIngress, packet, 1, 100_000);
        mean.expect("it runs").nanoseconds
    };
    let of = |name, to: IpAddr| datagram(CLIENT.into(), to, &plain(name));
    let mut other_port = of(FOUR, SERVER.into());
    other_port[37] = 54;
    println!(
        "a question that is left: {} ns; to another server: {} ns; to another port: {} ns",
        nanoseconds(&of(NONE, SERVER.into())),
        nanoseconds(&of(FOUR, [10, 96, 0, 11].into())),
        nanoseconds(&other_port)
    );
}

/// The kernel's numbers of the programs that this process holds.
fn programs() -> BTreeSet<u32> {
    let held = fs::read_dir("/proc/self/fdinfo").expect("this process");
    let texts = held.flatten().map(|entry| fs::read_to_string(entry.path()));
    let numbers = texts.flatten().filter_map(|text| {
        let line = text.lines().find(|line| line.starts_with("prog_id:"))?;
        line.split_whitespace().nth(1)?.parse().ok()
    });
    numbers.collect()
}

#[test]
fn a_worker_takes_programs_over_from_the_one_before_and_answers_by_what_it_knows_itself() {
    if !is_root("kernel_dns") {
        return;
    }
    let sandbox = Sandbox::enter().expect("namespaces");
    let cluster = cluster();
    let four = asked(&plain(FOUR), false);
    let answers = |worker: &Dataplane| run(worker, &four).verdict == REDIRECT;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut worker = dataplane(&sandbox, true);
        held.push(programs());
        // What the worker before answered by is emptied a moment after its end.
        eventually("nothing is answered", Duration::from_secs(10), || {
            (!answers(&worker)).then_some(()).ok_or("answered".into())
        });
        let mut names = KernelNames::new(worker.load_names().expect("the program loads"));
        names
            .settle(&cluster.snapshot, Some(terms()))
            .expect("the maps are written");
        assert!(answers(&worker));
    }
    assert!(held[0].len() > 10, "{held:?}");
    assert_eq!(held[0], held[1]);
    // Whoever would load others finds none, and leaves none of those.
    let other = dataplane(&sandbox, false);
    assert!(programs().is_disjoint(&held[0]));
    drop(other);
    let again = dataplane(&sandbox, true);
    assert!(programs().is_disjoint(&held[0]));
    assert!(!answers(&again));
}

#[test]
fn nothing_is_answered_but_what_the_nodes_server_would() {
    if !is_root("kernel_dns") {
        return;
    }
    let sandbox = Sandbox::enter().expect("namespaces");
    let mut dataplane = dataplane(&sandbox, true);
    let cluster = cluster();
    let mut snapshot = cluster.snapshot.clone();
    let four = asked(&plain(FOUR), false);
    let to = |server: IpAddr| datagram(CLIENT.into(), server, &plain(FOUR));
    assert_ne!(
        run(&dataplane, &four).verdict,
        REDIRECT,
        "nobody has said how"
    );
    let mut names = KernelNames::new(dataplane.load_names().expect("the program loads"));
    let answers = |packet: &[u8]| run(&dataplane, packet).verdict == REDIRECT;
    names.settle(&snapshot, None).expect("nothing to do");
    assert!(!answers(&four), "nobody has said how");
    names
        .settle(&snapshot, Some(terms()))
        .expect("the maps are written");
    assert!(answers(&four) && answers(&to(SERVER_POD.into())));
    assert!(!answers(&to([10, 96, 0, 11].into())), "another server");
    assert!(
        !answers(&to([10, 244, 2, 2].into())),
        "another node's server, which has not said how"
    );
    // What is no plain datagram of one packet is the server's.
    for (what, at, byte) in [
        ("TCP", 23, 6),
        ("IP options", 14, 0x46),
        ("a first fragment", 20, 0x20),
        ("a later fragment", 21, 1),
        ("another port", 37, 54),
        ("longer than it says", 39, 40),
    ] {
        let mut packet = four.clone();
        packet[at] = byte;
        assert!(!answers(&packet), "{what}");
    }
    // Servers of other addresses, and rules.
    let elsewhere = Terms {
        addresses: vec![[10, 244, 9, 9].into()],
        ..terms()
    };
    names
        .settle(&snapshot, Some(elsewhere))
        .expect("the maps are written");
    assert!(!answers(&four), "the Service leads to others");
    let mut slower = terms();
    slower.rules.ttl_s = 77;
    slower.rules.origins.remove(0);
    names
        .settle(&snapshot, Some(slower))
        .expect("the maps are written");
    assert!(!answers(&four), "of a domain that is served no more");
    let corp = asked(
        &plain(b"\x04four\x04prod\x03svc\x04corp\x07example\0"),
        false,
    );
    let answer = run(&dataplane, &corp);
    assert_eq!(answer.verdict, REDIRECT);
    assert_eq!(answer.packet[42 + plain(FOUR).len() - 1 + 9..][..1], [77]);
    // A name that goes is the server's to deny.
    names
        .settle(&snapshot, Some(terms()))
        .expect("the maps are written");
    assert!(answers(&four));
    let key = ServiceKey::new("prod", "four");
    let gone = ObjectRef {
        kind: Kind::Service,
        key: key.clone(),
    };
    snapshot.apply(Change::Remove(gone), &mut Dirty::default());
    names.replan(&snapshot, &key);
    names
        .settle(&snapshot, Some(terms()))
        .expect("the maps are written");
    assert!(!answers(&four) && answers(&asked(&plain(FEW), false)));
    // The server says no more how it would answer, and with the agent goes all that it answered.
    names.settle(&snapshot, None).expect("it is turned off");
    assert!(!answers(&asked(&plain(FEW), false)));
    names
        .settle(&snapshot, Some(terms()))
        .expect("the maps are written");
    assert!(answers(&asked(&plain(FEW), false)));
    drop(names);
    // The kernel empties the array a moment later.
    eventually(
        "the end of answers",
        Duration::from_secs(10),
        || match answers(&asked(&plain(FEW), false)) {
            false => Ok(()),
            true => Err("an answer".to_owned()),
        },
    );
}

#[test]
fn where_it_is_off_it_costs_no_instruction() {
    if !is_root("kernel_dns") {
        return;
    }
    let sandbox = Sandbox::enter().expect("namespaces");
    let mut dataplane = dataplane(&sandbox, false);
    let mut names = KernelNames::new(dataplane.load_names().expect("the program loads"));
    let snapshot = cluster().snapshot;
    names
        .settle(&snapshot, Some(terms()))
        .expect("the maps are written");
    let four = asked(&plain(FOUR), false);
    assert_ne!(run(&dataplane, &four).verdict, REDIRECT);
    assert_eq!(names.counts().expect("counters"), [0; 4]);
    let _ = SERVER;
}

#[test]
fn what_lies_under_a_name_and_is_anothers_is_for_the_server_to_say() {
    if !is_root("kernel_dns") {
        return;
    }
    let sandbox = Sandbox::enter().expect("namespaces");
    let mut dataplane = dataplane(&sandbox, true);
    let mut tables = dataplane.load_names().expect("the program loads");
    let seed = [7, 9];
    let key = |name: &[u8]| {
        let word = |at: usize| {
            let mut bytes = [0; 8];
            let rest = name.get(at * 8..).unwrap_or_default();
            let taken = rest.len().min(8);
            bytes[..taken].copy_from_slice(&rest[..taken]);
            u64::from_le_bytes(bytes)
        };
        name_key(seed, name.len(), word, |_| {})
    };
    let [four, few] = [FOUR, FEW].map(key);
    let zone = DnsZone {
        seed,
        ttl_s: 5,
        udp_bytes: 1232,
        ..DnsZone::default()
    };
    let server = FrontendKey::new(SERVER.into(), 53_u16.to_be(), proto::UDP);
    let one = NameAddresses {
        v4: [u32::from_ne_bytes([10, 0, 0, 1]), 0, 0, 0],
        v4_count: 1,
        name_bytes: FOUR.len() as u8,
        before: 14,
        ..NameAddresses::NONE
    };
    tables.set_zone(&zone).expect("the map is written");
    tables.set_servers(&[server]).expect("the map is written");
    tables.turn_on().expect("the map is written");
    let question = asked(&plain(FOUR), false);
    let is_answered = |lies: NameAddresses| {
        tables
            .set_names(&[(four, lies)])
            .expect("the map is written");
        run(&dataplane, &question).verdict == REDIRECT
    };
    assert!(is_answered(one.under(&four)));
    // As a program finds it whose element has gone to another name, whole or in part.
    let other: &NameKey = &few;
    let [own, others] = [one.under(&four), one.under(other)];
    let begun = NameAddresses {
        begin: others.begin,
        ..own
    };
    let from_the_end = NameAddresses {
        end: others.end,
        ..own
    };
    for lies in [others, begun, from_the_end] {
        assert!(!is_answered(lies));
    }
    assert!(is_answered(own));
}
