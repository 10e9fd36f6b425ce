//! pods: which pods belong on this node, and a worker for each.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Client;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;

use crate::backoff::Quick;
use crate::pod::admission::{Refusal, conflict};
use crate::pod::operations::Context;
use crate::pod::worker::{Handle, Signal, Worker};
use crate::pod::{PodKey, ended};
use crate::runtime::{ExitSource, KnownPod, Runtime};
use crate::volume::{PodFolder, place};

/// A Registry is the pods of this node as the API has them, for those who serve requests about them.
#[derive(Debug, Clone, Default)]
pub struct Registry(Arc<Mutex<HashMap<String, Arc<Pod>>>>);

impl Registry {
    pub fn find(&self, namespace: &str, name: &str) -> Option<Arc<Pod>> {
        let pods = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let matching = pods.values().filter(|p| {
            p.metadata.namespace.as_deref() == Some(namespace)
                && p.metadata.name.as_deref() == Some(name)
        });
        // A pod that is ending may still be there when its successor of the same name starts.
        matching
            .max_by_key(|p| p.metadata.creation_timestamp.clone())
            .cloned()
    }

    pub fn all(&self) -> Vec<Arc<Pod>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    fn put(&self, pod: &Arc<Pod>) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(uid, pod.clone());
    }

    fn remove(&self, uid: &str) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(uid);
    }
}

/// A Dispatcher starts workers and passes news on to them.
pub struct Dispatcher {
    context: Arc<Context>,
    registry: Registry,
    workers: HashMap<String, Handle>,
    /// Pods that were not let in: they hold nothing.
    refused: HashSet<String>,
    tasks: JoinSet<PodKey>,
}

impl Dispatcher {
    pub fn new(context: Arc<Context>, registry: Registry) -> Self {
        Self {
            context,
            registry,
            workers: HashMap::new(),
            refused: HashSet::new(),
            tasks: JoinSet::new(),
        }
    }

