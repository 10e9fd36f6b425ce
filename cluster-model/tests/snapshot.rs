//! A snapshot depends on what is, not on how it came about.

use std::sync::Arc;

use cluster_model::*;
use proptest::prelude::*;

fn slice(name: &str, service: Option<&str>, last_octet: u8) -> Object {
    Object::EndpointSlice(Arc::new(EndpointSlice {
        key: ObjectKey::new("default", name),
        service: service.map(|service| ObjectKey::new("default", service)),
        headless: false,
        ports: vec![EndpointPort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 80,
            app_protocol: None,
        }],
        endpoints: vec![Endpoint {
            address: [10, 244, 1, last_octet].into(),
            conditions: Conditions {
                ready: true,
                serving: true,
                terminating: false,
            },
            node_name: None,
            zone: None,
            hostname: None,
            target: None,
            for_zones: vec![],
            for_nodes: vec![],
        }],
        refused: vec![],
        last_change: None,
    }))
}

fn node(name: &str, last_octet: u8) -> Object {
    Object::Node(Arc::new(Node {
        name: name.into(),
        internal_ips: vec![[198, 18, 0, last_octet].into()],
        pod_cidrs: vec![],
        zone: None,
        leaving: false,
    }))
}

fn slice_ref(name: &str) -> ObjectRef {
    ObjectRef {
        kind: Kind::EndpointSlice,
        key: ObjectKey::new("default", name),
    }
}

#[test]
fn a_slice_that_moves_to_another_service_dirties_both() {
    let (mut snapshot, mut dirty) = (Snapshot::default(), Dirty::default());
    snapshot.apply(Change::Upsert(slice("a-1", Some("a"), 1)), &mut dirty);
    dirty = Dirty::default();
    snapshot.apply(Change::Upsert(slice("a-1", Some("b"), 1)), &mut dirty);
    let keys: Vec<String> = dirty.services.iter().map(ToString::to_string).collect();
    assert_eq!(keys, ["default/a", "default/b"]);
    assert!(snapshot.slices(&ObjectKey::new("default", "a")).is_empty());
    assert_eq!(snapshot.slices(&ObjectKey::new("default", "b")).len(), 1);
}

#[test]
fn an_object_that_did_not_change_dirties_nothing() {
    let (mut snapshot, mut dirty) = (Snapshot::default(), Dirty::default());
    snapshot.apply(Change::Upsert(slice("a-1", Some("a"), 1)), &mut dirty);
    dirty = Dirty::default();
    snapshot.apply(Change::Upsert(slice("a-1", Some("a"), 1)), &mut dirty);
    snapshot.apply(Change::Remove(slice_ref("never-there")), &mut dirty);
    assert!(dirty.is_empty(), "{dirty:?}");
}

#[test]
fn a_complete_list_removes_what_it_lacks_and_marks_the_kind_synced_once() {
    let (mut snapshot, mut dirty) = (Snapshot::default(), Dirty::default());
    snapshot.apply(Change::Upsert(node("gone", 1)), &mut dirty);
    dirty = Dirty::default();
    snapshot.apply(
        Change::Replace(Kind::Node, vec![node("here", 2)]),
        &mut dirty,
    );
    assert!(snapshot.synced(Kind::Node) && !snapshot.synced(Kind::Service));
    assert!(snapshot.node("gone").is_none() && snapshot.node("here").is_some());
    assert_eq!(
        dirty.nodes.iter().map(|name| &**name).collect::<Vec<_>>(),
        ["gone", "here"]
    );
    assert_eq!(
        dirty.synced.iter().copied().collect::<Vec<_>>(),
        [Kind::Node]
    );
    dirty = Dirty::default();
    snapshot.apply(
        Change::Replace(Kind::Node, vec![node("here", 2)]),
        &mut dirty,
    );
    assert!(dirty.is_empty());
}

#[test]
fn a_clone_is_not_changed_by_later_changes() {
    let (mut snapshot, mut dirty) = (Snapshot::default(), Dirty::default());
    snapshot.apply(Change::Upsert(slice("a-1", Some("a"), 1)), &mut dirty);
    let before = snapshot.clone();
    snapshot.apply(Change::Remove(slice_ref("a-1")), &mut dirty);
    assert_eq!(before.slices(&ObjectKey::new("default", "a")).len(), 1);
    assert!(snapshot.slices(&ObjectKey::new("default", "a")).is_empty());
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let names = prop::sample::select(vec!["s1", "s2", "s3"]);
    let services = prop::option::of(prop::sample::select(vec!["a", "b"]));
    let one = (names.clone(), services, 1u8..4)
        .prop_map(|(name, service, octet)| slice(name, service, octet));
    let change = prop_oneof![
        4 => one.clone().prop_map(Change::Upsert),
        2 => names.prop_map(|name| Change::Remove(slice_ref(name))),
        1 => prop::collection::btree_map("s[123]", one, 0..3).prop_map(|by_name| {
            let mut objects: Vec<Object> = by_name.into_values().collect();
            objects.dedup_by_key(|object| object.reference());
            objects.sort_by_key(Object::reference);
            objects.dedup_by_key(|object| object.reference());
            Change::Replace(Kind::EndpointSlice, objects)
        }),
    ];
    prop::collection::vec(change, 0..20)
}

proptest! {
    /// However the slices came, the snapshot equals one that was given the final list at once, and each service
    /// whose slices differ between two moments was reported dirty.
    #[test]
    fn the_way_does_not_matter(changes in changes()) {
        let mut snapshot = Snapshot::default();
        for change in changes {
            let before = snapshot.clone();
            let mut dirty = Dirty::default();
            snapshot.apply(change, &mut dirty);
            for name in ["a", "b"] {
                let key = ObjectKey::new("default", name);
                prop_assert_eq!(before.slices(&key) != snapshot.slices(&key), dirty.services.contains(&key));
            }
        }
        let mut objects: Vec<Object> = Vec::new();
        for name in ["a", "b"] {
            objects.extend(snapshot.slices(&ObjectKey::new("default", name)).iter().cloned().map(Object::EndpointSlice));
        }
        let (mut fresh, mut dirty) = (Snapshot::default(), Dirty::default());
        fresh.apply(Change::Replace(Kind::EndpointSlice, objects), &mut dirty);
        for name in ["a", "b"] {
            let key = ObjectKey::new("default", name);
            prop_assert_eq!(fresh.slices(&key), snapshot.slices(&key));
        }
    }
}
