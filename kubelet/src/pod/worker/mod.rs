//! worker: the loop that keeps one pod as it should be: look, plan, start operations, report, wait for news.

mod notes;
mod probes;
mod storage;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Mutex, mpsc};
use tokio::time::Instant;

use super::admission::{Refusal, refusal};
use super::memory::{Memory, OpKey};
use super::operations::{Context, Done, Failed, Job, references, shows_metadata};
use super::plan::{Op, Situation, StopReason, current_sandbox, plan};
use super::report::Reporter;
use super::status::{Report, status};
use super::{PodKey, ended};
use crate::cluster::{EventKind, Interest, Reference};
use crate::logs;
use crate::probe::{Finding, ProbeKind};
use crate::runtime::{ContainerPhase, ExitSource, PodView};
use crate::task::Scoped;
use crate::volume::payload::TokenKey;

/// How often a worker looks even if nothing is announced: a safety net, as announcements may be lost.
const LOOK_PERIOD: Duration = Duration::from_secs(10);
/// The same while containers run under a runtime that announces nothing.
const LOOK_PERIOD_UNANNOUNCED: Duration = Duration::from_secs(1);
/// How soon a look is repeated after the runtime could not be reached.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// containerd announces an exit before its own state shows it. Looks are repeated so soon, doubling, and so often.
const SETTLE_FIRST: Duration = Duration::from_millis(4);
const SETTLE_LOOKS_MAX: u32 = 10;

/// A Signal is news for a worker.
#[derive(Debug)]
pub enum Signal {
    /// The pod's object has changed.
    Pod(Arc<Pod>),
    /// The pod's object is gone.
    Removed,
    /// Something changed in the runtime.
    Look,
    /// A container or sandbox of this id, perhaps one of ours, changed in the runtime.
    Changed(Arc<str>),
    OpDone {
        key: OpKey,
        result: Result<Done, Failed>,
    },
    Probed(Finding),
    HookBegins {
        container_id: String,
    },
    HookEnds {
        container_id: String,
    },
}

/// A Handle reaches a worker from outside.
#[derive(Debug, Clone)]
pub struct Handle {
    pub signals: mpsc::UnboundedSender<Signal>,
}

/// A Worker owns one pod.
pub struct Worker {
    context: Arc<Context>,
    key: PodKey,
    pod: Arc<Pod>,
    removed: bool,
    view: PodView,
    memory: Memory,
    first_seen: Timestamp,
    signals: mpsc::UnboundedSender<Signal>,
    inbox: mpsc::UnboundedReceiver<Signal>,
    probes: HashMap<(String, ProbeKind), Scoped>,
    tokens: Arc<Mutex<BTreeMap<TokenKey, crate::cluster::Token>>>,
    reporter: Reporter,
    /// Keeps the pod's ConfigMaps and Secrets under watch.
    _interest: Option<Interest>,
    looked: Option<Instant>,
    /// When what the pod has written was last counted.
    counted: Option<Instant>,
    stale: bool,
    /// By container id: what a resize that is under way leads to.
    resizing: HashMap<String, String>,
    /// Containers whose exit was announced, and how often that has been looked for in vain.
    announced: HashMap<Arc<str>, u32>,
}

impl Worker {
    /// A worker for a pod, and the handle to it. `removed`: the pod is known from the runtime only.
    pub fn new(context: Arc<Context>, pod: Arc<Pod>, removed: bool) -> (Self, Handle) {
        let (signals, inbox) = mpsc::unbounded_channel();
        let key = PodKey::of(&pod);
        let reporter = Reporter::start(
            context.cluster.clone(),
            key.clone(),
            pod.status.clone().unwrap_or_default(),
        );
        let worker = Self {
            first_seen: context.clock.now(),
            _interest: (!removed).then(|| context.cluster.follow(references(&pod))),
            context,
            key,
            pod,
            removed,
            view: PodView::default(),
            memory: Memory::default(),
            signals: signals.clone(),
            inbox,
            probes: HashMap::new(),
            tokens: Arc::default(),
            reporter,
            looked: None,
            counted: None,
            stale: true,
            resizing: HashMap::new(),
            announced: HashMap::new(),
        };
        (worker, Handle { signals })
    }

    /// With the reason why the pod is not let in, if there is one that only who knows the others can tell.
    pub fn refusing(mut self, refusal: Option<Refusal>) -> Self {
        self.memory.refused = refusal;
        self
    }

