//! Changing maps, with maps in memory.

use std::net::Ipv4Addr;

use super::*;
use crate::dataplane::extent::{GRACE, LEAST_GRACE};
use crate::dataplane::op::Peers;

/// Maps in memory, which note in what order they were written.
#[derive(Default)]
struct Memory {
    frontends: BTreeMap<FrontendKey, RawLead>,
    ranges: BTreeSet<RangeKey>,
    maglev: BTreeMap<MaglevKey, MaglevBlock>,
    peers: BTreeMap<PeerKey, u64>,
    locals: BTreeMap<Addr, LocalAddress>,
    services: BTreeMap<u32, ServiceRef>,
    epoch: u32,
    cells: BTreeMap<u32, Cell>,
    reached: u32,
    log: Vec<&'static str>,
    /// Frontends and markers in the order in which they were set, and in which they were removed.
    set: Vec<FrontendKey>,
    removed: Vec<FrontendKey>,
    /// Whether frontends find no room.
    is_full: bool,
}

impl MapIo for Memory {
    fn frontends(&self) -> Result<Vec<(FrontendKey, RawLead)>, Error> {
        Ok(self.frontends.clone().into_iter().collect())
    }
    fn set_frontends(&mut self, entries: &[(FrontendKey, RawLead)]) -> Result<(), Error> {
        if self.is_full && !entries.is_empty() {
            return Err(Error::Full {
                map: dataplane_abi::map::FRONTENDS,
                limit: limits::FRONTENDS,
            });
        }
        self.frontends.extend(entries.iter().copied());
        self.set.extend(entries.iter().map(|(key, _)| *key));
        self.log.push("set frontends");
        Ok(())
    }
    fn remove_frontends(&mut self, keys: &[FrontendKey]) -> Result<(), Error> {
        self.frontends.retain(|key, _| !keys.contains(key));
        self.removed.extend(keys);
        self.log.push("remove frontends");
        Ok(())
    }
    fn ranges(&self) -> Result<Vec<RangeKey>, Error> {
        Ok(self.ranges.iter().copied().collect())
    }
    fn set_ranges(&mut self, keys: &[RangeKey]) -> Result<(), Error> {
        self.ranges.extend(keys);
        if !keys.is_empty() {
            self.log.push("set ranges");
        }
        Ok(())
    }
    fn remove_ranges(&mut self, keys: &[RangeKey]) -> Result<(), Error> {
        let gone: BTreeSet<&RangeKey> = keys.iter().collect();
        self.ranges.retain(|key| !gone.contains(key));
        if !keys.is_empty() {
            self.log.push("remove ranges");
        }
        Ok(())
    }
    fn local_addresses(&self) -> Result<Vec<(Addr, LocalAddress)>, Error> {
        Ok(self.locals.clone().into_iter().collect())
    }
    fn set_local_addresses(&mut self, entries: &[(Addr, LocalAddress)]) -> Result<(), Error> {
        self.locals.extend(entries.iter().copied());
        Ok(())
    }
    fn remove_local_addresses(&mut self, keys: &[Addr]) -> Result<(), Error> {
        self.locals.retain(|key, _| !keys.contains(key));
        Ok(())
    }
    fn maglev_blocks(&self) -> Result<Vec<MaglevKey>, Error> {
        Ok(self.maglev.keys().copied().collect())
    }
    fn set_maglev(&mut self, blocks: &[(MaglevKey, MaglevBlock)]) -> Result<(), Error> {
        self.maglev.extend(blocks.iter().copied());
        self.log.push("set table");
        Ok(())
    }
    fn remove_maglev(&mut self, keys: &[MaglevKey]) -> Result<(), Error> {
        self.maglev.retain(|key, _| !keys.contains(key));
        if !keys.is_empty() {
            self.log.push("remove table");
        }
        Ok(())
    }
    fn peers(&self) -> Result<Vec<(PeerKey, u64)>, Error> {
        Ok(self.peers.clone().into_iter().collect())
    }
    fn set_peers(&mut self, entries: &[(PeerKey, u64)]) -> Result<(), Error> {
        self.peers.extend(entries.iter().copied());
        Ok(())
    }
    fn remove_peers(&mut self, keys: &[PeerKey]) -> Result<(), Error> {
        self.peers.retain(|key, _| !keys.contains(key));
        Ok(())
    }
    fn epoch(&self) -> u32 {
        self.epoch
    }
    fn set_epoch(&mut self, epoch: u32) {
        self.epoch = epoch;
    }
    fn service(&self, id: u32) -> ServiceRef {
        self.services.get(&id).copied().unwrap_or_default()
    }
    fn set_service(&mut self, id: u32, reference: ServiceRef) {
        self.services.insert(id, reference);
        self.log.push(if reference.generation == 0 {
            "remove service"
        } else {
            "set service"
        });
    }
    fn reach_cells(&mut self, cells: u32) -> Result<(), Error> {
        self.reached = self.reached.max(cells);
        Ok(())
    }
    fn cell(&self, index: u32) -> Cell {
        assert!(index < self.reached, "cell {index} was not reached for");
        self.cells.get(&index).copied().unwrap_or_default()
    }
    fn write_cells(&mut self, first: u32, cells: &[Cell]) {
        assert!(first + cells.len() as u32 <= self.reached);
        self.cells.extend((first..).zip(cells.iter().copied()));
        self.log.push("write cells");
    }
}

