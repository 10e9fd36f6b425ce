//! Deletion: at once, after a grace period, or when the last finalizer is gone.

use bytes::Bytes;
use http::{StatusCode, request::Parts};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::fields::{self, Fields};
use super::reply::Answer;
use super::request::{Form, ListOptions, Query, Target, WriteOptions, check_dry_run};
use super::status::{FieldError, Status, Subject};
use super::{Api, Call, body, object, reply, strategy};
use crate::registry::Resource;
use crate::store::{Expect, StoreError};

/// How often a deletion is tried again when others write the object meanwhile.
const CONFLICT_RETRIES: usize = 16;

/// What a deletion is asked to do, from body and query.
#[derive(Debug, Clone, Default)]
pub struct DeleteOptions {
    grace_s: Option<i64>,
    uid: String,
    resource_version: String,
    propagation: String,
    dry_run: bool,
}

impl DeleteOptions {
    fn parse(parts: &Parts, body: &[u8], query: &Query) -> Result<Self, Status> {
        let validation = crate::codec::FieldValidation::Ignore;
        let body = match body {
            [] => Value::Null,
            body => {
                // Clients send the options in their own group's version or in v1's; the fields are the same.
                let media = crate::codec::MediaType::from_content_type(body::content_type(parts));
                let media =
                    media.ok_or_else(|| Status::unsupported_media_type(&["application/json"]))?;
                let decoded = crate::codec::decode(body, media, "v1", "DeleteOptions", validation);
                let decoded = decoded.map_err(|error| Status::bad_request(error.reason))?;
                check_options_kind(&decoded.value)?;
                decoded.value
            }
        };
        let text = |pointer: &str, key: &str| match body.text(pointer) {
            "" => query.get(key).to_owned(),
            text => text.to_owned(),
        };
        let mut propagation = text("/propagationPolicy", "propagationPolicy");
        let mut errors = Vec::new();
        let orphans = body.has("/orphanDependents") || !query.get("orphanDependents").is_empty();
        if orphans && !propagation.is_empty() {
            let why = "orphanDependents and deletionPropagation cannot be both set";
            let given = propagation.as_str();
            errors.push(FieldError::invalid("propagationPolicy", given, why));
        } else if orphans {
            let orphan = body.flag("/orphanDependents") || query.flag("orphanDependents");
            propagation = if orphan { "Orphan" } else { "Background" }.to_owned();
        }
        if !["", "Orphan", "Background", "Foreground"].contains(&propagation.as_str()) {
            errors.push(FieldError::unsupported_as_listed(
                "propagationPolicy",
                propagation.as_str(),
                &["Foreground", "Background", "Orphan", "nil"],
            ));
        }
        let sent = body.items("/dryRun").iter().filter_map(Value::as_str);
        let dry_run: Vec<&str> = query.all("dryRun").chain(sent).collect();
        check_dry_run(&dry_run, &mut errors);
        if !errors.is_empty() {
            return Err(Status::invalid("meta.k8s.io", "DeleteOptions", "", errors));
        }
        let grace_s = match body.pointer("/gracePeriodSeconds").and_then(Value::as_i64) {
            Some(grace) => Some(grace),
            None => query.number("gracePeriodSeconds")?,
        };
        Ok(Self {
            // A negative period means at once, one second is the least that upstream gives.
            grace_s: grace_s.map(|grace| if grace < 0 { 1 } else { grace }),
            uid: body.text("/preconditions/uid").to_owned(),
            resource_version: body.text("/preconditions/resourceVersion").to_owned(),
            propagation,
            dry_run: !dry_run.is_empty(),
        })
    }
}

/// Refuses a body that is no DeleteOptions; their group is that of whoever sends them.
fn check_options_kind(options: &Value) -> Result<(), Status> {
    let (version, kind) = (options.text("/apiVersion"), options.text("/kind"));
    if kind == "DeleteOptions" {
        return Ok(());
    }
    Err(Status::bad_request(format!(
        "no kind {kind:?} is registered for version {version:?} in scheme \"pkg/apis/meta/internalversion/scheme/register.go:27\""
    )))
}

/// Whether a deletion is answered with the object that is gone, as upstream and its schema have it, not with a Status:
/// clients with types refuse the other.
fn returns_deleted(resource: &Resource) -> bool {
    match resource.group {
        "" => matches!(
            resource.plural,
            "namespaces"
                | "persistentvolumeclaims"
                | "persistentvolumes"
                | "pods"
                | "podtemplates"
                | "resourcequotas"
                | "serviceaccounts"
                | "services"
        ),
        "storage.k8s.io" => resource.plural != "csistoragecapacities",
        "resource.k8s.io" => true,
        _ => false,
    }
}

