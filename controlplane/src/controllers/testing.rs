//! A cluster in memory for tests: an API server reduced to what controllers can notice of it, and a kubelet that makes
//! pods ready when it is told to.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{Namespace, Node, Pod, PodCondition, PodIP, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::garbage::{FOREGROUND, ORPHAN};
use super::nodeipam::Pool;
use super::object::{Key, Kind, Object, Target, Typed};
use super::plan::{Action, Controller, Keys, Note, Plan, Propagation, View};
use super::pods;
use super::snapshot::{Change, Snapshot};
use super::volumes::protection;
use super::{Settings, namespace::FINALIZER};

/// Plans run in one `settle` before it is held that the controllers fight each other.
const PLANS_MAX: usize = 20_000;

pub struct Cluster {
    pub snapshot: Snapshot,
    pub settings: Settings,
    pub now: Timestamp,
    instant: Instant,
    pub notes: Vec<Note>,
    /// Pods with a deletion timestamp stay until `finish_pods`.
    pub hold_pods: bool,
    /// Creates of pods fail with this.
    pub refuse_pods: Option<String>,
    controllers: &'static [Controller],
    dirty: Vec<BTreeSet<Key>>,
    again: Vec<(Timestamp, usize, Key)>,
    failures: std::collections::BTreeMap<(usize, Key), String>,
    serial: u64,
    /// Called after every write, with the snapshot then.
    #[expect(clippy::type_complexity, reason = "a test's check")]
    pub check: Option<Box<dyn FnMut(&Snapshot)>>,
}

impl Cluster {
    pub fn new(controllers: &'static [Controller]) -> Self {
        Self {
            snapshot: Snapshot::default(),
            settings: Settings {
                pools: vec![Pool::new("10.244.0.0/16".parse().unwrap()).unwrap()],
                root_ca: "the root ca".into(),
                authority: None,
            },
            now: "2026-01-01T00:00:00Z".parse().unwrap(),
            instant: Instant::now(),
            notes: Vec::new(),
            hold_pods: false,
            refuse_pods: None,
            controllers,
            dirty: vec![BTreeSet::new(); controllers.len()],
            again: Vec::new(),
            failures: Default::default(),
            serial: 0,
            check: None,
        }
    }

    pub fn time(&self) -> Time {
        Time(self.now)
    }

    /// Time passes.
    pub fn advance(&mut self, seconds: i64) {
        self.instant += Duration::from_secs(seconds.unsigned_abs());
        self.set_clock(seconds);
    }

    /// Somebody sets the clock, so far forward or back.
    pub fn set_clock(&mut self, seconds: i64) {
        self.now = self
            .now
            .saturating_add(SignedDuration::from_secs(seconds))
            .unwrap();
    }

    /// Creates an object, as a client would, and gives it back as stored.
    pub fn add<K: Typed>(&mut self, object: K) -> K {
        let stored = self.store_new(Object::of(object));
        decode(&stored)
    }

    /// Replaces an object.
    pub fn update<K: Typed>(&mut self, mut object: K) {
        self.serial += 1;
        object.metadata_mut().resource_version = Some(self.serial.to_string());
        self.take_in(Object::of(object));
    }

    /// Changes a stored object in place; its generation goes up as the API server does it for a new spec.
    pub fn edit<K: Typed>(&mut self, key: &Key, change: impl FnOnce(&mut K)) {
        let mut object: K = decode(
            &self
                .snapshot
                .object(K::TABLE.resource(), key)
                .expect("object to edit exists"),
        );
        change(&mut object);
        let generation = object.metadata().generation.unwrap_or(0) + 1;
        object.metadata_mut().generation = Some(generation);
        self.update(object);
    }

    fn store_new(&mut self, mut object: Object) -> Object {
        self.serial += 1;
        let serial = self.serial;
        let mut value = object.encode().unwrap();
        let meta = value["metadata"].as_object_mut().unwrap();
        if meta.get("name").is_none_or(|name| name == "") {
            let prefix = meta["generateName"].as_str().unwrap().to_string();
            meta.insert("name".into(), json!(format!("{prefix}{serial:05}")));
        }
        meta.entry("uid")
            .or_insert_with(|| json!(format!("uid-{serial}")));
        meta.insert("resourceVersion".into(), json!(serial.to_string()));
        meta.entry("generation").or_insert(json!(1));
        meta.entry("creationTimestamp")
            .or_insert_with(|| json!(Time(self.now)));
        object = Object::decode(object.resource(), &value.to_string()).unwrap();
        assert!(
            self.snapshot
                .object(object.resource(), &object.key())
                .is_none(),
            "{} {} exists already",
            object.resource().kind,
            object.key()
        );
        self.take_in(object.clone());
        object
    }

