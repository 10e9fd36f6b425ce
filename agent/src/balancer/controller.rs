//! Doing what [`super::allocate`] decides.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use cluster_model::ObjectKey;
use cluster_model::api::api::core::v1::Service;
use cluster_model::watch::kube::api::{Api, Patch, PatchParams};
use cluster_model::watch::kube::runtime::events::{Event, EventType, Recorder, Reporter};
use cluster_model::watch::kube::runtime::{WatchStreamExt, watcher};
use cluster_model::watch::kube::{self, Client, Resource};
use futures::{FutureExt, StreamExt};
use serde_json::{Value, json};
use tokio::sync::watch as channel;

use super::Pools;
use super::allocate::{Decision, Refusal, plan};

const REPORTER: &str = "keelway-load-balancer";
/// The pause before what could not be written is tried again.
const RETRY: Duration = Duration::from_secs(3);

/// Gives out addresses until it is dropped, or until nobody can change the pools any more.
pub async fn run(client: Client, identity: &str, mut pools: channel::Receiver<Arc<Pools>>) {
    let mut controller = Controller {
        recorder: Recorder::new(
            client.clone(),
            Reporter {
                controller: REPORTER.into(),
                instance: Some(identity.into()),
            },
        ),
        client: client.clone(),
        services: BTreeMap::new(),
        listed: BTreeMap::new(),
        synced: false,
        failed: false,
        told: BTreeMap::new(),
    };
    let services = watcher(Api::<Service>::all(client), watcher::Config::default());
    let mut events = std::pin::pin!(services.default_backoff());
    loop {
        tokio::select! {
            event = events.next() => match event {
                Some(event) => controller.take(event),
                None => return,
            },
            changed = pools.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if controller.failed => {}
        }
        // What has come in meanwhile is decided about together.
        while let Some(Some(event)) = events.next().now_or_never() {
            controller.take(event);
        }
        if controller.synced {
            let now = pools.borrow_and_update().clone();
            controller.settle(&now).await;
        }
    }
}

struct Controller {
    client: Client,
    recorder: Recorder,
    services: BTreeMap<ObjectKey, Service>,
    /// A list that is not complete yet.
    listed: BTreeMap<ObjectKey, Service>,
    synced: bool,
    /// Something could not be written, and is tried again.
    failed: bool,
    /// What was last said of a Service, so that it is said once.
    told: BTreeMap<ObjectKey, Refusal>,
}

fn keyed(service: Service) -> Option<(ObjectKey, Service)> {
    let meta = &service.metadata;
    let key = ObjectKey::new(meta.namespace.as_deref()?, meta.name.as_deref()?);
    Some((key, service))
}

impl Controller {
    fn take(&mut self, event: Result<watcher::Event<Service>, watcher::Error>) {
        match event {
            Ok(watcher::Event::Init) => self.listed.clear(),
            Ok(watcher::Event::InitApply(service)) => self.listed.extend(keyed(service)),
            Ok(watcher::Event::InitDone) => {
                self.services = std::mem::take(&mut self.listed);
                self.synced = true;
            }
            Ok(watcher::Event::Apply(service)) => self.services.extend(keyed(service)),
            Ok(watcher::Event::Delete(service)) => {
                if let Some((key, _)) = keyed(service) {
                    self.services.remove(&key);
                    self.told.remove(&key);
                }
            }
            Err(error) => tracing::warn!(%error, "load balancer: Services cannot be watched"),
        }
    }

    /// Brings every Service's status to what is decided.
    async fn settle(&mut self, pools: &Pools) {
        self.failed = false;
        let decisions = plan(self.services.values(), pools);
        self.told
            .retain(|key, _| matches!(decisions.get(key), Some(Decision::Refuse { .. })));
        // Addresses are taken back before they are given to others.
        let (back, give): (Vec<_>, Vec<_>) = decisions.into_iter().partition(|(_, decision)| {
            matches!(
                decision,
                Decision::TakeBack | Decision::Refuse { had: true, .. }
            )
        });
        for (key, decision) in back.into_iter().chain(give) {
            match decision {
                Decision::Leave => {}
                Decision::TakeBack => {
                    self.write(&key, &[]).await;
                }
                Decision::Give(addresses) => {
                    if self.write(&key, &addresses).await {
                        let texts: Vec<String> =
                            addresses.iter().map(ToString::to_string).collect();
                        let note = format!("Assigned {}", texts.join(", "));
                        self.tell(&key, EventType::Normal, "AddressAssigned", note)
                            .await;
                    }
                }
                Decision::Refuse { reason, had } => {
                    if had {
                        self.write(&key, &[]).await;
                    }
                    if self.told.get(&key) != Some(&reason) {
                        let note = format!("No address is assigned: {reason}");
                        tracing::warn!(service = %key, %reason, "no address is assigned");
                        self.told.insert(key.clone(), reason);
                        self.tell(&key, EventType::Warning, "AddressNotAssigned", note)
                            .await;
                    }
                }
            }
        }
    }

    /// Writes the addresses into a Service's status. False when it has changed meanwhile, or cannot be written.
    async fn write(&mut self, key: &ObjectKey, addresses: &[IpAddr]) -> bool {
        let Some(service) = self.services.get(key) else {
            return false;
        };
        let ingress: Vec<Value> = addresses
            .iter()
            .map(|ip| json!({"ip": ip, "ipMode": "VIP"}))
            .collect();
        let ingress = if ingress.is_empty() {
            Value::Null
        } else {
            ingress.into()
        };
        let patch = json!({
            "metadata": {"resourceVersion": service.metadata.resource_version},
            "status": {"loadBalancer": {"ingress": ingress}},
        });
        let services: Api<Service> = Api::namespaced(self.client.clone(), &key.namespace);
        let written = services
            .patch_status(&key.name, &PatchParams::default(), &Patch::Merge(patch))
            .await;
        match written {
            Ok(service) => {
                // The watch brings it too, later: until then plans must see it.
                self.services.insert(key.clone(), service);
                true
            }
            // It changed, and the watch will say how.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => false,
            Err(error) => {
                tracing::warn!(service = %key, %error, "the status of a Service cannot be written");
                self.failed = true;
                false
            }
        }
    }

    async fn tell(&self, key: &ObjectKey, type_: EventType, reason: &str, note: String) {
        let Some(service) = self.services.get(key) else {
            return;
        };
        let event = Event {
            type_,
            reason: reason.into(),
            note: Some(note),
            action: "AssignAddress".into(),
            secondary: None,
        };
        if let Err(error) = self
            .recorder
            .publish(&event, &service.object_ref(&()))
            .await
        {
            tracing::debug!(service = %key, %error, "an event cannot be written");
        }
    }
}
