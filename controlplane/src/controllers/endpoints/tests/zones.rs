//! Services whose endpoints are shared out among zones.

use super::*;

/// Two nodes of four processors in a zone each, and so many ready pods, all on the first.
fn two_zones(pods: usize) -> Cluster {
    let mut cluster = cluster(json!({}));
    cluster.add(node("n1"));
    for (name, zone) in [("n0", "z0"), ("n1", "z1")] {
        set_zone(&mut cluster, name, Some(zone));
    }
    for at in 0..pods {
        let key = add_pod(&mut cluster, &format!("p{at}"), 8080);
        cluster.set_ready(&key, true);
    }
    cluster
}

fn set_zone(cluster: &mut Cluster, name: &str, zone: Option<&str>) {
    cluster.edit::<Node>(&Key::cluster(name), |node| {
        let labels = node.metadata.labels.as_mut().unwrap();
        match zone {
            Some(zone) => labels.insert("topology.kubernetes.io/zone".into(), zone.into()),
            None => labels.remove("topology.kubernetes.io/zone"),
        };
    });
}

fn annotate(cluster: &mut Cluster, mode: Option<&str>) {
    cluster.edit::<Service>(&Key::new("default", "web"), |web| {
        let mode = mode.map(|mode| ("service.kubernetes.io/topology-mode".into(), mode.into()));
        web.metadata.annotations = Some(mode.into_iter().collect());
    });
}

/// How many endpoints are for z0, for z1, and for nobody in particular.
fn shares(cluster: &Cluster) -> (usize, usize, usize) {
    let zone = |endpoint: &&Endpoint| {
        let zones = endpoint.hints.as_ref()?.for_zones.as_ref()?;
        Some(zones[0].name.clone())
    };
    let found: Vec<_> = endpoints(cluster).iter().map(zone).collect();
    let of = |wanted: Option<&str>| {
        found
            .iter()
            .filter(|zone| zone.as_deref() == wanted)
            .count()
    };
    (of(Some("z0")), of(Some("z1")), of(None))
}

fn said(cluster: &mut Cluster) -> Vec<(String, String)> {
    let notes = std::mem::take(&mut cluster.notes);
    let say = |note: super::super::super::plan::Note| (note.reason.to_owned(), note.message);
    notes.into_iter().map(say).collect()
}

#[test]
fn endpoints_are_shared_out_among_zones_when_the_service_asks_for_it() {
    let mut cluster = two_zones(4);
    cluster.settle();
    assert_eq!(shares(&cluster), (0, 0, 4));
    annotate(&mut cluster, Some("Auto"));
    cluster.settle();
    assert_eq!(shares(&cluster), (2, 2, 0));
    let enabled = (
        "TopologyAwareHintsEnabled".to_owned(),
        "Topology Aware Hints has been enabled, addressType: IPv4".to_owned(),
    );
    assert_eq!(said(&mut cluster), [enabled]);

    // It comes before what the Service prefers; and goes with the annotation.
    cluster.edit::<Service>(&Key::new("default", "web"), |web| {
        web.spec.as_mut().unwrap().traffic_distribution = Some("PreferSameZone".into());
    });
    cluster.settle();
    assert_eq!(shares(&cluster), (2, 2, 0));
    annotate(&mut cluster, Some("Disabled"));
    cluster.settle();
    assert_eq!(shares(&cluster), (4, 0, 0));
    annotate(&mut cluster, None);
    cluster.settle();
    assert_eq!(shares(&cluster), (4, 0, 0));
}

#[test]
fn hints_go_by_what_the_nodes_have() {
    let mut cluster = two_zones(6);
    annotate(&mut cluster, Some("auto"));
    cluster.settle();
    assert_eq!(shares(&cluster), (3, 3, 0));
    cluster.edit::<Node>(&Key::cluster("n0"), |node| {
        let allocatable = node.status.as_mut().unwrap().allocatable.as_mut().unwrap();
        allocatable.insert("cpu".into(), serde_json::from_value(json!("8")).unwrap());
    });
    cluster.settle();
    assert_eq!(shares(&cluster), (4, 2, 0));
    said(&mut cluster);

    set_zone(&mut cluster, "n1", None);
    cluster.settle();
    assert_eq!(shares(&cluster), (0, 0, 6));
    let said = said(&mut cluster);
    assert_eq!(said[0].0, "TopologyAwareHintsDisabled");
    assert!(said[0].1.starts_with("Insufficient Node information"));

    // A node that is not ready, or a control plane, does not count.
    set_zone(&mut cluster, "n1", Some("z1"));
    cluster.settle();
    assert_eq!(shares(&cluster), (4, 2, 0));
    cluster.edit::<Node>(&Key::cluster("n1"), |node| {
        node.status.as_mut().unwrap().conditions.as_mut().unwrap()[0].status = "False".into();
    });
    cluster.settle();
    assert_eq!(shares(&cluster), (0, 0, 6));
}
