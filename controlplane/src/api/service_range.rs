//! The ServiceCIDR `kubernetes`: the cluster's own ranges of Service addresses, which each server sees to that it is there.

use serde_json::{Value, json};

use super::Api;
use super::bootstrap::{ensure, options, target};
use super::fields::{self, Fields};
use super::notices::Notice;
use super::status::Status;
use super::write::Part;

/// Name of the ServiceCIDR that is made of `--service-cidr`.
pub const DEFAULT: &str = "kubernetes";
const PATH: &str = "/apis/networking.k8s.io/v1/servicecidrs";
const REPORTER: &str = "kubernetes-service-cidr-controller";

/// Makes it if it is not there. One that is there may gain a second family; otherwise it stays, and what is wrong with it is told.
pub async fn keep(api: &Api) -> Result<(), Status> {
    let cidrs: Vec<String> = api
        .config
        .service_cidrs
        .iter()
        .map(ToString::to_string)
        .collect();
    let own = json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": DEFAULT},
        "spec": {"cidrs": cidrs}});
    let target = target(PATH, &own)?;
    ensure(api, PATH, own).await?;
    let Some(record) = api.store.get(&target.key()?).await? else {
        // Somebody has taken it away again; it is looked after all the time.
        return Ok(());
    };
    let known = target.decode(&record)?;
    let notice = |reason: &str, message: String| Notice {
        about: json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "name": DEFAULT,
            "uid": known.text("/metadata/uid")}),
        what: String::new(),
        reason: reason.to_owned(),
        message,
        reporter: REPORTER,
    };
    if gains_a_family(&known, &cidrs) {
        let grow = |old: &Value| {
            let mut new = old.clone();
            if gains_a_family(old, &cidrs) {
                new.set("/spec/cidrs", cidrs.clone());
            }
            Ok(new)
        };
        let grown = api.modify(&target, &options(), Part::Main, grow).await;
        if let Err(status) = grown {
            let message = format!(
                "The default ServiceCIDR can not be upgraded from {} to dual stack {cidrs:?} : {}",
                cidrs[0], status.message
            );
            api.warn(&[notice("KubernetesDefaultServiceCIDRError", message)])
                .await;
        }
        return Ok(());
    }
    // Deletion is the controllers' business.
    if known.has("/metadata/deletionTimestamp") {
        return Ok(());
    }
    let named = known.items("/spec/cidrs");
    if named != cidrs {
        let message = format!(
            "The default ServiceCIDR {} does not match the controller flag configurations {cidrs:?}",
            json!(named)
        );
        api.warn(&[notice("KubernetesDefaultServiceCIDRInconsistent", message)])
            .await;
        return Ok(());
    }
    match readiness(&known) {
        Some(ready) if ready.text("/status") == "True" => Ok(()),
        // Whoever has said so may know why; it is not for this server to say otherwise.
        Some(ready) if ready.text("/status") == "False" => {
            let message = format!("Configuration matches, but {}", ready.text("/message"));
            let reason = match ready.text("/reason") {
                "" => "KubernetesDefaultServiceCIDRError",
                reason => reason,
            };
            api.warn(&[notice(reason, message)]).await;
            Ok(())
        }
        _ => {
            let say = |old: &Value| {
                let mut new = old.clone();
                if readiness(&new).is_none_or(|ready| ready.text("/status") == "Unknown") {
                    let ready = json!({"type": "Ready", "status": "True", "reason": "",
                        "message": "Kubernetes default Service CIDR is ready",
                        "lastTransitionTime": fields::now()});
                    let others = old.items("/status/conditions").iter();
                    let others = others.filter(|one| one.text("/type") != "Ready").cloned();
                    let all: Vec<Value> = others.chain([ready]).collect();
                    new.set("/status/conditions", all);
                }
                Ok(new)
            };
            api.modify(&target, &options(), Part::Status, say)
                .await
                .map(drop)
        }
    }
}

fn readiness(range: &Value) -> Option<&Value> {
    let mut conditions = range.items("/status/conditions").iter();
    conditions.find(|one| one.text("/type") == "Ready")
}

/// Whether the ranges that are wanted are those that are there, and one of the other family.
fn gains_a_family(known: &Value, wanted: &[String]) -> bool {
    let known = known.items("/spec/cidrs");
    known.len() == 1 && wanted.len() == 2 && known[0] == wanted[0]
}
