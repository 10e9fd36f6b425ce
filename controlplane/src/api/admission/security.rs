//! PodSecurity: the levels that a namespace's labels name, enforced for pods and told of for what makes pods.

use std::collections::BTreeMap;

use serde_json::Value;

use super::levels::violations;
use super::stored;
use crate::api::Api;
use crate::api::fields::{self, Fields};
use crate::api::request::{Target, Warnings, WriteOptions};
use crate::api::status::{FieldError, Status};
use crate::api::strategy;

const LEVELS: [&str; 3] = ["privileged", "baseline", "restricted"];
/// Annotations of audit events, as upstream names them: the level that held, and what broke the one to be audited.
const ENFORCED: &str = "pod-security.kubernetes.io/enforce-policy";
const VIOLATIONS: &str = "pod-security.kubernetes.io/audit-violations";
/// Of a namespace whose level becomes stricter, as many pods are looked at, as upstream.
const PODS_CHECKED_MAX: usize = 3000;

/// What one of a namespace's labels asks for, and by the rules of which version.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Policy {
    level: String,
    version: String,
}

impl Policy {
    /// Of `enforce`, `warn` or `audit`. Without a label nothing is asked for; a level that is not known is the strictest.
    fn of(namespace: &Value, mode: &str) -> Self {
        let label = |name: &str| {
            let pointer = format!("/metadata/labels/pod-security.kubernetes.io~1{name}");
            namespace.text(&pointer).to_owned()
        };
        let level = match label(mode) {
            level if level.is_empty() => "privileged".to_owned(),
            level if LEVELS.contains(&level.as_str()) => level,
            _ => "restricted".to_owned(),
        };
        let version = match label(&format!("{mode}-version")) {
            version if version_is_valid(&version) => version,
            _ => "latest".to_owned(),
        };
        Self { level, version }
    }

    /// What of a pod breaks it, after some words.
    fn verdict(&self, pod: &Value, words: &str) -> Option<String> {
        let faults = violations(&self.level, pod);
        let Self { level, version } = self;
        let faults = Some(faults.join(", ")).filter(|faults| !faults.is_empty())?;
        Some(format!(
            "{words} PodSecurity \"{level}:{version}\": {faults}"
        ))
    }
}

fn version_is_valid(version: &str) -> bool {
    let minor = version.strip_prefix("v1.");
    version == "latest"
        || minor.is_some_and(|minor| {
            minor.parse::<u16>().is_ok() && (minor == "0" || !minor.starts_with(['0', '+']))
        })
}

async fn namespace_of(api: &Api, target: &Target) -> Result<Value, Status> {
    let name = target.namespace.as_deref().unwrap_or("");
    let found = api.lookup("", "namespaces", None, name).await?;
    Ok(found.unwrap_or_default())
}

/// Refuses a pod that breaks the level its namespace enforces, and tells of the one it warns of and of the one it audits.
pub async fn check_pod(
    api: &Api,
    options: &WriteOptions,
    target: &Target,
    pod: &Value,
) -> Result<(), Status> {
    let namespace = namespace_of(api, target).await?;
    let enforced = Policy::of(&namespace, "enforce");
    if let Some(notes) = &options.notes {
        let Policy { level, version } = &enforced;
        notes.note(ENFORCED, format!("{level}:{version}"));
    }
    if let Some(why) = enforced.verdict(pod, "violates") {
        note_violations(options, &namespace, pod);
        let subject = target.subject_named(fields::name(pod));
        return Err(Status::forbidden(subject, why));
    }
    tell(options, &namespace, pod);
    Ok(())
}

/// Tells of what makes pods that would break a level that its namespace warns of or audits. The pods themselves are refused.
pub async fn check_template(
    api: &Api,
    options: &WriteOptions,
    target: &Target,
    object: &Value,
) -> Result<(), Status> {
    let template = strategy::pod_at(target.resource)
        .and_then(|(pointer, _)| object.pointer(pointer))
        .filter(|template| template.has("/spec"));
    if let Some(template) = template {
        let namespace = namespace_of(api, target).await?;
        tell(options, &namespace, template);
    }
    Ok(())
}

/// Clients hear of the level that is warned of, the audit log of the one that is audited.
fn tell(options: &WriteOptions, namespace: &Value, pod: &Value) {
    note_violations(options, namespace, pod);
    let broken = Policy::of(namespace, "warn").verdict(pod, "would violate");
    options.warnings.add(broken);
}

fn note_violations(options: &WriteOptions, namespace: &Value, pod: &Value) {
    let Some(notes) = &options.notes else { return };
    if let Some(broken) = Policy::of(namespace, "audit").verdict(pod, "would violate") {
        notes.note(VIOLATIONS, broken);
    }
}

/// Whether a change of a pod can make a difference to its level: little of a pod can change.
pub fn matters(pod: &Value, old: &Value) -> bool {
    let looked_at = |pod: &Value| {
        let lists = ["initContainers", "containers"].map(|list| {
            let containers = pod.items(&format!("/spec/{list}")).iter();
            let images = containers.map(|container| container.text("/image").to_owned());
            images.collect::<Vec<_>>()
        });
        let annotations = pod.object("/metadata/annotations").into_iter().flatten();
        let seccomp: Vec<_> = annotations
            .filter(|(key, _)| key.contains("seccomp") || key.contains("apparmor"))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        (lists, seccomp)
    };
    looked_at(pod) != looked_at(old)
}

