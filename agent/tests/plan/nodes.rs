//! What follows from the nodes: routes, and ranges in which pods keep their addresses.

use super::*;

fn node(name: &str, ip: u8, range: &str) -> Object {
    Object::Node(Arc::new(Node {
        name: name.into(),
        internal_ips: vec![[198, 18, 0, ip].into()],
        pod_cidrs: vec![range.parse().unwrap()],
        zone: None,
        leaving: false,
    }))
}

#[test]
fn pods_keep_their_addresses_in_the_cluster_and_where_it_is_configured() {
    let (mut snapshot, mut dirty) = (Snapshot::default(), Dirty::default());
    let nodes = vec![
        node("node-1", 11, "10.244.1.0/24"),
        node("node-2", 12, "10.244.2.0/24"),
    ];
    snapshot.apply(Change::Replace(Kind::Node, nodes), &mut dirty);
    // A range may be written with bits after its prefix.
    let configured = ["10.96.0.0/16", "192.0.2.7/24"].map(|range| range.parse().unwrap());
    let wanted = [
        "10.244.1.0/24",
        "10.244.2.0/24",
        "198.18.0.11/32",
        "198.18.0.12/32",
        "169.254.0.0/16",
        "fe80::/10",
        "10.96.0.0/16",
        "192.0.2.0/24",
    ];
    let wanted = wanted.map(|range| range.parse().unwrap()).into();
    assert_eq!(plan_unmasqueraded(&snapshot, configured), wanted);
}

#[test]
fn routes_lead_to_other_nodes_and_close_the_own_range() {
    let (mut snapshot, mut dirty) = (Snapshot::default(), Dirty::default());
    let nodes = vec![
        node("node-1", 11, "10.244.1.0/24"),
        node("node-2", 12, "10.244.2.0/24"),
        node("thief", 13, "10.244.1.0/24"),
    ];
    snapshot.apply(Change::Replace(Kind::Node, nodes), &mut dirty);
    let routes = plan_routes(&snapshot, "node-1", Routing::Direct, &BTreeSet::new()).routes;
    let own = NodeRoute::Own {
        range: "10.244.1.0/24".parse().unwrap(),
    };
    let pods = NodeRoute::Pods {
        range: "10.244.2.0/24".parse().unwrap(),
        node: [198, 18, 0, 12].into(),
    };
    assert_eq!(routes, BTreeSet::from([own, pods]));

    let moved = NodeRoute::Pods {
        range: "10.244.2.0/24".parse().unwrap(),
        node: [198, 18, 0, 99].into(),
    };
    assert_eq!(
        diff_routes(&BTreeSet::from([own, moved]), &routes),
        [RouteChange::Replace(pods)]
    );
    assert_eq!(
        diff_routes(&routes, &BTreeSet::from([own])),
        [RouteChange::Remove(pods)]
    );
    assert_eq!(diff_routes(&routes, &routes), []);
}
