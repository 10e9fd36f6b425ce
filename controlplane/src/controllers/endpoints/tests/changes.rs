//! What a Service's slices become when something changes, and what they are on the way.

use super::*;
use crate::controllers::plan::Propagation;

/// Endpoints at the port of this name.
fn at_port(snapshot: &crate::controllers::snapshot::Snapshot, name: &str) -> usize {
    let has = |slice: &EndpointSlice| {
        let mut ports = slice.ports.iter().flatten();
        ports.any(|port| port.name.as_deref() == Some(name))
    };
    let slices = snapshot.slices.values();
    slices
        .filter(|slice| has(slice))
        .map(|slice| slice.endpoints.as_ref().map_or(0, Vec::len))
        .sum()
}

fn uids(cluster: &Cluster) -> BTreeSet<String> {
    let slices = slices(cluster).into_iter();
    slices
        .map(|slice| slice.metadata.uid.clone().unwrap())
        .collect()
}

fn ready_pods(cluster: &mut Cluster, prefix: &str, count: usize) {
    for index in 0..count {
        add_pod(cluster, &format!("{prefix}{index:03}"), 8080);
    }
    cluster.all_ready();
}

#[test]
fn a_port_that_comes_or_changes_takes_no_endpoint_away_meanwhile() {
    let mut cluster = cluster(json!({}));
    ready_pods(&mut cluster, "p", 250);
    cluster.settle();
    let before = uids(&cluster);
    cluster.check = Some(Box::new(|snapshot| {
        assert_eq!(at_port(snapshot, "http"), 250);
    }));
    let web = Key::new("default", "web");
    for (ports, count) in [
        (
            json!([{"name": "http", "port": 80, "targetPort": 8080}, {"name": "metrics", "port": 90}]),
            2,
        ),
        (json!([{"name": "http", "port": 80, "targetPort": 8081}]), 1),
    ] {
        cluster.edit::<Service>(&web, |web| {
            web.spec.as_mut().unwrap().ports = Some(serde_json::from_value(ports).unwrap());
        });
        cluster.settle();
        assert_eq!(uids(&cluster), before, "they are the same slices");
        let counts = slices(&cluster).into_iter();
        let mut counts = counts.map(|slice| slice.ports.as_ref().unwrap().len());
        assert!(counts.all(|found| found == count));
    }
}

#[test]
fn a_service_that_is_made_again_has_its_own_slices_before_the_old_ones_go() {
    let mut cluster = cluster(json!({}));
    ready_pods(&mut cluster, "p", 3);
    cluster.settle();
    let before = uids(&cluster);
    cluster.check = Some(Box::new(|snapshot| {
        assert!(at_port(snapshot, "http") >= 3);
    }));
    cluster.delete_now("web");
    let again = cluster.add(service(json!({})));
    cluster.settle();
    assert!(uids(&cluster).is_disjoint(&before));
    let owner = pods::controller_of(&slices(&cluster)[0].metadata).unwrap();
    assert_eq!(Some(&owner.uid), again.metadata.uid.as_ref());
    assert_eq!(endpoints(&cluster).len(), 3);
}

#[test]
fn slices_have_the_labels_of_their_service_and_no_others() {
    let mut cluster = cluster(json!({}));
    ready_pods(&mut cluster, "p", 1);
    cluster.settle();
    let slice = Key::of(&slices(&cluster)[0].metadata);
    cluster.edit::<EndpointSlice>(&slice, |slice| {
        let labels = slice.metadata.labels.as_mut().unwrap();
        labels.insert("by".into(), "hand".into());
    });
    cluster.edit::<Service>(&Key::new("default", "web"), |web| {
        web.metadata.labels = None;
    });
    cluster.settle();
    let labels = slices(&cluster)[0].metadata.labels.as_ref().unwrap();
    let names: Vec<&str> = labels.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "endpointslice.kubernetes.io/managed-by",
            "kubernetes.io/service-name"
        ]
    );
}

