//! What API servers are asked: lists, watches, and reads and writes by many at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::future::try_join_all;
use hdrhistogram::Histogram;
use http::Method;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::beside::{Beside, read_beside};
use super::endpoint::{Caller, Endpoint, Events};

pub const NAMESPACE: &str = "bench-api";
const PODS: &str = "/api/v1/namespaces/bench-api/pods";
const MAPS: &str = "/api/v1/namespaces/bench-api/configmaps";
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";
const JSON: &str = "application/json";
/// Requests that fill a server at a time.
const FILLERS: usize = 16;
/// A hundredth of the pods has one label.
const GROUPS: usize = 100;
/// How long watches may take to open, events to come, and objects to go.
const PATIENCE: Duration = Duration::from_secs(120);

/// A pod with a name that follows from its number, and about so many bytes of JSON.
fn pod(number: usize, bytes: usize) -> Value {
    let filling = "x".repeat(bytes.saturating_sub(700));
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("p-{number}"), "labels": {"group": (number % GROUPS).to_string()}, "annotations": {"filling": filling}},
        "spec": {"containers": [{"name": "main", "image": "nothing"}], "schedulerName": "nobody", "automountServiceAccountToken": false}})
}

/// Makes the namespace with so many pods.
pub async fn fill(endpoint: &Endpoint, pods: usize, bytes: usize) -> Result<()> {
    let caller = endpoint.caller()?;
    let namespace =
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
    let made = caller.post("/api/v1/namespaces", &namespace).await?;
    ensure!(
        made.status.is_success(),
        "{}: the namespace {NAMESPACE} cannot be made ({}); one that is left is to be deleted first",
        endpoint.name,
        made.status
    );
    // An API server may hold pods back until this is there.
    let account =
        json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
    let path = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts");
    caller.post(&path, &account).await?;
    let next = Arc::new(AtomicU64::new(0));
    let fillers = (0..FILLERS).map(|_| {
        let next = next.clone();
        async move {
            let caller = endpoint.caller()?;
            loop {
                let number = usize::try_from(next.fetch_add(1, Ordering::Relaxed))?;
                if number >= pods {
                    return Ok::<_, anyhow::Error>(());
                }
                caller.post(PODS, &pod(number, bytes)).await?.ok()?;
            }
        }
    });
    try_join_all(fillers).await.map(drop)
}

/// Removes what `fill` made; pods at once, since no kubelet ends them.
pub async fn clear(endpoint: &Endpoint) -> Result<()> {
    let caller = endpoint.caller()?;
    for path in [format!("{PODS}?gracePeriodSeconds=0"), MAPS.to_owned()] {
        let began = Instant::now();
        loop {
            let answer = caller.delete(&path).await?;
            // A server gives up on very many at once, with some of them gone.
            if answer.status.is_success() || began.elapsed() > PATIENCE {
                answer.ok()?;
                break;
            }
        }
    }
    caller
        .delete(&format!("/api/v1/namespaces/{NAMESPACE}"))
        .await?
        .ok()?;
    // Where no controller empties it, it is finalized here.
    let finalize = format!("/api/v1/namespaces/{NAMESPACE}/finalize");
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}, "spec": {"finalizers": []}});
    caller
        .send(Method::PUT, &finalize, JSON, Some(&namespace))
        .await?;
    Ok(())
}

/// Asks for one pod.
pub async fn one(caller: &Caller) -> Result<()> {
    caller.get(&format!("{PODS}/p-0")).await.map(drop)
}

/// A way to list all pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    Whole,
    Protobuf,
    Pages,
    Selector,
}

impl List {
    pub const ALL: [List; 4] = [List::Whole, List::Protobuf, List::Pages, List::Selector];