    /// Runs for ever: follows the pods of this node, and what the runtime says about them.
    pub async fn run(mut self, client: Client, mut changes: broadcast::Receiver<Arc<str>>) {
        let selector = format!("spec.nodeName={}", self.context.config.node_name);
        let events = watcher(
            Api::<Pod>::all(client),
            watcher::Config::default().fields(&selector),
        )
        .backoff(Quick::default());
        let mut events = std::pin::pin!(events);
        let mut listing: HashMap<String, Arc<Pod>> = HashMap::new();
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(Event::Init)) => listing.clear(),
                    Some(Ok(Event::InitApply(pod))) => {
                        let pod = Arc::new(pod);
                        listing.insert(pod.metadata.uid.clone().unwrap_or_default(), pod);
                    }
                    Some(Ok(Event::InitDone)) => self.replace(std::mem::take(&mut listing)).await,
                    Some(Ok(Event::Apply(pod))) => self.apply(Arc::new(pod)),
                    Some(Ok(Event::Delete(pod))) => self.removed(&pod.metadata.uid.unwrap_or_default()),
                    Some(Err(error)) => tracing::warn!(%error, "the watch on pods broke; it is started again"),
                    None => return,
                },
                change = changes.recv() => match change {
                    Ok(id) => self.tell_all(|| Signal::Changed(id.clone())),
                    Err(broadcast::error::RecvError::Lagged(_)) => self.tell_all(|| Signal::Look),
                    Err(broadcast::error::RecvError::Closed) => return,
                },
                Some(ended) = self.tasks.join_next() => match ended {
                    Ok(key) => {
                        tracing::info!(pod = %key, "gone");
                        self.workers.remove(&key.uid);
                        self.refused.remove(&key.uid);
                    }
                    // The worker's handle fails from now on; the next event of the pod starts another.
                    Err(error) => tracing::error!(%error, "a worker broke"),
                },
            }
        }
    }

    /// Takes over a full list. What the runtime or the disk has beyond it are remains of deleted pods.
    async fn replace(&mut self, listing: HashMap<String, Arc<Pod>>) {
        let gone: Vec<String> = self
            .workers
            .keys()
            .filter(|uid| !listing.contains_key(*uid))
            .cloned()
            .collect();
        for uid in gone {
            self.removed(&uid);
        }
        // Those that were let in before a restart of the kubelet come first.
        let mut pods: Vec<Arc<Pod>> = listing.into_values().collect();
        pods.sort_by_key(|pod| (!was_let_in(pod), pod.metadata.creation_timestamp.clone()));
        for pod in pods {
            self.apply(pod);
        }
        match self.context.runtime.known_pods().await {
            Ok(known) => known.into_iter().for_each(|pod| self.adopt_orphan(pod)),
            Err(error) => tracing::warn!(%error, "cannot look for remains of deleted pods"),
        }
        self.clean_folders();
    }

    fn apply(&mut self, pod: Arc<Pod>) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        self.registry.put(&pod);
        let delivered = self
            .workers
            .get(&uid)
            .is_some_and(|worker| worker.signals.send(Signal::Pod(pod.clone())).is_ok());
        if !delivered {
            self.start(pod, false);
        }
    }

    fn removed(&mut self, uid: &str) {
        self.registry.remove(uid);
        if let Some(worker) = self.workers.get(uid) {
            // It fails if the worker has just ended by itself, which is what is wanted.
            let _ = worker.signals.send(Signal::Removed);
        }
    }

    fn start(&mut self, pod: Arc<Pod>, removed: bool) {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let refusal = self.refusal(&uid, &pod).filter(|_| !removed);
        if refusal.is_some() {
            self.refused.insert(uid.clone());
        }
        let (worker, handle) = Worker::new(self.context.clone(), pod, removed);
        self.workers.insert(uid, handle);
        self.tasks.spawn(worker.refusing(refusal).run());
    }

    /// Why a new pod cannot be beside those that are here and have not ended.
    fn refusal(&self, uid: &str, pod: &Pod) -> Option<Refusal> {
        if was_let_in(pod) || ended(pod) {
            return None;
        }
        let here = self.registry.all();
        let others = here.iter().map(Arc::as_ref).filter(|other| {
            let other_uid = other.metadata.uid.as_deref().unwrap_or_default();
            let is_here = self.workers.contains_key(other_uid) && !self.refused.contains(other_uid);
            other_uid != uid && is_here && !ended(other)
        });
        conflict(pod, others)
    }

    fn tell_all(&self, signal: impl Fn() -> Signal) {
        for worker in self.workers.values() {
            let _ = worker.signals.send(signal());
        }
    }

    fn adopt_orphan(&mut self, known: KnownPod) {
        if self.workers.contains_key(&known.uid) {
            return;
        }
        tracing::info!(
            pod = format!("{}/{}", known.namespace, known.name),
            "ending what is left of a deleted pod"
        );
        let metadata = ObjectMeta {
            name: Some(known.name),
            namespace: Some(known.namespace),
            uid: Some(known.uid),
            ..Default::default()
        };
        self.start(
            Arc::new(Pod {
                metadata,
                spec: Some(PodSpec::default()),
                status: None,
            }),
            true,
        );
    }

    fn clean_folders(&self) {
        let root = &self.context.config.root_dir;
        for entry in std::fs::read_dir(root.join("pods"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let uid = entry.file_name().to_string_lossy().into_owned();
            if self.workers.contains_key(&uid) {
                continue;
            }
            if let Err(error) = place::remove(&PodFolder::new(root, &uid)) {
                tracing::warn!(uid, %error, "cannot remove the folder of a deleted pod");
            }
            self.context.cgroups.remove_uid(&uid);
        }
    }
}

/// Whether a kubelet has begun with the pod before.
fn was_let_in(pod: &Pod) -> bool {
    let status = pod.status.as_ref();
    status.is_some_and(|status| status.start_time.is_some())
}

/// Keeps listening to the runtime for containers that change.
pub async fn watch_changes(
    runtime: Arc<dyn Runtime>,
    changes: broadcast::Sender<Arc<str>>,
    source: watch::Sender<ExitSource>,
) {
    let mut retry = Quick::default();
    loop {
        match runtime.changes().await {
            Ok((kind, mut ids)) => {
                tracing::info!(source = ?kind, "container exits are learnt");
                retry.clear();
                let _ = source.send(kind);
                // What happened before this subscription was announced to nobody.
                let _ = changes.send(Arc::from(""));
                while let Some(id) = ids.next().await {
                    let _ = changes.send(Arc::from(id));
                }
                let _ = source.send(ExitSource::Relist);
            }
            Err(error) => {
                tracing::debug!(%error, "cannot follow the runtime's events; trying again")
            }
        }
        tokio::time::sleep(retry.wait()).await;
    }
}
