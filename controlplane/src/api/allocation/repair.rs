//! Brings keys and Services together, at start, every now and then, and when an IPAddress is taken away under its Service: a state
//! that was written before there were such keys, by another version, or by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use serde_json::{Value, json};
use tokio::time::MissedTickBehavior;

use super::super::fields::Fields;
use super::held::{ADDRESSES, Claim, FAMILY_LABEL, MANAGED_BY, PORTS, SERVICES};
use super::ranges::{RANGES, Ranges};
use crate::api::Api;
use crate::api::notices::Notice;
use crate::api::status::Status;
use crate::api::strategy::families::Family;
use crate::store::{
    Change, Expect, Range, Record, Revision, Store, StoreError, WatchStream, Write,
};

/// Writes at a time: they share the store's commits.
const PARALLEL: usize = 64;
/// As often as upstream.
const PERIOD: Duration = Duration::from_secs(180);
/// Between two tries to follow what is taken away.
const RETRY: Duration = Duration::from_secs(5);
const REPORTER: &str = "ipallocator-repair-controller";

impl Api {
    /// Makes the keys that Services lack, and takes away those of Services that are gone. Several servers may do so at once.
    pub(in crate::api) async fn repair_allocations(&self) -> Result<Vec<Notice>, Status> {
        repair(&*self.store).await.map_err(Status::from)
    }

    /// Repairs until the server stops.
    pub(in crate::api) async fn keep_allocations(self: Arc<Self>) {
        let mut period = tokio::time::interval(PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first one is at once.
        period.tick().await;
        let mut taken_away = TakenAway::default();
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = period.tick() => {}
                () = taken_away.of_a_service(&self) => {}
            }
            match self.repair_allocations().await {
                Ok(repairs) => self.warn(&repairs).await,
                Err(status) => {
                    let reason = status.message;
                    tracing::warn!(reason, "what Services hold cannot be looked through");
                }
            }
        }
    }
}

/// A watch of what becomes of IPAddresses.
#[derive(Default)]
struct TakenAway(Option<Box<dyn WatchStream>>);

impl TakenAway {
    /// Waits until an IPAddress is gone that a Service still holds, or until one may have gone unseen. Cancel safe.
    async fn of_a_service(&mut self, api: &Api) {
        loop {
            match self.next(api).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(StoreError::Compacted { .. }) => {
                    self.0 = None;
                    return;
                }
                Err(error) => {
                    tracing::debug!(%error, "IPAddresses cannot be followed");
                    self.0 = None;
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    async fn next(&mut self, api: &Api) -> Result<bool, StoreError> {
        let Some(stream) = &mut self.0 else {
            let from = api.store.revision();
            self.0 = Some(api.store.watch(ADDRESSES, from).await?);
            return Ok(false);
        };
        let events = stream.next().await?;
        let gone = events
            .iter()
            .filter(|event| event.change == Change::Delete)
            .filter_map(|event| event.record.key.strip_prefix(ADDRESSES)?.parse().ok());
        let gone: Vec<IpAddr> = gone.collect();
        if gone.is_empty() {
            return Ok(false);
        }
        // A Service that has gone with its address, as is usual, holds it no more.
        let held = &api.services.held;
        held.catch_up(&*api.store).await?;
        let held = held.view();
        Ok(gone.into_iter().any(|address| held.has_address(address)))
    }
}

/// An address or port, as messages name it.
enum Named<'a> {
    Address(&'a str, &'static str),
    Port(&'a str),
}

impl<'a> Named<'a> {
    fn of(key: &'a str) -> Self {
        match key.strip_prefix(ADDRESSES) {
            Some(ip) => {
                let family = ip.parse().map_or("", |ip| Family::of(ip).name());
                Self::Address(ip, family)
            }
            None => Self::Port(key.strip_prefix(PORTS).unwrap_or(key)),
        }
    }

    fn text(&self) -> &'a str {
        match self {
            Self::Address(text, _) | Self::Port(text) => text,
        }
    }
}

/// A Service, as it is named in keys and references.
#[derive(Clone, Copy)]
struct Holder<'a> {
    namespace: &'a str,
    name: &'a str,
    uid: &'a str,
}

impl Holder<'_> {
    fn about(&self) -> Value {
        json!({"apiVersion": "v1", "kind": "Service", "namespace": self.namespace, "name": self.name,
            "uid": self.uid})
    }

    fn notice(&self, key: &str, reason: &str, message: String) -> Notice {
        Notice {
            about: self.about(),
            what: Named::of(key).text().to_owned(),
            reason: reason.to_owned(),
            message,
            reporter: REPORTER,
        }
    }

