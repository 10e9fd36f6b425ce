//! Addresses for Services of type LoadBalancer where no cloud gives any.
//!
//! Pools of addresses are configured ([`Pools`]: a ConfigMap, or a file). One agent at a time, by a Lease, gives them out: [`allocate`] is
//! a pure function of all Services and the pools, [`controller`] writes what it decides to `status.loadBalancer`. It lives in the
//! agent rather than in the control plane because the agent is on every Kubernetes that Keelway is added to, and speaks the public API
//! alone. Who answers for the addresses on the link is another matter: `crate::announce`.

pub mod allocate;
mod controller;
pub mod pools;

use std::sync::Arc;

use cluster_model::api::api::core::v1::ConfigMap;
use cluster_model::watch::ApiOptions;
use cluster_model::watch::kube::Client;
use cluster_model::watch::kube::api::Api;
use cluster_model::watch::kube::runtime::{WatchStreamExt, watcher};
use futures::StreamExt;
use tokio::sync::watch as channel;

use crate::lease::Candidate;
use crate::source::{self, Feed};
pub use pools::Pools;

const NAMESPACE: &str = "kube-system";
/// The ConfigMap with the pools, and the key that they are under.
const CONFIG_MAP: &str = "keelway-config";
const CONFIG_KEY: &str = "loadBalancer";
const LEASE: &str = "keelway-load-balancer";

/// The pools as they are configured now, or why they cannot be used.
pub type Configured = Result<Arc<Pools>, String>;

/// Follows the configuration, tells the event loop, and gives out addresses while this agent holds the Lease. Never ends.
pub async fn run(
    options: ApiOptions,
    identity: String,
    configured: Option<Arc<Pools>>,
    feed: Feed,
) {
    let client = source::client(&options, "load balancer").await;
    let (tell, told) = channel::channel(configured.clone().unwrap_or_default());
    let follow = async {
        match configured {
            None => follow(client.clone(), feed, tell).await,
            // What a file says does not change; the sender must outlive whoever waits for a change.
            Some(_) => {
                std::future::pending::<()>().await;
                drop(tell);
            }
        }
    };
    tokio::join!(follow, lead(client.clone(), identity, told));
}

/// Reads the ConfigMap whenever it changes. One that is wrong leaves what was, and is said; one that is gone is no pools.
async fn follow(client: Client, feed: Feed, tell: channel::Sender<Arc<Pools>>) {
    let maps: Api<ConfigMap> = Api::namespaced(client, NAMESPACE);
    let only = watcher::Config::default().fields(&format!("metadata.name={CONFIG_MAP}"));
    let mut events = std::pin::pin!(watcher(maps, only).default_backoff());
    let mut found = false;
    while let Some(event) = events.next().await {
        let configured = match event {
            Ok(watcher::Event::Init) => {
                found = false;
                continue;
            }
            Ok(watcher::Event::InitApply(map) | watcher::Event::Apply(map)) => {
                found = true;
                read(&map)
            }
            Ok(watcher::Event::InitDone) if found => continue,
            Ok(watcher::Event::InitDone | watcher::Event::Delete(_)) => Ok(Arc::default()),
            Err(error) => {
                tracing::debug!(%error, "load balancer: the configuration cannot be watched");
                continue;
            }
        };
        if let Ok(pools) = &configured {
            // Nobody leads when this fails: the process ends.
            let _ = tell.send(pools.clone());
        }
        if !feed.pools(configured) {
            return;
        }
    }
}

fn read(map: &ConfigMap) -> Configured {
    let data = map.data.as_ref();
    match data.and_then(|data| data.get(CONFIG_KEY)) {
        None => Ok(Arc::default()),
        Some(yaml) => Pools::parse(yaml).map(Arc::new).map_err(|error| {
            format!("ConfigMap {NAMESPACE}/{CONFIG_MAP}, key {CONFIG_KEY}: {error}")
        }),
    }
}

/// Waits until there are no pools, or some. False when nobody can change them any more.
async fn are(told: &mut channel::Receiver<Arc<Pools>>, empty: bool) -> bool {
    // What is borrowed from the channel must not be held while others are waited for.
    told.wait_for(|pools| pools.is_empty() == empty)
        .await
        .is_ok()
}

/// Runs the controller while there are pools and this agent holds the Lease. Without pools no agent asks for it.
async fn lead(client: Client, identity: String, mut told: channel::Receiver<Arc<Pools>>) {
    let mut candidate = Candidate::new(client.clone(), LEASE, &identity);
    loop {
        // The sender lives as long as this: both are joined.
        if !are(&mut told, false).await {
            return;
        }
        tokio::select! {
            () = candidate.lead() => {}
            _ = are(&mut told, true) => continue,
        }
        tracing::info!(lease = LEASE, "giving out addresses of load balancers");
        let mut emptied = told.clone();
        tokio::select! {
            () = candidate.keep() => {
                tracing::warn!(lease = LEASE, "another agent gives out addresses");
            }
            () = controller::run(client.clone(), &identity, told.clone()) => {}
            _ = are(&mut emptied, true) => {
                // What was given is taken back by nobody: whoever removed the pools may be about to write them anew.
                candidate.release().await;
            }
        }
    }
}
