//! Deployments, ReplicaSets, ReplicationControllers, DaemonSets, StatefulSets: defaults, and selectors that must fit their
//! templates.

use serde_json::Value;

use super::place::Place;
use super::{Errors, Strategy, pod_spec, storage};
use crate::api::fields::Fields;
use crate::api::status::FieldError;
use crate::selector::LabelSelector;

const EMPTY_SELECTOR: &str = "empty selector is invalid for";
const NO_MATCH: &str = "`selector` does not match template `labels`";

pub fn default_template(object: &mut Value, pointer: &str) {
    if !object.has(pointer) {
        return;
    }
    object.object_mut(&format!("{pointer}/metadata"));
    object.object_mut(&format!("{pointer}/spec"));
    if let Some(spec) = object.pointer_mut(&format!("{pointer}/spec")) {
        pod_spec::default(spec);
    }
}

/// Pods of a set that keeps its number run until they are taken away.
fn always_restarts(template: &Place<'_>, errors: &mut Errors) {
    let policy = template.field("spec.restartPolicy");
    policy.one_of(&["Always"], errors);
    if template.field("spec.activeDeadlineSeconds").is_there() {
        let why = "activeDeadlineSeconds in ReplicaSet is not Supported";
        template
            .field("spec.activeDeadlineSeconds")
            .forbidden(why, errors);
    }
}

/// The selector must be there, must not select everything, and must select what the template makes.
fn validate_selector_and_template(object: &Value, kind: &str, errors: &mut Errors) {
    let spec = Place::root(object).field("spec");
    let (selector, template) = (spec.field("selector"), spec.field("template"));
    if selector.is_there() {
        super::metadata::validate_selector(&selector, errors);
    } else {
        selector.missing("", errors);
    }
    let labels = template.value().object("/metadata/labels");
    match LabelSelector::from_object(selector.value()) {
        Ok(parsed) if selector.is_there() && parsed.is_empty() => {
            selector.invalid(format!("{EMPTY_SELECTOR} {kind}"), errors);
        }
        Ok(parsed) if parsed.is_empty() || !parsed.matches_labels(labels) => {
            template
                .field("metadata.labels")
                .invalid_set(NO_MATCH, errors);
        }
        // Said field by field above.
        Ok(_) | Err(_) => {}
    }
    pod_spec::validate_template(&template, errors);
    always_restarts(&template, errors);
}

fn is_zero(place: &Place<'_>) -> bool {
    match place.value() {
        Value::String(text) => super::place::percent(text) == Some(0),
        Value::Null => true,
        value => value.as_i64() == Some(0),
    }
}

fn fixed_selector(object: &Value, old: &Value, errors: &mut Errors) {
    let selector = |object| Place::root(object).field("spec.selector");
    selector(object).unchanged(&selector(old), errors);
}

pub struct Deployment;

impl Strategy for Deployment {
    fn default(&self, deployment: &mut Value) {
        deployment.default("/spec/replicas", 1);
        deployment.default("/spec/strategy/type", "RollingUpdate");
        if deployment.text("/spec/strategy/type") == "RollingUpdate" {
            deployment.default("/spec/strategy/rollingUpdate/maxUnavailable", "25%");
            deployment.default("/spec/strategy/rollingUpdate/maxSurge", "25%");
        }
        deployment.default("/spec/revisionHistoryLimit", 10);
        deployment.default("/spec/progressDeadlineSeconds", 600);
        default_template(deployment, "/spec/template");
    }

    fn validate(&self, deployment: &Value, errors: &mut Errors) {
        let spec = Place::root(deployment).field("spec");
        for field in ["replicas", "minReadySeconds", "revisionHistoryLimit"] {
            spec.field(field).not_negative(errors);
        }
        validate_selector_and_template(deployment, "deployment", errors);
        let strategy = spec.field("strategy");
        strategy
            .field("type")
            .require_one_of(&["Recreate", "RollingUpdate"], errors);
        let rolling = strategy.field("rollingUpdate");
        if strategy.field("type").text() == "Recreate" {
            if rolling.is_there() {
                let why = "may not be specified when strategy `type` is 'Recreate'";
                rolling.forbidden(why, errors);
            }
        } else if rolling.is_there() {
            let (surge, unavailable) = (rolling.field("maxSurge"), rolling.field("maxUnavailable"));
            unavailable.share(errors);
            surge.share(errors);
            if is_zero(&surge) && is_zero(&unavailable) {
                unavailable.invalid("may not be 0 when `maxSurge` is 0", errors);
            }
            unavailable.at_most_all(errors);
        }
        let deadline = spec.field("progressDeadlineSeconds");
        deadline.not_negative(errors);
        if deadline.is_there() && deadline.int() <= spec.field("minReadySeconds").int() {
            deadline.invalid("must be greater than minReadySeconds", errors);
        }
    }

