//! A rolling upgrade: control planes on one etcd are replaced one after another while clients work, and no request is lost on them.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Client;
use kube::api::{Api, ListParams, PostParams};
use serde_json::json;
use tokio::task::{JoinSet, block_in_place};
use tokio_util::sync::CancellationToken;

use crate::etcd::Etcd;
use crate::server::Server;

const CLIENTS: usize = 12;
/// How often a request is sent again before it counts as failed; the next one goes to the next server, as clients behind a balancer.
const TRIES: usize = 20;
const RETRY: Duration = Duration::from_millis(100);

/// What one client did.
#[derive(Default)]
struct Done {
    made: Vec<String>,
    /// Requests that were sent again.
    again: usize,
}

/// Creates and reads until it is told to stop; panics when a request is not answered after all its tries.
async fn work(clients: Vec<Client>, number: usize, stop: CancellationToken) -> Done {
    let maps = clients
        .into_iter()
        .map(Api::<ConfigMap>::default_namespaced);
    let maps: Vec<_> = maps.collect();
    let (mut done, mut at) = (Done::default(), number);
    while !stop.is_cancelled() {
        let name = format!("rolling-{number}-{}", done.made.len());
        let map = json!({"metadata": {"name": name}, "data": {"of": number.to_string()}});
        let map: ConfigMap = serde_json::from_value(map).expect("a ConfigMap");
        for reads in [false, true] {
            let mut tries = 0;
            loop {
                let server = &maps[at % maps.len()];
                let outcome = match reads {
                    true => server.get(&name).await,
                    false => server.create(&PostParams::default(), &map).await,
                };
                match outcome {
                    Ok(_) => break,
                    // The answer of an earlier try was lost.
                    Err(kube::Error::Api(status)) if tries > 0 && status.code == 409 => break,
                    Err(kube::Error::Api(status)) if ![429, 503, 504].contains(&status.code) => {
                        panic!("{name}: {status:?}")
                    }
                    Err(error) => {
                        tries += 1;
                        done.again += 1;
                        assert!(tries < TRIES, "{name}: not after {TRIES} tries: {error}");
                    }
                }
                at += 1;
                tokio::time::sleep(RETRY).await;
            }
        }
        done.made.push(name);
    }
    done
}

/// An answer, perhaps at a second try: a connection to a server that was replaced is noticed to be gone when it is used.
async fn answered<T>(ask: impl AsyncFn() -> kube::Result<T>) -> T {
    for _ in 1..TRIES {
        match ask().await {
            Ok(answer) => return answer,
            Err(_) => tokio::time::sleep(RETRY).await,
        }
    }
    ask().await.expect("an answer")
}

async fn holder(client: &Client, lease: &str) -> Option<String> {
    let leases: Api<Lease> = Api::namespaced(client.clone(), "kube-system");
    let lease = answered(async || leases.get_opt(lease).await).await?;
    lease.spec?.holder_identity
}

#[tokio::test(flavor = "multi_thread")]
async fn control_planes_are_replaced_without_a_failed_request() {
    let etcd = Etcd::start("http", &[]);
    let components = "api,controllers,scheduler";
    let first = Server::start_with_on(components, &etcd);
    let servers = [first.beside(components), first.beside(components), first];
    let mut clients = Vec::new();
    for server in &servers {
        clients.push(server.client().await);
    }
    while holder(&clients[0], "kube-controller-manager")
        .await
        .is_none()
    {
        tokio::time::sleep(RETRY).await;
    }

    let stop = CancellationToken::new();
    let mut working = JoinSet::new();
    for number in 0..CLIENTS {
        working.spawn(work(clients.clone(), number, stop.clone()));
    }
    for (at, server) in servers.iter().enumerate() {
        let (well, _) = block_in_place(|| server.terminate());
        assert!(well, "it ends well");
        // Who led has given that back: nobody waits until a lease ends.
        let other = &clients[(at + 1) % clients.len()];
        for lease in ["kube-controller-manager", "kube-scheduler"] {
            let holder = holder(other, lease).await;
            assert_ne!(holder, Some(server.identity()), "{lease}");
        }
        block_in_place(|| server.launch());
    }
    stop.cancel();
    let (mut made, mut again) = (BTreeSet::new(), 0);
    while let Some(done) = working.join_next().await {
        let done = done.expect("no request failed");
        again += done.again;
        made.extend(done.made);
    }
    println!("{} requests, {again} sent again", made.len() * 2);
    assert!(made.len() > CLIENTS, "they worked");
    for client in &clients {
        let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
        let all = ListParams::default();
        let there = answered(async || maps.list(&all).await).await;
        let there: BTreeSet<String> = there
            .into_iter()
            .filter_map(|map| map.metadata.name)
            .collect();
        assert!(made.is_subset(&there), "an answered write is not there");
    }
}