fn frontend(text: &str) -> Frontend {
    let at: SocketAddr = text.parse().unwrap();
    Frontend {
        addr: at.ip(),
        port: at.port(),
        protocol: Protocol::Tcp,
    }
}

fn backends(active: &[&str], terminating: &[&str]) -> ServiceBackends {
    let parse = |list: &[&str]| list.iter().map(|at| at.parse().unwrap()).collect();
    ServiceBackends {
        active: parse(active),
        terminating: parse(terminating),
        ..ServiceBackends::default()
    }
}

fn sources(list: &[&str]) -> BTreeSet<IpNetwork> {
    list.iter().map(|range| range.parse().unwrap()).collect()
}

fn everything() -> Vec<Op> {
    vec![
        Op::SetFrontend {
            frontend: frontend("10.96.0.1:443"),
            lead: Lead {
                internal: ServiceId(1),
                external: ServiceId(2),
                guarded: true,
            },
        },
        Op::SetFrontend {
            frontend: frontend("[fd00::1]:443"),
            lead: Lead::to(ServiceId(1)),
        },
        Op::SetVip {
            addr: "10.96.0.1".parse().unwrap(),
            kind: Vip::Cluster,
        },
        Op::SetVip {
            addr: "192.0.2.1".parse().unwrap(),
            kind: Vip::External,
        },
        Op::SetSources {
            id: ServiceId(1),
            sources: sources(&["192.0.2.0/24", "2001:db8::/32", "0.0.0.0/0"]),
        },
        Op::SetUnmasqueraded {
            ranges: sources(&["10.0.0.0/8"]),
        },
        Op::SetService {
            id: ServiceId(1),
            backends: backends(&["10.0.0.1:6443", "[fd01::1]:6443"], &["10.0.0.2:6443"]),
        },
        Op::SetService {
            id: ServiceId(2),
            backends: ServiceBackends {
                silent: true,
                affinity_timeout_s: 10_800,
                ..ServiceBackends::default()
            },
        },
        Op::SetPod {
            addr: "10.0.0.1".parse().unwrap(),
            pod: LocalPod {
                ifindex: 7,
                mac: [1, 2, 3, 4, 5, 6],
                queued: true,
            },
        },
        Op::SetHostAddress {
            addr: "198.18.0.1".parse().unwrap(),
        },
    ]
}

#[test]
fn what_is_written_is_read_back_also_by_the_next_agent() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    tables.apply(&everything(), Instant::now()).unwrap();
    let state = tables.state().unwrap();
    assert_eq!(
        state.services[&ServiceId(1)],
        backends(&["10.0.0.1:6443", "[fd01::1]:6443"], &["10.0.0.2:6443"])
    );
    let second = &state.services[&ServiceId(2)];
    assert_eq!((second.silent, second.affinity_timeout_s), (true, 10_800));
    let lead = state.frontends[&frontend("10.96.0.1:443")];
    assert_eq!(
        (lead.internal.0, lead.external.0, lead.guarded),
        (1, 2, true)
    );
    assert_eq!(
        state.frontends[&frontend("[fd00::1]:443")],
        Lead::to(ServiceId(1))
    );
    let vip = |text: &str| state.vips[&text.parse::<IpAddr>().unwrap()];
    assert_eq!(
        (vip("10.96.0.1"), vip("192.0.2.1")),
        (Vip::Cluster, Vip::External)
    );
    assert_eq!(
        state.sources[&ServiceId(1)],
        sources(&["192.0.2.0/24", "2001:db8::/32", "0.0.0.0/0"])
    );
    assert_eq!(state.unmasqueraded, sources(&["10.0.0.0/8"]));
    assert_eq!(
        state.pods[&"10.0.0.1".parse::<IpAddr>().unwrap()].ifindex,
        7
    );
    assert_eq!(state.host_addresses, ["198.18.0.1".parse().unwrap()].into());
    let next = Tables::adopt(tables.io).unwrap();
    assert_eq!(next.state().unwrap(), state);
}

