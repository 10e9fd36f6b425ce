//! Writers and readers that write down what they ask and what they are told, and a watch that tells of every write.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::{StreamExt, pin_mut};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, ListParams, PostParams, Preconditions, WatchEvent, WatchParams};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;

use super::history::{Ask, Event, Id, Key, NEVER, Operation, Revision, Said};

pub const NAMESPACE: &str = "linear";
/// Few keys for many writers: most of what is asked meets what another one does.
const KEYS: u64 = 48;
/// An answer that takes longer counts as none.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// So many answers take seconds at most, also from a server that is built for debugging.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a client waits after it was not answered, while servers are up.
const REST: Duration = Duration::from_millis(20);

pub type Maps = Api<ConfigMap>;

pub fn maps(client: &Client) -> Maps {
    Api::namespaced(client.clone(), NAMESPACE)
}

/// What all clients share.
pub struct History {
    began: Instant,
    next_id: AtomicU64,
    operations: Mutex<Vec<Operation>>,
    /// Writes that were done, and answered so.
    written: watch::Sender<u64>,
}

impl History {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            began: Instant::now(),
            next_id: AtomicU64::new(1),
            operations: Mutex::default(),
            written: watch::Sender::new(0),
        })
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).expect("a test of less than 500 years")
    }

    /// Waits until so many more writes were answered.
    pub async fn progress(&self, more: u64) {
        let mut written = self.written.subscribe();
        let target = *written.borrow_and_update() + more;
        let reached = written.wait_for(|written| *written >= target);
        let reached = tokio::time::timeout(PROGRESS_TIMEOUT, reached).await;
        reached.expect("servers answer").expect("it has a sender");
    }

    pub fn take(&self) -> Vec<Operation> {
        std::mem::take(&mut self.operations.lock().expect("no client has panicked"))
    }
}

/// What clients do: they go on while the number stays, and begin again when it has changed; None ends them.
pub type Serving = watch::Receiver<Option<u64>>;

/// A client of one server, with dice of its own.
pub struct Worker {
    pub maps: Maps,
    pub history: Arc<History>,
    pub serving: Serving,
    /// Counted down when the worker waits for a server.
    pub parked: watch::Sender<usize>,
    /// It waits for the next number after an answer that did not come; else it goes on at once.
    pub parks: bool,
    pub dice: u64,
    known: BTreeMap<Key, Option<Revision>>,
}

impl Worker {
    pub fn new(
        maps: Maps,
        history: Arc<History>,
        serving: Serving,
        parked: watch::Sender<usize>,
        (parks, seed): (bool, u64),
    ) -> Self {
        Self {
            maps,
            history,
            serving,
            parked,
            parks,
            dice: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            known: BTreeMap::new(),
        }
    }

    fn roll(&mut self, sides: u64) -> u64 {
        // xorshift64*, Vigna 2016: a seed gives the same asks again.
        self.dice ^= self.dice >> 12;
        self.dice ^= self.dice << 25;
        self.dice ^= self.dice >> 27;
        (self.dice.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % sides
    }

    pub async fn run(mut self) {
        loop {
            let Some(epoch) = *self.serving.borrow_and_update() else {
                return;
            };
            loop {
                if *self.serving.borrow() != Some(epoch) {
                    break;
                }
                if !self.ask_something().await {
                    if self.parks {
                        break;
                    }
                    tokio::time::sleep(REST).await;
                }
            }
            if !self.parks {
                continue;
            }
            self.parked.send_modify(|parked| *parked += 1);
            let changed = self
                .serving
                .wait_for(|now| *now != Some(epoch))
                .await
                .is_ok();
            self.parked.send_modify(|parked| *parked -= 1);
            if !changed {
                return;
            }
        }
    }

    /// Writes a key that nobody else writes any more, and gives the revision.
    pub async fn write_last(self) -> Revision {
        let id = self.history.next_id.fetch_add(1, Ordering::Relaxed);
        let (key, asked_ns) = (Key::MAX, self.history.now_ns());
        let ask = Ask::Create(id);
        let said = self.tell(key, &ask).await;
        let Said::Written(revision) = said else {
            panic!("the last write is answered by {said:?}");
        };
        let operation = Operation {
            key,
            ask,
            said,
            asked_ns,
            answered_ns: self.history.now_ns(),
        };
        let mut all = self.history.operations.lock();
        all.as_mut()
            .expect("no client has panicked")
            .push(operation);
        revision
    }

    /// One operation; false when it was not answered.
    async fn ask_something(&mut self) -> bool {
        let key = Key::try_from(self.roll(KEYS)).expect("few keys");
        let id = self.history.next_id.fetch_add(1, Ordering::Relaxed);
        let ask = match (self.roll(100), self.known.get(&key)) {
            (0..=2, _) => Ask::List,
            (3..=29, _) | (_, None) => Ask::Read,
            (_, Some(None)) => Ask::Create(id),
            (30..=44, Some(Some(revision))) => Ask::Delete(*revision),
            (_, Some(Some(revision))) => Ask::Update(*revision, id),
        };
        let asked_ns = self.history.now_ns();
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, self.tell(key, &ask)).await;
        let said = answer.unwrap_or(Said::Unknown);
        let answered_ns = match said {
            Said::Unknown => NEVER,
            _ => self.history.now_ns(),
        };
        match said {
            Said::Found(revision, _) | Said::Written(revision) => {
                self.known.insert(key, Some(revision));
            }
            Said::Absent | Said::Deleted => {
                self.known.insert(key, None);
            }
            Said::Exists | Said::Conflict | Said::Unknown => {
                self.known.remove(&key);
            }
            Said::Listed(..) => {}
        }
        let answered = said != Said::Unknown;
        if matches!(said, Said::Written(_) | Said::Deleted) {
            self.history.written.send_modify(|written| *written += 1);
        }
        let operation = Operation {
            key,
            ask,
            said,
            asked_ns,
            answered_ns,
        };
        let mut all = self.history.operations.lock();
        all.as_mut()
            .expect("no client has panicked")
            .push(operation);
        answered
    }

