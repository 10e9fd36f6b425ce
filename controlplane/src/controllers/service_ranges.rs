//! ServiceCIDRs: each says whether addresses are given out of it, and stays until no Service has one that is in no other.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use k8s_openapi::api::networking::v1::{IPAddress, ServiceCIDR};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::json;

use super::object::{Key, Object, Target};
use super::plan::{Action, Controller, Keys, Plan, View};
use super::pods::guarded_status_patch;
use super::snapshot::{Change, Snapshot};
use super::volumes::protection::{hold, release};
use crate::api::MANAGED_BY;

pub const CONTROLLER: Controller = Controller {
    name: "servicecidr",
    affected,
    plan,
};

const FINALIZER: &str = "networking.k8s.io/service-cidr-finalizer";
/// API servers that have not heard of a deletion yet may give an address out: so long they have to hear of it, as upstream.
const GRACE: SignedDuration = SignedDuration::from_secs(10);

fn affected(snapshot: &Snapshot, change: &Change, keys: &mut Keys) {
    for state in change.states() {
        match state {
            Object::ServiceCIDR(changed) => {
                keys.insert(Key::of(&changed.metadata));
                let own = cidrs(changed);
                let others = snapshot.service_cidrs.iter().filter(|(_, other)| {
                    let theirs = cidrs(other);
                    theirs
                        .iter()
                        .any(|their| own.iter().any(|own| overlap(own, their)))
                });
                keys.extend(others.map(|(key, _)| key.clone()));
            }
            // Addresses matter to what is to go alone.
            Object::IPAddress(address) => {
                let Some(ip) = given(address) else { continue };
                let going = snapshot
                    .service_cidrs
                    .iter()
                    .filter(|(_, range)| is_going(range) && has(range, ip));
                keys.extend(going.map(|(key, _)| key.clone()));
            }
            _ => {}
        }
    }
}

fn plan(view: &View<'_>, key: &Key) -> Plan {
    let mut plan = Plan::nothing();
    let Some(range) = view.snapshot.service_cidrs.get(key) else {
        return plan;
    };
    let meta = &range.metadata;
    let held = meta.finalizers.iter().flatten().map(String::as_str);
    let is_held = held.clone().any(|held| held == FINALIZER);
    let patch = |body| Action::Patch {
        target: Target::of(&**range),
        subresource: None,
        body,
    };
    let Some(deleted) = &meta.deletion_timestamp else {
        if !is_held {
            // The condition comes with the next plan: both are guarded by the object's version.
            plan.push(patch(hold(meta, held.chain([FINALIZER]).collect())));
        } else if let Some(say) = say(range, &ready(view.now)) {
            plan.push(say);
        }
        return plan;
    };
    if !is_held {
        return plan;
    }
    if has_orphans(view.snapshot, range) {
        if let Some(say) = say(range, &terminating(view.now)) {
            plan.push(say);
        }
        return plan;
    }
    let free_at = deleted.0.saturating_add(GRACE).unwrap_or(view.now);
    if view.now < free_at {
        plan.look_again(free_at);
    } else {
        plan.push(patch(release(meta, FINALIZER)));
    }
    plan
}

fn ready(now: Timestamp) -> Condition {
    Condition {
        type_: "Ready".into(),
        status: "True".into(),
        reason: String::new(),
        message: "Kubernetes Service CIDR is ready".into(),
        last_transition_time: Time(now),
        observed_generation: None,
    }
}

fn terminating(now: Timestamp) -> Condition {
    Condition {
        status: "False".into(),
        reason: "Terminating".into(),
        message: "There are still IPAddresses referencing the ServiceCIDR, please remove them or create a new ServiceCIDR".into(),
        ..ready(now)
    }
}

/// The patch that gives a ServiceCIDR a condition; None when it has it.
fn say(range: &ServiceCIDR, condition: &Condition) -> Option<Action> {
    let status = range.status.as_ref();
    let known = status.and_then(|status| status.conditions.clone());
    let mut conditions = known.unwrap_or_default();
    let is_said = conditions.iter().any(|known| {
        let known = (&known.type_, &known.status, &known.reason, &known.message);
        let said = condition;
        known == (&said.type_, &said.status, &said.reason, &said.message)
    });
    if is_said {
        return None;
    }
    conditions.retain(|known| known.type_ != condition.type_);
    conditions.push(condition.clone());
    Some(guarded_status_patch(
        range,
        json!({"conditions": conditions}),
    ))
}