    fn not_allocated(&self, key: &str) -> Notice {
        let (reason, message) = match Named::of(key) {
            Named::Address(ip, family) => (
                "ClusterIPNotAllocated",
                format!("Cluster IP [{family}]: {ip} is not allocated; repairing"),
            ),
            Named::Port(port) => (
                "PortNotAllocated",
                format!("Port {port} is not allocated; repairing"),
            ),
        };
        self.notice(key, reason, message)
    }

    fn allocated_twice(&self, key: &str) -> Notice {
        let (reason, message) = match Named::of(key) {
            Named::Address(ip, family) => (
                "ClusterIPAlreadyAllocated",
                format!(
                    "Cluster IP [{family}]:{ip} was assigned to multiple services; please recreate service"
                ),
            ),
            Named::Port(port) => (
                "PortAlreadyAllocated",
                format!("Port {port} was assigned to multiple services; please recreate service"),
            ),
        };
        self.notice(key, reason, message)
    }

    fn out_of_range(&self, key: &str) -> Option<Notice> {
        let Named::Address(ip, family) = Named::of(key) else {
            return None;
        };
        let message = format!(
            "Cluster IP [{family}]: {ip} is not within any configured Service CIDR; please recreate service"
        );
        Some(self.notice(key, "ClusterIPOutOfRange", message))
    }

    fn wrongly_referred_to(&self, key: &str) -> Notice {
        let (namespace, name) = (self.namespace, self.name);
        let message = match Named::of(key) {
            Named::Address(ip, family) => format!(
                "the ClusterIP [{family}]: {ip} for Service {namespace}/{name} has a wrong reference; repairing"
            ),
            Named::Port(port) => format!("Port {port} has a wrong reference; repairing"),
        };
        self.notice(key, "ClusterIPNotAllocated", message)
    }
}

/// What is told of a key that no Service holds.
fn leaked(key: &str, object: &Value, parent: Parent<'_>) -> Notice {
    let (about, reason, message) = match Named::of(key) {
        Named::Port(port) => (
            json!({"kind": "Port", "name": port}),
            "PortNotAllocated",
            format!("Port {port} is of no Service any more: cleaning up"),
        ),
        Named::Address(ip, _) => {
            let of = |parent: &Value| {
                let [namespace, name] = ["/namespace", "/name"].map(|path| parent.text(path));
                format!("{namespace}/{name}")
            };
            let parent_ref = &object["spec"]["parentRef"];
            let (reason, message) = match parent {
                Parent::Foreign => (
                    "IPAddressNotAllocated",
                    format!(
                        "IPAddress {ip} appears to have been modified, not referencing a Service {parent_ref}: cleaning up"
                    ),
                ),
                Parent::Gone => (
                    "IPAddressNotAllocated",
                    format!(
                        "IPAddress: {ip} for Service {} appears to have leaked: cleaning up",
                        of(parent_ref)
                    ),
                ),
                Parent::Holds(_) => (
                    "IPAddressWrongReference",
                    format!(
                        "IPAddress: {ip} for Service {} has a wrong reference; cleaning up",
                        of(parent_ref)
                    ),
                ),
            };
            let about = json!({"apiVersion": "networking.k8s.io/v1", "kind": "IPAddress", "name": ip,
                "uid": object.text("/metadata/uid")});
            (about, reason, message)
        }
    };
    Notice {
        about,
        what: Named::of(key).text().to_owned(),
        reason: reason.to_owned(),
        message,
        reporter: REPORTER,
    }
}

/// Whom an IPAddress says it is of.
#[derive(Clone, Copy)]
enum Parent<'a> {
    /// No Service.
    Foreign,
    /// A Service that is not there.
    Gone,
    Holds(&'a Claim),
}

/// The Services of one round, by namespace and name, with what each holds.
type Claims = BTreeMap<(String, String), (String, Claim)>;

fn parent<'a>(address: &Value, claims: &'a Claims) -> Parent<'a> {
    let text = |field: &str| address.text(&format!("/spec/parentRef/{field}"));
    if !text("group").is_empty() || text("resource") != "services" {
        return Parent::Foreign;
    }
    let key = (text("namespace").to_owned(), text("name").to_owned());
    claims
        .get(&key)
        .map_or(Parent::Gone, |(_, claim)| Parent::Holds(claim))
}

fn is_managed(address: &Value) -> bool {
    let (label, value) = MANAGED_BY;
    address["metadata"]["labels"][label] == value
}

/// Whether an IPAddress has the labels that it is made with.
fn is_labelled(address: &Value, ip: IpAddr) -> bool {
    is_managed(address) && address["metadata"]["labels"][FAMILY_LABEL] == Family::of(ip).name()
}

