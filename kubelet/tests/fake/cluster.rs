//! FakeCluster: what was reported about pods, and the objects they refer to.

use std::collections::HashMap;
use std::sync::Mutex;

use async_trait::async_trait;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, PodStatus, Secret, Service};
use keelway_kubelet::cluster::{Cluster, ClusterError, EventKind, Interest, Reference, Token};
use keelway_kubelet::pod::PodKey;
use tokio::sync::broadcast;

#[derive(Default)]
struct State {
    statuses: HashMap<String, PodStatus>,
    reports: HashMap<String, usize>,
    reported_at: HashMap<String, Timestamp>,
    deleted: Vec<String>,
    config_maps: HashMap<String, ConfigMap>,
    secrets: HashMap<String, Secret>,
    events: Vec<(String, &'static str)>,
}

pub struct FakeCluster {
    state: Mutex<State>,
    changes: broadcast::Sender<Reference>,
}

impl Default for FakeCluster {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            changes: broadcast::channel(64).0,
        }
    }
}

impl FakeCluster {
    pub fn put_secret(&self, secret: Secret) {
        let name = secret.metadata.name.clone().unwrap();
        self.state.lock().unwrap().secrets.insert(name, secret);
    }

    pub fn status(&self, pod: &str) -> Option<PodStatus> {
        self.state.lock().unwrap().statuses.get(pod).cloned()
    }

    pub fn phase(&self, pod: &str) -> Option<String> {
        self.status(pod)?.phase
    }

    pub fn condition(&self, pod: &str, kind: &str) -> Option<String> {
        let conditions = self.status(pod)?.conditions?;
        conditions
            .into_iter()
            .find(|c| c.type_ == kind)
            .map(|c| c.status)
    }

    /// Why a container waits.
    pub fn waiting(&self, pod: &str, container: &str) -> Option<String> {
        let statuses = self.status(pod)?.container_statuses?;
        statuses
            .into_iter()
            .find(|c| c.name == container)?
            .state?
            .waiting?
            .reason
    }

    pub fn reports(&self, pod: &str) -> usize {
        self.state
            .lock()
            .unwrap()
            .reports
            .get(pod)
            .copied()
            .unwrap_or(0)
    }

    /// When the last report came, by the machine's clock.
    pub fn reported_at(&self, pod: &str) -> Option<Timestamp> {
        self.state.lock().unwrap().reported_at.get(pod).copied()
    }

    pub fn is_deleted(&self, pod: &str) -> bool {
        self.state
            .lock()
            .unwrap()
            .deleted
            .iter()
            .any(|name| name == pod)
    }

    /// Reasons of all events of a pod, in order.
    pub fn reasons(&self, pod: &Pod) -> Vec<&'static str> {
        let name = pod.metadata.name.clone().unwrap();
        let state = self.state.lock().unwrap();
        state
            .events
            .iter()
            .filter(|(pod, _)| *pod == name)
            .map(|(_, reason)| *reason)
            .collect()
    }

    pub fn put_config_map(&self, name: &str, key: &str, value: &str) {
        let map = serde_json::from_value(serde_json::json!({"data": {key: value}})).unwrap();
        self.state
            .lock()
            .unwrap()
            .config_maps
            .insert(name.to_owned(), map);
        let reference = Reference::ConfigMap {
            namespace: "default".to_owned(),
            name: name.to_owned(),
        };
        let _ = self.changes.send(reference);
    }
}

#[async_trait]
impl Cluster for FakeCluster {
    async fn config_map(&self, _: &str, name: &str) -> Result<Option<ConfigMap>, ClusterError> {
        Ok(self.state.lock().unwrap().config_maps.get(name).cloned())
    }

    async fn secret(&self, _: &str, name: &str) -> Result<Option<Secret>, ClusterError> {
        let secrets = &self.state.lock().unwrap().secrets;
        Ok(secrets.get(name).cloned())
    }

    async fn token(&self, _: &Pod, _: Option<&str>, _: i64) -> Result<Token, ClusterError> {
        Err(ClusterError::Gone {
            operation: "create",
            object: "token".to_owned(),
        })
    }

    async fn runtime_handler(&self, class: &str) -> Result<Option<String>, ClusterError> {
        Ok((class == "sandboxed").then(|| "vm".to_owned()))
    }

    async fn services(&self) -> Vec<Service> {
        Vec::new()
    }

    async fn report(
        &self,
        key: &PodKey,
        _: &PodStatus,
        new: &PodStatus,
    ) -> Result<(), ClusterError> {
        let mut state = self.state.lock().unwrap();
        state.statuses.insert(key.name.clone(), new.clone());
        state.reported_at.insert(key.name.clone(), Timestamp::now());
        *state.reports.entry(key.name.clone()).or_default() += 1;
        Ok(())
    }

    async fn delete(&self, key: &PodKey) -> Result<(), ClusterError> {
        self.state.lock().unwrap().deleted.push(key.name.clone());
        Ok(())
    }

    fn event(&self, pod: &Pod, _: Option<&str>, _: EventKind, reason: &'static str, _: String) {
        self.state
            .lock()
            .unwrap()
            .events
            .push((pod.metadata.name.clone().unwrap(), reason));
    }

    fn follow(&self, _: Vec<Reference>) -> Interest {
        Box::new(())
    }

    fn changes(&self) -> broadcast::Receiver<Reference> {
        self.changes.subscribe()
    }
}
