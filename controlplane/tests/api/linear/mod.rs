//! Linearizability under kills: 64 clients write and read through the API while servers, or the members of an etcd below them, are
//! killed and paused at random moments; every answer is written down, and all of it is held against one order ([`history`]).
//!
//! `KEELWAY_LINEAR_ROUNDS` says how often; a few times unless it is set.

mod history;
mod load;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use kube::api::{ListParams, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::etcd::{Etcd, free_port};
use crate::server::Server;
use history::{Epoch, Event, Revision, check};
use load::{History, Maps, Serving, Worker, follow, maps};

const WORKERS: u64 = 64;
/// Connections that they share.
const CLIENTS: usize = 8;
/// Watches beside the one that is checked against: each must tell the same.
const WATCHES: usize = 6;
const ROUNDS: &str = "KEELWAY_LINEAR_ROUNDS";
const ROUNDS_DEFAULT: u64 = 6;
const ETCD_ROUNDS_DEFAULT: u64 = 3;
/// How long an etcd without a member, or with one that does nothing, may take to serve again.
const HEAL_TIMEOUT: Duration = Duration::from_secs(60);

fn rounds(default: u64) -> u64 {
    let given = std::env::var(ROUNDS).ok();
    given.map_or(default, |text| text.parse().expect("a number of rounds"))
}

/// A client that asks once: what it is not answered, it does not know.
async fn client(server: &Server) -> Client {
    let mut config = server.config().await;
    config.default_retry = false;
    Client::try_from(config).expect("a client")
}

async fn clients(servers: &[Server]) -> Vec<Client> {
    let each = servers.iter().cycle().take(CLIENTS.max(servers.len()));
    join_all(each.map(client)).await
}

async fn make_namespace(client: &Client) {
    let namespace = serde_json::json!({"metadata": {"name": load::NAMESPACE}});
    let namespace = serde_json::from_value(namespace).expect("a Namespace");
    let api: Api<k8s_openapi::api::core::v1::Namespace> = Api::all(client.clone());
    api.create(&PostParams::default(), &namespace)
        .await
        .expect("made");
}

/// Starts the clients that write and read. `parks`: see [`Worker::parks`].
fn start_workers(
    clients: &[Client],
    history: &Arc<History>,
    serving: &Serving,
    parked: &watch::Sender<usize>,
    (parks, dice): (bool, u64),
) -> JoinSet<()> {
    let mut workers = JoinSet::new();
    for at in 0..WORKERS {
        let maps = maps(&clients[usize::try_from(at).expect("few") % CLIENTS]);
        let worker = Worker::new(
            maps,
            history.clone(),
            serving.clone(),
            parked.clone(),
            (parks, dice ^ at),
        );
        workers.spawn(worker.run());
    }
    workers
}

/// What is there now: the revision, and each key's.
async fn state(maps: &Maps) -> (Revision, BTreeMap<u16, (Revision, u64)>) {
    // A connection that was there before a kill is noticed to be gone when it is used.
    let mut tries = 0;
    let list = loop {
        match maps.list(&ListParams::default()).await {
            Ok(list) => break list,
            Err(error) => assert!(tries < 20, "no list: {error}"),
        }
        tries += 1;
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let at = list.metadata.resource_version.unwrap_or_default();
    let state = list.items.iter();
    let state = state.map(|map| (load::key_of(map), (load::revision(map), load::id(map))));
    (at.parse().expect("a revision"), state.collect())
}

/// What a round is chaotic by; it is said, so that a failure can be looked at.
fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = now.expect("after 1970").subsec_nanos().into();
    println!("seed {seed}");
    seed
}

/// Each watch is told of the same writes, in the same order, from where it began.
fn check_watches(all: &[Event], watches: &[(Revision, Vec<Event>)]) {
    for (from, seen) in watches {
        let until = seen.last().map_or(*from, |event| event.revision);
        let expected: Vec<&Event> = all
            .iter()
            .filter(|event| (from + 1..=until).contains(&event.revision))
            .collect();
        let differs = expected.iter().zip(seen).position(|(a, b)| *a != b);
        assert!(
            differs.is_none() && expected.len() == seen.len(),
            "a watch from {from} to {until} told of {} writes, and there were {}; the first that differs: {:?}",
            seen.len(),
            expected.len(),
            differs.map(|at| (expected[at], &seen[at]))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_killed_keeps_what_it_has_answered() {
    let server = Server::start();
    let servers = std::slice::from_ref(&server);
    let clients = clients(servers).await;
    make_namespace(&clients[0]).await;
    let history = History::new();
    let (say, serving) = watch::channel(Some(0));
    let (parked, mut waiting) = watch::channel(0);
    let mut workers = JoinSet::new();
    let mut dice = seed();
    // They begin with the first round.
    let (mut from, _) = state(&maps(&clients[0])).await;
    let mut epochs = Vec::new();
    let rounds = rounds(ROUNDS_DEFAULT);
    for round in 0..rounds {
        let (_upto, never) = watch::channel(None);
        let watching = tokio::spawn(follow(maps(&clients[1]), from, false, never.clone()));
        let others: Vec<_> = (0..WATCHES)
            .map(|at| {
                tokio::spawn(follow(
                    maps(&clients[at % CLIENTS]),
                    from,
                    false,
                    never.clone(),
                ))
            })
            .collect();
        if round == 0 {
            workers = start_workers(&clients, &history, &serving, &parked, (true, dice));
        } else {
            say.send_replace(Some(round));
            // Else one that has not noticed would pass for one that waits already.
            let begun = waiting.wait_for(|parked| *parked == 0).await;
            begun.expect("workers");
        }
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        // At whatever moment comes then, in the middle of what 64 clients ask.
        history.progress(30 + (dice >> 33) % 200).await;
        tokio::task::block_in_place(|| server.kill());
        let all = usize::try_from(WORKERS).expect("few");
        waiting
            .wait_for(|parked| *parked == all)
            .await
            .expect("workers");
        let events = watching.await.expect("a watch");
        let seen = join_all(others).await;
        let seen: Vec<(Revision, Vec<Event>)> = seen
            .into_iter()
            .map(|seen| (from, seen.expect("a watch")))
            .collect();
        // Watches end at different moments; the longest is what the others are held against.
        let longest = seen
            .iter()
            .map(|(_, events)| events)
            .chain([&events])
            .max_by_key(|events| events.len());
        let longest = longest.expect("one").clone();
        check_watches(&longest, &seen);
        check_watches(&longest, &[(from, events)]);
        tokio::task::block_in_place(|| server.launch());
        let (until, found) = state(&maps(&clients[0])).await;
        epochs.push(Epoch {
            from,
            events: longest,
            until,
            state: found,
        });
        from = until;
    }
    say.send_replace(None);
    while let Some(ended) = workers.join_next().await {
        ended.expect("a worker");
    }
    let operations = history.take();
    let summary =
        check(&operations, &epochs).unwrap_or_else(|error| panic!("not linearizable: {error}"));
    println!("{rounds} kills: {summary:?}");
}

/// Three members, of which some are killed or paused, and two servers on them.
struct Members(Vec<Etcd>);

impl Members {
    fn start() -> Self {
        let peers: Vec<u16> = (0..3).map(|_| free_port()).collect();
        let cluster: Vec<String> = peers
            .iter()
            .enumerate()
            .map(|(at, port)| format!("m{at}=http://127.0.0.1:{port}"))
            .collect();
        let cluster = cluster.join(",");
        let members = peers.iter().enumerate();
        let mut members: Vec<Etcd> = members
            .map(|(at, peer)| Etcd::member(&format!("m{at}"), *peer, &cluster, "http", &[]))
            .collect();
        for member in &mut members {
            assert!(member.wait_ready(), "a member serves");
        }
        Self(members)
    }

    fn store(&self) -> String {
        let endpoints: Vec<&str> = self.0.iter().map(Etcd::endpoint).collect();
        format!("--store=etcd:{}", endpoints.join(","))
    }
}

fn signal(member: &Etcd, name: &str) {
    let pid = member.child.id().to_string();
    let sent = std::process::Command::new("kill")
        .args([&format!("-{name}"), &pid])
        .status();
    assert!(sent.expect("kill").success(), "kill -{name}");
}

#[tokio::test(flavor = "multi_thread")]
async fn members_of_etcd_that_are_killed_and_paused_lose_nothing_that_was_answered() {
    let mut members = tokio::task::block_in_place(Members::start);
    let first = Server::start_flagged("api", vec![members.store()]);
    let servers = [first.beside("api"), first];
    let clients = clients(&servers).await;
    make_namespace(&clients[0]).await;
    let history = History::new();
    let (say, serving) = watch::channel(Some(0));
    let (parked, _) = watch::channel(0);
    let mut dice = seed();
    let (from, _) = state(&maps(&clients[0])).await;
    let (upto, until) = watch::channel(None);
    let watches: Vec<_> = (0..=WATCHES)
        .map(|at| {
            tokio::spawn(follow(
                maps(&clients[at % CLIENTS]),
                from,
                true,
                until.clone(),
            ))
        })
        .collect();
    let mut workers = start_workers(&clients, &history, &serving, &parked, (false, dice));
    let rounds = rounds(ETCD_ROUNDS_DEFAULT);
    for round in 0..rounds {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let victim = usize::try_from((dice >> 40) % 3).expect("few");
        let hold = Duration::from_millis(200 + (dice >> 33) % 1500);
        history.progress(30 + (dice >> 50) % 100).await;
        // Every third time two of three: nobody can answer until one is back.
        let also = (round % 3 == 2).then_some((victim + 1) % 3);
        let hit: Vec<usize> = [Some(victim), also].into_iter().flatten().collect();
        if round % 2 == 0 {
            tokio::task::block_in_place(|| hit.iter().for_each(|at| members.0[*at].kill()));
            tokio::time::sleep(hold).await;
            tokio::task::block_in_place(|| hit.iter().for_each(|at| members.0[*at].restart()));
        } else {
            hit.iter().for_each(|at| signal(&members.0[*at], "STOP"));
            tokio::time::sleep(hold).await;
            hit.iter().for_each(|at| signal(&members.0[*at], "CONT"));
        }
    }
    // All members serve again: both servers answer.
    for client in &clients {
        let began = Instant::now();
        while maps(client).list(&ListParams::default()).await.is_err() {
            assert!(
                began.elapsed() < HEAL_TIMEOUT,
                "a server does not answer again"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    say.send_replace(None);
    while let Some(ended) = workers.join_next().await {
        ended.expect("a worker");
    }
    // One last write, so that watches have something to end with.
    let last = Worker::new(
        maps(&clients[0]),
        history.clone(),
        serving,
        parked,
        (false, 0),
    );
    let end = last.write_last().await;
    upto.send_replace(Some(end));
    let seen = join_all(watches).await;
    let seen: Vec<(Revision, Vec<Event>)> = seen
        .into_iter()
        .map(|seen| (from, seen.expect("a watch")))
        .collect();
    let (until, found) = state(&maps(&clients[0])).await;
    let events = seen[0].1.clone();
    assert_eq!(events.last().map(|event| event.revision), Some(end));
    check_watches(&events, &seen);
    let epoch = Epoch {
        from,
        events,
        until,
        state: found,
    };
    let operations = history.take();
    let summary =
        check(&operations, &[epoch]).unwrap_or_else(|error| panic!("not linearizable: {error}"));
    println!("{rounds} faults: {summary:?}");
}
