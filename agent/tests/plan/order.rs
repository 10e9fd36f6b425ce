//! Which backends come first, that each is there once, and when clients lose one.

use super::*;

fn any_endpoint() -> impl Strategy<Value = (u8, bool, Conditions)> {
    let conditions = prop::sample::select(vec![READY, READY, TERMINATING, NOT_READY]);
    (1u8..24, any::<bool>(), conditions)
}

/// Those of this node first, then by number, each once; near in one slice is near.
fn expected(found: impl Iterator<Item = (u8, bool)>) -> Vec<u8> {
    let mut nearness: BTreeMap<u8, bool> = BTreeMap::new();
    for (ip, near) in found {
        *nearness.entry(ip).or_default() |= near;
    }
    let of = |wanted| nearness.iter().filter(move |(_, near)| **near == wanted);
    of(true).chain(of(false)).map(|(ip, _)| *ip).collect()
}

proptest! {
    #[test]
    fn each_backend_is_there_once_near_ones_first_and_then_by_number(
        found in prop::collection::vec(prop::collection::vec(any_endpoint(), 0..12), 1..5),
    ) {
        let web = service("web", 1);
        let key = web.key.clone();
        let slices = found.iter().enumerate().map(|(number, found)| {
            let endpoints = found.iter().map(|(ip, near, conditions)| {
                endpoint(*ip, if *near { "node-1" } else { "node-2" }, "a", *conditions)
            });
            slice(&format!("web-{number}"), "web", endpoints.collect())
        });
        let plan = plan(&snapshot(vec![web], slices.collect()), &key, &here());
        check(&plan).map_err(|violation| TestCaseError::fail(violation.to_string()))?;
        let backends = &plan.ports.values().next().expect("one port").backends;
        let with = |wanted| {
            let found = found.iter().flatten().filter(move |(.., conditions)| *conditions == wanted);
            found.map(|(ip, near, _)| (*ip, *near))
        };
        let active = expected(with(READY));
        let mut terminating = expected(with(TERMINATING));
        terminating.retain(|ip| !active.contains(ip));
        let all = |ips: Vec<u8>| -> Vec<std::net::SocketAddr> {
            ips.into_iter().map(|ip| ([10, 244, 0, ip], 8080).into()).collect()
        };
        prop_assert_eq!(&backends.active, &all(active));
        prop_assert_eq!(&backends.terminating, &all(terminating));
    }

    #[test]
    fn clients_lose_a_backend_when_it_is_neither_active_nor_terminating_any_more(
        held in prop::collection::vec(any_endpoint(), 1..8),
        wished in prop::collection::vec(any_endpoint(), 1..8),
    ) {
        let web = service("web", 1);
        let (key, mut ledger) = (web.key.clone(), Ledger::adopt(State::default()));
        let mut turn = |found: &[(u8, bool, Conditions)]| {
            let endpoints = found.iter().map(|(ip, near, conditions)| {
                endpoint(*ip, if *near { "node-1" } else { "node-2" }, "a", *conditions)
            });
            let cluster = snapshot(vec![web.clone()], vec![slice("web-1", "web", endpoints.collect())]);
            let wish = plan(&cluster, &key, &here());
            let backends = wish.ports.values().next().expect("one port").backends.clone();
            ledger.set(&key, wish);
            let batch = ledger.diff();
            let loses = ledger.loses_backends(&batch);
            ledger.applied(&batch);
            (backends.all().copied().collect::<BTreeSet<_>>(), loses)
        };
        let (before, first) = turn(&held);
        let (after, loses) = turn(&wished);
        prop_assert!(!first, "nobody had any");
        prop_assert_eq!(loses, !before.is_subset(&after));
    }
}

#[test]
fn a_plan_with_a_backend_twice_or_of_another_family_is_unsound() {
    let web = service("web", 1);
    let key = web.key.clone();
    let cluster = snapshot(vec![web], vec![slice("web-1", "web", near_and_far())]);
    let sound = plan(&cluster, &key, &here());
    let with = |terminating: std::net::SocketAddr| {
        let mut changed = sound.clone();
        for (_, port) in changed.ports.iter_mut() {
            port.backends.terminating.push(terminating);
        }
        check(&changed).map_err(|violation| violation.to_string())
    };
    let other = with("10.244.0.9:8080".parse().unwrap());
    assert_eq!(other, Ok(()));
    let twice = with("10.244.0.1:8080".parse().unwrap()).expect_err("it is active too");
    assert!(twice.contains("10.244.0.1:8080 is there twice"), "{twice}");
    let ipv6 = with("[fd00::1]:8080".parse().unwrap()).expect_err("of another family");
    assert!(ipv6.contains("another address family"), "{ipv6}");
}
