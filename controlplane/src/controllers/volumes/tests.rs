//! Claims and volumes in a cluster in memory.

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::{StorageClass, VolumeAttributesClass};
use serde_json::{Value, json};

use super::super::object::{Key, Kind};
use super::super::testing::{Cluster, namespace, pod};

fn cluster() -> Cluster {
    let mut cluster = Cluster::new(&[super::CLAIMS, super::VOLUMES]);
    cluster.add(namespace("default"));
    cluster
}

fn volume(cluster: &mut Cluster, name: &str, size: &str, spec: Value) {
    let mut value = json!({
        "metadata": {"name": name},
        "spec": {"capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"], "hostPath": {"path": "/tmp/x"},
            "persistentVolumeReclaimPolicy": "Retain"},
    });
    json_patch::merge(&mut value, &json!({"spec": spec}));
    cluster.add::<PersistentVolume>(serde_json::from_value(value).unwrap());
}

fn claim(cluster: &mut Cluster, name: &str, size: &str, spec: Value) {
    let mut value = json!({
        "metadata": {"namespace": "default", "name": name},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}},
    });
    json_patch::merge(&mut value, &json!({"spec": spec}));
    cluster.add::<PersistentVolumeClaim>(serde_json::from_value(value).unwrap());
}

/// Volume and phase of a claim.
fn bound(cluster: &Cluster, name: &str) -> (Option<String>, String) {
    let claim = cluster
        .snapshot
        .claims
        .get(&Key::new("default", name))
        .unwrap();
    let phase = super::phase_of_claim(claim).to_string();
    (super::volume_name(claim).map(str::to_string), phase)
}

fn phase(cluster: &Cluster, name: &str) -> String {
    super::phase_of(cluster.snapshot.volumes.get(&Key::cluster(name)).unwrap()).to_string()
}

fn to(volume: &str) -> (Option<String>, String) {
    (Some(volume.into()), "Bound".into())
}

#[test]
fn a_claim_gets_the_smallest_volume_that_fits() {
    let mut cluster = cluster();
    volume(&mut cluster, "large", "10Gi", json!({}));
    volume(&mut cluster, "small", "1Gi", json!({}));
    volume(&mut cluster, "fits", "3Gi", json!({}));
    volume(
        &mut cluster,
        "class",
        "2Gi",
        json!({"storageClassName": "fast"}),
    );
    volume(&mut cluster, "block", "2Gi", json!({"volumeMode": "Block"}));
    cluster.settle();
    assert_eq!(phase(&cluster, "fits"), "Available");
    claim(&mut cluster, "data", "2Gi", json!({}));
    cluster.settle();
    assert_eq!(bound(&cluster, "data"), to("fits"));
    assert_eq!(phase(&cluster, "fits"), "Bound");
    let data = cluster.snapshot.claims.values().next().unwrap();
    assert_eq!(
        data.status.as_ref().unwrap().capacity.as_ref().unwrap()["storage"].0,
        "3Gi"
    );
    claim(
        &mut cluster,
        "quick",
        "1Gi",
        json!({"storageClassName": "fast"}),
    );
    claim(
        &mut cluster,
        "shared",
        "1Gi",
        json!({"accessModes": ["ReadWriteMany"]}),
    );
    cluster.settle();
    assert_eq!(bound(&cluster, "quick"), to("class"));
    assert_eq!(bound(&cluster, "shared"), (None, "Pending".into()));
    assert!(
        cluster
            .notes
            .iter()
            .any(|note| note.reason == "FailedBinding")
    );
}

#[test]
fn two_claims_never_share_a_volume() {
    let mut cluster = cluster();
    claim(&mut cluster, "a", "1Gi", json!({}));
    claim(&mut cluster, "b", "1Gi", json!({}));
    cluster.settle();
    volume(&mut cluster, "only", "1Gi", json!({}));
    cluster.settle();
    assert_eq!(bound(&cluster, "a"), to("only"));
    assert_eq!(bound(&cluster, "b"), (None, "Pending".into()));
    volume(&mut cluster, "second", "1Gi", json!({}));
    cluster.settle();
    assert_eq!(bound(&cluster, "b"), to("second"));
}

#[test]
fn a_choice_of_the_user_is_kept_on_either_side() {
    let mut cluster = cluster();
    volume(
        &mut cluster,
        "promised",
        "1Gi",
        json!({"claimRef": {"namespace": "default", "name": "a"}}),
    );
    volume(&mut cluster, "free", "1Gi", json!({}));
    claim(&mut cluster, "b", "1Gi", json!({"volumeName": "free"}));
    claim(&mut cluster, "c", "1Gi", json!({}));
    cluster.settle();
    assert_eq!(bound(&cluster, "b"), to("free"));
    assert_eq!(bound(&cluster, "c"), (None, "Pending".into()));
    claim(&mut cluster, "a", "1Gi", json!({}));
    cluster.settle();
    assert_eq!(bound(&cluster, "a"), to("promised"));
}

#[test]
fn a_volume_is_released_and_a_claim_lost_when_the_other_goes() {
    let mut cluster = cluster();
    volume(&mut cluster, "one", "1Gi", json!({}));
    volume(
        &mut cluster,
        "two",
        "1Gi",
        json!({"persistentVolumeReclaimPolicy": "Delete"}),
    );
    claim(&mut cluster, "a", "1Gi", json!({}));
    claim(&mut cluster, "b", "1Gi", json!({}));
    cluster.settle();
    cluster.delete_now("a");
    cluster.delete_now("b");
    cluster.settle();
    assert_eq!(
        (&*phase(&cluster, "one"), &*phase(&cluster, "two")),
        ("Released", "Failed")
    );
    claim(&mut cluster, "again", "1Gi", json!({}));
    cluster.settle();
    assert_eq!(
        bound(&cluster, "again").1,
        "Pending",
        "what was released is not given to another"
    );
    volume(&mut cluster, "three", "1Gi", json!({}));
    cluster.settle();
    cluster.delete_now("three");
    cluster.settle();
    assert_eq!(bound(&cluster, "again").1, "Lost");
}

