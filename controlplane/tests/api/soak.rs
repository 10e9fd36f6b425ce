//! Informers under random disconnects, compactions and kills of the server: in the end each holds what a plain list shows,
//! and on the way none saw a gap, the same twice, or a step back.
//!
//! `KEELWAY_SOAK_S` says for how many seconds objects are written, `KEELWAY_SOAK_SEED` by which numbers.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use http::Request;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent};
use kube::runtime::watcher::{self, Event, watcher};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;
use tokio::sync::watch;

use crate::server::Server;

const INFORMERS: usize = 200;
const WRITERS: usize = 4;
/// Objects that each writer has.
const OBJECTS: usize = 20;
const NAMESPACE: &str = "soak";
/// Pauses between a writer's writes: what matters is the order of things, not their number.
const WRITE_PERIOD: Duration = Duration::from_millis(60);
/// A value so large that few of them push everything else out of the history (16 MiB).
const FILLING_BYTES: usize = 700 << 10;
const FILLINGS: usize = 26;

/// An object as an informer knows it: its revision, and what is in it.
type Known = BTreeMap<String, (u64, String)>;

fn facts(map: &ConfigMap) -> (String, (u64, String)) {
    let metadata = &map.metadata;
    let revision = metadata
        .resource_version
        .as_deref()
        .and_then(|text| text.parse().ok());
    let content = format!("{:?} {:?}", map.data, metadata.labels);
    let name = metadata.name.clone().expect("a name");
    (name, (revision.expect("a revision"), content))
}

/// What an informer follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Lists, then watches from there.
    List,
    /// Asks the watch for the list (KEP-3157).
    Stream,
    /// As `List`, of what a selector picks.
    Selected,
}

/// Counts of what happened, so that a soak in which nothing happened is no success.
#[derive(Default)]
struct Tally {
    events: AtomicU64,
    disconnects: AtomicU64,
    relists: AtomicU64,
    writes: AtomicU64,
}

struct Informer {
    client: kube::Client,
    kind: Kind,
    random: StdRng,
    /// Whether the server is up.
    up: watch::Receiver<bool>,
    known: Arc<Mutex<Known>>,
    tally: Arc<Tally>,
}

/// Why a watch is over.
enum Ended {
    Broken,
    Expired,
}