    pub fn name(self) -> &'static str {
        match self {
            List::Whole => "whole, JSON",
            List::Protobuf => "whole, protobuf",
            List::Pages => "by pages of 500, JSON",
            List::Selector => "by a label of 1 %, JSON",
        }
    }

    /// Lists once; gives how long the answers took to come, without what is looked at in them.
    pub async fn once(self, caller: &Caller, pods: usize) -> Result<Duration> {
        match self {
            List::Whole => {
                let answer = caller.get(PODS).await?;
                check(&answer.body, pods)?;
                Ok(answer.took)
            }
            List::Protobuf => {
                let answer = caller.send(Method::GET, PODS, PROTOBUF, None).await?.ok()?;
                ensure!(
                    answer.body.starts_with(b"k8s\0"),
                    "an answer in another encoding"
                );
                Ok(answer.took)
            }
            List::Selector => {
                let answer = caller
                    .get(&format!("{PODS}?labelSelector=group%3D7"))
                    .await?;
                check(&answer.body, pods / GROUPS)?;
                Ok(answer.took)
            }
            List::Pages => {
                let (mut took, mut more) = (Duration::ZERO, String::new());
                loop {
                    let page = caller
                        .get(&format!("{PODS}?limit=500&continue={more}"))
                        .await?;
                    took += page.took;
                    more = continued(&page.body);
                    if more.is_empty() {
                        return Ok(took);
                    }
                }
            }
        }
    }
}

/// Whether a list is as long as it should be, without parsing all of it.
fn check(body: &[u8], pods: usize) -> Result<()> {
    let needle = b"\"filling\":";
    let found = body.windows(needle.len()).filter(|window| window == needle);
    // What is said of managed fields names it too, with "f:" before it.
    let found = found.count();
    ensure!(
        found == pods,
        "a list of {found} pods, where {pods} are there"
    );
    Ok(())
}

/// The token of the next page, from the list's metadata, which comes first or last.
fn continued(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let token = text.split_once("\"continue\":\"");
    let token = token.and_then(|(_, rest)| rest.split_once('"'));
    token.map_or(String::new(), |(token, _)| token.to_owned())
}

/// What watchers of one change cost.
pub struct FanOut {
    pub events: u64,
    pub took: Duration,
    pub cpu: Option<Duration>,
}

/// Watches ConfigMaps by so many at a time, writes one `changes` times, and waits until all have seen all of it.
pub async fn fan_out(endpoint: &Endpoint, watchers: usize, changes: u64) -> Result<FanOut> {
    let writer = endpoint.caller()?;
    let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "watched"}, "data": {"filling": "x".repeat(900)}});
    writer.post(MAPS, &map).await?;
    let listed = writer.get(MAPS).await?.json()?;
    let from = listed["metadata"]["resourceVersion"].as_str();
    let from = from.context("a list has a revision")?.to_owned();
    let (count, mut seen) = watch::channel(0_u64);
    let count = Arc::new(count);
    let path = format!("{MAPS}?watch=1&resourceVersion={from}&timeoutSeconds=600");
    let mut tasks = tokio::task::JoinSet::new();
    let mut opened = Vec::new();
    // Each has a connection of its own.
    for _ in 0..watchers {
        let (caller, path, count) = (endpoint.caller()?, path.clone(), count.clone());
        let (open, is_open) = tokio::sync::oneshot::channel();
        let mut open = Some(open);
        opened.push(is_open);
        tasks.spawn(async move {
            let mut left = changes + 1;
            caller
                .watch(&path, Events::Lines, |come| {
                    // The first change tells that the watch is open.
                    let first = open.take().map(|open| open.send(()));
                    let counted = come - u64::from(first.is_some());
                    if counted > 0 {
                        count.send_modify(|count| *count += counted);
                    }
                    left -= come;
                    left > 0
                })
                .await
        });
    }
    // All see this one, whenever they come: it is after where they watch from.
    let change = |number: u64| json!({"data": {"number": number.to_string()}});
    let watched = format!("{MAPS}/watched");
    writer.patch(&watched, &change(0)).await?.ok()?;
    tokio::time::timeout(PATIENCE, try_join_all(opened))
        .await
        .context("watches are not open in time")?
        .context("a watch ended before its first event")?;
    let (cpu, began) = (endpoint.cpu()?, Instant::now());
    for number in 1..=changes {
        writer.patch(&watched, &change(number)).await?.ok()?;
    }
    let all = changes * u64::try_from(watchers)?;
    let waited = tokio::time::timeout(PATIENCE, async {
        while *seen.borrow_and_update() < all {
            if seen.changed().await.is_err() {
                break;
            }
        }
    });
    waited
        .await
        .with_context(|| format!("{} of {all} events have come", *count.borrow()))?;
    let took = began.elapsed();
    let used = endpoint
        .cpu()?
        .zip(cpu)
        .map(|(after, before)| after - before);
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(FanOut {
        events: all,
        took,
        cpu: used,
    })
}