#[test]
fn a_class_may_wait_for_the_first_consumer() {
    let mut cluster = cluster();
    let class = json!({
        "metadata": {"name": "local"}, "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer",
    });
    cluster.add::<StorageClass>(serde_json::from_value(class).unwrap());
    volume(
        &mut cluster,
        "disk",
        "1Gi",
        json!({"storageClassName": "local"}),
    );
    claim(
        &mut cluster,
        "data",
        "1Gi",
        json!({"storageClassName": "local"}),
    );
    cluster.settle();
    assert_eq!(bound(&cluster, "data"), (None, "Pending".into()));
    assert!(
        cluster
            .notes
            .iter()
            .any(|note| note.reason == "WaitForFirstConsumer")
    );
    let mut user: Pod = pod("default", "user");
    user.spec.as_mut().unwrap().volumes = Some(
        serde_json::from_value(
            json!([{"name": "d", "persistentVolumeClaim": {"claimName": "data"}}]),
        )
        .unwrap(),
    );
    cluster.add(user);
    cluster.settle();
    assert_eq!(bound(&cluster, "data"), to("disk"));
}

#[test]
fn what_is_in_use_waits_for_its_users() {
    use super::protection;
    let all = &[
        super::CLAIMS,
        super::VOLUMES,
        protection::CLAIMS,
        protection::VOLUMES,
        protection::CLASSES,
    ];
    let mut cluster = Cluster::new(all);
    cluster.add(namespace("default"));
    let class = json!({"metadata": {"name": "gold"}, "driverName": "csi.example.com"});
    cluster.add::<VolumeAttributesClass>(serde_json::from_value(class).unwrap());
    volume(&mut cluster, "disk", "1Gi", json!({}));
    let gold = json!({"volumeAttributesClassName": "gold"});
    claim(&mut cluster, "data", "1Gi", gold);
    cluster.settle();
    // They were made without.
    let held = |cluster: &Cluster, kind: Kind, key: &Key| {
        let found = cluster.snapshot.object(kind.resource(), key);
        found.map(|found| found.meta().finalizers.clone().unwrap_or_default())
    };
    let (data, disk) = (Key::new("default", "data"), Key::cluster("disk"));
    let gold = Key::cluster("gold");
    let of_claim = |cluster: &Cluster| held(cluster, Kind::PersistentVolumeClaim, &data);
    let of_volume = |cluster: &Cluster| held(cluster, Kind::PersistentVolume, &disk);
    let of_class = |cluster: &Cluster| held(cluster, Kind::VolumeAttributesClass, &gold);
    assert_eq!(of_claim(&cluster).unwrap(), [protection::CLAIM]);
    assert_eq!(of_volume(&cluster).unwrap(), [protection::VOLUME]);
    assert_eq!(of_class(&cluster).unwrap(), [protection::CLASS]);

    let user = |name: &str, source: Value, node: Option<&str>| {
        let mut user: Pod = pod("default", name);
        let spec = user.spec.as_mut().unwrap();
        spec.node_name = node.map(str::to_string);
        let mut volume = json!({"name": "data"});
        json_patch::merge(&mut volume, &source);
        spec.volumes = Some(serde_json::from_value(json!([volume])).unwrap());
        user
    };
    let by_name = json!({"persistentVolumeClaim": {"claimName": "data"}});
    cluster.add(user("runs", by_name.clone(), Some("n1")));
    cluster.add(user("waits", by_name, None));
    let time = cluster.time();
    cluster.edit::<PersistentVolumeClaim>(&data, |claim| {
        claim.metadata.deletion_timestamp = Some(time.clone());
    });
    cluster.edit::<PersistentVolume>(&disk, |volume| {
        volume.metadata.deletion_timestamp = Some(time.clone());
    });
    cluster.edit::<VolumeAttributesClass>(&gold, |class| {
        class.metadata.deletion_timestamp = Some(time.clone());
    });
    cluster.settle();
    assert!(of_claim(&cluster).is_some(), "a pod on a node uses it");
    assert!(of_volume(&cluster).is_some(), "a claim is bound to it");
    assert!(of_class(&cluster).is_some(), "a claim names it");
    cluster.delete_now("runs");
    cluster.settle();
    assert_eq!(
        of_claim(&cluster),
        None,
        "a pod without a node uses nothing"
    );
    assert_eq!(of_volume(&cluster), None);
    assert_eq!(of_class(&cluster), None);

    // A claim that was made for a pod is used by it under a name of its own.
    claim(&mut cluster, "own-data", "1Gi", json!({}));
    let made = json!({"ephemeral": {"volumeClaimTemplate": {"spec": {}}}});
    cluster.add(user("own", made, Some("n1")));
    let own = Key::new("default", "own-data");
    cluster.settle();
    cluster.edit::<PersistentVolumeClaim>(&own, |claim| {
        claim.metadata.deletion_timestamp = Some(time.clone());
    });
    cluster.settle();
    assert!(held(&cluster, Kind::PersistentVolumeClaim, &own).is_some());
    cluster.delete_now("own");
    cluster.settle();
    assert_eq!(held(&cluster, Kind::PersistentVolumeClaim, &own), None);
}