/// What one round finds: what is only told, and what is written, with what is told then.
#[derive(Default)]
struct Found {
    told: Vec<Notice>,
    writes: Vec<(Write, Notice)>,
}

pub(super) async fn repair(store: &dyn Store) -> Result<Vec<Notice>, StoreError> {
    // All at one revision: a Service comes and goes in one step with its keys.
    let mut at = None;
    let mut list = async |prefix| {
        let range = Range {
            at,
            ..Range::all(prefix)
        };
        let page = store.list(range).await?;
        at = Some(page.revision);
        Ok::<_, StoreError>(page.records)
    };
    let mut keys: BTreeMap<String, Record> = BTreeMap::new();
    for prefix in [ADDRESSES, PORTS] {
        let records = list(prefix).await?;
        keys.extend(records.into_iter().map(|r| (r.key.to_string(), r)));
    }
    let mut ranges = Ranges::default();
    for record in list(RANGES).await? {
        let name = record.key.strip_prefix(RANGES).unwrap_or_default();
        ranges.set(name, Some(&record.value));
    }
    let claims: Claims = list(SERVICES)
        .await?
        .iter()
        .filter_map(|record| {
            let (namespace, name) = record.key.strip_prefix(SERVICES)?.split_once('/')?;
            let service: Value = serde_json::from_slice(&record.value).ok()?;
            let uid = service.text("/metadata/uid").to_owned();
            let key = (namespace.to_owned(), name.to_owned());
            Some((key, (uid, Claim::of(&service))))
        })
        .collect();
    let found = look(&keys, &ranges, &claims);
    let repaired: Vec<Option<Notice>> = futures::stream::iter(found.writes)
        .map(|(write, notice)| async {
            match store.commit(write, Vec::new()).await {
                Ok(_) => Ok(Some(notice)),
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
    let mut told = found.told;
    told.extend(repaired.into_iter().flatten());
    Ok(told)
}

fn look(keys: &BTreeMap<String, Record>, ranges: &Ranges, claims: &Claims) -> Found {
    let mut found = Found::default();
    let mut held: BTreeSet<String> = BTreeSet::new();
    for ((namespace, name), (uid, claim)) in claims {
        let holder = Holder {
            namespace,
            name,
            uid,
        };
        for write in claim.taking(namespace, name) {
            if held.contains(&write.key) {
                found.told.push(holder.allocated_twice(&write.key));
                continue;
            }
            let address = write.key.strip_prefix(ADDRESSES);
            let address = address.and_then(|ip| ip.parse::<IpAddr>().ok());
            let known = keys.get(&write.key);
            match (address, known) {
                // Of a state without any the cluster's own are yet to be made.
                (Some(ip), _) if !ranges.is_empty() && !ranges.has(ip) => {
                    found.told.extend(holder.out_of_range(&write.key));
                }
                (_, None) => {
                    let notice = holder.not_allocated(&write.key);
                    found.writes.push((write.clone(), notice));
                }
                (Some(ip), Some(record)) => {
                    let object: Value = serde_json::from_slice(&record.value).unwrap_or_default();
                    let parent_ref = &object["spec"]["parentRef"];
                    let is_mine = parent_ref.text("/namespace") == namespace
                        && parent_ref.text("/name") == name;
                    match parent(&object, claims) {
                        Parent::Holds(claim) if !is_mine && claim.addresses.contains(&ip) => {
                            // The other one has it.
                            found.told.push(holder.allocated_twice(&write.key));
                            continue;
                        }
                        Parent::Holds(_) if is_mine && is_labelled(&object, ip) => {}
                        _ => {
                            let notice = holder.wrongly_referred_to(&write.key);
                            let again = Write {
                                expect: Expect::Revision(record.revision),
                                ..write.clone()
                            };
                            found.writes.push((again, notice));
                        }
                    }
                }
                (None, Some(_)) => {}
            }
            held.insert(write.key);
        }
    }
    for record in keys.values().filter(|record| !held.contains(&*record.key)) {
        let object: Value = serde_json::from_slice(&record.value).unwrap_or_default();
        if record.key.starts_with(PORTS) || is_managed(&object) {
            let parent = parent(&object, claims);
            let notice = leaked(&record.key, &object, parent);
            found
                .writes
                .push((freed(&record.key, record.revision), notice));
        }
    }
    found
}

fn freed(key: &str, revision: Revision) -> Write {
    Write {
        key: key.to_owned(),
        value: None,
        expect: Expect::Revision(revision),
    }
}