    async fn tell(&self, key: Key, ask: &Ask) -> Said {
        let name = name(key);
        match ask {
            Ask::Read => match self.maps.get(&name).await {
                Ok(map) => Said::Found(revision(&map), id(&map)),
                Err(error) => refusal(&error),
            },
            Ask::List => match self.maps.list(&ListParams::default()).await {
                Ok(list) => {
                    let at = list
                        .metadata
                        .resource_version
                        .as_deref()
                        .unwrap_or_default();
                    let items = list.items.iter();
                    let items = items.map(|map| (key_of(map), revision(map)));
                    Said::Listed(at.parse().expect("a revision"), items.collect())
                }
                Err(error) => refusal(&error),
            },
            Ask::Create(id) => {
                let new = map(key, *id, None);
                match self.maps.create(&PostParams::default(), &new).await {
                    Ok(map) => Said::Written(revision(&map)),
                    Err(error) => refusal(&error),
                }
            }
            Ask::Update(at, id) => {
                let new = map(key, *id, Some(*at));
                match self.maps.replace(&name, &PostParams::default(), &new).await {
                    Ok(map) => Said::Written(revision(&map)),
                    Err(error) => refusal(&error),
                }
            }
            Ask::Delete(at) => {
                let params = DeleteParams {
                    preconditions: Some(Preconditions {
                        resource_version: Some(at.to_string()),
                        uid: None,
                    }),
                    ..DeleteParams::default()
                };
                match self.maps.delete(&name, &params).await {
                    Ok(_) => Said::Deleted,
                    Err(error) => refusal(&error),
                }
            }
        }
    }
}

fn refusal(error: &kube::Error) -> Said {
    match error {
        kube::Error::Api(status) => match (status.code, status.reason.as_str()) {
            (404, _) => Said::Absent,
            (409, "AlreadyExists") => Said::Exists,
            (409, _) => Said::Conflict,
            (500..=599 | 429, _) => Said::Unknown,
            other => panic!("an answer that nobody expects: {other:?} {status:?}"),
        },
        _ => Said::Unknown,
    }
}

fn name(key: Key) -> String {
    format!("k-{key}")
}

pub fn key_of(map: &ConfigMap) -> Key {
    let name = map.metadata.name.as_deref().unwrap_or_default();
    let number = name
        .strip_prefix("k-")
        .and_then(|number| number.parse().ok());
    number.expect("a name of ours")
}

pub fn revision(map: &ConfigMap) -> Revision {
    let text = map.metadata.resource_version.as_deref().unwrap_or_default();
    text.parse().expect("a revision")
}

pub fn id(map: &ConfigMap) -> Id {
    let text = map.data.as_ref().and_then(|data| data.get("id"));
    text.and_then(|text| text.parse().ok())
        .expect("an id of ours")
}

fn map(key: Key, id: Id, at: Option<Revision>) -> ConfigMap {
    let value = json!({
        "metadata": {"name": name(key), "resourceVersion": at.map(|at| at.to_string())},
        "data": {"id": id.to_string(), "filling": "x".repeat(usize::try_from(id % 900).unwrap_or(0))},
    });
    serde_json::from_value(value).expect("a ConfigMap")
}

/// Watches from a revision on. With `resumes`, a watch that breaks is taken up where it was; else its end is the end.
/// `upto` ends it when a revision has been seen.
pub async fn follow(
    maps: Maps,
    from: Revision,
    resumes: bool,
    mut upto: watch::Receiver<Option<Revision>>,
) -> Vec<Event> {
    let mut seen: Vec<Event> = Vec::new();
    let mut last = from;
    loop {
        let params = WatchParams::default().timeout(280);
        if let Ok(events) = maps.watch(&params, &last.to_string()).await {
            pin_mut!(events);
            loop {
                let wanted = *upto.borrow_and_update();
                if wanted.is_some_and(|wanted| last >= wanted) {
                    return seen;
                }
                let event = tokio::select! {
                    event = events.next() => event,
                    changed = upto.changed() => {
                        if changed.is_err() {
                            return seen;
                        }
                        continue;
                    }
                };
                let (map, gone) = match event {
                    Some(Ok(WatchEvent::Added(map) | WatchEvent::Modified(map))) => (map, false),
                    Some(Ok(WatchEvent::Deleted(map))) => (map, true),
                    Some(Ok(WatchEvent::Bookmark(_))) => continue,
                    Some(Ok(WatchEvent::Error(status))) => {
                        assert!(
                            status.code != 410,
                            "a watch has lost its place after {last}: {status:?}"
                        );
                        break;
                    }
                    Some(Err(_)) | None => break,
                };
                last = revision(&map);
                seen.push(Event {
                    revision: last,
                    key: key_of(&map),
                    id: (!gone).then(|| id(&map)),
                });
            }
        }
        let wanted = *upto.borrow();
        if !resumes || wanted.is_some_and(|wanted| last >= wanted) {
            return seen;
        }
        tokio::time::sleep(REST).await;
    }
}
