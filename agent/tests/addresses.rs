//! Addresses are given once, rest before they are given again, and survive the agent.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use keelway_agent::addresses::{
    AddressFile, Allocation, Ask, FileError, Pool, PoolError, REST, Reserved, host_interface,
    is_host_interface,
};
use keelway_cni::{Attachment, Mac};
use proptest::prelude::*;

fn attachment(n: u32) -> Attachment {
    Attachment {
        container_id: format!("c{n}"),
        ifname: "eth0".into(),
    }
}

fn ask(n: u32) -> Ask {
    Ask {
        attachment: attachment(n),
        ..Ask::default()
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pool(ranges: &[&str]) -> Pool {
    let mut pool = Pool::default();
    pool.set_ranges(ranges.iter().map(|range| range.parse().unwrap()).collect());
    pool
}

/// Deletes as an agent does, with the interface gone at once.
fn delete(pool: &mut Pool, n: u32, now: u64) {
    let name = host_interface(&attachment(n));
    pool.bury(&name);
    pool.buried(&name, now);
}

fn last_octet(allocation: &Allocation) -> u8 {
    let IpAddr::V4(v4) = allocation.addresses[0] else {
        panic!("{allocation:?}")
    };
    v4.octets()[3]
}

const LATER: u64 = 1_000_000;

#[test]
fn the_same_attachment_gets_the_same_address_again() {
    let mut pool = pool(&["10.244.1.0/24"]);
    let named = Ask {
        pod: Some("default/web".into()),
        ..ask(1)
    };
    let first = pool.allocate(&named, LATER).unwrap();
    // The first two are the node's own.
    assert_eq!(first.addresses, [ip("10.244.1.3")]);
    assert_eq!(
        pool.allocate(&ask(1), LATER).unwrap().addresses,
        first.addresses
    );
    assert_ne!(
        pool.allocate(&ask(2), LATER).unwrap().addresses,
        first.addresses
    );
}

#[test]
fn a_node_with_ranges_of_both_families_gives_one_address_of_each() {
    let mut pool = pool(&["10.244.1.0/24", "fd00:10:244:1::/64"]);
    let first = pool.allocate(&ask(1), LATER).unwrap();
    assert_eq!(first.addresses, [ip("10.244.1.3"), ip("fd00:10:244:1::3")]);
    assert_eq!(first.mac(), [0x0a, 0x6c, 10, 244, 1, 3]);
    let own = Reserved::of("fd00:10:244:1::/64".parse().unwrap()).unwrap();
    assert_eq!(
        (own.host, own.probe),
        (ip("fd00:10:244:1::1"), ip("fd00:10:244:1::2"))
    );

    let mut six = self::pool(&["fd00:10:244:2::/64"]);
    let only = six.allocate(&ask(1), LATER).unwrap();
    assert_eq!(only.addresses.len(), 1);
    assert_eq!(only.mac()[0] & 3, 2, "local, and not a group's");
}

#[test]
fn an_address_that_was_released_is_the_last_to_be_given_again() {
    let mut pool = pool(&["10.244.1.0/29"]);
    let first = pool.allocate(&ask(0), LATER).unwrap();
    assert_eq!(last_octet(&first), 3);
    delete(&mut pool, 0, LATER);
    let then = LATER + REST.as_secs();
    let next: Vec<u8> = (1..=4)
        .map(|n| last_octet(&pool.allocate(&ask(n), then).unwrap()))
        .collect();
    assert_eq!(next, [4, 5, 6, 3]);
    let error = pool.allocate(&ask(9), then).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no pod address of this node is free: 4 of 4 IPv4 addresses in use"
    );
}

#[test]
fn an_address_rests_before_it_is_given_again_and_the_error_says_so() {
    let mut pool = pool(&["10.244.1.4/31"]);
    let first = pool.allocate(&ask(0), LATER).unwrap();
    pool.allocate(&ask(1), LATER).unwrap();
    let name = host_interface(&attachment(0));
    pool.bury(&name);
    assert!(pool.is_dying(&name) && pool.get(&name).is_none());
    // However long its interface takes to go.
    let then = LATER + 100;
    assert!(matches!(
        pool.allocate(&ask(2), then),
        Err(PoolError::Exhausted(_))
    ));
    pool.buried(&name, then);
    let error = pool
        .allocate(&ask(2), then + REST.as_secs() - 1)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "no pod address of this node is free: 1 of 2 IPv4 addresses in use, 1 resting for up to 5 s"
    );
    let again = pool.allocate(&ask(2), then + REST.as_secs()).unwrap();
    assert_eq!(again.addresses, first.addresses);
    // A clock that is set back keeps nothing back.
    delete(&mut pool, 2, then);
    assert!(pool.allocate(&ask(3), 5).is_ok());
}