/// Whether a Service has an address that is in no ServiceCIDR when this one is gone. Of two that cover each other and are both to go,
/// one counts for the other, and not the other way round: so the last one stays.
fn has_orphans(snapshot: &Snapshot, range: &ServiceCIDR) -> bool {
    let name = &range.metadata.name;
    let stays = |other: &ServiceCIDR| {
        other.metadata.name != *name && (!is_going(other) || other.metadata.name > *name)
    };
    let others: Vec<&ServiceCIDR> = snapshot
        .service_cidrs
        .values()
        .map(|other| &**other)
        .filter(|other| stays(other))
        .collect();
    let mut addresses = snapshot.ip_addresses.values().filter_map(|one| given(one));
    addresses.any(|ip| has(range, ip) && !others.iter().any(|other| has(other, ip)))
}

fn is_going(range: &ServiceCIDR) -> bool {
    range.metadata.deletion_timestamp.is_some()
}

/// The address of an IPAddress, if an API server has given it to a Service.
fn given(address: &IPAddress) -> Option<IpAddr> {
    let (label, value) = MANAGED_BY;
    let labels = address.metadata.labels.as_ref()?;
    let managed = labels.get(label).is_some_and(|found| found == value);
    let name = address.metadata.name.as_deref().filter(|_| managed)?;
    name.parse().ok()
}

fn cidrs(range: &ServiceCIDR) -> Vec<IpNetwork> {
    let spec = range.spec.as_ref();
    let cidrs = spec.into_iter().flat_map(|spec| &spec.cidrs).flatten();
    cidrs.filter_map(|cidr| cidr.parse().ok()).collect()
}

/// Whether an address may have come out of a ServiceCIDR.
fn has(range: &ServiceCIDR, ip: IpAddr) -> bool {
    cidrs(range).iter().any(|cidr| {
        let is_broadcast = ip.is_ipv4() && ip == cidr.broadcast();
        cidr.contains(ip) && ip != cidr.network() && !is_broadcast
    })
}

