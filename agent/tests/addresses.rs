//! Addresses are given once, rest before they are given again, and survive the agent.

use std::collections::HashSet;
use std::net::Ipv4Addr;

use keelway_agent::addresses::{
    AddressFile, FileError, Pool, PoolError, host_interface, is_host_interface,
};
use keelway_cni::Attachment;
use proptest::prelude::*;

fn attachment(n: u32) -> Attachment {
    Attachment {
        container_id: format!("c{n}"),
        ifname: "eth0".into(),
    }
}

fn pool(range: &str) -> Pool {
    let mut pool = Pool::default();
    pool.set_ranges(vec![range.parse().unwrap()]);
    pool
}

#[test]
fn the_same_attachment_gets_the_same_address_again() {
    let mut pool = pool("10.244.1.0/24");
    let first = pool
        .allocate(&attachment(1), Some("default/web".into()))
        .unwrap();
    assert_eq!(first.address, Ipv4Addr::new(10, 244, 1, 1));
    assert_eq!(
        pool.allocate(&attachment(1), None).unwrap().address,
        first.address
    );
    assert_ne!(
        pool.allocate(&attachment(2), None).unwrap().address,
        first.address
    );
}

#[test]
fn an_address_that_was_released_is_the_last_to_be_given_again() {
    let mut pool = pool("10.244.1.0/29");
    let first = pool.allocate(&attachment(0), None).unwrap();
    pool.release(&first.host_interface);
    let next: Vec<u8> = (1..=6)
        .map(|n| {
            pool.allocate(&attachment(n), None)
                .unwrap()
                .address
                .octets()[3]
        })
        .collect();
    assert_eq!(next, [2, 3, 4, 5, 6, 1]);
    assert_eq!(
        pool.allocate(&attachment(9), None),
        Err(PoolError::Exhausted(6))
    );
}

#[test]
fn a_node_without_a_range_says_so() {
    assert_eq!(
        Pool::default().allocate(&attachment(1), None),
        Err(PoolError::NoRange)
    );
}

#[test]
fn a_second_range_is_used_when_the_first_is_full() {
    let mut pool = pool("10.244.1.0/30");
    pool.set_ranges(vec![
        "10.244.1.0/30".parse().unwrap(),
        "10.244.9.0/30".parse().unwrap(),
    ]);
    let given: Vec<Ipv4Addr> = (0..4)
        .map(|n| pool.allocate(&attachment(n), None).unwrap().address)
        .collect();
    assert_eq!(given[2], Ipv4Addr::new(10, 244, 9, 1));
    pool.release(&host_interface(&attachment(0)));
    assert_eq!(
        pool.allocate(&attachment(7), None).unwrap().address,
        given[0]
    );
    assert_eq!(pool.capacity(), 4);
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
    ] {
        assert!(!is_host_interface(other), "{other}");
    }
}

#[test]
fn the_file_brings_the_pool_back() {
    let dir = tempfile::tempdir().unwrap();
    let file = AddressFile::new(&dir.path().join("agent"));
    assert_eq!(file.load().unwrap(), Pool::default());
    let mut pool = pool("10.244.1.0/24");
    pool.allocate(&attachment(1), Some("default/web".into()))
        .unwrap();
    pool.allocate(&attachment(2), None).unwrap();
    file.save(&pool).unwrap();
    let mut back = file.load().unwrap();
    back.set_ranges(pool.ranges().to_vec());
    assert_eq!(back, pool);
}

#[test]
fn a_file_that_cannot_be_read_is_named_and_set_aside() {
    let dir = tempfile::tempdir().unwrap();
    let file = AddressFile::new(dir.path());
    for content in [
        "{",
        r#"{"version": 9, "last": null, "allocations": []}"#,
        r#"{"version": 1, "last": null, "allocations": [
            {"address": "10.0.0.1", "hostInterface": "kw1"}, {"address": "10.0.0.1", "hostInterface": "kw2"}]}"#,
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
fn an_interface_that_is_found_keeps_its_address() {
    let mut pool = pool("10.244.1.0/29");
    assert!(pool.adopt("kw0123456789ab", Ipv4Addr::new(10, 244, 1, 1)));
    assert!(
        !pool.adopt("kwffffffffffff", Ipv4Addr::new(10, 244, 1, 1)),
        "another's"
    );
    assert_eq!(
        pool.allocate(&attachment(1), None).unwrap().address,
        Ipv4Addr::new(10, 244, 1, 2)
    );
}

proptest! {
    #[test]
    fn no_two_attachments_ever_share_an_address(steps in prop::collection::vec((0u32..20, any::<bool>()), 0..200)) {
        let mut pool = pool("10.244.1.0/28");
        for (n, add) in steps {
            if add {
                match pool.allocate(&attachment(n), None) {
                    Ok(_) => {}
                    Err(error) => {
                        prop_assert_eq!(error, PoolError::Exhausted(14));
                        prop_assert_eq!(pool.allocations().count(), 14);
                    }
                }
            } else {
                pool.release(&host_interface(&attachment(n)));
            }
            let addresses: HashSet<Ipv4Addr> = pool.allocations().map(|one| one.address).collect();
            prop_assert_eq!(addresses.len(), pool.allocations().count());
        }
    }
}