    /// Runs until the pod is gone from the runtime and from the API.
    pub async fn run(mut self) -> PodKey {
        let mut network = self.context.network_ready.clone();
        let mut changes = self.context.cluster.changes();
        let mut first = true;
        loop {
            if self.stale {
                match self.context.runtime.observe(&self.key.uid).await {
                    Ok(view) => {
                        self.stale = false;
                        self.looked = Some(Instant::now());
                        self.take_note(view);
                        self.rotate_logs().await;
                        self.hold_to_storage_limits().await;
                        if std::mem::take(&mut first) {
                            self.adopt();
                            self.tell_refusal();
                        }
                    }
                    Err(error) => tracing::warn!(pod = %self.key, %error, "cannot look at the pod"),
                }
            }
            let mut wake = Instant::now() + LOOK_AGAIN;
            // Without one good look nothing is known, and nothing may be started.
            if !first {
                let now = self.context.clock.now();
                let network_ready = *network.borrow_and_update();
                let situation = Situation {
                    pod: &self.pod,
                    view: &self.view,
                    memory: &self.memory,
                    now,
                    network_ready,
                    removed: self.removed,
                };
                if self.memory.ending_since.is_none()
                    && super::plan::is_ending(&self.pod, self.removed)
                {
                    self.memory.ending_since = Some(self.ending_since(now));
                    continue;
                }
                let plan = plan(&situation);
                for op in plan.ops {
                    self.launch(op);
                }
                self.keep_probes();
                self.report();
                if plan.finished && self.finish().await {
                    return self.key;
                }
                if !self.stale {
                    wake = self.next_look();
                }
                if let Some(looks) = self.announced.values().min() {
                    wake = wake.min(Instant::now() + SETTLE_FIRST * (1 << looks));
                }
                if let Some(at) = plan.wake_at {
                    let wait = at.duration_since(now).unsigned_abs();
                    wake = wake.min(Instant::now() + wait + Duration::from_millis(1));
                }
            }
            tokio::select! {
                signal = self.inbox.recv() => {
                    let Some(signal) = signal else { return self.key };
                    self.take(signal);
                    while let Ok(signal) = self.inbox.try_recv() {
                        self.take(signal);
                    }
                }
                _ = network.changed() => {}
                change = changes.recv() => match change {
                    Ok(reference) => self.object_changed(&reference),
                    Err(RecvError::Lagged(_)) => self.memory.volumes_stale = self.memory.volumes_ready,
                    Err(RecvError::Closed) => tokio::time::sleep_until(wake).await,
                },
                () = tokio::time::sleep_until(wake) => {
                    self.stale |= !self.announced.is_empty() || self.next_look() <= Instant::now();
                }
            }
        }
    }

    /// Puts on record why the pod is not run, unless a kubelet has done so before.
    fn tell_refusal(&self) {
        let known = self.memory.refused.clone();
        let refusal = known.or_else(|| refusal(&self.pod));
        if let Some(refusal) = refusal.filter(|_| !ended(&self.pod)) {
            let (kind, cluster) = (EventKind::Warning, &self.context.cluster);
            cluster.event(&self.pod, None, kind, refusal.reason, refusal.message);
        }
    }

    /// Moves logs aside that have grown too large.
    async fn rotate_logs(&self) {
        for run in self
            .view
            .containers
            .iter()
            .filter(|c| c.phase == ContainerPhase::Running)
        {
            let path = std::path::Path::new(&run.log_path);
            // A container may have no log yet, or write none.
            let moved = logs::rotate(path, self.context.clock.now());
            if moved.is_ok_and(|moved| moved)
                && let Err(error) = self.context.runtime.reopen_log(&run.id).await
            {
                tracing::warn!(pod = %self.key, container = run.name, %error, "cannot rotate a log");
            }
        }
    }

    fn next_look(&self) -> Instant {
        let running = self
            .view
            .containers
            .iter()
            .any(|c| c.phase == ContainerPhase::Running);
        let unannounced = *self.context.exit_source.borrow() == ExitSource::Relist;
        let period = if running && unannounced {
            LOOK_PERIOD_UNANNOUNCED
        } else {
            LOOK_PERIOD
        };
        self.looked.map_or_else(Instant::now, |at| at + period)
    }

    /// When the end of the pod began. A deletion that was under way before this kubelet started is not begun anew.
    fn ending_since(&self, now: Timestamp) -> Timestamp {
        let meta = &self.pod.metadata;
        let asked = match (&meta.deletion_timestamp, meta.deletion_grace_period_seconds) {
            (Some(at), Some(grace_s)) => at.0 - jiff::SignedDuration::from_secs(grace_s),
            _ => now,
        };
        // Times in the API are cut to seconds, and clocks differ a little.
        if now.duration_since(asked) < jiff::SignedDuration::from_secs(3) {
            now
        } else {
            asked
        }
    }

