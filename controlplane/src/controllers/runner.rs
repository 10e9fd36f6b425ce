//! The runner: takes in what the API server tells, has the touched keys planned, and has the writes done.
//!
//! One task owns the snapshot and all planning. A key with writes on their way is not planned again until all of them are
//! answered and the answers are in the snapshot. So a plan always sees what the plans before it did, and no burst of changes
//! can make it do the same thing twice.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::certificates::Authority;
use super::clock::{self, Clock};
use super::events::{Happening, Recorder};
use super::execute::{Outcome, execute};
use super::intake::Intake;
use super::lease::work_while_leading;
use super::nodeipam::Pool;
use super::object::{Key, Kind, Object, ResourceType};
use super::plan::{Action, Keys, Note, Plan, View, Write};
use super::snapshot::Change;
use super::watch::{Api, Feed, follow};
use super::{ALL, Config, Error, Settings};
use crate::pki::Stamp;

/// Upstream's name, so that an upstream controller manager waits while this one leads.
const LEASE: &str = "kube-controller-manager";
/// Writes on their way at a time, of all controllers and of one key.
const WRITES_MAX: usize = 64;
const WRITES_PER_KEY_MAX: usize = 32;
/// News taken in between two rounds of planning: bounds how long a key waits behind a flood.
const NEWS_MAX: usize = 4096;
const RETRY_MIN: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_secs(30);
const DISCOVERY_EVERY: Duration = Duration::from_secs(30);

/// Runs the controllers whenever this control plane leads, until `stop` fires or they cannot run at all.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), Error> {
    let pools = config.cluster_cidrs.iter().copied().map(Pool::new);
    let pools = pools.collect::<Result<Vec<_>, _>>()?;
    let files = [config.ca_file.clone(), config.ca_key_file.clone()];
    let stamp = Stamp::of(&files);
    let first = read_settings(&files, pools.clone())?;
    let (settings, followed) = watch::channel(Arc::new(first));
    let api = Api::from_kubeconfig(&config.kubeconfig, "kube-controller-manager").await?;
    let work = || Runner::new(api.clone(), followed.clone()).run();
    tokio::select! {
        () = work_while_leading(&api, LEASE, &config.identity, &stop, work) => {}
        () = follow_settings(&files, stamp, pools, settings) => {}
    }
    Ok(())
}

/// What plans depend on beside the snapshot, as the files of the authority say.
fn read_settings([ca_file, key_file]: &[PathBuf; 2], pools: Vec<Pool>) -> Result<Settings, Error> {
    let root_ca = std::fs::read_to_string(ca_file).map_err(|source| Error::RootCa {
        path: ca_file.clone(),
        source,
    })?;
    let authority = match std::fs::read_to_string(key_file) {
        Ok(key) => Some(Arc::new(Authority::new(&root_ca, &key)?)),
        // Not every control plane is trusted with it.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(source) => {
            return Err(Error::CaKey {
                path: key_file.clone(),
                source,
            });
        }
    };
    Ok(Settings {
        authority,
        pools,
        root_ca,
    })
}

/// Reads the files again for ever, whenever they have changed. While one does not fit the other, what was there before stays.
async fn follow_settings(
    files: &[PathBuf; 2],
    mut known: Stamp,
    pools: Vec<Pool>,
    settings: watch::Sender<Arc<Settings>>,
) {
    loop {
        let stamp = known.changed(files).await;
        match read_settings(files, pools.clone()) {
            Ok(new) => {
                tracing::info!("the authorities have changed");
                known = stamp;
                settings.send_replace(Arc::new(new));
            }
            Err(error) => tracing::warn!(%error, "the authorities of before stay in use"),
        }
    }
}

/// A key of one controller, by the controller's place in `ALL`.
type Job = (usize, Key);

struct Done {
    job: Job,
    outcomes: Vec<Outcome>,
}

