//! Brings keys and Services together, at start and every now and then: a state that was written before there were such keys, by
//! another version, or by a hand that took an IPAddress away.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use serde_json::{Value, json};

use super::super::fields::{self, Fields};
use super::held::{ADDRESSES, Claim, MANAGED_BY, PORTS, SERVICES};
use crate::api::status::Status;
use crate::api::{Api, bootstrap};
use crate::store::{Expect, Range, Record, Revision, Store, StoreError, Write};

/// Writes at a time: they share the store's commits.
const PARALLEL: usize = 64;
/// Repairs of one round that are told: a state that was written before there were keys lacks all of them.
const TOLD_MAX: usize = 100;
/// As often as upstream.
const PERIOD: Duration = Duration::from_secs(180);

/// What did not belong together, as an event tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    pub about: Value,
    /// The address or port.
    pub what: String,
    pub reason: &'static str,
    pub message: String,
}

impl Api {
    /// Makes the keys that Services lack, and takes away those of Services that are gone. Several servers may do so at once.
    pub(in crate::api) async fn repair_allocations(&self) -> Result<Vec<Repair>, Status> {
        repair(&*self.store).await.map_err(Status::from)
    }

    /// Repairs until the server stops.
    pub(in crate::api) async fn keep_allocations(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(PERIOD) => {}
            }
            match self.repair_allocations().await {
                Ok(repairs) => self.tell_repairs(&repairs).await,
                Err(status) => {
                    let reason = status.message;
                    tracing::warn!(reason, "what Services hold cannot be looked through");
                }
            }
        }
    }

    /// Puts repairs on record. What is told already, and not forgotten yet, is not told again.
    pub(in crate::api) async fn tell_repairs(&self, repairs: &[Repair]) {
        for repair in repairs.iter().take(TOLD_MAX) {
            let Repair {
                reason, message, ..
            } = repair;
            tracing::warn!(reason, message, "Services and what they hold");
            let event = event(repair);
            let namespace = fields::namespace(&event);
            let path = format!("/api/v1/namespaces/{namespace}/events");
            if let Err(status) = bootstrap::ensure(self, &path, event).await {
                tracing::debug!(reason = status.message, "an event could not be written");
            }
        }
    }
}

fn event(repair: &Repair) -> Value {
    let Repair {
        about,
        what,
        reason,
        message,
    } = repair;
    let reporter = "ipallocator-repair-controller";
    let namespace = match about.text("/namespace") {
        "" => "default",
        namespace => namespace,
    };
    // The same fault has the same name, so that it is told once.
    let name = format!("{}.{what}.{}", about.text("/name"), reason.to_lowercase());
    let name = name.replace(':', "-");
    let now = fields::now();
    json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": name, "namespace": namespace},
        "involvedObject": about, "type": "Warning", "reason": reason, "message": message,
        "source": {"component": reporter}, "reportingComponent": reporter,
        "firstTimestamp": now, "lastTimestamp": now, "count": 1})
}

/// An address or port, as messages name it.
fn named(key: &str) -> (bool, &str) {
    match key.strip_prefix(ADDRESSES) {
        Some(address) => (true, address),
        None => (false, key.strip_prefix(PORTS).unwrap_or(key)),
    }
}

fn not_allocated(about: Value, key: &str) -> Repair {
    let (reason, message) = match named(key) {
        (true, ip) => (
            "ClusterIPNotAllocated",
            format!("Cluster IP {ip} is not allocated; repairing"),
        ),
        (false, port) => (
            "PortNotAllocated",
            format!("Port {port} is not allocated; repairing"),
        ),
    };
    Repair {
        about,
        what: named(key).1.to_owned(),
        reason,
        message,
    }
}

fn allocated_twice(about: Value, key: &str) -> Repair {
    let (reason, message) = match named(key) {
        (true, ip) => (
            "ClusterIPAlreadyAllocated",
            format!("Cluster IP {ip} was assigned to multiple services; please recreate service"),
        ),
        (false, port) => (
            "PortAlreadyAllocated",
            format!("Port {port} was assigned to multiple services; please recreate service"),
        ),
    };
    Repair {
        about,
        what: named(key).1.to_owned(),
        reason,
        message,
    }
}

fn leaked(key: &str) -> Repair {
    let (is_address, name) = named(key);
    let (kind, version, reason) = match is_address {
        true => ("IPAddress", "networking.k8s.io/v1", "IPAddressNotAllocated"),
        false => ("Port", "", "PortNotAllocated"),
    };
    Repair {
        about: json!({"apiVersion": version, "kind": kind, "name": name}),
        what: name.to_owned(),
        reason,
        message: format!("{kind} {name} is of no Service any more: cleaning up"),
    }
}

pub(super) async fn repair(store: &dyn Store) -> Result<Vec<Repair>, StoreError> {
    // All at one revision: a Service comes and goes in one step with its keys.
    let mut keys: BTreeMap<String, Record> = BTreeMap::new();
    let mut at = None;
    for prefix in [ADDRESSES, PORTS] {
        let range = Range {
            at,
            ..Range::all(prefix)
        };
        let page = store.list(range).await?;
        at = Some(page.revision);
        keys.extend(page.records.into_iter().map(|r| (r.key.to_string(), r)));
    }
    let range = Range {
        at,
        ..Range::all(SERVICES)
    };
    let services = store.list(range).await?;
    let mut found: Vec<Repair> = Vec::new();
    let mut writes: Vec<(Write, Repair)> = Vec::new();
    let mut held: BTreeMap<String, Value> = BTreeMap::new();
    for record in &services.records {
        let path = record.key.strip_prefix(SERVICES).unwrap_or_default();
        let (Some((namespace, name)), Ok(service)) = (
            path.split_once('/'),
            serde_json::from_slice::<Value>(&record.value),
        ) else {
            continue;
        };
        let about = json!({"apiVersion": "v1", "kind": "Service", "namespace": namespace, "name": name,
            "uid": service.text("/metadata/uid")});
        for write in Claim::of(&service).taking(namespace, name) {
            if held.contains_key(&write.key) {
                found.push(allocated_twice(about.clone(), &write.key));
                continue;
            }
            held.insert(write.key.clone(), about.clone());
            if !keys.contains_key(&write.key) {
                let repair = not_allocated(about.clone(), &write.key);
                writes.push((write, repair));
            }
        }
    }
    let lost = keys.values().filter(|record| {
        let (label, value) = MANAGED_BY;
        let ours = || {
            serde_json::from_slice::<Value>(&record.value)
                .is_ok_and(|address| address["metadata"]["labels"][label] == value)
        };
        !held.contains_key(&*record.key) && (record.key.starts_with(PORTS) || ours())
    });
    writes.extend(lost.map(|record| (freed(&record.key, record.revision), leaked(&record.key))));
    let repaired: Vec<Option<Repair>> = futures::stream::iter(writes)
        .map(|(write, repair)| async {
            match store.commit(write, Vec::new()).await {
                Ok(_) => Ok(Some(repair)),
                // Another server was faster, or the Service is being changed.
                Err(
                    StoreError::Exists { .. }
                    | StoreError::Conflict { .. }
                    | StoreError::NotFound { .. },
                ) => Ok(None),
                Err(error) => Err(error),
            }
        })
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await?;
    found.extend(repaired.into_iter().flatten());
    Ok(found)
}

fn freed(key: &str, revision: Revision) -> Write {
    Write {
        key: key.to_owned(),
        value: None,
        expect: Expect::Revision(revision),
    }
}