#[test]
fn a_service_that_was_removed_leaves_its_generation_to_nobody() {
    let set = |count: usize| Op::SetService {
        id: ServiceId(7),
        backends: backends(&["10.0.0.9:1"; 3][..count], &[]),
    };
    let now = Instant::now();
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    tables.apply(&[set(1)], now).unwrap();
    tables.apply(&[set(2)], now).unwrap();
    let before = tables.io.service(7);
    let gone = Op::RemoveService { id: ServiceId(7) };
    tables.apply(&[gone], now).unwrap();
    let mut next = Tables::adopt(tables.io).unwrap();
    next.apply(&[set(1)], now).unwrap();
    assert!(next.io.service(7).generation > before.generation);
}

#[test]
fn a_renewed_service_is_the_same_in_another_generation_after_all_frontends() {
    let id = ServiceId(1);
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    tables.apply(&everything(), Instant::now()).unwrap();
    let (before, had) = (tables.io.service(1), tables.backends(1));
    tables.io.log.clear();
    let gone = Op::RemoveFrontend {
        frontend: frontend("10.96.0.1:443"),
    };
    let renew = || Op::RenewService {
        id,
        backends: had.clone(),
    };
    let ops = [renew(), gone.clone()];
    tables.apply(&ops, Instant::now()).unwrap();
    assert!(tables.io.service(1).generation > before.generation);
    assert_eq!(tables.backends(1), had);
    let at = |what: &str| tables.io.log.iter().rposition(|entry| *entry == what);
    assert!(
        at("set service") > at("remove frontends"),
        "{:?}",
        tables.io.log
    );
    // One that goes in the same batch, or is gone, comes to nothing.
    for ops in [vec![renew(), Op::RemoveService { id }], vec![renew()]] {
        tables.apply(&ops, Instant::now()).unwrap();
        assert_eq!(tables.io.service(1), ServiceRef::default());
    }
}

#[test]
fn the_next_agent_neither_reuses_a_generation_nor_overwrites_an_extent() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    tables.apply(&everything(), Instant::now()).unwrap();
    let before = tables.io.service(1);
    let mut next = Tables::adopt(tables.io).unwrap();
    next.apply(
        &[Op::SetService {
            id: ServiceId(9),
            backends: backends(&["10.0.0.9:1"; 3], &[]),
        }],
        Instant::now(),
    )
    .unwrap();
    assert!(next.io.service(9).generation > before.generation);
    assert_eq!(
        next.backends(1),
        backends(&["10.0.0.1:6443", "[fd01::1]:6443"], &["10.0.0.2:6443"])
    );
}

#[test]
fn services_are_there_before_their_frontends_and_gone_after_them() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    tables.apply(&everything(), Instant::now()).unwrap();
    let set = tables
        .io
        .log
        .iter()
        .position(|entry| *entry == "set frontends")
        .unwrap();
    assert!(
        tables.io.log[..set].contains(&"set service")
            && !tables.io.log[set..].contains(&"set service")
    );
    tables.io.log.clear();
    let ops = [
        Op::RemoveService { id: ServiceId(1) },
        Op::RemoveFrontend {
            frontend: frontend("10.96.0.1:443"),
        },
    ];
    tables.apply(&ops, Instant::now()).unwrap();
    let gone = tables
        .io
        .log
        .iter()
        .position(|entry| *entry == "remove service")
        .unwrap();
    assert!(tables.io.log[..gone].contains(&"remove frontends"));
    assert!(!tables.state().unwrap().services.contains_key(&ServiceId(1)));
}

