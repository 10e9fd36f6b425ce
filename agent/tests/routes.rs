//! The ways to other nodes' pods: what is planned, and what probes make of it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use cluster_model::{Change, Dirty, Kind, Node, Object, Snapshot};
use ipnetwork::IpNetwork;
use keelway_agent::addresses::Reserved;
use keelway_agent::plan::{
    NodeRoute, PathKey, Probed, RouteChange, RoutePlan, Routing, diff_routes, plan_routes,
};
use keelway_agent::routing::{Answer, Paths, Settings};
use proptest::prelude::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn range(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

fn node(name: &str, ips: &[&str], ranges: &[&str]) -> Object {
    Object::Node(std::sync::Arc::new(Node {
        name: name.into(),
        internal_ips: ips.iter().map(|text| ip(text)).collect(),
        pod_cidrs: ranges.iter().map(|text| range(text)).collect(),
        zone: None,
        leaving: false,
    }))
}

fn key(node: &str, ipv4: bool) -> PathKey {
    PathKey {
        node: node.into(),
        ipv4,
    }
}

fn snapshot(nodes: Vec<Object>) -> Snapshot {
    let (mut snapshot, mut dirty) = (Snapshot::default(), Dirty::default());
    snapshot.apply(Change::Replace(Kind::Node, nodes), &mut dirty);
    snapshot
}

fn three() -> Snapshot {
    snapshot(vec![
        node(
            "a",
            &["198.18.0.1", "fd00:18::1"],
            &["10.244.1.0/24", "fd00:1::/64"],
        ),
        node(
            "b",
            &["198.18.0.2", "fd00:18::2"],
            &["10.244.2.0/24", "fd00:2::/64"],
        ),
        node("c", &["198.18.0.3"], &["10.244.3.0/24", "fd00:3::/64"]),
    ])
}

#[test]
fn the_overlay_carries_pods_until_a_way_is_proven_each_by_itself() {
    let none = BTreeSet::new();
    let plan = plan_routes(&three(), "a", Routing::Auto, &none);
    for (text, gateway) in [
        ("10.244.2.0/24", "10.244.2.1"),
        // The kernel takes no gateway out of a range of IPv6 whose route leads elsewhere.
        ("fd00:2::/64", "fe80::86d:c6ff:fe12:2"),
        ("fd00:3::/64", "fe80::86d:c6ff:fe12:3"),
    ] {
        assert!(
            plan.routes.contains(&NodeRoute::Overlay {
                range: range(text),
                gateway: ip(gateway)
            }),
            "{plan:?}"
        );
    }
    // What probes go by is direct from the beginning.
    assert!(plan.routes.contains(&NodeRoute::Pods {
        range: range("10.244.2.2/32"),
        node: ip("198.18.0.2")
    }));
    assert_eq!(
        plan.peers.len(),
        2,
        "by their underlay addresses: {:?}",
        plan.peers
    );
    assert_eq!(
        plan.peers[&ip("198.18.0.3")],
        [ip("10.244.3.1"), ip("fe80::86d:c6ff:fe12:3")].into()
    );

    let proven = BTreeSet::from([key("b", true)]);
    let then = plan_routes(&three(), "a", Routing::Auto, &proven);
    assert_eq!(
        diff_routes(&plan.routes, &then.routes),
        [RouteChange::Replace(NodeRoute::Pods {
            range: range("10.244.2.0/24"),
            node: ip("198.18.0.2")
        })]
    );
    assert_eq!(
        then.peers, plan.peers,
        "the other node may still send by the overlay"
    );
    // c has no IPv6 address: there is no direct way to its IPv6 pods, and none is asked for.
    assert_eq!(plan.probed[&key("c", false)].node, None);
    let all: BTreeSet<PathKey> = [key("c", false)].into();
    let still = plan_routes(&three(), "a", Routing::Auto, &all);
    assert!(still.routes.contains(&NodeRoute::Overlay {
        range: range("fd00:3::/64"),
        gateway: ip("fe80::86d:c6ff:fe12:3")
    }));
}

#[test]
fn one_way_can_be_asked_for_and_what_it_cannot_reach_is_named() {
    let none = BTreeSet::new();
    let direct = plan_routes(&three(), "a", Routing::Direct, &none);
    assert!(direct.peers.is_empty());
    assert!(
        direct
            .routes
            .iter()
            .all(|route| !matches!(route, NodeRoute::Overlay { .. }))
    );
    assert!(
        direct.unreachable.contains_key("c"),
        "{:?}",
        direct.unreachable
    );
    let all = BTreeSet::from([key("b", true), key("b", false), key("c", true)]);
    let overlay = plan_routes(&three(), "a", Routing::Vxlan, &all);
    assert!(
        overlay
            .routes
            .iter()
            .all(|route| !matches!(route, NodeRoute::Pods { .. }))
    );
    assert_eq!(
        plan_routes(&three(), "unknown", Routing::Auto, &none),
        RoutePlan::default()
    );
}

#[test]
fn nodes_that_come_go_and_get_other_ranges_change_their_own_routes_alone() {
    let none = BTreeSet::new();
    let plan = |snapshot: &Snapshot| plan_routes(snapshot, "n0", Routing::Auto, &none);
    let of = |n: usize, third: usize| {
        node(
            &format!("n{n}"),
            &[&format!("198.18.{}.{}", n / 250, n % 250 + 1)],
            &[&format!("10.{}.{}.0/24", 64 + third / 256, third % 256)],
        )
    };
    let mut nodes: Vec<Object> = (0..5000).map(|n| of(n, n)).collect();
    let before = plan(&snapshot(nodes.clone()));
    // A way and a probe for each of the others, and the own range.
    assert_eq!(before.routes.len(), 2 * 4999 + 1);
    nodes[17] = of(17, 6000);
    let renumbered = plan(&snapshot(nodes.clone()));
    let changes = diff_routes(&before.routes, &renumbered.routes);
    assert_eq!(changes.len(), 4, "{changes:?}");
    nodes.remove(17);
    let gone = plan(&snapshot(nodes));
    let changes = diff_routes(&renumbered.routes, &gone.routes);
    assert!(
        changes.len() == 2
            && changes
                .iter()
                .all(|change| matches!(change, RouteChange::Remove(_))),
        "{changes:?}"
    );
    assert_eq!(gone.peers.len(), 4998);
}

fn probed(nodes: u32, direct: bool) -> BTreeMap<PathKey, Probed> {
    let own = Reserved::of(range("10.244.0.0/24")).unwrap();
    (0..nodes)
        .map(|n| {
            let there = Reserved {
                host: IpAddr::from((0x0b00_0000 + n * 256 + 1).to_be_bytes()),
                probe: IpAddr::from((0x0b00_0000 + n * 256 + 2).to_be_bytes()),
            };
            let address = IpAddr::from((0xc612_0000 + n).to_be_bytes());
            (
                key(&format!("n{n:05}"), true),
                Probed {
                    here: own,
                    there,
                    node: direct.then_some(address),
                },
            )
        })
        .collect()
}

#[test]
fn a_way_is_proven_by_an_answer_and_doubted_when_answers_stay_away() {
    let settings = Settings::default();
    let mut paths = Paths::new(settings, 7);
    let ways = probed(1, true);
    let way = ways.values().next().unwrap();
    paths.follow(&ways, Duration::ZERO);
    let (questions, changed) = paths.ask(Duration::ZERO);
    assert!(questions.len() == 2 && !changed);
    let probe = questions
        .iter()
        .find(|one| one.to == way.there.probe)
        .unwrap();
    let used = questions
        .iter()
        .find(|one| one.to == way.there.host)
        .unwrap();
    let soon = Duration::from_millis(3);
    // From somebody else, to another question, and in time by the way in use: all no proof.
    assert!(!paths.answered(
        Answer {
            from: ip("192.0.2.1"),
            number: probe.number
        },
        soon
    ));
    assert!(!paths.answered(
        Answer {
            from: way.there.probe,
            number: 1
        },
        soon
    ));
    assert!(!paths.answered(
        Answer {
            from: way.there.host,
            number: used.number
        },
        soon
    ));
    assert!(paths.proven().is_empty());
    assert_eq!(paths.get().values().next().unwrap().latency_us, Some(3000));
    assert!(paths.answered(
        Answer {
            from: way.there.probe,
            number: probe.number
        },
        soon
    ));
    assert_eq!(paths.proven().len(), 1);

    // The node is cut off: after three questions without answer the overlay has it again, and it is asked eagerly.
    let mut now = soon;
    let mut lost = false;
    let mut asked = 0;
    while !lost {
        now = paths.due().unwrap().max(now + Duration::from_millis(1));
        let (questions, changed) = paths.ask(now);
        asked += questions
            .iter()
            .filter(|one| one.to == way.there.probe)
            .count();
        lost = changed;
        assert!(now < Duration::from_secs(30), "never");
    }
    assert!((3..6).contains(&asked), "{asked}");
    assert!(paths.proven().is_empty());
    let (back, _) = paths.ask(now + settings.eager);
    let probe = back.iter().find(|one| one.to == way.there.probe).unwrap();
    assert!(paths.answered(
        Answer {
            from: way.there.probe,
            number: probe.number
        },
        now + settings.eager
    ));

    // Another address begins anew; a node that is gone is forgotten.
    let mut moved = ways.clone();
    moved.values_mut().next().unwrap().node = Some(ip("198.18.9.9"));
    paths.follow(&moved, now);
    assert!(paths.proven().is_empty());
    paths.follow(&BTreeMap::new(), now);
    assert_eq!(paths.due(), None);
}

#[test]
fn five_thousand_nodes_are_not_asked_all_the_time() {
    let settings = Settings::default();
    let mut paths = Paths::new(settings, 7);
    paths.follow(&probed(5000, true), Duration::ZERO);
    let mut sent = 0;
    let mut now = Duration::ZERO;
    let (first, _) = paths.ask(now);
    assert_eq!(first.len(), 10_000, "everybody once");
    while now < Duration::from_secs(200) {
        now = paths.due().unwrap().max(now + Duration::from_millis(50));
        let (questions, _) = paths.ask(now);
        sent += questions.len();
        for one in questions {
            paths.answered(
                Answer {
                    from: one.to,
                    number: one.number,
                },
                now,
            );
        }
    }
    let rate = sent as f64 / now.as_secs_f64();
    assert!(
        rate < 1.3 * f64::from(settings.rate_max),
        "{rate} questions per second"
    );
}

proptest! {
    #[test]
    fn every_range_has_one_route_and_every_overlay_route_has_its_peer(
        nodes in prop::collection::vec((0u8..12, 0u8..12, any::<bool>(), any::<bool>()), 1..12),
        routing in prop::sample::select(vec![Routing::Auto, Routing::Direct, Routing::Vxlan]),
        proven in prop::collection::btree_set((0usize..12, any::<bool>()), 0..8),
    ) {
        let objects = nodes.iter().enumerate().map(|(n, (address, third, four, six))| {
            let v4 = format!("198.18.0.{address}");
            let v6 = format!("fd00:18::{address:x}");
            let ips: Vec<&str> = [four.then_some(&*v4), six.then_some(&*v6)].into_iter().flatten().collect();
            node(&format!("n{n:02}"), &ips, &[&format!("10.244.{third}.0/24"), &format!("fd00:{third:x}::/64")])
        });
        let snapshot = snapshot(objects.collect());
        let proven = proven.into_iter().map(|(n, ipv4)| key(&format!("n{n:02}"), ipv4)).collect();
        let plan = plan_routes(&snapshot, "n00", routing, &proven);
        let mut ranges = BTreeSet::new();
        for route in &plan.routes {
            prop_assert!(ranges.insert(route.range()), "{} twice", route.range());
            if let NodeRoute::Overlay { gateway, .. } = route {
                prop_assert!(plan.peers.values().any(|gateways| gateways.contains(gateway)), "{gateway}");
            }
        }
        prop_assert!(diff_routes(&plan.routes, &plan.routes).is_empty());
        let everything = diff_routes(&BTreeSet::new(), &plan.routes);
        prop_assert_eq!(everything.len(), plan.routes.len());
    }
}