/// A namespace's labels must name levels that there are; pods that break a new level are told of.
pub async fn check_namespace(
    api: &Api,
    namespace: &Value,
    old: Option<&Value>,
    warnings: &Warnings,
) -> Result<(), Status> {
    let errors = faults_of_labels(namespace);
    let known = old.map(faults_of_labels).unwrap_or_default();
    if !errors.is_empty() && errors != known {
        let name = fields::name(namespace);
        return Err(Status::invalid("", "Namespace", name, errors));
    }
    let Some(old) = old else { return Ok(()) };
    let (new, before) = (Policy::of(namespace, "enforce"), Policy::of(old, "enforce"));
    let rank = |policy: &Policy| LEVELS.iter().position(|level| *level == policy.level);
    if new == before || rank(&new) <= rank(&before) {
        return Ok(());
    }
    let name = fields::name(namespace);
    let pods = stored(api, "", "pods", Some(name)).await?;
    warnings.add(broken_by(&new, name, &pods));
    Ok(())
}

fn faults_of_labels(namespace: &Value) -> Vec<FieldError> {
    let labels = namespace.object("/metadata/labels").into_iter().flatten();
    let faults = labels.filter_map(|(key, value)| {
        let mode = key.strip_prefix("pod-security.kubernetes.io/")?;
        let value = value.as_str().unwrap_or("");
        let why = match mode {
            "enforce" | "warn" | "audit" if !LEVELS.contains(&value) => {
                "must be one of privileged, baseline, restricted"
            }
            "enforce-version" | "warn-version" | "audit-version" if !version_is_valid(value) => {
                "must be \"latest\" or \"v1.x\""
            }
            _ => return None,
        };
        Some(FieldError::invalid(
            format!("metadata.labels[{key}]"),
            value,
            why,
        ))
    });
    faults.collect()
}

/// What to say of pods that are there and break a new level: by what they break, with the first pod's name.
fn broken_by(policy: &Policy, namespace: &str, pods: &[Value]) -> Vec<String> {
    let mut told = Vec::new();
    let mut broken: BTreeMap<String, (String, usize)> = BTreeMap::new();
    for pod in pods.iter().take(PODS_CHECKED_MAX) {
        let faults = violations(&policy.level, pod);
        let reasons: Vec<&str> = faults
            .iter()
            .map(|fault| fault.split(" (").next().unwrap_or(fault))
            .collect();
        if !reasons.is_empty() {
            let first = || (fields::name(pod).to_owned(), 0);
            broken.entry(reasons.join(", ")).or_insert_with(first).1 += 1;
        }
    }
    if pods.len() > PODS_CHECKED_MAX {
        told.push(format!(
            "new PodSecurity enforce level only checked against the first {PODS_CHECKED_MAX} of {} existing pods",
            pods.len()
        ));
    }
    if !broken.is_empty() {
        let Policy { level, version } = policy;
        told.push(format!(
            "existing pods in namespace {namespace:?} violate the new PodSecurity enforce level \"{level}:{version}\""
        ));
    }
    let mut lines: Vec<String> = broken
        .into_iter()
        .map(|(reasons, (pod, count))| match count {
            1 => format!("{pod}: {reasons}"),
            2 => format!("{pod} (and 1 other pod): {reasons}"),
            count => format!("{pod} (and {} other pods): {reasons}", count - 1),
        })
        .collect();
    lines.sort();
    told.append(&mut lines);
    told
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn labels_name_levels_and_versions_that_there_are() {
        let namespace = |labels: Value| json!({"metadata": {"name": "n", "labels": labels}});
        let good = json!({"pod-security.kubernetes.io/enforce": "baseline",
            "pod-security.kubernetes.io/enforce-version": "v1.36", "pod-security.kubernetes.io/warn": "restricted", "x": "y"});
        assert!(faults_of_labels(&namespace(good)).is_empty());
        let bad = namespace(json!({"pod-security.kubernetes.io/enforce": "strict",
            "pod-security.kubernetes.io/warn-version": "1.36"}));
        let faults = faults_of_labels(&bad);
        assert_eq!(faults.len(), 2);
        assert_eq!(
            faults[0].message,
            "Invalid value: \"strict\": must be one of privileged, baseline, restricted"
        );
        let policy = Policy::of(&bad, "enforce");
        assert_eq!(
            policy.level, "restricted",
            "what is not known is taken to be strict"
        );
    }

    #[test]
    fn pods_that_break_a_new_level_are_named_once_per_reason() {
        let pod = |name: &str, spec: Value| json!({"metadata": {"name": name}, "spec": spec});
        let host = json!({"hostNetwork": true, "containers": []});
        let pods = [
            pod("a", host.clone()),
            pod("b", host),
            pod("c", json!({"containers": [{"name": "c"}]})),
        ];
        let policy = Policy {
            level: "baseline".into(),
            version: "latest".into(),
        };
        assert_eq!(
            broken_by(&policy, "shop", &pods),
            [
                "existing pods in namespace \"shop\" violate the new PodSecurity enforce level \"baseline:latest\"",
                "a (and 1 other pod): host namespaces",
            ]
        );
    }
}