#[test]
fn an_address_is_marked_after_its_ports_are_there_and_before_they_go() {
    let now = Instant::now();
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    let ports = ["10.96.0.1:80", "10.96.0.1:443", "10.96.0.2:80"].map(frontend);
    let addresses: BTreeSet<IpAddr> = ports.iter().map(|port| port.addr).collect();
    let mut ops = vec![Op::SetService {
        id: ServiceId(1),
        backends: backends(&["10.0.0.1:80"], &[]),
    }];
    ops.extend(addresses.iter().map(|addr| Op::SetVip {
        addr: *addr,
        kind: Vip::Cluster,
    }));
    ops.extend(ports.iter().map(|frontend| Op::SetFrontend {
        frontend: *frontend,
        lead: Lead::to(ServiceId(1)),
    }));
    tables.apply(&ops, now).unwrap();
    let marks = |keys: &[FrontendKey]| keys.iter().map(FrontendKey::is_marker).collect::<Vec<_>>();
    assert_eq!(marks(&tables.io.set), [false, false, false, true, true]);
    let mut ops = vec![Op::RemoveService { id: ServiceId(1) }];
    ops.extend(ports.map(|frontend| Op::RemoveFrontend { frontend }));
    ops.extend(addresses.into_iter().map(|addr| Op::RemoveVip { addr }));
    tables.apply(&ops, now).unwrap();
    assert_eq!(marks(&tables.io.removed), [true, true, false, false, false]);
}

#[test]
fn a_change_writes_a_new_extent_before_it_leads_there_and_leaves_the_old_one_whole_for_a_while() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    let now = Instant::now();
    let set = |to: &str| {
        [Op::SetService {
            id: ServiceId(1),
            backends: backends(&[to], &[]),
        }]
    };
    tables.apply(&set("10.0.0.1:1"), now).unwrap();
    let old = tables.io.service(1).extent;
    let old_cells = [tables.io.cell(old), tables.io.cell(old + 1)];
    tables.io.log.clear();
    for step in 1..20 {
        tables
            .apply(
                &set(&format!("10.0.0.1:{}", step + 1)),
                now + GRACE / 20 * (step - 1),
            )
            .unwrap();
        assert_ne!(tables.io.service(1).extent, old);
        assert_eq!([tables.io.cell(old), tables.io.cell(old + 1)], old_cells);
    }
    assert_eq!(tables.io.log[..2], ["write cells", "set service"]);
    tables.apply(&set("10.0.0.1:99"), now + GRACE).unwrap();
    assert_eq!(tables.io.service(1).extent, old);
}

#[test]
fn of_several_changes_the_last_counts() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    let id = ServiceId(1);
    let ops = [
        Op::SetService {
            id,
            backends: backends(&["10.0.0.1:1"], &[]),
        },
        Op::RemoveService { id },
        Op::SetService {
            id,
            backends: backends(&["10.0.0.2:1"], &[]),
        },
    ];
    tables.apply(&ops, Instant::now()).unwrap();
    assert_eq!(
        tables.state().unwrap().services[&id],
        backends(&["10.0.0.2:1"], &[])
    );
    tables
        .apply(
            &[Op::RemoveService { id }, Op::RemoveService { id }],
            Instant::now(),
        )
        .unwrap();
    assert_eq!(tables.state().unwrap(), State::default());
}

