//! Slices of Services, as those see them who watch.

use std::sync::{Arc, Mutex};

use futures::TryStreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use kube::runtime::watcher::{self, Event, watcher};
use serde_json::json;

use crate::cluster::Cluster;
use crate::serving::{object, ready_addresses, service, workload};

/// What was seen of slices: the name, and the endpoints; None when it went.
type Seen = Arc<Mutex<Vec<(String, Option<usize>)>>>;

async fn look(slices: Api<EndpointSlice>, seen: Seen) {
    let of_web = watcher::Config::default().labels("kubernetes.io/service-name=web");
    let mut events = std::pin::pin!(watcher(slices, of_web));
    while let Ok(Some(event)) = events.try_next().await {
        let (slice, there) = match event {
            Event::Apply(slice) | Event::InitApply(slice) => (slice, true),
            Event::Delete(slice) => (slice, false),
            Event::Init | Event::InitDone => continue,
        };
        let count = slice.endpoints.as_ref().map_or(0, Vec::len);
        let name = slice.metadata.name.expect("a name");
        seen.lock().unwrap().push((name, there.then_some(count)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_takes_the_place_of_another_has_slices_before_the_others_go() {
    let mut cluster = Cluster::start().await;
    cluster.add_nodes(1).await;
    cluster.takes_pods().await;
    let deployments: Api<Deployment> = cluster.api("default");
    let slices: Api<EndpointSlice> = cluster.api("default");
    let services: Api<Service> = cluster.api("default");
    let make = PostParams::default();
    let web = object(workload("Deployment", "web", Some(3)));
    deployments.create(&make, &web).await.unwrap();
    services.create(&make, &service("web")).await.unwrap();
    let served = async || ready_addresses(&slices, "web").await.len() == 3;
    cluster.eventually("all are endpoints", served).await;
    let seen = Seen::default();
    let looking = tokio::spawn(look(slices.clone(), seen.clone()));
    cluster
        .eventually("the slice is seen", async || {
            !seen.lock().unwrap().is_empty()
        })
        .await;
    let old = seen.lock().unwrap()[0].0.clone();

    let orphan = DeleteParams::orphan();
    services.delete("web", &orphan).await.unwrap();
    cluster
        .eventually("the Service is gone", async || {
            services.get_opt("web").await.is_ok_and(|web| web.is_none())
        })
        .await;
    assert!(served().await, "its slices are not");
    // One more port, so that the slices differ.
    let mut again = service("web");
    again.spec.as_mut().unwrap().ports = Some(
        serde_json::from_value(json!([{"name": "a", "port": 80}, {"name": "b", "port": 90}]))
            .unwrap(),
    );
    services.create(&make, &again).await.unwrap();
    let position = |wanted: fn(&str, &str, Option<usize>) -> bool| {
        let seen = seen.lock().unwrap();
        seen.iter()
            .position(|(name, count)| wanted(name, &old, *count))
    };
    let left = || position(|name, old, count| name == old && count.is_none());
    cluster
        .eventually("the old slice is gone", async || left().is_some())
        .await;
    let made = position(|name, old, count| name != old && count == Some(3));
    assert!(made.is_some() && made < left(), "{:?}", seen.lock());
    looking.abort();
}