fn overlap(one: &IpNetwork, other: &IpNetwork) -> bool {
    one.contains(other.network()) || other.contains(one.network())
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::plan::Propagation;
    use super::super::testing::Cluster;
    use super::*;

    fn range(cluster: &mut Cluster, name: &str, cidrs: &[&str]) {
        let value = json!({"metadata": {"name": name}, "spec": {"cidrs": cidrs}});
        cluster.add::<ServiceCIDR>(serde_json::from_value(value).unwrap());
    }

    fn address(cluster: &mut Cluster, ip: &str, labels: Value) {
        let value = json!({"metadata": {"name": ip, "labels": labels},
            "spec": {"parentRef": {"resource": "services", "namespace": "a", "name": "b"}}});
        cluster.add::<IPAddress>(serde_json::from_value(value).unwrap());
    }

    fn given(cluster: &mut Cluster, ip: &str) {
        address(cluster, ip, json!({MANAGED_BY.0: MANAGED_BY.1}));
    }

    fn delete(cluster: &mut Cluster, name: &str) {
        cluster.delete(name, Propagation::Background);
        cluster.settle();
    }

    /// What is said of a ServiceCIDR: its status and reason; None when it is gone.
    fn said(cluster: &Cluster, name: &str) -> Option<(String, String)> {
        let range = cluster.snapshot.service_cidrs.get(&Key::cluster(name))?;
        assert_eq!(
            range.metadata.finalizers.as_deref(),
            Some(&[FINALIZER.to_owned()][..])
        );
        let conditions = range.status.as_ref()?.conditions.as_ref()?;
        assert_eq!(conditions.len(), 1);
        let ready = &conditions[0];
        Some((ready.status.clone(), ready.reason.clone()))
    }

    fn is(status: &str, reason: &str) -> Option<(String, String)> {
        Some((status.to_owned(), reason.to_owned()))
    }

    fn cluster() -> Cluster {
        let mut cluster = Cluster::new(&[CONTROLLER]);
        range(&mut cluster, "kubernetes", &["10.96.0.0/16"]);
        range(&mut cluster, "more", &["203.0.113.0/24", "fd00::/112"]);
        cluster.settle();
        cluster
    }

    #[test]
    fn a_range_is_held_and_ready_and_goes_after_a_while_when_nothing_is_of_it() {
        let mut cluster = cluster();
        assert_eq!(said(&cluster, "more"), is("True", ""));
        // Another range's, and one that no API server has given out.
        given(&mut cluster, "10.96.0.7");
        address(&mut cluster, "203.0.113.9", json!({}));
        delete(&mut cluster, "more");
        assert_eq!(
            said(&cluster, "more"),
            is("True", ""),
            "servers are yet to hear"
        );
        cluster.advance(9);
        cluster.settle();
        assert!(said(&cluster, "more").is_some());
        cluster.advance(1);
        cluster.settle();
        assert_eq!(said(&cluster, "more"), None);
        assert_eq!(said(&cluster, "kubernetes"), is("True", ""));
    }

    #[test]
    fn a_range_stays_until_the_last_of_its_addresses_is_gone() {
        let mut cluster = cluster();
        given(&mut cluster, "203.0.113.7");
        given(&mut cluster, "fd00::7");
        delete(&mut cluster, "more");
        assert_eq!(said(&cluster, "more"), is("False", "Terminating"));
        cluster.advance(60);
        cluster.settle();
        assert_eq!(said(&cluster, "more"), is("False", "Terminating"));
        delete(&mut cluster, "203.0.113.7");
        assert_eq!(said(&cluster, "more"), is("False", "Terminating"));
        delete(&mut cluster, "fd00::7");
        assert_eq!(said(&cluster, "more"), None);
    }

    #[test]
    fn addresses_that_another_range_has_hold_nothing_up() {
        let mut cluster = cluster();
        given(&mut cluster, "203.0.113.7");
        delete(&mut cluster, "more");
        assert_eq!(said(&cluster, "more"), is("False", "Terminating"));
        cluster.advance(60);
        // Of this one 203.0.113.7 is the broadcast address, which it does not give out.
        range(&mut cluster, "part", &["203.0.113.0/29"]);
        cluster.settle();
        assert_eq!(said(&cluster, "more"), is("False", "Terminating"));
        range(&mut cluster, "whole", &["203.0.0.0/16"]);
        cluster.settle();
        assert_eq!(said(&cluster, "more"), None);
    }

    #[test]
    fn of_two_that_are_both_to_go_one_stays_with_the_addresses() {
        let mut cluster = cluster();
        range(&mut cluster, "same", &["203.0.113.0/24"]);
        cluster.settle();
        given(&mut cluster, "203.0.113.7");
        for name in ["same", "more"] {
            cluster.delete(name, Propagation::Background);
        }
        cluster.advance(60);
        cluster.settle();
        assert_eq!(said(&cluster, "more"), None);
        assert_eq!(said(&cluster, "same"), is("False", "Terminating"));
        delete(&mut cluster, "203.0.113.7");
        assert_eq!(said(&cluster, "same"), None);
    }

    #[test]
    fn a_condition_of_others_stays() {
        let mut cluster = cluster();
        cluster.edit::<ServiceCIDR>(&Key::cluster("more"), |range| {
            let status = range.status.get_or_insert_default();
            let other = Condition {
                type_: "Mine".into(),
                ..ready(Timestamp::UNIX_EPOCH)
            };
            status.conditions = Some(vec![other]);
        });
        cluster.settle();
        let range = cluster
            .snapshot
            .service_cidrs
            .get(&Key::cluster("more"))
            .unwrap();
        let conditions = range.status.as_ref().unwrap().conditions.as_ref().unwrap();
        let types: Vec<&str> = conditions.iter().map(|one| one.type_.as_str()).collect();
        assert_eq!(types, ["Mine", "Ready"]);
    }
}