#[test]
fn what_does_not_fit_is_an_error_that_says_which_limit() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    for id in [0, limits::SERVICES] {
        let error = tables
            .apply(&[Op::RemoveService { id: ServiceId(id) }], Instant::now())
            .unwrap_err();
        assert!(
            matches!(
                error,
                Error::Full {
                    map: "SERVICES",
                    ..
                }
            ),
            "{error}"
        );
    }
    let too_many = vec!["10.0.0.1:1"; limits::BACKENDS_PER_SERVICE as usize + 1];
    let error = tables
        .apply(
            &[Op::SetService {
                id: ServiceId(1),
                backends: backends(&too_many, &[]),
            }],
            Instant::now(),
        )
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooManyBackends {
                backends: 16_384,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn ranges_are_there_before_the_frontends_that_ask_for_them_and_gone_after() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    tables.apply(&everything(), Instant::now()).unwrap();
    let place = |log: &[&str], what| log.iter().position(|entry| *entry == what).unwrap();
    let log = &tables.io.log;
    assert!(place(log, "set ranges") < place(log, "set frontends"));
    // Also by the next agent, which has not read them yet.
    let mut next = Tables::adopt(tables.io).unwrap();
    next.io.log.clear();
    let ops = [
        Op::SetSources {
            id: ServiceId(1),
            sources: sources(&["192.0.2.0/24", "198.51.100.0/24"]),
        },
        Op::RemoveFrontend {
            frontend: frontend("10.96.0.1:443"),
        },
    ];
    next.apply(&ops, Instant::now()).unwrap();
    let log = &next.io.log;
    assert!(place(log, "set ranges") < place(log, "remove frontends"));
    assert!(place(log, "remove frontends") < place(log, "remove ranges"));
    let state = next.state().unwrap();
    assert_eq!(
        state.sources[&ServiceId(1)],
        sources(&["192.0.2.0/24", "198.51.100.0/24"])
    );
    assert_eq!(state.unmasqueraded, sources(&["10.0.0.0/8"]));
}

#[test]
fn ranges_that_were_taken_away_are_gone_also_after_a_failure_in_between() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    tables.apply(&everything(), Instant::now()).unwrap();
    let shrink = Op::SetSources {
        id: ServiceId(1),
        sources: sources(&["192.0.2.0/24"]),
    };
    let lead = Op::SetFrontend {
        frontend: frontend("10.96.0.9:443"),
        lead: Lead::to(ServiceId(1)),
    };
    tables.io.is_full = true;
    tables
        .apply(&[shrink.clone(), lead], Instant::now())
        .unwrap_err();
    tables.apply(&[shrink], Instant::now()).unwrap();
    let state = tables.state().unwrap();
    assert_eq!(state.sources[&ServiceId(1)], sources(&["192.0.2.0/24"]));
}

#[test]
fn ranges_replace_others_also_where_both_do_not_fit() {
    let many = |first: u32| {
        let count = limits::RANGES / 2 + 1;
        let range = |number: u32| IpNetwork::from(IpAddr::from(Ipv4Addr::from(first + number)));
        (0..count).map(range).collect::<BTreeSet<IpNetwork>>()
    };
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    let mut set = |first| {
        let (id, sources) = (ServiceId(1), many(first));
        let now = Instant::now();
        tables
            .apply(&[Op::SetSources { id, sources }], now)
            .unwrap();
        tables.state().unwrap().sources[&id].clone()
    };
    assert_eq!(set(0x0a00_0000), many(0x0a00_0000));
    assert_eq!(set(0x0b00_0000), many(0x0b00_0000));
}

#[test]
fn a_service_of_very_many_backends_changes_as_often_as_it_likes() {
    let at = |number: u32| SocketAddr::new(Ipv4Addr::from(0x0a00_0000 + number).into(), 80);
    let all = ServiceBackends {
        active: (0..10_000).map(at).collect(),
        ..ServiceBackends::default()
    };
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    let mut now = Instant::now();
    for _ in 0..200 {
        now += LEAST_GRACE / 4;
        let (id, backends) = (ServiceId(1), all.clone());
        tables
            .apply(&[Op::SetService { id, backends }], now)
            .unwrap();
    }
}

#[test]
fn sockets_ask_again_when_it_changes_where_destinations_lead_and_not_when_backends_do() {
    let now = Instant::now();
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    let mut epochs = vec![tables.io.epoch];
    let mut apply = |tables: &mut Tables<Memory>, op: Op| {
        tables.apply(&[op], now).unwrap();
        let before = epochs.last().copied();
        epochs.push(tables.io.epoch);
        before != epochs.last().copied()
    };
    let id = ServiceId(3);
    let set = |at: &str| Op::SetService {
        id,
        backends: backends(&[at], &[]),
    };
    assert!(!apply(&mut tables, set("10.0.0.1:80")));
    let frontend = frontend("10.96.0.1:80");
    let lead = Lead::to(id);
    assert!(apply(&mut tables, Op::SetFrontend { frontend, lead }));
    assert!(!apply(&mut tables, set("10.0.0.2:80")));
    let sources = sources(&["10.0.0.0/8"]);
    assert!(apply(&mut tables, Op::SetSources { id, sources }));
    let addr = [198, 18, 0, 1].into();
    assert!(apply(&mut tables, Op::SetHostAddress { addr }));
    assert!(apply(&mut tables, Op::RemoveFrontend { frontend }));
    // None comes twice, nor one that a generation has had, also from the next agent.
    let mut next = Tables::adopt(tables.io).unwrap();
    next.begin_epoch();
    epochs.push(next.io.epoch);
    epochs.dedup();
    assert!(epochs.is_sorted_by(|a, b| a < b), "{epochs:?}");
}