/// What became of a deletion.
pub enum Deleted {
    Gone(Value),
    /// It waits for its grace period or its finalizers.
    Waiting(Value),
}

impl Api {
    pub(super) async fn delete(
        &self,
        call: &Call,
        parts: &Parts,
        body: Bytes,
    ) -> Result<Answer, Status> {
        let form = Form::negotiate(&parts.headers, &call.query)?;
        let options = DeleteOptions::parse(parts, &body, &call.query)?;
        match self.delete_object(&call.target, &options).await? {
            Deleted::Waiting(object) => {
                Ok(reply::object(StatusCode::OK, &call.target, form, object))
            }
            Deleted::Gone(object) if returns_deleted(call.target.resource) => {
                Ok(reply::object(StatusCode::OK, &call.target, form, object))
            }
            Deleted::Gone(object) => {
                let resource = call.target.resource;
                let mut details = json!({"name": fields::name(&object), "kind": resource.plural, "uid": object["metadata"]["uid"]});
                if !resource.group.is_empty() {
                    details["group"] = resource.group.into();
                }
                let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details});
                Ok(reply::json(StatusCode::OK, &status))
            }
        }
    }

    pub(super) async fn delete_collection(
        &self,
        call: &Call,
        parts: &Parts,
        body: Bytes,
    ) -> Result<Answer, Status> {
        let options = DeleteOptions::parse(parts, &body, &call.query)?;
        let selected = ListOptions::parse(&call.query, call.target.resource)?;
        strategy::check_selectable(&call.target, &selected.fields)?;
        let listing = self.select(&call.target, &selected).await?;
        let resource = call.target.resource;
        let mut items = Vec::with_capacity(listing.records.len());
        for record in &listing.records {
            let object = call.target.decode(record)?;
            let target = Target {
                namespace: Some(fields::namespace(&object))
                    .filter(|ns| !ns.is_empty())
                    .map(str::to_owned),
                name: Some(fields::name(&object).to_owned()),
                ..call.target.clone()
            };
            match self.delete_object(&target, &options).await {
                Ok(Deleted::Gone(object) | Deleted::Waiting(object)) => {
                    items.push(object::from_stored(object, resource))
                }
                Err(status) if status.code == StatusCode::NOT_FOUND => {}
                Err(status) => return Err(status),
            }
        }
        let list = json!({"kind": format!("{}List", resource.kind), "apiVersion": resource.api_version(),
            "metadata": {"resourceVersion": listing.revision.to_string()}, "items": items});
        Ok(reply::json(StatusCode::OK, &list))
    }

    /// Deletes the object of a target, or begins to.
    pub(super) async fn delete_object(
        &self,
        target: &Target,
        options: &DeleteOptions,
    ) -> Result<Deleted, Status> {
        strategy::of(target.resource).check_delete(target)?;
        let key = target.key()?;
        let mut place = self.contention.place(&key);
        for attempt in 0..CONFLICT_RETRIES {
            place.wait(attempt > 0).await;
            let record = self.record_at(&key, target).await?;
            let old = target.decode(&record)?;
            options.check(target, &old)?;
            let grace_s = strategy::of(target.resource).grace_s(&old, options.grace_s);
            let mut new = old.clone();
            mark(&mut new, grace_s, &options.propagation);
            strategy::of(target.resource).mark_deleted(&mut new);
            let held = grace_s > 0
                || !new.items("/metadata/finalizers").is_empty()
                || !new.items("/spec/finalizers").is_empty();
            if options.dry_run {
                return Ok(if held {
                    Deleted::Waiting(new)
                } else {
                    Deleted::Gone(new)
                });
            }
            if held && new == old {
                return Ok(Deleted::Waiting(old));
            }
            let done = if held {
                let put = self
                    .store
                    .put(
                        &record.key,
                        object::encode(new),
                        Expect::Revision(record.revision),
                    )
                    .await;
                put.map(|record| target.decode(&record).map(Deleted::Waiting))
            } else {
                let deleted = self.remove(target, &record).await;
                deleted.map(|record| {
                    // What was deleted is what was read: its revision is another one.
                    let mut last = old;
                    last.set("/metadata/resourceVersion", record.revision.to_string());
                    Ok(Deleted::Gone(last))
                })
            };
            match done {
                Ok(deleted) => return deleted,
                Err(StoreError::Conflict { .. }) => {}
                Err(StoreError::NotFound { .. }) => {
                    return Err(Status::not_found(target.subject()));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Status::modified(target.subject()))
    }

    /// Deletes an object with the options of a request that is not a DELETE (eviction).
    pub(super) async fn delete_as_asked(
        &self,
        target: &Target,
        options: &Value,
        write: &WriteOptions,
    ) -> Result<(), Status> {
        let options = DeleteOptions {
            grace_s: options
                .pointer("/gracePeriodSeconds")
                .and_then(Value::as_i64),
            uid: options.text("/preconditions/uid").to_owned(),
            resource_version: options.text("/preconditions/resourceVersion").to_owned(),
            propagation: options.text("/propagationPolicy").to_owned(),
            dry_run: write.dry_run,
        };
        self.delete_object(target, &options).await.map(drop)
    }
}

impl DeleteOptions {
    fn check(&self, target: &Target, object: &Value) -> Result<(), Status> {
        let differs = |what: &str, wanted: &str, present: &str, then: &str| {
            let why = format!(
                "the {what} in the precondition ({wanted}) does not match the {what} in record ({present}). The object might have been {then}"
            );
            // Named by its kind, as upstream has it here and nowhere else.
            let subject = Subject {
                resource: target.resource.kind,
                ..target.subject()
            };
            Err(Status::conflict(subject, why))
        };
        let (uid, revision) = (
            object.text("/metadata/uid"),
            object.text("/metadata/resourceVersion"),
        );
        if !self.uid.is_empty() && self.uid != uid {
            return differs("UID", &self.uid, uid, "deleted and then recreated");
        }
        if !self.resource_version.is_empty() && self.resource_version != revision {
            let wanted = &self.resource_version;
            return differs("ResourceVersion", wanted, revision, "modified");
        }
        Ok(())
    }
}

/// Marks an object as being deleted. A grace period that runs already may only become shorter.
fn mark(object: &mut Value, grace_s: i64, propagation: &str) {
    let finalizers = object
        .object_mut("/metadata")
        .entry("finalizers")
        .or_insert_with(|| json!([]));
    if let Some(finalizers) = finalizers.as_array_mut() {
        let wanted = match propagation {
            "Orphan" => Some("orphan"),
            "Foreground" => Some("foregroundDeletion"),
            _ => None,
        };
        if !propagation.is_empty() {
            finalizers
                .retain(|f| !["orphan", "foregroundDeletion"].contains(&f.as_str().unwrap_or("")));
            finalizers.extend(wanted.map(Value::from));
        }
        if finalizers.is_empty() {
            object.remove("/metadata/finalizers");
        }
    }
    let running = object.has("/metadata/deletionTimestamp");
    if running && object.int("/metadata/deletionGracePeriodSeconds") <= grace_s {
        return;
    }
    let since = match object
        .text("/metadata/deletionTimestamp")
        .parse::<Timestamp>()
    {
        // Counted from when the deletion was first asked for.
        Ok(due) if running => {
            due - SignedDuration::from_secs(object.int("/metadata/deletionGracePeriodSeconds"))
        }
        _ => Timestamp::now(),
    };
    object.set(
        "/metadata/deletionTimestamp",
        fields::timestamp(since + SignedDuration::from_secs(grace_s)),
    );
    object.set("/metadata/deletionGracePeriodSeconds", grace_s);
    if !running && object.has("/metadata/generation") {
        object.set(
            "/metadata/generation",
            object.int("/metadata/generation") + 1,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grace_period_only_shrinks() {
        let mut object = json!({"metadata": {"name": "a", "generation": 1}});
        mark(&mut object, 30, "");
        let due = object["metadata"]["deletionTimestamp"].clone();
        assert_eq!(object["metadata"]["deletionGracePeriodSeconds"], 30);
        assert_eq!(object["metadata"]["generation"], 2);
        mark(&mut object, 60, "");
        assert_eq!(object["metadata"]["deletionTimestamp"], due);
        mark(&mut object, 0, "");
        assert_eq!(object["metadata"]["deletionGracePeriodSeconds"], 0);
        assert!(object["metadata"]["deletionTimestamp"].as_str() < due.as_str());
        assert_eq!(object["metadata"]["generation"], 2);
    }

    #[test]
    fn the_propagation_policy_becomes_a_finalizer() {
        let mut object = json!({"metadata": {"finalizers": ["orphan", "example.com/mine"]}});
        mark(&mut object, 0, "Foreground");
        assert_eq!(
            object["metadata"]["finalizers"],
            json!(["example.com/mine", "foregroundDeletion"])
        );
        mark(&mut object, 0, "Background");
        assert_eq!(
            object["metadata"]["finalizers"],
            json!(["example.com/mine"])
        );
    }
}