struct Failed {
    times: u32,
    message: Option<String>,
}

struct Runner {
    api: Api,
    settings: watch::Receiver<Arc<Settings>>,
    intake: Intake,
    recorder: Recorder,
    tasks: JoinSet<()>,
    feed: mpsc::Sender<Feed>,
    news: mpsc::Receiver<Feed>,
    done: mpsc::UnboundedSender<Done>,
    finished: mpsc::UnboundedReceiver<Done>,
    permits: Arc<Semaphore>,
    followed: HashSet<Arc<ResourceType>>,
    queue: VecDeque<Job>,
    queued: HashSet<Job>,
    /// Keys with writes on their way, and whether they were touched since.
    running: HashMap<Job, bool>,
    failed: HashMap<Job, Failed>,
    timers: BTreeSet<(Instant, usize, Key)>,
    timer_of: HashMap<Job, Instant>,
}

impl Runner {
    fn new(api: Api, settings: watch::Receiver<Arc<Settings>>) -> Self {
        let (feed, news) = mpsc::channel(NEWS_MAX);
        let (done, finished) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        let (recorder, write_events) = Recorder::new(api.clone());
        tasks.spawn(write_events);
        tasks.spawn(discover(api.clone(), feed.clone()));
        Self {
            api,
            settings,
            intake: Intake::of(Kind::ALL.iter().copied()),
            recorder,
            tasks,
            feed,
            news,
            done,
            finished,
            permits: Arc::new(Semaphore::new(WRITES_MAX)),
            followed: HashSet::new(),
            queue: VecDeque::new(),
            queued: HashSet::new(),
            running: HashMap::new(),
            failed: HashMap::new(),
            timers: BTreeSet::new(),
            timer_of: HashMap::new(),
        }
    }