impl Informer {
    fn query(&self) -> &'static str {
        match self.kind {
            Kind::Selected => "&labelSelector=parity%3Deven",
            _ => "",
        }
    }

    async fn run(mut self) {
        // Where the informer has come to; None when it has to begin anew.
        let mut at: Option<u64> = None;
        let mut newest = 0;
        loop {
            self.up.wait_for(|up| *up).await.expect("the soak goes on");
            if at.is_none() && self.kind != Kind::Stream {
                match self.list(newest).await {
                    Some(revision) => at = Some(revision),
                    None => continue,
                }
            }
            newest = newest.max(at.unwrap_or(0));
            match self.watch(&mut at, &mut newest).await {
                Ended::Broken => {}
                Ended::Expired => {
                    self.tally.relists.fetch_add(1, Ordering::Relaxed);
                    at = None;
                }
            }
        }
    }

    /// The present state in place of what is known; None when the server cannot be asked.
    async fn list(&self, newest: u64) -> Option<u64> {
        let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), NAMESPACE);
        let mut options = ListParams::default();
        if self.kind == Kind::Selected {
            options = options.labels("parity=even");
        }
        let list = maps.list(&options).await.ok()?;
        let revision = list.metadata.resource_version.as_deref()?.parse().ok()?;
        assert!(
            revision >= newest,
            "the list at {revision} is older than {newest}"
        );
        self.replace(list.items.iter().map(facts).collect());
        Some(revision)
    }

    fn replace(&self, state: Known) {
        let mut known = self.known.lock().expect("known");
        for (name, (revision, _)) in &state {
            let before = known.get(name).map_or(0, |(before, _)| *before);
            assert!(
                *revision >= before,
                "{name} steps back from {before} to {revision}"
            );
        }
        *known = state;
    }

    async fn watch(&mut self, at: &mut Option<u64>, newest: &mut u64) -> Ended {
        let mut path = format!(
            "/api/v1/namespaces/{NAMESPACE}/configmaps?watch=true&allowWatchBookmarks=true{}",
            self.query()
        );
        match *at {
            Some(at) => path += &format!("&resourceVersion={at}"),
            None => path += "&sendInitialEvents=true&resourceVersionMatch=NotOlderThan",
        }
        let request = Request::get(path).body(Vec::new()).expect("a request");
        let Ok(stream) = self.client.request_events::<ConfigMap>(request).await else {
            return Ended::Broken;
        };
        let mut stream = std::pin::pin!(stream);
        // The initial events of a streaming list, until their bookmark.
        let mut initial = at.is_none().then(Known::new);
        let mut lives = self.random.random_range(1..60);
        // Some starts are broken off, and some come to their end however much there is.
        if at.is_none() && self.random.random_bool(0.5) {
            lives += OBJECTS * WRITERS;
        }
        for _ in 0..lives {
            let event = match stream.next().await {
                Some(Ok(event)) => event,
                Some(Err(_)) | None => return Ended::Broken,
            };
            self.tally.events.fetch_add(1, Ordering::Relaxed);
            match event {
                WatchEvent::Bookmark(bookmark) => {
                    let revision: u64 = bookmark
                        .metadata
                        .resource_version
                        .parse()
                        .expect("a number");
                    assert!(
                        revision >= *newest,
                        "a bookmark steps back from {newest} to {revision}"
                    );
                    if let Some(state) = initial.take() {
                        self.replace(state);
                    }
                    (*at, *newest) = (Some(revision), revision);
                }
                WatchEvent::Error(status) => {
                    assert_eq!(status.code, 410, "{status:?}");
                    return Ended::Expired;
                }
                WatchEvent::Added(map) if initial.is_some() => {
                    let (name, object) = facts(&map);
                    let state = initial.as_mut().expect("initial events");
                    assert_eq!(state.insert(name, object), None, "told twice");
                }
                event => {
                    assert!(initial.is_none(), "a change among the initial events");
                    *newest = self.apply(event, *newest);
                    *at = Some(*newest);
                }
            }
        }
        self.tally.disconnects.fetch_add(1, Ordering::Relaxed);
        Ended::Broken
    }

    /// Takes a change over; returns its revision.
    fn apply(&self, event: WatchEvent<ConfigMap>, newest: u64) -> u64 {
        let mut known = self.known.lock().expect("known");
        let (map, word) = match &event {
            WatchEvent::Added(map) => (map, "added"),
            WatchEvent::Modified(map) => (map, "modified"),
            WatchEvent::Deleted(map) => (map, "deleted"),
            _ => unreachable!("handled by the caller"),
        };
        let (name, object) = facts(map);
        let revision = object.0;
        assert!(
            revision > newest,
            "{name} {word} at {revision}, which is not after {newest}"
        );
        let before = match word {
            "deleted" => known.remove(&name),
            _ => known.insert(name.clone(), object),
        };
        assert_eq!(
            before.is_none(),
            word == "added",
            "{name} {word}, before that {before:?}"
        );
        revision
    }
}