#[test]
fn an_address_that_is_asked_for_is_had_or_refused_by_name() {
    let mut pool = pool(&["10.244.1.0/24", "fd00::/64"]);
    let want = |n: u32, addresses: &[&str]| Ask {
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        mac: Some(Mac([2, 0, 0, 0, 0, n as u8])),
        pod: Some(format!("default/p{n}")),
        ..ask(n)
    };
    let had = pool.allocate(&want(1, &["10.244.1.77"]), LATER).unwrap();
    assert_eq!(had.addresses, [ip("10.244.1.77"), ip("fd00::3")]);
    assert_eq!(had.mac(), [2, 0, 0, 0, 0, 1]);
    // Repeated with the same wish, and with another one.
    assert_eq!(
        pool.allocate(&want(1, &["10.244.1.77"]), LATER)
            .unwrap()
            .addresses,
        had.addresses
    );
    let moved = pool.allocate(&want(1, &["10.244.1.78"]), LATER).unwrap();
    assert_eq!(moved.addresses[0], ip("10.244.1.78"));
    assert_eq!(pool.allocations().count(), 1);

    for (wish, complaint) in [
        ("10.244.1.78", "belongs to default/p1"),
        (
            "10.244.2.1",
            "none of this node's pod ranges: 10.244.1.0/24, fd00::/64",
        ),
        ("10.244.1.255", "none of this node's"),
        ("10.244.1.1", "belongs to the node itself"),
    ] {
        let error = pool
            .allocate(&want(2, &[wish]), LATER)
            .unwrap_err()
            .to_string();
        assert!(error.contains(wish) && error.contains(complaint), "{error}");
    }
    delete(&mut pool, 1, LATER);
    let error = pool
        .allocate(&want(2, &["10.244.1.78"]), LATER + 1)
        .unwrap_err();
    assert_eq!(error, PoolError::Resting(ip("10.244.1.78")));
    assert!(
        pool.allocate(&want(2, &["10.244.1.78"]), LATER + REST.as_secs())
            .is_ok()
    );
}

#[test]
fn a_node_without_a_range_says_so() {
    assert_eq!(
        Pool::default().allocate(&ask(1), LATER),
        Err(PoolError::NoRange)
    );
}

#[test]
fn a_second_range_is_used_when_the_first_is_full() {
    let mut pool = pool(&["10.244.1.0/30", "10.244.9.0/30"]);
    let given: Vec<IpAddr> = (0..4)
        .map(|n| pool.allocate(&ask(n), LATER).unwrap().addresses[0])
        .collect();
    assert_eq!(given[2], ip("10.244.9.1"));
    delete(&mut pool, 0, LATER);
    assert_eq!(
        pool.allocate(&ask(7), LATER + REST.as_secs())
            .unwrap()
            .addresses,
        given[..1]
    );
    let fill = pool.fill(LATER + REST.as_secs());
    assert_eq!((fill.len(), fill[0].capacity, fill[0].used), (1, 4, 4));
}

#[test]
fn interface_names_fit_the_kernel_and_are_known_again() {
    let name = host_interface(&attachment(1));
    assert!(name.len() <= 15 && is_host_interface(&name), "{name}");
    assert_ne!(
        name,
        host_interface(&Attachment {
            ifname: "eth1".into(),
            ..attachment(1)
        })
    );
    for other in [
        "keelway-svc",
        "keelway-svc-in",
        "eth0",
        "kw",
        "kw0123456789",
        "kw-s1f-3",
    ] {
        assert!(!is_host_interface(other), "{other}");
    }
}

#[test]
fn the_file_brings_the_pool_back() {
    let dir = tempfile::tempdir().unwrap();
    let file = AddressFile::new(&dir.path().join("agent"));
    assert_eq!(file.load().unwrap(), Pool::default());
    let mut pool = pool(&["10.244.1.0/24", "fd00::/64"]);
    for n in 0..5 {
        let named = Ask {
            pod: Some(format!("default/web-{n}")),
            network: Some("keelway".into()),
            ..ask(n)
        };
        pool.allocate(&named, LATER).unwrap();
    }
    delete(&mut pool, 1, LATER);
    pool.bury(&host_interface(&attachment(2)));
    file.save(&pool).unwrap();
    let mut back = file.load().unwrap();
    back.set_ranges(pool.ranges().to_vec());
    assert_eq!(back, pool);
    assert!(back.is_dying(&host_interface(&attachment(2))));
}