#[test]
fn a_service_that_leads_to_anothers_extent_is_not_adopted() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    tables.apply(&everything(), Instant::now()).unwrap();
    let stolen = tables.io.service(1);
    tables.io.set_service(5, stolen);
    let next = Tables::adopt(tables.io).unwrap();
    assert_eq!(next.io.service(5), ServiceRef::default());
    assert!(next.placed.contains_key(&1));
}

#[test]
fn pods_keep_their_addresses_everywhere_until_it_is_known_where() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    let now = Instant::now();
    let held = |tables: &Tables<Memory>| {
        let ranges = tables.state().unwrap().unmasqueraded;
        ranges.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    tables.hold_masquerade_back(now).unwrap();
    assert_eq!(held(&tables), ["0.0.0.0/0", "::/0"]);
    let ranges = ["10.244.0.0/16".parse().unwrap()].into();
    let op = Op::SetUnmasqueraded { ranges };
    tables.io.log.clear();
    tables.apply(&[op], now).unwrap();
    assert_eq!(held(&tables), ["10.244.0.0/16"]);
    let ranges = |log: &&str| log.contains("ranges");
    let order: Vec<&str> = tables.io.log.iter().copied().filter(ranges).collect();
    assert_eq!(order, ["set ranges", "remove ranges"]);
    // A worker that is replaced knows from the maps, and changes nothing.
    tables.hold_masquerade_back(now).unwrap();
    assert_eq!(held(&tables), ["10.244.0.0/16"]);
}

/// A service whose backends are chosen by a table of 509 entries, two blocks.
fn by_table(active: &[&str]) -> Op {
    Op::SetService {
        id: ServiceId(3),
        backends: ServiceBackends {
            maglev: 509,
            ..backends(active, &[])
        },
    }
}

#[test]
fn a_table_comes_before_its_service_and_goes_after_it() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    let now = Instant::now();
    let first = by_table(&["10.0.0.1:80", "10.0.0.2:80"]);
    tables.apply(&[first], now).unwrap();
    let of = |tables: &Tables<Memory>| -> BTreeSet<u32> {
        let keys = tables.io.maglev.keys();
        keys.map(|key| key.generation).collect()
    };
    assert_eq!(of(&tables), [tables.io.service(3).generation].into());
    assert_eq!(
        tables.io.log[..3],
        ["set table", "write cells", "set service"]
    );
    assert_eq!(tables.maglev().blocks, 2);
    let header = ExtentHeader::from(tables.io.cell(tables.io.service(3).extent));
    assert_eq!(header.maglev, 509);
    tables.io.log.clear();
    let second = by_table(&["10.0.0.1:80", "10.0.0.3:80"]);
    tables.apply(&[second], now).unwrap();
    let order = ["set table", "write cells", "set service", "remove table"];
    assert_eq!(tables.io.log[..4], order);
    assert_eq!(of(&tables), [tables.io.service(3).generation].into());
    // One backend needs no table.
    tables.apply(&[by_table(&["10.0.0.1:80"])], now).unwrap();
    assert!(tables.io.maglev.is_empty());
    let third = by_table(&["10.0.0.1:80", "10.0.0.3:80"]);
    tables.apply(&[third], now).unwrap();
    let gone = Op::RemoveService { id: ServiceId(3) };
    tables.apply(&[gone], now).unwrap();
    assert!(tables.io.maglev.is_empty());
    assert_eq!(tables.maglev(), MaglevUse::default());
}

#[test]
fn the_next_agent_takes_tables_over_and_clears_those_of_nobody() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    let both = by_table(&["10.0.0.1:80", "10.0.0.2:80"]);
    tables.apply(&[both], Instant::now()).unwrap();
    let held = tables.state().unwrap();
    assert_eq!(held.services[&ServiceId(3)].maglev, 509);
    let mut io = tables.io;
    let stray = MaglevKey {
        generation: 99,
        block: 0,
    };
    io.maglev.insert(stray, MaglevBlock::EMPTY);
    let next = Tables::adopt(io).unwrap();
    assert_eq!(next.maglev().blocks, 2);
    assert!(!next.io.maglev.contains_key(&stray) && next.io.maglev.len() == 2);
    assert_eq!(next.state().unwrap(), held);
}