/// An informer of kube-rs, with its own ways of coming back.
async fn kube_informer(client: kube::Client, config: watcher::Config, known: Arc<Mutex<Known>>) {
    let maps: Api<ConfigMap> = Api::namespaced(client, NAMESPACE);
    let mut stream = std::pin::pin!(watcher(maps, config));
    let mut initial = Known::new();
    loop {
        match stream.try_next().await {
            Ok(Some(Event::Init)) => initial.clear(),
            Ok(Some(Event::InitApply(map))) => initial.extend([facts(&map)]),
            Ok(Some(Event::InitDone)) => {
                *known.lock().expect("known") = std::mem::take(&mut initial);
            }
            Ok(Some(Event::Apply(map))) => known.lock().expect("known").extend([facts(&map)]),
            Ok(Some(Event::Delete(map))) => {
                known.lock().expect("known").remove(&facts(&map).0);
            }
            Ok(None) => return,
            // The server is away; without a pause this would spin.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Creates, changes, relabels and deletes its own objects until the end. Whatever is refused because the server is away is
/// done again, or not: nobody but the list knows what became of it.
async fn write(client: kube::Client, number: usize, seed: u64, ends: Instant, tally: Arc<Tally>) {
    let maps: Api<ConfigMap> = Api::namespaced(client, NAMESPACE);
    let mut random = StdRng::seed_from_u64(seed);
    let mut pace = tokio::time::interval(WRITE_PERIOD);
    while Instant::now() < ends {
        pace.tick().await;
        let name = format!("w{number}-{}", random.random_range(0..OBJECTS));
        let parity = if random.random_bool(0.5) {
            "even"
        } else {
            "odd"
        };
        let value = random.random_range(0..1_000_000).to_string();
        let outcome = if random.random_bool(0.2) {
            maps.delete(&name, &DeleteParams::default()).await.map(drop)
        } else {
            let change =
                json!({"metadata": {"labels": {"parity": parity}}, "data": {"value": value}});
            let patched = maps
                .patch(&name, &PatchParams::default(), &Patch::Merge(&change))
                .await;
            match patched {
                Err(kube::Error::Api(status)) if status.code == 404 => {
                    let mut object = change;
                    object["metadata"]["name"] = name.into();
                    let object = serde_json::from_value(object).expect("a map");
                    maps.create(&PostParams::default(), &object).await.map(drop)
                }
                outcome => outcome.map(drop),
            }
        };
        if outcome.is_ok() {
            tally.writes.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Writes so much elsewhere in the same bucket that its history begins anew: who is behind gets 410.
async fn compact(client: &kube::Client, random: &mut StdRng) {
    let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
    for _ in 0..FILLINGS {
        let letter = char::from(random.random_range(b'a'..=b'z'));
        let data = json!({"data": {"filling": letter.to_string().repeat(FILLING_BYTES), "n": random.random_range(0..u32::MAX).to_string()}});
        let filled = maps
            .patch("filler", &PatchParams::default(), &Patch::Merge(&data))
            .await;
        filled.expect("filled");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn informers_hold_what_a_list_shows_whatever_happens() {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse::<u64>().ok())
    };
    let seconds = number("KEELWAY_SOAK_S").unwrap_or(12);
    let seed = number("KEELWAY_SOAK_SEED").unwrap_or_else(rand::random);
    println!("KEELWAY_SOAK_S={seconds} KEELWAY_SOAK_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let server = Server::start();
    server.kubectl(&format!("create namespace {NAMESPACE}"));
    server.kubectl("create configmap filler");
    let client = server.client().await;
    let (goes, up) = watch::channel(true);
    let tally = Arc::new(Tally::default());
    let mut informers = tokio::task::JoinSet::new();
    let mut held = Vec::new();
    for index in 0..INFORMERS {
        let known = Arc::new(Mutex::new(Known::new()));
        let kind = [Kind::List, Kind::Stream, Kind::Selected][index % 3];
        held.push((kind == Kind::Selected && index % 8 != 7, known.clone()));
        match index % 8 {
            7 => {
                let config = watcher::Config::default();
                let config = if index % 16 == 7 {
                    config.streaming_lists()
                } else {
                    config
                };
                informers.spawn(kube_informer(client.clone(), config, known));
            }
            _ => {
                let informer = Informer {
                    client: client.clone(),
                    kind,
                    random: StdRng::seed_from_u64(random.random()),
                    up: up.clone(),
                    known,
                    tally: tally.clone(),
                };
                informers.spawn(informer.run());
            }
        }
    }
    let ends = Instant::now() + Duration::from_secs(seconds);
    let mut writers = tokio::task::JoinSet::new();
    for number in 0..WRITERS {
        writers.spawn(write(
            client.clone(),
            number,
            random.random(),
            ends,
            tally.clone(),
        ));
    }
    let mut kills = 0;
    // At least once each, in whatever time there is.
    while Instant::now() < ends || kills == 0 {
        tokio::time::sleep(Duration::from_millis(random.random_range(500..2500))).await;
        goes.send_replace(false);
        server.kill();
        server.launch();
        goes.send_replace(true);
        kills += 1;
        compact(&client, &mut random).await;
    }
    while writers
        .join_next()
        .await
        .transpose()
        .expect("a writer")
        .is_some()
    {}
    let maps: Api<ConfigMap> = Api::namespaced(client, NAMESPACE);
    let shown: Known = maps
        .list(&ListParams::default())
        .await
        .expect("a list")
        .items
        .iter()
        .map(facts)
        .collect();
    let even: Known = shown
        .clone()
        .into_iter()
        .filter(|(_, (_, content))| content.contains("even"))
        .collect();
    assert!(!even.is_empty() && even.len() < shown.len(), "{shown:?}");
    let deadline = Instant::now() + Duration::from_secs(60);
    for (index, (selected, known)) in held.iter().enumerate() {
        let expected = if *selected { &even } else { &shown };
        while *known.lock().expect("an informer that saw what must not be") != *expected {
            let known = known.lock().expect("known").clone();
            assert!(
                Instant::now() < deadline,
                "informer {index} holds {known:#?}, not {expected:#?}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    assert!(
        informers.try_join_next().is_none(),
        "an informer gave up: its words are above"
    );
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    // Those who were behind when the server was killed find that out when they come back.
    while count(&tally.relists) == 0 {
        assert!(Instant::now() < deadline, "nobody was ever too far behind");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (events, writes) = (count(&tally.events), count(&tally.writes));
    let (disconnects, relists) = (count(&tally.disconnects), count(&tally.relists));
    println!(
        "{INFORMERS} informers, {writes} writes, {events} events, {disconnects} disconnects, {relists} lists again, {kills} kills"
    );
    assert!(writes > 0 && events > 0 && disconnects > 0 && relists > 0);
}