    fn take(&mut self, signal: Signal) {
        match signal {
            Signal::Pod(pod) => {
                let shown = |pod: &Pod| {
                    (
                        pod.metadata.labels.clone(),
                        pod.metadata.annotations.clone(),
                    )
                };
                if shown(&pod) != shown(&self.pod) && shows_metadata(&pod) {
                    self.memory.volumes_stale = self.memory.volumes_ready;
                }
                if pod.metadata.deletion_timestamp.is_some()
                    && self.pod.metadata.deletion_timestamp.is_none()
                {
                    // Nothing that failed before may hold up the end.
                    self.memory.failures.clear();
                }
                self.pod = pod;
            }
            Signal::Removed => {
                self.removed = true;
                self.memory.failures.clear();
            }
            Signal::Look => self.stale = true,
            Signal::Changed(id) => {
                let ours = self.view.containers.iter().any(|c| c.id == *id)
                    || self.view.sandboxes.iter().any(|s| s.id == *id);
                // A container that is being started is not in the view yet and may have ended already.
                if ours || !self.memory.in_flight.is_empty() {
                    self.stale = true;
                    self.announced.insert(id, 0);
                }
            }
            Signal::OpDone { key, result } => self.op_done(key, result),
            Signal::Probed(finding) => self.probed(finding),
            Signal::HookBegins { container_id } => {
                self.memory.post_start.insert(container_id);
            }
            Signal::HookEnds { container_id } => {
                self.memory.post_start.remove(&container_id);
            }
        }
    }

    fn object_changed(&mut self, reference: &Reference) {
        if references(&self.pod).contains(reference) {
            self.memory.volumes_stale = self.memory.volumes_ready;
            self.memory.failures.remove(&OpKey::Volumes);
        }
    }

    fn launch(&mut self, op: Op) {
        let key = op.key();
        tracing::debug!(pod = %self.key, ?op, "operation starts");
        if let Op::StopContainer {
            id,
            deadline,
            reason,
            ..
        } = &op
        {
            self.memory.stop_deadlines.insert(id.clone(), *deadline);
            if matches!(
                reason,
                StopReason::LivenessFailed | StopReason::StartupFailed
            ) {
                self.memory.killed.insert(id.clone(), "probe");
            }
        }
        if let Op::KillContainer { id, deadline, .. } = &op {
            self.memory.stop_deadlines.insert(id.clone(), *deadline);
        }
        if let Op::ResizeContainer { id, limits, .. } = &op {
            self.resizing.insert(id.clone(), limits.clone());
        }
        if op == Op::PrepareVolumes {
            self.memory.volumes_stale = false;
        }
        self.memory.in_flight.insert(key.clone());
        let job = Job {
            context: self.context.clone(),
            pod: self.pod.clone(),
            pod_ips: current_sandbox(&self.view)
                .map(|s| s.ips.clone())
                .unwrap_or_default(),
            tokens: self.tokens.clone(),
            signals: self.signals.clone(),
        };
        let signals = self.signals.clone();
        tokio::spawn(async move {
            // A panic in an operation must not leave it "in flight" for ever.
            let result = tokio::spawn(async move { job.execute(op).await }).await;
            let result = result.unwrap_or_else(|panic| {
                Err(Failed {
                    reason: "InternalError",
                    message: panic.to_string(),
                    wait_s: (10, 300),
                })
            });
            let _ = signals.send(Signal::OpDone { key, result });
        });
    }

    fn op_done(&mut self, key: OpKey, result: Result<Done, Failed>) {
        self.memory.in_flight.remove(&key);
        self.stale = true;
        match result {
            Ok(done) => {
                self.memory.failures.remove(&key);
                match key {
                    OpKey::Volumes => {
                        self.memory.volumes_ready = true;
                        self.memory.volumes_fresh = done.fresh;
                    }
                    OpKey::Clean => self.memory.cleaned = true,
                    OpKey::Resize(id) => {
                        let limits = self.resizing.remove(&id);
                        self.memory.limits.extend(limits.map(|limits| (id, limits)));
                    }
                    _ => {}
                }
            }
            Err(Failed {
                reason,
                message,
                wait_s: (first_s, max_s),
            }) => {
                tracing::warn!(pod = %self.key, operation = ?key, reason, message, "operation failed");
                let again = self.memory.failures.contains_key(&key);
                let reason = if reason == "ErrImagePull" && again {
                    "ImagePullBackOff"
                } else {
                    reason
                };
                self.memory.fail(
                    key,
                    reason,
                    message,
                    self.context.clock.now(),
                    first_s,
                    max_s,
                );
            }
        }
    }

    fn report(&self) {
        if self.removed {
            return;
        }
        let report = Report {
            pod: &self.pod,
            view: &self.view,
            memory: &self.memory,
            node: &self.context.node,
            runtime_name: &self.context.runtime_name,
            first_seen: self.first_seen,
            now: self.context.clock.now(),
            removed: self.removed,
        };
        self.reporter
            .want(status(&report), self.pod.status.as_ref());
    }

    /// Takes leave of the API: the last status first, then the object. False if the API could not be reached.
    async fn finish(&mut self) -> bool {
        if self.removed {
            return true;
        }
        self.reporter.flush().await;
        match self.context.cluster.delete(&self.key).await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(pod = %self.key, %error, "cannot remove the pod's object; trying again");
                tokio::time::sleep(LOOK_AGAIN).await;
                false
            }
        }
    }
}