#[test]
fn a_table_without_room_leaves_its_service_served_and_is_told() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    tables.maglev.blocks = limits::MAGLEV_BLOCKS - 1;
    let both = by_table(&["10.0.0.1:80", "10.0.0.2:80"]);
    let once = std::slice::from_ref(&both);
    tables.apply(once, Instant::now()).unwrap();
    assert_eq!(tables.maglev().refused, 1);
    let state = tables.state().unwrap();
    let held = &state.services[&ServiceId(3)];
    assert_eq!((held.active.len(), held.maglev), (2, 0));
    assert_eq!(tables.tables_with_room(), []);
    tables.maglev.blocks = 0;
    assert_eq!(tables.tables_with_room(), [ServiceId(3)]);
    tables.apply(once, Instant::now()).unwrap();
    assert_eq!(tables.maglev().refused, 0);
    assert_eq!(tables.tables_with_room(), []);
}

#[test]
fn a_renewed_service_gets_the_table_that_had_no_room() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    let now = Instant::now();
    tables.maglev.blocks = limits::MAGLEV_BLOCKS - 1;
    let set = by_table(&["10.0.0.1:80", "10.0.0.2:80"]);
    let Op::SetService { id, backends } = set.clone() else {
        panic!("{set:?}");
    };
    let wished = ServiceBackends {
        direct: true,
        ..backends
    };
    tables.apply(&[set], now).unwrap();
    assert_eq!(tables.backends(id.0).maglev, 0);
    tables.maglev.blocks = 0;
    let renew = Op::RenewService {
        id,
        backends: wished.clone(),
    };
    tables.apply(&[renew], now).unwrap();
    assert_eq!(tables.backends(id.0), wished);
    assert_eq!(tables.maglev().refused, 0);
    // Without room for what is wished it is renewed all the same.
    let before = tables.io.service(id.0).generation;
    let many = Op::RenewService {
        id,
        backends: ServiceBackends {
            active: vec![wished.active[0]; limits::BACKENDS_PER_SERVICE as usize + 1],
            ..wished.clone()
        },
    };
    tables.apply(&[many], now).unwrap();
    assert!(tables.io.service(id.0).generation > before);
    assert_eq!(tables.backends(id.0), wished);
}

#[test]
fn ranges_of_other_nodes_are_replaced_whole_and_read_back() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    let peers = |list: &[(&str, u8)]| -> Peers {
        let peer =
            |(range, last): &(&str, u8)| (range.parse().unwrap(), [10, 0x6d, 198, 18, 0, *last]);
        list.iter().map(peer).collect()
    };
    for list in [
        &[
            ("10.244.2.0/24", 2),
            ("fd00:244:2::/64", 2),
            ("198.18.0.2/32", 2),
        ][..],
        &[("10.244.2.0/24", 3), ("fd00:244:4::/64", 4)],
        &[],
    ] {
        let wished = peers(list);
        let op = Op::SetPeers {
            peers: wished.clone(),
        };
        tables.apply(&[op], Instant::now()).unwrap();
        assert_eq!(tables.state().unwrap().peers, wished);
    }
}

#[test]
fn clients_are_answered_directly_only_where_all_nodes_choose_alike() {
    let mut tables = Tables::adopt(Memory::default()).unwrap();
    let mut direct = |active: &[&str], maglev: u32| {
        let wished = ServiceBackends {
            maglev,
            direct: true,
            ..backends(active, &[])
        };
        let op = Op::SetService {
            id: ServiceId(1),
            backends: wished,
        };
        tables.apply(&[op], Instant::now()).unwrap();
        tables.state().unwrap().services[&ServiceId(1)].direct
    };
    assert!(direct(&["10.0.0.1:80"], 0));
    assert!(direct(&["10.0.0.1:80", "10.0.0.2:80"], 251));
    assert!(!direct(&["10.0.0.1:80", "10.0.0.2:80"], 0));
    assert!(!direct(&[], 0));
}