/// Reads and writes of some connections for a while.
pub struct Mixed {
    pub reads: Histogram<u64>,
    pub writes: Histogram<u64>,
    /// What the reader beside them has seen, if there was one. Its reads are in the others.
    pub beside: Option<Beside>,
    pub took: Duration,
    pub cpu: Option<Duration>,
}

/// How many requests of ten read; the others create, change and delete in turn.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    pub connections: usize,
    pub reads_of_ten: u64,
    /// One connection more, which only reads.
    pub reader_beside: bool,
}

pub async fn mixed(endpoint: &Endpoint, mix: Mix, duration: Duration) -> Result<Mixed> {
    let histogram = || Histogram::<u64>::new(3).context("a histogram");
    let (cpu, began) = (endpoint.cpu()?, Instant::now());
    let until = began + duration;
    let connections = (0..mix.connections).map(|connection| async move {
        let caller = endpoint.caller()?;
        let (mut reads, mut writes) = (histogram()?, histogram()?);
        let mut turn = 0_u64;
        while Instant::now() < until {
            // What an earlier mix had no time to delete is still there.
            let (all, of_ten) = (mix.connections, mix.reads_of_ten);
            let name = format!("c-{all}-{of_ten}-{connection}-{}", turn / 10);
            let path = format!("{MAPS}/{name}");
            // Of each object: created, read and changed for a while, deleted.
            let step = turn % 10;
            let answer = if step == 0 {
                let map = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"filling": "x".repeat(900)}});
                caller.post(MAPS, &map).await?.ok()?
            } else if step == 9 {
                caller.delete(&path).await?.ok()?
            } else if step <= mix.reads_of_ten {
                let answer = caller.get(&path).await?;
                reads.record(u64::try_from(answer.took.as_micros())?)?;
                turn += 1;
                continue;
            } else {
                let change = json!({"data": {"turn": turn.to_string()}});
                caller.patch(&path, &change).await?.ok()?
            };
            writes.record(u64::try_from(answer.took.as_micros())?)?;
            turn += 1;
        }
        Ok::<_, anyhow::Error>((reads, writes))
    });
    let beside = async {
        if !mix.reader_beside {
            return anyhow::Ok(None);
        }
        let caller = endpoint.caller()?;
        let path = format!("{PODS}/p-1");
        let reader = tokio::task::spawn_blocking(move || read_beside(&caller, &path, until));
        reader.await?.map(Some)
    };
    let (of_connections, beside) = tokio::try_join!(try_join_all(connections), beside)?;
    let took = began.elapsed();
    let used = endpoint
        .cpu()?
        .zip(cpu)
        .map(|(after, before)| after - before);
    let (mut reads, mut writes) = (histogram()?, histogram()?);
    for (of_reads, of_writes) in of_connections {
        reads.add(of_reads)?;
        writes.add(of_writes)?;
    }
    if let Some(beside) = &beside {
        reads.add(&beside.reads)?;
    }
    Ok(Mixed {
        reads,
        writes,
        beside,
        took,
        cpu: used,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_have_about_the_bytes_that_are_asked_for() {
        for bytes in [1000, 8000] {
            let text = pod(7, bytes).to_string();
            assert!(
                text.len() < bytes && text.len() + 700 > bytes,
                "{}",
                text.len()
            );
        }
    }

    #[test]
    fn pages_lead_to_the_next_one() {
        assert_eq!(
            continued(br#"{"metadata":{"continue":"abc","resourceVersion":"1"}}"#),
            "abc"
        );
        assert_eq!(continued(br#"{"metadata":{"resourceVersion":"1"}}"#), "");
    }
}