#[test]
fn slices_are_used_again_before_others_are_made() {
    let mut cluster = cluster(json!({"ipFamilies": ["IPv4", "IPv6"]}));
    cluster.settle();
    let before = uids(&cluster);
    assert_eq!(
        before.len(),
        2,
        "one of each family says that nobody is there"
    );
    ready_pods(&mut cluster, "p", 2);
    cluster.settle();
    assert_eq!(endpoints(&cluster).len(), 2);
    assert_eq!(uids(&cluster), before);
    for pod in ["p000", "p001"] {
        cluster.delete_now(pod);
    }
    cluster.settle();
    assert!(endpoints(&cluster).is_empty());
    assert_eq!(uids(&cluster), before);
}

#[test]
fn many_new_endpoints_fill_slices_of_their_own_and_the_rest_goes_where_there_is_room() {
    let mut cluster = cluster(json!({}));
    ready_pods(&mut cluster, "a", 40);
    cluster.settle();
    ready_pods(&mut cluster, "b", 150);
    cluster.settle();
    let mut sizes: Vec<usize> = slices(&cluster)
        .iter()
        .map(|slice| slice.endpoints.as_ref().unwrap().len())
        .collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [90, 100]);
}

#[test]
fn pods_of_a_node_that_is_gone_get_nothing() {
    for (publish, left) in [(false, 0), (true, 2)] {
        let mut cluster = cluster(json!({"publishNotReadyAddresses": publish}));
        ready_pods(&mut cluster, "p", 2);
        cluster.settle();
        assert_eq!(endpoints(&cluster).len(), 2);
        cluster.delete_now("n0");
        cluster.settle();
        assert_eq!(endpoints(&cluster).len(), left, "published: {publish}");
        cluster.add(node("n0"));
        cluster.settle();
        assert_eq!(endpoints(&cluster).len(), 2);
    }
}

#[test]
fn endpoints_are_kept_up_to_date_as_long_as_their_service_is_there() {
    let mut cluster = Cluster::new(ALL);
    cluster.add(namespace("default"));
    cluster.add(node("n0"));
    let mut web = service(json!({}));
    web.metadata.finalizers = Some(vec!["example.com/balancer".into()]);
    cluster.add(web);
    ready_pods(&mut cluster, "p", 2);
    cluster.settle();
    cluster.delete("web", Propagation::Background);
    cluster.delete("default", Propagation::Background);
    cluster.set_ready(&Key::new("default", "p000"), false);
    cluster.settle();
    let ready = endpoints(&cluster).into_iter();
    let ready = ready.filter(|one| one.conditions.as_ref().unwrap().ready == Some(true));
    assert_eq!(ready.count(), 1, "the balancer still leads here");
    assert_eq!(
        subsets(&cluster, "web")[0]["addresses"]
            .as_array()
            .map(Vec::len),
        Some(1)
    );
    // But nothing is made any more.
    let name = slices(&cluster)[0].metadata.name.clone().unwrap();
    cluster.delete_now(&name);
    cluster.settle();
    assert!(slices(&cluster).is_empty());
}

#[test]
fn mirrors_follow_the_annotations_of_what_they_mirror() {
    let mut cluster = Cluster::new(ALL);
    cluster.add(namespace("default"));
    cluster.add(service(json!({"selector": null})));
    let mut kept = custom("web", json!([{"addresses": [{"ip": "10.1.2.3"}]}]));
    let annotations = [("a", "1"), (super::super::mirror::LAST_APPLIED, "{}")];
    let annotations = annotations.map(|(name, value)| (name.to_owned(), value.to_owned()));
    kept.metadata.annotations = Some(annotations.into());
    cluster.add(kept);
    cluster.settle();
    let shown = |cluster: &Cluster| {
        let annotations = slices(cluster)[0].metadata.annotations.clone();
        annotations.unwrap_or_default()
    };
    assert_eq!(shown(&cluster), [("a".to_owned(), "1".to_owned())].into());
    cluster.edit::<Endpoints>(&Key::new("default", "web"), |kept| {
        kept.metadata.annotations = Some([("b".to_owned(), "2".to_owned())].into());
    });
    cluster.settle();
    assert_eq!(shown(&cluster), [("b".to_owned(), "2".to_owned())].into());
}