    async fn run(mut self) {
        for kind in Kind::ALL {
            self.follow(kind.resource().clone());
        }
        let mut clock = Clock::new(Timestamp::now(), std::time::Instant::now());
        let mut looks = tokio::time::interval(clock::LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let timer = self.timers.first().map(|(at, _, _)| *at);
            let wake = async {
                match timer {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                Some(feed) = self.news.recv() => self.take_in(feed),
                Some(done) = self.finished.recv() => self.finish(done),
                Ok(()) = self.settings.changed() => self.touch_those_of_settings(),
                _ = looks.tick() => {
                    let by = clock.look(Timestamp::now(), std::time::Instant::now());
                    if let Some(by) = by {
                        self.clock_was_set(by);
                    }
                }
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
            self.ring_timers();
            if self.intake.is_synced() {
                self.plan_queued();
            }
        }
    }

    fn follow(&mut self, resource: Arc<ResourceType>) {
        // Events have owners in name only, and there are many of them.
        if resource.plural != "events" && self.followed.insert(resource.clone()) {
            self.tasks
                .spawn(follow(self.api.clone(), resource, self.feed.clone()));
        }
    }

    fn take_in(&mut self, feed: Feed) {
        if let Feed::Resources(resources) = &feed {
            for resource in resources {
                self.follow(resource.clone());
            }
        }
        let was_synced = self.intake.is_synced();
        for change in self.intake.take_in(feed) {
            self.touch(&change);
        }
        if !was_synced && self.intake.is_synced() {
            tracing::info!(
                pods = self.intake.snapshot.pods.len(),
                nodes = self.intake.snapshot.nodes.len(),
                "controllers are in sync"
            );
        }
    }

    fn touch(&mut self, change: &Change) {
        let mut keys = Keys::new();
        for (index, controller) in ALL.iter().enumerate() {
            (controller.affected)(&self.intake.snapshot, change, &mut keys);
            for key in std::mem::take(&mut keys) {
                self.enqueue((index, key));
            }
        }
    }

    /// Has those planned again that hold the authorities: namespaces have a ConfigMap with them, tokens of accounts a copy.
    fn touch_those_of_settings(&mut self) {
        let snapshot = &self.intake.snapshot;
        let namespaces = snapshot.namespaces.values().cloned();
        let secrets = snapshot.secrets.values().cloned();
        let holders: Vec<Object> = namespaces
            .map(Object::Namespace)
            .chain(secrets.map(Object::Secret))
            .collect();
        for object in holders {
            let new = Some(object);
            self.touch(&Change { old: None, new });
        }
    }

    fn enqueue(&mut self, job: Job) {
        if let Some(again) = self.running.get_mut(&job) {
            *again = true;
        } else if self.failed.contains_key(&job) && self.timer_of.contains_key(&job) {
            // It waits out its back-off; the plan then sees this change too.
        } else if self.queued.insert(job.clone()) {
            self.queue.push_back(job);
        }
    }

    fn plan_queued(&mut self) {
        let settings = self.settings.borrow().clone();
        while let Some(job) = self.queue.pop_front() {
            self.queued.remove(&job);
            self.clear_timer(&job);
            let now = Timestamp::now();
            let view = View {
                snapshot: &self.intake.snapshot,
                settings: &settings,
                now,
                instant: std::time::Instant::now(),
                last_failure: self
                    .failed
                    .get(&job)
                    .and_then(|failed| failed.message.as_deref()),
            };
            let Plan {
                writes,
                then,
                again_at,
            } = (ALL[job.0].plan)(&view, &job.1);
            if let Some(at) = again_at {
                let wait = Duration::try_from(at.duration_since(now)).unwrap_or(Duration::ZERO);
                self.set_timer(job.clone(), wait);
            }
            let mut requests = Vec::new();
            for write in writes {
                match write {
                    Write {
                        action: Action::None,
                        note: Some(note),
                    } => say(&self.recorder, note, None, None),
                    Write {
                        action: Action::None,
                        note: None,
                    } => {}
                    write => requests.push(write),
                }
            }
            let stages = std::iter::once(requests).chain(then);
            let stages: Vec<_> = stages.filter(|stage| !stage.is_empty()).collect();
            if stages.is_empty() {
                self.failed.remove(&job);
            } else {
                self.start(job, stages);
            }
        }
    }

    fn start(&mut self, job: Job, stages: Vec<Vec<Write>>) {
        self.running.insert(job.clone(), false);
        let done = self.done.clone();
        let errand = Errand {
            api: self.api.clone(),
            permits: self.permits.clone(),
            resources: self.intake.snapshot.resources.clone(),
            recorder: self.recorder.clone(),
        };
        self.tasks.spawn(async move {
            let mut outcomes: Vec<Outcome> = Vec::new();
            for stage in stages {
                if outcomes.iter().any(|outcome| outcome.failure.is_some()) {
                    break;
                }
                let writes = stage.into_iter();
                let writes = writes.map(|write| errand.clone().perform(write));
                let mut done = futures::stream::iter(writes).buffer_unordered(WRITES_PER_KEY_MAX);
                while let Some(outcome) = done.next().await {
                    outcomes.push(outcome);
                }
            }
            // Nobody waits for it any more when the lease is lost.
            let _ = done.send(Done { job, outcomes });
        });
    }

    fn finish(&mut self, done: Done) {
        while self.tasks.try_join_next().is_some() {}
        let job = done.job;
        let (mut failed, mut stale, mut message) = (false, false, None);
        for outcome in done.outcomes {
            for change in self.intake.answered(outcome.seen, outcome.gone) {
                self.touch(&change);
            }
            if let Some(failure) = outcome.failure {
                failed = true;
                stale |= failure.stale;
                message = message.or((!failure.stale).then_some(failure.message));
            }
        }
        self.running.remove(&job);
        if !failed {
            // Planned again in any case: the next step may be due.
            self.failed.remove(&job);
            self.clear_timer(&job);
            self.enqueue(job);
            return;
        }
        let controller = ALL[job.0].name;
        let entry = self.failed.entry(job.clone()).or_insert(Failed {
            times: 0,
            message: None,
        });
        entry.times += 1;
        if let Some(message) = &message
            && entry.times.is_power_of_two()
        {
            tracing::warn!(controller, key = %job.1, times = entry.times, "{message}");
        }
        entry.message = message;
        let wait = RETRY_MIN
            .saturating_mul(1 << entry.times.min(12))
            .min(RETRY_MAX);
        tracing::debug!(controller, key = %job.1, stale, ?wait, "planned again after a failure");
        self.set_timer(job, wait);
    }

    fn set_timer(&mut self, job: Job, wait: Duration) {
        self.clear_timer(&job);
        let at = Instant::now() + wait;
        self.timers.insert((at, job.0, job.1.clone()));
        self.timer_of.insert(job, at);
    }

    /// What waits for a time of day is planned again: that may have come, or be further off than it was.
    fn clock_was_set(&mut self, by: SignedDuration) {
        tracing::warn!(by_ms = by.as_millis(), "the clock was set");
        let waiting = self.timer_of.keys();
        let waiting: Vec<Job> = waiting
            .filter(|job| !self.failed.contains_key(*job))
            .cloned()
            .collect();
        for job in waiting {
            self.enqueue(job);
        }
    }

    fn clear_timer(&mut self, job: &Job) {
        if let Some(at) = self.timer_of.remove(job) {
            self.timers.remove(&(at, job.0, job.1.clone()));
        }
    }

    fn ring_timers(&mut self) {
        let now = Instant::now();
        while self.timers.first().is_some_and(|(at, _, _)| *at <= now) {
            let Some((_, index, key)) = self.timers.pop_first() else {
                return;
            };
            let job = (index, key);
            self.timer_of.remove(&job);
            if let Some(again) = self.running.get_mut(&job) {
                *again = true;
            } else if self.queued.insert(job.clone()) {
                self.queue.push_back(job);
            }
        }
    }
}

/// All that doing a write takes.
#[derive(Clone)]
pub struct Errand {
    pub api: Api,
    pub permits: Arc<Semaphore>,
    pub resources: Arc<Vec<Arc<ResourceType>>>,
    pub recorder: Recorder,
}

impl Errand {
    pub async fn perform(self, write: Write) -> Outcome {
        let _permit = self.permits.acquire().await;
        let outcome = execute(&self.api, &self.resources, write.action).await;
        if let Some(note) = write.note {
            let failure = outcome
                .failure
                .as_ref()
                .map(|failure| (failure.stale, failure.message.as_str()));
            say(&self.recorder, note, outcome.name.as_deref(), failure);
        }
        outcome
    }
}

/// Records the event of a write that came out one way or the other.
pub fn say(recorder: &Recorder, note: Note, name: Option<&str>, failure: Option<(bool, &str)>) {
    let (type_, reason, message) = match (failure, note.failure) {
        (None, _) => (
            note.type_,
            note.reason,
            note.message.replace("{name}", name.unwrap_or_default()),
        ),
        (Some((false, error)), Some((reason, beginning))) => {
            ("Warning", reason, format!("{beginning}{error}"))
        }
        (Some(_), _) => return,
    };
    recorder.record(Happening {
        about: note.about,
        reporter: note.reporter,
        type_,
        reason,
        message,
    });
}

/// Tells which resources there are, now and whenever that may have changed.
async fn discover(api: Api, feed: mpsc::Sender<Feed>) {
    loop {
        let wait = match api.discover().await {
            Ok(resources) => {
                if feed.send(Feed::Resources(resources)).await.is_err() {
                    return;
                }
                DISCOVERY_EVERY
            }
            Err(error) => {
                tracing::debug!(%error, "discovery failed");
                Duration::from_secs(1)
            }
        };
        tokio::time::sleep(wait).await;
    }
}
