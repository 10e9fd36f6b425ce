//! Several control planes on one etcd: they give nothing out twice, and do without any one of them.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures::future::join_all;
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Endpoints, Service};
use k8s_openapi::api::networking::v1::IPAddress;
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use serde_json::json;

use crate::etcd::Etcd;
use crate::server::Server;

/// Longer than a lease lives, and its key after it.
const PATIENCE: Duration = Duration::from_secs(60);

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < PATIENCE, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn three(components: &'static str) -> (Etcd, Vec<Server>) {
    let etcd = Etcd::start("http", &[]);
    let first = Server::start_with_on(components, &etcd);
    let more = [first.beside(components), first.beside(components)];
    let mut servers = vec![first];
    servers.extend(more);
    (etcd, servers)
}

fn service(name: &str, node_port: Option<u16>) -> Service {
    let mut port = json!({"port": 80});
    if let Some(number) = node_port {
        port["nodePort"] = number.into();
    }
    let service =
        json!({"metadata": {"name": name}, "spec": {"type": "NodePort", "ports": [port]}});
    serde_json::from_value(service).expect("a Service")
}

/// The address and port of a Service, when it was made; the code of the answer when not.
async fn make(client: &Client, service: Service) -> Result<(String, i32), u16> {
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    match services.create(&PostParams::default(), &service).await {
        Ok(made) => {
            let spec = made.spec.expect("a spec");
            let port = spec.ports.expect("ports")[0]
                .node_port
                .expect("a node port");
            Ok((spec.cluster_ip.expect("an address"), port))
        }
        Err(kube::Error::Api(status)) => Err(status.code),
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_address_or_port_is_given_out_twice() {
    const EACH: usize = 40;
    let (_etcd, servers) = three("api");
    let clients = join_all(servers.iter().map(Server::client)).await;
    // All ask all servers at once, for whatever there is.
    let asked = clients.iter().enumerate().flat_map(|(at, client)| {
        (0..EACH).map(move |i| make(client, service(&format!("any-{at}-{i}"), None)))
    });
    let given = join_all(asked).await;
    let given: Vec<_> = given
        .into_iter()
        .map(|given| given.expect("room"))
        .collect();
    let addresses: BTreeSet<&String> = given.iter().map(|(address, _)| address).collect();
    let ports: BTreeSet<i32> = given.iter().map(|(_, port)| *port).collect();
    assert_eq!((addresses.len(), ports.len()), (3 * EACH, 3 * EACH));
    // The same port of each server: one gets it, and the others are told so.
    let free = (30000..=32767).filter(|port| !ports.contains(&i32::from(*port)));
    for number in free.take(20) {
        let asked = clients.iter().enumerate().map(|(at, client)| {
            make(
                client,
                service(&format!("port-{number}-{at}"), Some(number)),
            )
        });
        let outcomes = join_all(asked).await;
        let made = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        let refused = outcomes.iter().filter(|o| **o == Err(422)).count();
        assert_eq!((made, refused), (1, 2), "{number}: {outcomes:?}");
    }
    // What one server frees another one gives out.
    let services: Api<Service> = Api::namespaced(clients[0].clone(), "default");
    let all = services.list(&ListParams::default()).await.expect("a list");
    let taken = all.items.iter().find_map(|service| {
        let ports = service.spec.as_ref()?.ports.as_ref()?;
        Some((service.metadata.name.clone()?, ports[0].node_port?))
    });
    let (name, port) = taken.expect("a NodePort");
    services
        .delete(&name, &DeleteParams::default())
        .await
        .expect("deleted");
    let number = u16::try_from(port).expect("a port");
    let again = make(&clients[1], service("again", Some(number))).await;
    assert_eq!(again.expect("it is free").1, port);
    // Each address is an object, and none is left over.
    let addresses: Api<IPAddress> = Api::all(clients[2].clone());
    let objects = addresses
        .list(&ListParams::default())
        .await
        .expect("a list");
    let services = services.list(&ListParams::default()).await.expect("a list");
    assert_eq!(objects.items.len(), services.items.len());
}

async fn led_to(client: &Client) -> BTreeSet<String> {
    let endpoints: Api<Endpoints> = Api::namespaced(client.clone(), "default");
    let found = endpoints.get("kubernetes").await.expect("the API's own");
    let subsets = found.subsets.unwrap_or_default();
    let ports = subsets
        .into_iter()
        .flat_map(|subset| subset.ports.unwrap_or_default());
    ports
        .map(|port| format!("127.0.0.1:{}", port.port))
        .collect()
}

async fn holder(client: &Client, lease: &str) -> Option<String> {
    let leases: Api<Lease> = Api::namespaced(client.clone(), "kube-system");
    let lease = leases.get_opt(lease).await.expect("a read")?;
    lease.spec?.holder_identity
}

/// Whether the controllers do their work: a Deployment gets its ReplicaSet.
async fn a_deployment_is_carried_out(client: &Client, name: &str) {
    let deployment = json!({"metadata": {"name": name}, "spec": {"selector": {"matchLabels": {"app": name}},
        "template": {"metadata": {"labels": {"app": name}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
    let deployment: Deployment = serde_json::from_value(deployment).expect("a Deployment");
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), "default");
    deployments
        .create(&PostParams::default(), &deployment)
        .await
        .expect("created");
    let sets: Api<ReplicaSet> = Api::namespaced(client.clone(), "default");
    let of_it = ListParams::default().labels(&format!("app={name}"));
    eventually("a ReplicaSet is made", async || {
        let found = sets.list(&of_it).await.expect("a list");
        !found.items.is_empty()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_control_plane_may_go() {
    let (_etcd, mut servers) = three("api,controllers,scheduler");
    let all: BTreeSet<String> = servers.iter().map(Server::identity).collect();
    let client = servers[2].client().await;
    eventually("the API leads to all of them", async || {
        led_to(&client).await == all
    })
    .await;
    a_deployment_is_carried_out(&client, "before").await;
    // kill -9 to whoever leads, so long as there are others.
    for round in 0..2 {
        let client = servers.last().expect("a server").client().await;
        let leader = holder(&client, "kube-controller-manager").await;
        let leader = leader.expect("somebody leads");
        let at = servers
            .iter()
            .position(|server| server.identity() == leader)
            .expect("one of ours");
        let killed = servers.swap_remove(at);
        killed.kill();
        let left: BTreeSet<String> = servers.iter().map(Server::identity).collect();
        let client = servers[0].client().await;
        for lease in ["kube-controller-manager", "kube-scheduler"] {
            eventually("another one leads", async || {
                holder(&client, lease)
                    .await
                    .is_some_and(|holder| left.contains(&holder))
            })
            .await;
        }
        a_deployment_is_carried_out(&client, &format!("after-{round}")).await;
        eventually("the API leads to those that are left", async || {
            led_to(&client).await == left
        })
        .await;
    }
    // One that is asked to stop takes its leave at once, and one that comes is led to.
    let (first, second) = (&servers[0], servers[0].beside("api"));
    let client = first.client().await;
    let both = BTreeSet::from([first.identity(), second.identity()]);
    assert_eq!(led_to(&client).await, both);
    assert!(second.terminate().0, "it ends well");
    assert_eq!(led_to(&client).await, BTreeSet::from([first.identity()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_etcd_is_put_back_ends_and_starts_anew() {
    let mut etcd = Etcd::start("http", &[]);
    let server = Server::start_on(&etcd);
    server.kubectl("create configmap kept");
    etcd.keep("before");
    etcd.restart();
    server.kubectl("create configmap lost");
    etcd.put_back("before");
    etcd.restart();
    assert!(!server.ended(), "it says that something was wrong");
    server.launch();
    assert!(server.kubectl("get configmaps").contains("kept"));
    server.kubectl_fails("get configmap lost", "");
}