    fn take_in(&mut self, object: Object) {
        if let Some(change) = self.snapshot.apply(object, self.instant) {
            self.mark(&change);
        }
    }

    fn drop_object(&mut self, object: &Object) {
        if let Some(change) = self.snapshot.remove(object) {
            self.mark(&change);
        }
    }

    fn mark(&mut self, change: &Change) {
        for (controller, dirty) in self.controllers.iter().zip(&mut self.dirty) {
            let mut keys = Keys::new();
            (controller.affected)(&self.snapshot, change, &mut keys);
            dirty.extend(keys);
        }
        if let Some(check) = &mut self.check {
            check(&self.snapshot);
        }
    }

    /// Plans the first dirty key; false when there is none.
    pub fn step(&mut self) -> bool {
        let due: Vec<_> = self
            .again
            .iter()
            .filter(|(at, _, _)| *at <= self.now)
            .cloned()
            .collect();
        self.again.retain(|(at, _, _)| *at > self.now);
        for (_, index, key) in due {
            self.dirty[index].insert(key);
        }
        let Some(index) = self.dirty.iter().position(|dirty| !dirty.is_empty()) else {
            return false;
        };
        let key = self.dirty[index].pop_first().unwrap();
        let plan = self.plan(index, &key);
        if let Some(at) = plan.again_at {
            self.again.push((at, index, key.clone()));
        }
        let mut failure = None;
        let stages = std::iter::once(plan.writes).chain(plan.then);
        let stages: Vec<Vec<_>> = stages.collect();
        let any_action = stages
            .iter()
            .flatten()
            .any(|write| !matches!(write.action, Action::None));
        for stage in stages {
            if failure.is_some() {
                break;
            }
            for write in stage {
                self.notes.extend(write.note);
                if let Err(reason) = self.execute(write.action) {
                    failure = Some(reason);
                }
            }
        }
        match failure {
            Some(reason) => {
                self.failures.insert((index, key.clone()), reason);
            }
            None => {
                let failed = self.failures.remove(&(index, key.clone())).is_some();
                if any_action || failed {
                    self.dirty[index].insert(key);
                }
            }
        }
        true
    }

    pub fn plan(&self, index: usize, key: &Key) -> Plan {
        let view = View {
            snapshot: &self.snapshot,
            settings: &self.settings,
            now: self.now,
            instant: self.instant,
            last_failure: self.failures.get(&(index, key.clone())).map(String::as_str),
        };
        (self.controllers[index].plan)(&view, key)
    }

    /// Runs until nobody wants anything any more.
    pub fn settle(&mut self) {
        for _ in 0..PLANS_MAX {
            if !self.step() {
                return;
            }
        }
        panic!("the controllers do not come to rest: {:?}", self.dirty);
    }

    fn execute(&mut self, action: Action) -> Result<(), String> {
        match action {
            Action::None => {}
            Action::Create(object) => {
                if let (Some(reason), Object::Pod(_)) = (&self.refuse_pods, &object) {
                    return Err(reason.clone());
                }
                self.store_new(object);
            }
            Action::Patch {
                target,
                subresource,
                body,
            } => self.patch(&target, subresource, body)?,
            Action::Delete {
                target,
                propagation,
                grace_seconds,
            } => {
                self.delete_object(&target, propagation, grace_seconds == Some(0));
            }
            Action::Collect {
                target,
                owners,
                propagation,
                ..
            } => {
                for owner in &owners {
                    assert!(
                        self.snapshot
                            .graph
                            .get(&owner.uid)
                            .is_none_or(|found| found.key.namespace != target.key.namespace)
                    );
                }
                self.delete_object(&target, Some(propagation), false);
            }
            Action::Bind { pod, node } => {
                self.patch(&pod, None, json!({"spec": {"nodeName": node}}))?;
            }
            Action::FillToken {
                secret, account, ..
            } => {
                let data =
                    json!({"token": "dA==", "namespace": "bg==", "ca.crt": "dGhlIHJvb3QgY2E="});
                let annotations = json!({super::tokens::ACCOUNT_UID: &*account.uid});
                let body = json!({"metadata": {"annotations": annotations}, "data": data});
                self.patch(&secret, None, body)?;
            }
            Action::ReleaseClaim(claim) => {
                let body = protection::release(&claim.metadata, protection::CLAIM);
                self.patch(&Target::of(&*claim), None, body)?;
            }
            Action::FinalizeNamespace(target) => {
                let Some(object) = self.snapshot.object(&target.resource, &target.key) else {
                    return Ok(());
                };
                let mut value = object.encode().unwrap();
                let finalizers = value["spec"]["finalizers"].as_array_mut().unwrap();
                finalizers.retain(|finalizer| finalizer != FINALIZER);
                self.drop_object(&object);
            }
        }
        Ok(())
    }

