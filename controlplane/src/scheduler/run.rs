//! The scheduler's loop: news in, decisions, bindings out. Deciding waits for nothing; bindings are on their way side by side.

use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::cache::{Cache, key_of};
use super::decide::{Decision, decide, matters_to_pods};
use super::preempt::{Preemption, preempt};
use super::queue::Queue;
use crate::controllers::events::Recorder;
use crate::controllers::execute::Outcome;
use crate::controllers::intake::Intake;
use crate::controllers::lease::work_while_leading;
use crate::controllers::object::{Kind, Object, Target};
use crate::controllers::plan::{Action, Note, Write};
use crate::controllers::pods;
use crate::controllers::runner::{Errand, say};
use crate::controllers::snapshot::Change;
use crate::controllers::watch::{Api, ClientError, Feed, follow};

/// Upstream's name, so that an upstream scheduler waits while this one leads.
const LEASE: &str = "kube-scheduler";
const NAME: &str = "default-scheduler";
const BINDINGS_MAX: usize = 64;
const NEWS_MAX: usize = 4096;
/// What decisions look at.
const KINDS: [Kind; 4] = [
    Kind::Pod,
    Kind::Node,
    Kind::Namespace,
    Kind::PodDisruptionBudget,
];
/// Pods decided before news is looked at again.
const BATCH_MAX: usize = 512;

/// What the scheduler is started with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Credentials and address of the API server.
    pub kubeconfig: PathBuf,
    /// Name of this control plane in leader elections (see `controllers::Config`).
    pub identity: String,
}

/// Runs the scheduler whenever this control plane leads, until `stop` fires or it cannot run at all.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), ClientError> {
    let api = Api::from_kubeconfig(&config.kubeconfig, "kube-scheduler").await?;
    let work = || Scheduler::new(api.clone()).run();
    work_while_leading(&api, LEASE, &config.identity, &stop, work).await;
    Ok(())
}

/// A binding or a status that was written.
struct Done {
    pod: Target,
    bound: bool,
    outcome: Outcome,
}

struct Scheduler {
    errand: Errand,
    intake: Intake,
    cache: Cache,
    queue: Queue,
    tasks: JoinSet<()>,
    feed: mpsc::Sender<Feed>,
    news: mpsc::Receiver<Feed>,
    done: mpsc::UnboundedSender<Done>,
    finished: mpsc::UnboundedReceiver<Done>,
}

impl Scheduler {
    fn new(api: Api) -> Self {
        let (feed, news) = mpsc::channel(NEWS_MAX);
        let (done, finished) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        let (recorder, write_events) = Recorder::new(api.clone());
        tasks.spawn(write_events);
        let errand = Errand {
            api,
            permits: Arc::new(Semaphore::new(BINDINGS_MAX)),
            resources: Arc::default(),
            recorder,
        };
        Self {
            errand,
            intake: Intake::of(KINDS),
            cache: Cache::default(),
            queue: Queue::default(),
            tasks,
            feed,
            news,
            done,
            finished,
        }
    }

