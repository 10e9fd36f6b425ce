//! Which API servers there are, where several share a store: each keeps a key there while it lives, and `default/kubernetes`
//! leads to all of them. A store of one process has one server. Each server sees to it that the Service stays, whoever deletes it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use super::bootstrap::{hold, kubernetes_service};
use super::status::Status;
use super::{Api, service_range};
use crate::store::{Expect, Range, SERVERS, StoreError};

/// How long a server that says nothing is still led to.
const LIFETIME: Duration = Duration::from_secs(15);
const RENEWAL: Duration = Duration::from_secs(5);

impl Api {
    fn own_address(&self) -> SocketAddr {
        SocketAddr::new(self.config.advertise_address, self.config.advertise_port)
    }

    fn own_key(&self) -> String {
        format!("{SERVERS}{}", self.own_address())
    }

    /// Says that this server is there, and leads to all that are.
    pub(super) async fn announce(&self) -> Result<(), Status> {
        if self.store.is_shared() {
            let value = Bytes::from_static(br#"{"metadata":{}}"#);
            self.store
                .put_for(&self.own_key(), value, Expect::Any, LIFETIME)
                .await?;
        }
        let mut servers = self.servers().await?;
        servers.insert(self.own_address());
        self.lead_to(&servers).await
    }

    /// Announces this server until it stops, then takes its leave. The Service by which pods reach it is made again when it is gone, and so is
    /// the ServiceCIDR of the cluster's own ranges.
    pub(super) async fn stay_announced(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.stop.cancelled() => break,
                () = tokio::time::sleep(RENEWAL) => {}
            }
            if let Err(status) = self.announce().await {
                tracing::warn!(reason = status.message, "this server cannot be announced");
            }
            if let Err(status) = service_range::keep(&self).await {
                let reason = status.message;
                tracing::warn!(reason, "the ServiceCIDR kubernetes cannot be looked after");
            }
            if let Err(status) = kubernetes_service(&self).await {
                let reason = status.message;
                tracing::warn!(reason, "the Service default/kubernetes cannot be made");
            }
        }
        if !self.store.is_shared() {
            return;
        }
        let left = async {
            self.store.delete(&self.own_key(), Expect::Any).await?;
            let servers = self.servers().await?;
            match servers.is_empty() {
                true => Ok(()),
                false => self.lead_to(&servers).await,
            }
        };
        if let Err(status) = left.await {
            tracing::warn!(
                reason = status.message,
                "this server is still led to for a while"
            );
        }
    }

    async fn servers(&self) -> Result<BTreeSet<SocketAddr>, StoreError> {
        let page = self.store.list(Range::all(SERVERS)).await?;
        let addresses = page.records.iter().filter_map(|record| {
            let address = record.key.strip_prefix(SERVERS)?;
            address.parse().ok()
        });
        Ok(addresses.collect())
    }

    async fn lead_to(&self, servers: &BTreeSet<SocketAddr>) -> Result<(), Status> {
        let endpoints = json!({"apiVersion": "v1", "kind": "Endpoints",
            "metadata": {"name": "kubernetes", "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
            "subsets": subsets(servers)});
        let path = "/api/v1/namespaces/default/endpoints";
        hold(self, path, endpoints, &["subsets"]).await?;
        let path = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
        let slice = slice(servers, self.config.advertise_address.is_ipv4());
        hold(self, path, slice, &["endpoints", "ports"]).await
    }
}

fn subsets(servers: &BTreeSet<SocketAddr>) -> Vec<Value> {
    let mut by_port: BTreeMap<u16, Vec<Value>> = BTreeMap::new();
    for server in servers {
        let address = json!({"ip": server.ip().to_string()});
        by_port.entry(server.port()).or_default().push(address);
    }
    let subset = |(port, addresses)| json!({"addresses": addresses, "ports": [{"name": "https", "port": port, "protocol": "TCP"}]});
    by_port.into_iter().map(subset).collect()
}

/// A slice has one port for all of its endpoints: servers at another port than the first one's are not in it.
fn slice(servers: &BTreeSet<SocketAddr>, is_ipv4: bool) -> Value {
    let port = servers.first().map_or(0, SocketAddr::port);
    let endpoints: Vec<Value> = servers
        .iter()
        .filter(|server| server.port() == port && server.is_ipv4() == is_ipv4)
        .map(
            |server| json!({"addresses": [server.ip().to_string()], "conditions": {"ready": true}}),
        )
        .collect();
    json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": if is_ipv4 { "IPv4" } else { "IPv6" },
        "endpoints": endpoints,
        "ports": [{"name": "https", "port": port, "protocol": "TCP"}]})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_api_leads_to_every_server() {
        let servers: BTreeSet<SocketAddr> =
            ["198.18.0.3:6443", "198.18.0.2:6443", "198.18.0.4:7443"]
                .map(|address| address.parse().expect("an address"))
                .into();
        let subsets = subsets(&servers);
        assert_eq!(subsets.len(), 2);
        let first = json!([{"ip": "198.18.0.2"}, {"ip": "198.18.0.3"}]);
        assert_eq!(subsets[0]["addresses"], first);
        assert_eq!(subsets[1]["ports"][0]["port"], 7443);
        let slice = slice(&servers, true);
        assert_eq!(slice["endpoints"].as_array().map(Vec::len), Some(2));
        assert_eq!(slice["ports"][0]["port"], 6443);
    }
}