    fn patch(
        &mut self,
        target: &Target,
        subresource: Option<&str>,
        body: Value,
    ) -> Result<(), String> {
        let Some(object) = self.snapshot.object(&target.resource, &target.key) else {
            return Err("not found".into());
        };
        let mut value = object.encode().unwrap();
        if let Some(revision) = body["metadata"]
            .get("resourceVersion")
            .and_then(Value::as_str)
            && Some(revision) != object.meta().resource_version.as_deref()
        {
            return Err("conflict".into());
        }
        let before = value.clone();
        merge(&mut value, body);
        if matches!(subresource, Some("status" | "approval")) {
            for field in ["spec", "metadata"] {
                value[field] = before[field].clone();
            }
        } else {
            value["status"] = before["status"].clone();
        }
        if value["spec"] != before["spec"] {
            value["metadata"]["generation"] = json!(object.meta().generation.unwrap_or(0) + 1);
        }
        if value == before {
            return Ok(());
        }
        self.serial += 1;
        value["metadata"]["resourceVersion"] = json!(self.serial.to_string());
        if value["status"].is_null() {
            value.as_object_mut().unwrap().remove("status");
        }
        let object = Object::decode(&target.resource, &value.to_string()).unwrap();
        let meta = object.meta();
        let ended = match &object {
            Object::Pod(_) => meta.deletion_grace_period_seconds == Some(0),
            // Its own finalizers are in its spec.
            Object::Namespace(_) => false,
            _ => true,
        };
        let done = meta.deletion_timestamp.is_some()
            && meta.finalizers.as_ref().is_none_or(Vec::is_empty)
            && ended;
        self.take_in(object.clone());
        if done {
            self.drop_object(&object);
        }
        Ok(())
    }

    /// Deletes the object of this name, whatever its kind, as a client would.
    pub fn delete(&mut self, name: &str, propagation: Propagation) {
        let target = self.find(name).target();
        self.delete_object(&target, Some(propagation), false);
    }

    /// Takes the object of this name away without grace.
    pub fn delete_now(&mut self, name: &str) {
        let object = self.find(name);
        self.drop_object(&object);
    }

    fn find(&self, name: &str) -> Object {
        Kind::ALL
            .iter()
            .flat_map(|kind| {
                self.snapshot
                    .graph
                    .of_resource(kind.resource())
                    .cloned()
                    .collect::<Vec<_>>()
            })
            .find(|node| &*node.key.name == name)
            .and_then(|node| self.snapshot.object(&node.resource, &node.key))
            .unwrap_or_else(|| panic!("no object named {name}"))
    }

    fn delete_object(&mut self, target: &Target, propagation: Option<Propagation>, at_once: bool) {
        let Some(object) = self.snapshot.object(&target.resource, &target.key) else {
            return;
        };
        if object.uid() != &*target.uid {
            return;
        }
        let mut value = object.encode().unwrap();
        let finalizer = match propagation {
            Some(Propagation::Foreground) => Some(FOREGROUND),
            Some(Propagation::Orphan) => Some(ORPHAN),
            _ => None,
        };
        if let Some(finalizer) = finalizer {
            let meta = value["metadata"].as_object_mut().unwrap();
            let finalizers = meta.entry("finalizers").or_insert(json!([]));
            finalizers.as_array_mut().unwrap().push(json!(finalizer));
        }
        let held = value["metadata"]
            .get("finalizers")
            .and_then(Value::as_array)
            .is_some_and(|held| !held.is_empty());
        let graceful = matches!(&object, Object::Pod(pod) if self.hold_pods && !at_once && !pods::is_terminal(pod));
        if !held && !graceful && !matches!(object, Object::Namespace(_)) {
            self.drop_object(&object);
            return;
        }
        if object.meta().deletion_timestamp.is_some() {
            // A grace may only become shorter.
            if !graceful && object.meta().deletion_grace_period_seconds != Some(0) {
                self.serial += 1;
                value["metadata"]["resourceVersion"] = json!(self.serial.to_string());
                value["metadata"]["deletionGracePeriodSeconds"] = json!(0);
                self.take_in(Object::decode(&target.resource, &value.to_string()).unwrap());
            }
            return;
        }
        self.serial += 1;
        value["metadata"]["resourceVersion"] = json!(self.serial.to_string());
        value["metadata"]["deletionTimestamp"] = json!(Time(self.now));
        if !graceful {
            value["metadata"]["deletionGracePeriodSeconds"] = json!(0);
        }
        self.take_in(Object::decode(&target.resource, &value.to_string()).unwrap());
    }