    async fn run(mut self) {
        for kind in KINDS {
            self.tasks.spawn(follow(
                self.errand.api.clone(),
                kind.resource().clone(),
                self.feed.clone(),
            ));
        }
        let mut more = false;
        loop {
            let due = self.queue.next_tick();
            let wake = async {
                match due {
                    _ if more => {}
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(feed) = self.news.recv() => self.take_in(feed),
                Some(done) = self.finished.recv() => self.finish(done),
                () = wake => {}
            }
            for _ in 0..NEWS_MAX {
                if let Ok(done) = self.finished.try_recv() {
                    self.finish(done);
                } else if let Ok(feed) = self.news.try_recv() {
                    self.take_in(feed);
                } else {
                    break;
                }
            }
            self.queue.tick(Instant::now());
            more = self.intake.is_synced() && self.decide_batch();
        }
    }

    fn take_in(&mut self, feed: Feed) {
        let was_synced = self.intake.is_synced();
        for change in self.intake.take_in(feed) {
            self.touch(change);
        }
        if !was_synced && self.intake.is_synced() {
            tracing::info!(nodes = self.cache.nodes.len(), "scheduler is in sync");
        }
    }

    fn touch(&mut self, change: Change) {
        match (change.old, change.new) {
            (old, Some(Object::Node(new))) => {
                let matters = match &old {
                    Some(Object::Node(old)) => matters_to_pods(old, &new),
                    _ => true,
                };
                self.cache.put_node(new);
                if matters {
                    self.queue.wake(Instant::now());
                }
            }
            (_, Some(Object::Namespace(namespace))) => {
                let name = namespace.metadata.name.clone().unwrap_or_default();
                let labels = namespace.metadata.labels.clone().unwrap_or_default();
                self.cache.namespaces.insert(name, labels);
            }
            (Some(Object::Namespace(namespace)), None) => {
                self.cache
                    .namespaces
                    .remove(namespace.metadata.name.as_deref().unwrap_or_default());
            }
            (Some(Object::Node(old)), None) => {
                self.cache
                    .remove_node(old.metadata.name.as_deref().unwrap_or_default());
            }
            (old, Some(Object::Pod(new))) => {
                // A pod of the same name was there before: it goes with its place.
                if let Some(Object::Pod(old)) = &old
                    && old.metadata.uid != new.metadata.uid
                {
                    self.leave(old);
                }
                let old = old.and_then(|old| match old {
                    Object::Pod(old) => Some(old),
                    _ => None,
                });
                self.put_pod(old.as_deref(), &new);
            }
            (Some(Object::Pod(old)), None) => self.leave(&old),
            _ => {}
        }
    }

    fn leave(&mut self, pod: &Pod) {
        self.queue.remove(&key_of(pod));
        self.cache
            .remove_pod(pod.metadata.uid.as_deref().unwrap_or_default());
        if pods::node_name(pod).is_some() {
            self.queue.wake(Instant::now());
        }
    }

    fn put_pod(&mut self, old: Option<&Pod>, pod: &Arc<Pod>) {
        let key = key_of(pod);
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let was_placed = self.cache.is_placed(uid);
        self.cache.put_pod(pod);
        let nominated = pod
            .status
            .as_ref()
            .and_then(|status| status.nominated_node_name.as_deref())
            .filter(|node| !node.is_empty());
        if let Some(node) = nominated.filter(|_| !self.cache.is_placed(uid) && is_ours(pod)) {
            self.cache.nominate(pod, node);
        }
        // Room was made, or a pod turned up that another one wants to be with.
        let came =
            pods::node_name(pod).is_some() && old.is_none_or(|old| pods::node_name(old).is_none());
        if came || (pods::is_terminal(pod) && was_placed) {
            self.queue.wake(Instant::now());
        }
        if !is_ours(pod) {
            self.queue.remove(&key);
            return;
        }
        // Its binding is on its way, and may fail: the queue must know the pod then.
        if self.cache.is_placed(uid) {
            return;
        }
        // Our own status patches come back too; only a change of what decides is worth another try.
        let changed = old
            .is_none_or(|old| old.spec != pod.spec || old.metadata.labels != pod.metadata.labels);
        if changed || !self.queue.contains(&key) {
            self.queue.add(&key, pods::spec(pod).priority.unwrap_or(0));
        }
    }

    /// Decides for a batch of pods; true when more are waiting for their turn.
    fn decide_batch(&mut self) -> bool {
        for _ in 0..BATCH_MAX {
            let Some(key) = self.queue.next() else {
                return false;
            };
            let Some(pod) = self.intake.snapshot.pods.get(&key).cloned() else {
                self.queue.remove(&key);
                continue;
            };
            match decide(&self.cache, &pod) {
                Decision::Node(node) => {
                    self.cache.assume(&pod, &node);
                    let target = Target::of(&*pod);
                    let message = format!("Successfully assigned {key} to {node}");
                    let write = Write {
                        action: Action::Bind {
                            pod: target.clone(),
                            node,
                        },
                        note: Some(Note::normal(&target, NAME, "Scheduled", message)),
                    };
                    self.perform(target, write, true);
                }
                Decision::Nowhere(message) => {
                    self.queue.unschedulable(&key, Instant::now());
                    self.make_room(&pod, message);
                }
            }
        }
        true
    }

    /// Has pods of lower priority make way, where that helps; says in any case why the pod waits.
    fn make_room(&mut self, pod: &Arc<Pod>, message: String) {
        let budgets: Vec<_> = self
            .intake
            .snapshot
            .disruption_budgets
            .values()
            .cloned()
            .collect();
        match preempt(&self.cache, pod, &budgets) {
            Ok(preemption) => {
                let Preemption { node, victims, .. } = preemption;
                self.cache.nominate(pod, &node);
                let by = pod.metadata.uid.clone().unwrap_or_default();
                for victim in victims {
                    self.evict(&victim, &format!("Preempted by pod {by} on node {node}"));
                }
                self.report(pod, &message, Some(&node));
            }
            Err(why) => self.report(pod, &format!("{message} preemption: {why}"), None),
        }
    }

    /// Tells a pod that it is disrupted, for whoever counts its failure, and deletes it.
    fn evict(&mut self, victim: &Arc<Pod>, message: &str) {
        let why = format!("{NAME}: preempting to accommodate a higher priority pod");
        let conditions =
            pods::with_disruption(victim, "PreemptionByScheduler", &why, Timestamp::now());
        let tell = Write {
            action: pods::guarded_status_patch(&**victim, json!({"conditions": conditions})),
            note: None,
        };
        let target = Target::of(&**victim);
        let delete = Write {
            action: Action::Delete {
                target: target.clone(),
                propagation: None,
                grace_seconds: None,
            },
            note: Some(Note::normal(&target, NAME, "Preempted", message)),
        };
        let (errand, done) = (self.errand.clone(), self.done.clone());
        self.tasks.spawn(async move {
            for write in [tell, delete] {
                let outcome = errand.clone().perform(write).await;
                // Nobody waits for it any more when the lease is lost.
                let _ = done.send(Done {
                    pod: target.clone(),
                    bound: false,
                    outcome,
                });
            }
        });
    }

    fn perform(&mut self, pod: Target, write: Write, bound: bool) {
        let (errand, done) = (self.errand.clone(), self.done.clone());
        self.tasks.spawn(async move {
            let outcome = errand.perform(write).await;
            // Nobody waits for it any more when the lease is lost.
            let _ = done.send(Done {
                pod,
                bound,
                outcome,
            });
        });
    }

    fn finish(&mut self, done: Done) {
        while self.tasks.try_join_next().is_some() {}
        for change in self.intake.answered(done.outcome.seen, done.outcome.gone) {
            self.touch(change);
        }
        let Some(failure) = done.outcome.failure.filter(|_| done.bound) else {
            return;
        };
        if !failure.stale {
            tracing::warn!(pod = %done.pod.key, "binding failed: {}", failure.message);
        }
        self.cache.forget(&done.pod.uid);
        // The pod may be gone, or bound by someone else: then the queue no longer knows it.
        self.queue.failed(&done.pod.key, Instant::now());
    }

    /// Says on the pod and by an event why it waits, unless that has been said.
    fn report(&mut self, pod: &Arc<Pod>, message: &str, nominated: Option<&str>) {
        let target = Target::of(&**pod);
        say(
            &self.errand.recorder,
            Note::warning(&target, NAME, "FailedScheduling", message),
            None,
            None,
        );
        let known = pods::condition(pod, "PodScheduled");
        let said = known.is_some_and(|known| {
            known.status == "False" && known.message.as_deref() == Some(message)
        });
        let status = pod.status.as_ref();
        let before = status.and_then(|status| status.nominated_node_name.as_deref());
        if said && (nominated.is_none() || nominated == before) {
            return;
        }
        let since = known
            .filter(|known| known.status == "False")
            .and_then(|known| known.last_transition_time.clone());
        let mut conditions = pod
            .status
            .as_ref()
            .and_then(|status| status.conditions.clone())
            .unwrap_or_default();
        conditions.retain(|condition| condition.type_ != "PodScheduled");
        conditions.push(PodCondition {
            type_: "PodScheduled".into(),
            status: "False".into(),
            reason: Some("Unschedulable".into()),
            message: Some(message.into()),
            last_transition_time: since.or(Some(Time(Timestamp::now()))),
            ..Default::default()
        });
        let mut status = json!({"conditions": conditions});
        if let Some(node) = nominated {
            status["nominatedNodeName"] = json!(node);
        }
        let action = pods::guarded_status_patch(&**pod, status);
        self.perform(target, Write { action, note: None }, false);
    }
}

/// Whether this scheduler is to find a node for the pod.
fn is_ours(pod: &Pod) -> bool {
    let spec = pods::spec(pod);
    pods::node_name(pod).is_none()
        && pods::is_active(pod)
        && spec.scheduling_gates.as_ref().is_none_or(Vec::is_empty)
        && matches!(spec.scheduler_name.as_deref(), None | Some("" | NAME))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::execute::Failure;
    use crate::controllers::object::Key;

    /// A scheduler whose API server never answers.
    async fn alone() -> Scheduler {
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": "https://127.0.0.1:1", "insecure-skip-tls-verify": true}}],
            "users": [{"name": "test", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kubeconfig");
        std::fs::write(&path, kubeconfig.to_string()).unwrap();
        Scheduler::new(Api::from_kubeconfig(&path, "test").await.unwrap())
    }

    fn pod(revision: &str, note: &str) -> Arc<Pod> {
        let pod = json!({
            "metadata": {"namespace": "default", "name": "web", "uid": "pod-1", "resourceVersion": revision, "annotations": {"note": note}},
            "spec": {"containers": [{"name": "main", "image": "image"}]},
        });
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    #[tokio::test]
    async fn a_pod_that_changes_while_its_binding_fails_is_tried_again() {
        let mut scheduler = alone().await;
        let node = json!({
            "metadata": {"name": "node", "uid": "node-1", "resourceVersion": "1"},
            "status": {"allocatable": {"cpu": "4", "memory": "4Gi", "pods": "10"}},
        });
        scheduler.take_in(Feed::Changed(Object::Node(Arc::new(
            serde_json::from_value(node).unwrap(),
        ))));
        scheduler.take_in(Feed::Changed(Object::Pod(pod("2", "first"))));
        assert!(!scheduler.decide_batch());
        assert!(scheduler.cache.is_placed("pod-1"), "it is being bound");

        scheduler.take_in(Feed::Changed(Object::Pod(pod("3", "second"))));
        scheduler.finish(Done {
            pod: Target::of(&*pod("2", "first")),
            bound: true,
            outcome: Outcome {
                failure: Some(Failure {
                    message: "no answer".into(),
                    stale: false,
                }),
                ..Outcome::default()
            },
        });
        assert!(!scheduler.cache.is_placed("pod-1"));
        let due = scheduler
            .queue
            .next_tick()
            .expect("it waits for its next try");
        scheduler.queue.tick(due);
        assert_eq!(scheduler.queue.next(), Some(Key::new("default", "web")));
    }
}