    fn validate_update(&self, deployment: &Value, old: &Value, errors: &mut Errors) {
        fixed_selector(deployment, old, errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

pub struct ReplicaSet;

impl Strategy for ReplicaSet {
    fn default(&self, set: &mut Value) {
        set.default("/spec/replicas", 1);
        default_template(set, "/spec/template");
    }

    fn validate(&self, set: &Value, errors: &mut Errors) {
        let spec = Place::root(set).field("spec");
        spec.field("replicas").not_negative(errors);
        spec.field("minReadySeconds").not_negative(errors);
        validate_selector_and_template(set, "deployment", errors);
    }

    fn validate_update(&self, set: &Value, old: &Value, errors: &mut Errors) {
        fixed_selector(set, old, errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["status.replicas"]
    }
}

/// The older ReplicaSet, whose selector is a map of labels.
pub struct ReplicationController;

impl Strategy for ReplicationController {
    fn default(&self, controller: &mut Value) {
        controller.default("/spec/replicas", 1);
        let labels = controller
            .pointer("/spec/template/metadata/labels")
            .cloned();
        if let Some(labels) =
            labels.filter(|labels| labels.as_object().is_some_and(|l| !l.is_empty()))
        {
            if controller
                .object("/spec/selector")
                .is_none_or(serde_json::Map::is_empty)
            {
                controller.set("/spec/selector", labels.clone());
            }
            if controller
                .object("/metadata/labels")
                .is_none_or(serde_json::Map::is_empty)
            {
                controller.set("/metadata/labels", labels);
            }
        }
        default_template(controller, "/spec/template");
    }

    fn validate(&self, controller: &Value, errors: &mut Errors) {
        let spec = Place::root(controller).field("spec");
        spec.field("replicas").not_negative(errors);
        spec.field("minReadySeconds").not_negative(errors);
        let (selector, template) = (spec.field("selector"), spec.field("template"));
        if selector.is_empty() {
            selector.missing("", errors);
        }
        super::metadata::validate_labels(selector.value().as_object(), selector.path(), errors);
        if !template.is_there() {
            return template.missing("", errors);
        }
        let labels = template.field("metadata.labels");
        if selector
            .entries()
            .any(|(key, value)| labels.value().get(key) != Some(value.value()))
        {
            labels.invalid_set(NO_MATCH, errors);
        }
        pod_spec::validate_template(&template, errors);
        always_restarts(&template, errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["status.replicas"]
    }
}

pub struct DaemonSet;

const TEMPLATE_GENERATION: &str = "deprecated.daemonset.template.generation";

impl Strategy for DaemonSet {
    fn default(&self, set: &mut Value) {
        set.default("/spec/updateStrategy/type", "RollingUpdate");
        if set.text("/spec/updateStrategy/type") == "RollingUpdate" {
            set.default("/spec/updateStrategy/rollingUpdate/maxUnavailable", 1);
            set.default("/spec/updateStrategy/rollingUpdate/maxSurge", 0);
        }
        set.default("/spec/revisionHistoryLimit", 10);
        default_template(set, "/spec/template");
    }

    fn prepare_create(&self, set: &mut Value) {
        set.object_mut("/metadata/annotations")
            .insert(TEMPLATE_GENERATION.to_owned(), "1".into());
    }

    /// Counts the changes of the template, as the field of older versions did that this annotation stands for.
    fn prepare_update(&self, set: &mut Value, old: &Value) {
        let counted = &old["metadata"]["annotations"][TEMPLATE_GENERATION];
        let counted: Option<u64> = counted.as_str().and_then(|text| text.parse().ok());
        let Some(counted) = counted else { return };
        let mut whole = set.clone();
        self.default(&mut whole);
        let changed = whole["spec"]["template"] != old["spec"]["template"];
        let counted = counted + u64::from(changed);
        set.object_mut("/metadata/annotations")
            .insert(TEMPLATE_GENERATION.to_owned(), counted.to_string().into());
    }

    fn validate(&self, set: &Value, errors: &mut Errors) {
        let spec = Place::root(set).field("spec");
        spec.field("minReadySeconds").not_negative(errors);
        spec.field("revisionHistoryLimit").not_negative(errors);
        validate_selector_and_template(set, "daemonset", errors);
        let strategy = spec.field("updateStrategy");
        strategy
            .field("type")
            .one_of(&["OnDelete", "RollingUpdate"], errors);
        let rolling = strategy.field("rollingUpdate");
        if strategy.field("type").text() != "RollingUpdate" || !rolling.is_there() {
            return;
        }
        let (surge, unavailable) = (rolling.field("maxSurge"), rolling.field("maxUnavailable"));
        surge.share(errors);
        unavailable.share(errors);
        surge.at_most_all(errors);
        unavailable.at_most_all(errors);
        match (is_zero(&surge), is_zero(&unavailable)) {
            (true, true) => unavailable.invalid("cannot be 0 when maxSurge is 0", errors),
            (false, false) => {
                surge.invalid("may not be set when maxUnavailable is non-zero", errors)
            }
            _ => {}
        }
    }

    fn validate_update(&self, set: &Value, old: &Value, errors: &mut Errors) {
        fixed_selector(set, old, errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

pub struct StatefulSet;

/// What of a StatefulSet's spec may change.
const STATEFUL_CHANGES: [&str; 7] = [
    "replicas",
    "ordinals",
    "template",
    "updateStrategy",
    "revisionHistoryLimit",
    "persistentVolumeClaimRetentionPolicy",
    "minReadySeconds",
];

impl Strategy for StatefulSet {
    fn default(&self, set: &mut Value) {
        set.default("/spec/replicas", 1);
        set.default("/spec/podManagementPolicy", "OrderedReady");
        set.default("/spec/updateStrategy/type", "RollingUpdate");
        if set.text("/spec/updateStrategy/type") == "RollingUpdate" {
            set.default("/spec/updateStrategy/rollingUpdate/partition", 0);
        }
        set.default("/spec/revisionHistoryLimit", 10);
        let retention = "/spec/persistentVolumeClaimRetentionPolicy";
        set.default(&format!("{retention}/whenDeleted"), "Retain");
        set.default(&format!("{retention}/whenScaled"), "Retain");
        default_template(set, "/spec/template");
        for claim in set.items_mut("/spec/volumeClaimTemplates") {
            // Clients see claims as they would be created.
            claim.default("/apiVersion", "v1");
            claim.default("/kind", "PersistentVolumeClaim");
            storage::default_claim(claim);
        }
    }

    fn validate(&self, set: &Value, errors: &mut Errors) {
        let spec = Place::root(set).field("spec");
        for field in [
            "replicas",
            "minReadySeconds",
            "revisionHistoryLimit",
            "ordinals.start",
        ] {
            spec.field(field).not_negative(errors);
        }
        spec.field("podManagementPolicy")
            .one_of(&["OrderedReady", "Parallel"], errors);
        let strategy = spec.field("updateStrategy");
        strategy
            .field("type")
            .one_of(&["OnDelete", "RollingUpdate"], errors);
        let rolling = strategy.field("rollingUpdate");
        if strategy.field("type").text() == "OnDelete" && rolling.is_there() {
            let why = "only allowed for updateStrategy 'RollingUpdate'";
            rolling.invalid(why, errors);
        }
        rolling.field("partition").not_negative(errors);
        let unavailable = rolling.field("maxUnavailable");
        unavailable.share(errors);
        unavailable.at_most_all(errors);
        if unavailable.is_there() && is_zero(&unavailable) {
            unavailable.invalid("cannot be 0", errors);
        }
        let retention = spec.field("persistentVolumeClaimRetentionPolicy");
        for field in ["whenDeleted", "whenScaled"] {
            retention.field(field).one_of(&["Delete", "Retain"], errors);
        }
        validate_selector_and_template(set, "statefulset", errors);
    }

    fn validate_update(&self, set: &Value, old: &Value, errors: &mut Errors) {
        let fixed = |set: &Value| {
            let mut spec = set.pointer("/spec").cloned().unwrap_or_default();
            for field in STATEFUL_CHANGES {
                spec.remove(&format!("/{field}"));
            }
            // Equal to what is there by default.
            spec.default("/serviceName", "");
            spec
        };
        if fixed(set) != fixed(old) {
            let why = "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden";
            errors.push(FieldError::forbidden("spec", why));
        }
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

/// A snapshot of a template: written once.
pub struct ControllerRevision;

impl Strategy for ControllerRevision {
    fn validate(&self, revision: &Value, errors: &mut Errors) {
        let root = Place::root(revision);
        root.field("revision").not_negative(errors);
        if !root.field("data").is_there() {
            root.field("data").missing("data is mandatory", errors);
        }
    }

    fn validate_update(&self, revision: &Value, old: &Value, errors: &mut Errors) {
        let data = |object| Place::root(object).field("data");
        data(revision).unchanged(&data(old), errors);
    }
}

pub struct PodTemplate;

impl Strategy for PodTemplate {
    fn default(&self, object: &mut Value) {
        default_template(object, "/template");
    }

    fn validate(&self, object: &Value, errors: &mut Errors) {
        pod_spec::validate_template(&Place::root(object).field("template"), errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::told;
    use super::*;
    use serde_json::json;

    fn deployment(labels: Value) -> Value {
        let mut object = json!({"metadata": {"name": "web"}, "spec": {
            "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
        Deployment.default(&mut object);
        object
    }

    #[test]
    fn a_deployment_is_defaulted_and_then_valid() {
        let object = deployment(json!({"app": "web"}));
        assert_eq!(object["spec"]["replicas"], 1);
        assert_eq!(
            object["spec"]["strategy"]["rollingUpdate"]["maxSurge"],
            "25%"
        );
        assert_eq!(
            object["spec"]["template"]["spec"]["containers"][0]["imagePullPolicy"],
            "Always"
        );
        assert_eq!(told(&Deployment, &object), Vec::<String>::new());
    }

    #[test]
    fn a_selector_that_misses_its_template_is_refused() {
        assert_eq!(
            told(&Deployment, &deployment(json!({"app": "other"}))),
            [
                r#"spec.template.metadata.labels: Invalid value: {"app":"other"}: `selector` does not match template `labels`"#
            ]
        );
        let mut everything = deployment(json!({"app": "web"}));
        everything.set("/spec/selector", json!({}));
        assert_eq!(
            told(&Deployment, &everything),
            ["spec.selector: Invalid value: {}: empty selector is invalid for deployment"]
        );
    }

    #[test]
    fn a_rollout_must_be_able_to_begin() {
        let mut object = deployment(json!({"app": "web"}));
        object.set(
            "/spec/strategy/rollingUpdate",
            json!({"maxSurge": 0, "maxUnavailable": "0%"}),
        );
        object.set("/spec/minReadySeconds", 600);
        assert_eq!(
            told(&Deployment, &object),
            [
                r#"spec.strategy.rollingUpdate.maxUnavailable: Invalid value: "0%": may not be 0 when `maxSurge` is 0"#,
                "spec.progressDeadlineSeconds: Invalid value: 600: must be greater than minReadySeconds",
            ]
        );
    }

    #[test]
    fn a_replication_controller_takes_its_selector_from_its_template() {
        let mut object = json!({"metadata": {"name": "rc"}, "spec": {"template": {
            "metadata": {"labels": {"app": "x"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
        ReplicationController.default(&mut object);
        assert_eq!(object["spec"]["selector"], json!({"app": "x"}));
        assert_eq!(object["metadata"]["labels"], json!({"app": "x"}));
        assert_eq!(told(&ReplicationController, &object), Vec::<String>::new());
        object.set("/spec/selector", json!({"app": "y"}));
        assert_eq!(told(&ReplicationController, &object).len(), 1);
    }

    #[test]
    fn only_some_of_a_stateful_set_changes() {
        let mut old = json!({"metadata": {"name": "s"}, "spec": {"serviceName": "s", "selector": {"matchLabels": {"a": "b"}},
            "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}},
            "volumeClaimTemplates": [{"metadata": {"name": "d"}, "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1"}}}}]}});
        StatefulSet.default(&mut old);
        assert_eq!(
            old["spec"]["volumeClaimTemplates"][0]["spec"]["volumeMode"],
            "Filesystem"
        );
        assert_eq!(told(&StatefulSet, &old), Vec::<String>::new());
        let mut new = old.clone();
        new.set("/spec/replicas", 5);
        let mut errors = Vec::new();
        StatefulSet.validate_update(&new, &old, &mut errors);
        assert_eq!(errors, []);
        new.set("/spec/serviceName", "other");
        StatefulSet.validate_update(&new, &old, &mut errors);
        assert!(
            errors[0]
                .message
                .starts_with("Forbidden: updates to statefulset spec")
        );
    }
}