    /// Ends the pods that are on their way out.
    pub fn finish_pods(&mut self) {
        let going: Vec<_> = self
            .snapshot
            .pods
            .values()
            .filter(|pod| pods::is_terminating(pod))
            .cloned()
            .collect();
        for pod in going {
            let held = pod.metadata.finalizers.as_ref();
            if held.is_none_or(Vec::is_empty) {
                self.drop_object(&Object::Pod(pod));
                continue;
            }
            // The kubelet is done with it; whoever holds it lets it go.
            let mut pod = (*pod).clone();
            pod.metadata.deletion_grace_period_seconds = Some(0);
            if !pods::is_terminal(&pod) {
                pod.status.get_or_insert_default().phase = Some("Failed".into());
            }
            self.update(pod);
        }
    }

    /// Makes a pod running and ready, or running and not ready.
    pub fn set_ready(&mut self, key: &Key, ready: bool) {
        let Some(pod) = self.snapshot.pods.get(key) else {
            return;
        };
        let mut pod = (**pod).clone();
        self.serial += 1;
        pod.metadata.resource_version = Some(self.serial.to_string());
        let address = format!(
            "10.244.{}.{}",
            self.serial / 250 % 250,
            self.serial % 250 + 1
        );
        let status = pod.status.get_or_insert_with(PodStatus::default);
        status.phase = Some("Running".into());
        if status.pod_ips.is_none() {
            status.pod_ip = Some(address.clone());
            status.pod_ips = Some(vec![PodIP { ip: address }]);
        }
        status.conditions = Some(vec![PodCondition {
            type_: "Ready".into(),
            status: if ready { "True" } else { "False" }.into(),
            last_transition_time: Some(Time(self.now)),
            ..Default::default()
        }]);
        self.take_in(Object::of(pod));
    }

    /// Makes all active pods ready.
    pub fn all_ready(&mut self) {
        let waiting: Vec<Key> = self
            .snapshot
            .pods
            .iter()
            .filter(|(_, pod)| pods::is_active(pod) && !pods::is_ready(pod))
            .map(|(key, _)| key.clone())
            .collect();
        for key in waiting {
            self.set_ready(&key, true);
        }
    }

    /// Settles and makes pods ready until both come to rest.
    pub fn roll_out(&mut self) {
        for _ in 0..1000 {
            self.settle();
            let ready = |pod: &Arc<Pod>| !pods::is_active(pod) || pods::is_ready(pod);
            if self.snapshot.pods.values().all(ready) {
                return;
            }
            self.all_ready();
        }
        panic!("the rollout does not come to rest");
    }
}

fn decode<K: Typed>(object: &Object) -> K {
    serde_json::from_value(object.encode().unwrap()).unwrap()
}

/// JSON merge patch (RFC 7396).
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    let fields = target.as_object_mut().unwrap();
    for (name, value) in patch {
        if value.is_null() {
            fields.remove(&name);
        } else {
            merge(fields.entry(name).or_insert(Value::Null), value);
        }
    }
}

pub fn node(name: &str) -> Node {
    serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "status": {
            "allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }))
    .unwrap()
}

pub fn namespace(name: &str) -> Namespace {
    serde_json::from_value(json!({
        "metadata": {"name": name}, "spec": {"finalizers": [FINALIZER]}, "status": {"phase": "Active"},
    }))
    .unwrap()
}

pub fn pod(namespace: &str, name: &str) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"namespace": namespace, "name": name},
        "spec": {"containers": [{"name": "main", "image": "image"}]},
    }))
    .unwrap()
}

fn workload(namespace: &str, name: &str) -> Value {
    json!({
        "metadata": {"namespace": namespace, "name": name, "labels": {"app": name}},
        "spec": {
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"containers": [{"name": "main", "image": "image:1"}]},
            },
        },
    })
}

pub fn set(namespace: &str, name: &str, replicas: i32) -> ReplicaSet {
    let mut value = workload(namespace, name);
    value["spec"]["replicas"] = json!(replicas);
    serde_json::from_value(value).unwrap()
}

pub fn deployment(namespace: &str, name: &str, replicas: i32) -> Deployment {
    let mut value = workload(namespace, name);
    value["spec"]["replicas"] = json!(replicas);
    serde_json::from_value(value).unwrap()
}

pub fn daemon_set(namespace: &str, name: &str) -> DaemonSet {
    serde_json::from_value(workload(namespace, name)).unwrap()
}