#[test]
fn whenever_writing_is_cut_short_the_file_holds_one_pool_whole() {
    let dir = tempfile::tempdir().unwrap();
    let file = AddressFile::new(dir.path());
    let (path, partial) = (
        dir.path().join("addresses.json"),
        dir.path().join("addresses.json.new"),
    );
    let mut pool = pool(&["10.244.1.0/24"]);
    pool.allocate(&ask(1), LATER).unwrap();
    file.save(&pool).unwrap();
    let (old, before) = (std::fs::read(&path).unwrap(), file.load().unwrap());
    pool.allocate(&ask(2), LATER).unwrap();
    file.save(&pool).unwrap();
    let (new, after) = (std::fs::read(&path).unwrap(), file.load().unwrap());
    assert_ne!(before, after);
    // What a writer leaves that is killed after any number of bytes, before the files trade names.
    for written in 0..=new.len() {
        std::fs::write(&path, &old).unwrap();
        std::fs::write(&partial, &new[..written]).unwrap();
        assert_eq!(file.load().unwrap(), before, "after {written} bytes");
        file.save(&pool).unwrap();
        assert_eq!(file.load().unwrap(), after, "and then again");
    }
}

#[test]
fn a_file_that_cannot_be_read_is_named_and_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let file = AddressFile::new(dir.path());
    for content in [
        "{",
        "",
        r#"{"version": 9, "allocations": []}"#,
        r#"{"version": 2, "allocations": [{"addresses": [], "hostInterface": "kw1"}]}"#,
        r#"{"version": 2, "allocations": [
            {"addresses": ["10.0.0.1"], "hostInterface": "kw1"}, {"addresses": ["10.0.0.1"], "hostInterface": "kw2"}]}"#,
    ] {
        std::fs::write(dir.path().join("addresses.json"), content).unwrap();
        assert!(
            matches!(file.load(), Err(FileError::Content { .. })),
            "{content}"
        );
        assert!(file.set_aside().unwrap().exists());
        assert_eq!(file.load().unwrap(), Pool::default());
    }
}

#[test]
fn an_interface_that_is_found_keeps_its_addresses() {
    let mut pool = pool(&["10.244.1.0/28", "fd00::/64"]);
    let found = [ip("fd00::3"), ip("10.244.1.3")];
    let asked = Some(Mac([2, 0, 0, 0, 0, 1]));
    assert!(pool.adopt("kw0123456789ab", &found, asked));
    assert!(
        !pool.adopt("kwffffffffffff", &found[1..], None),
        "another's"
    );
    assert!(!pool.adopt("kweeeeeeeeeeee", &[], None), "half made");
    let adopted = pool.get("kw0123456789ab").unwrap();
    assert_eq!(
        (adopted.mac, adopted.addresses[0]),
        (asked, ip("10.244.1.3"))
    );
    assert_eq!(
        pool.allocate(&ask(1), LATER).unwrap().addresses,
        [ip("10.244.1.4"), ip("fd00::4")]
    );
}

/// Whatever is done, what [`Pool`] promises holds.
fn holds(pool: &Pool, given: &HashMap<IpAddr, u64>, now: u64) -> Result<(), TestCaseError> {
    let mut seen = HashSet::new();
    for one in pool.allocations() {
        for address in &one.addresses {
            prop_assert!(seen.insert(*address), "{} is given twice", address);
            if let Some(freed) = given.get(address) {
                prop_assert!(now >= freed + REST.as_secs(), "{} did not rest", address);
            }
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn no_two_attachments_share_an_address_and_every_address_rests(
        steps in prop::collection::vec((0u32..20, 0u8..4, 0u64..4), 0..200),
    ) {
        let mut pool = pool(&["10.244.1.0/28", "fd00::/124"]);
        let mut freed = HashMap::new();
        let mut now = LATER;
        for (n, what, pause) in steps {
            now += pause;
            let name = host_interface(&attachment(n));
            match what {
                0 | 1 => match pool.allocate(&ask(n), now) {
                    Ok(allocation) => {
                        prop_assert_eq!(allocation.addresses.len(), 2);
                        holds(&pool, &freed, now)?;
                        for address in &allocation.addresses {
                            freed.remove(address);
                        }
                    }
                    Err(PoolError::Exhausted(fill)) => prop_assert!(fill.used + fill.resting >= fill.capacity, "{}", fill),
                    Err(other) => prop_assert!(false, "{}", other),
                },
                2 => {
                    pool.bury(&name);
                    prop_assert!(pool.get(&name).is_none());
                }
                _ => {
                    let before: Vec<IpAddr> = pool.allocations().flat_map(|one| one.addresses.clone()).collect();
                    if let Some(gone) = pool.bury(&name) {
                        freed.extend(gone.addresses.into_iter().map(|address| (address, now)));
                    }
                    pool.buried(&name, now);
                    prop_assert!(pool.allocations().all(|one| one.addresses.iter().all(|address| before.contains(address))));
                }
            }
            let mut seen = HashSet::new();
            prop_assert!(pool.allocations().flat_map(|one| &one.addresses).all(|address| seen.insert(*address)));
        }
    }
}
