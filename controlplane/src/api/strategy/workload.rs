//! Deployments, ReplicaSets, DaemonSets, StatefulSets: defaults, and selectors that must fit their templates.

use serde_json::{Map, Value, json};

use super::{Errors, Strategy, immutable, not_negative, one_of, pod_spec};
use crate::api::fields::Fields;
use crate::api::status::FieldError;
use crate::selector::LabelSelector;

fn default_template(object: &mut Value) {
    object.object_mut("/spec/template/metadata");
    if let Some(spec) = object.pointer_mut("/spec/template/spec") {
        pod_spec::default(spec);
    }
}

/// The selector must be there, must not select everything, and must select what the template makes.
fn validate_selector_and_template(object: &Value, errors: &mut Errors) {
    let template = object.pointer("/spec/template").unwrap_or(&Value::Null);
    let Some(selector) = object
        .pointer("/spec/selector")
        .filter(|selector| !selector.is_null())
    else {
        errors.push(FieldError::required("spec.selector", ""));
        let why = "`selector` does not match template `labels`";
        let labels = template
            .pointer("/metadata/labels")
            .cloned()
            .unwrap_or(json!({}));
        errors.push(FieldError::invalid(
            "spec.template.metadata.labels",
            labels,
            why,
        ));
        return pod_spec::validate_template(template, "spec.template", errors);
    };
    match LabelSelector::from_object(selector) {
        Ok(parsed) if parsed.is_empty() => {
            let why = "empty selector is invalid for this kind";
            errors.push(FieldError::invalid("spec.selector", selector.clone(), why));
        }
        Ok(parsed) if !parsed.matches_labels(template.object("/metadata/labels")) => {
            let labels = template
                .pointer("/metadata/labels")
                .cloned()
                .unwrap_or(json!({}));
            let why = "`selector` does not match template `labels`";
            errors.push(FieldError::invalid(
                "spec.template.metadata.labels",
                labels,
                why,
            ));
        }
        Ok(_) => {}
        Err(error) => errors.push(FieldError::invalid(
            "spec.selector",
            selector.clone(),
            error.to_string(),
        )),
    }
    pod_spec::validate_template(template, "spec.template", errors);
    if template.text("/spec/restartPolicy") != "Always" {
        let given = template.text("/spec/restartPolicy");
        errors.push(FieldError::unsupported(
            "spec.template.spec.restartPolicy",
            given,
            &["Always"],
        ));
    }
}

/// A count, or a percentage of the replicas.
fn validate_share(object: &Value, pointer: &str, errors: &mut Errors) {
    let field = pointer.trim_start_matches('/').replace('/', ".");
    match object.pointer(pointer) {
        Some(Value::Number(number)) if number.as_i64().unwrap_or(-1) < 0 => {
            errors.push(FieldError::invalid(
                field,
                object.int(pointer),
                "must be greater than or equal to 0",
            ));
        }
        Some(Value::String(text)) => {
            let share = text
                .strip_suffix('%')
                .and_then(|digits| digits.parse::<u32>().ok());
            if share.is_none() {
                let why = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')";
                errors.push(FieldError::invalid(field, text.as_str(), why));
            }
        }
        _ => {}
    }
}

fn is_zero(object: &Value, pointer: &str) -> bool {
    match object.pointer(pointer) {
        Some(Value::String(text)) => text == "0%",
        Some(value) => value.as_i64() == Some(0),
        None => true,
    }
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
        default_template(deployment);
    }

    fn validate(&self, deployment: &Value, errors: &mut Errors) {
        not_negative(deployment, "/spec/replicas", errors);
        not_negative(deployment, "/spec/minReadySeconds", errors);
        not_negative(deployment, "/spec/revisionHistoryLimit", errors);
        validate_selector_and_template(deployment, errors);
        one_of(
            deployment,
            "/spec/strategy/type",
            "",
            &["Recreate", "RollingUpdate"],
            errors,
        );
        let rolling = "/spec/strategy/rollingUpdate";
        if deployment.text("/spec/strategy/type") == "Recreate" && deployment.has(rolling) {
            let why = "may not be specified when strategy `type` is 'Recreate'";
            errors.push(FieldError::forbidden("spec.strategy.rollingUpdate", why));
        }
        let (surge, unavailable) = (
            format!("{rolling}/maxSurge"),
            format!("{rolling}/maxUnavailable"),
        );
        validate_share(deployment, &surge, errors);
        validate_share(deployment, &unavailable, errors);
        if deployment.has(rolling)
            && is_zero(deployment, &surge)
            && is_zero(deployment, &unavailable)
        {
            let given = deployment
                .pointer(&unavailable)
                .cloned()
                .unwrap_or_default();
            let why = "may not be 0 when `maxSurge` is 0";
            errors.push(FieldError::invalid(
                "spec.strategy.rollingUpdate.maxUnavailable",
                given,
                why,
            ));
        }
        let deadline = deployment.int("/spec/progressDeadlineSeconds");
        if deadline <= deployment.int("/spec/minReadySeconds") {
            let why = "must be greater than minReadySeconds";
            errors.push(FieldError::invalid(
                "spec.progressDeadlineSeconds",
                deadline,
                why,
            ));
        }
    }

    fn validate_update(&self, deployment: &Value, old: &Value, errors: &mut Errors) {
        immutable(deployment, old, "/spec/selector", errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

pub struct ReplicaSet;

impl Strategy for ReplicaSet {
    fn default(&self, set: &mut Value) {
        set.default("/spec/replicas", 1);
        default_template(set);
    }

    fn validate(&self, set: &Value, errors: &mut Errors) {
        not_negative(set, "/spec/replicas", errors);
        not_negative(set, "/spec/minReadySeconds", errors);
        validate_selector_and_template(set, errors);
    }

    fn validate_update(&self, set: &Value, old: &Value, errors: &mut Errors) {
        immutable(set, old, "/spec/selector", errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["status.replicas"]
    }
}

/// Selector and labels follow from the template where they are left out.
pub struct ReplicationController;

impl Strategy for ReplicationController {
    fn default(&self, controller: &mut Value) {
        controller.default("/spec/replicas", 1);
        let labels = controller
            .pointer("/spec/template/metadata/labels")
            .cloned();
        if let Some(labels) = labels.filter(|labels| !labels.is_null()) {
            if controller
                .object("/spec/selector")
                .is_none_or(Map::is_empty)
            {
                controller.set("/spec/selector", labels.clone());
            }
            if controller
                .object("/metadata/labels")
                .is_none_or(Map::is_empty)
            {
                controller.set("/metadata/labels", labels);
            }
        }
        default_template(controller);
    }

    fn validate(&self, controller: &Value, errors: &mut Errors) {
        not_negative(controller, "/spec/replicas", errors);
        not_negative(controller, "/spec/minReadySeconds", errors);
        let template = controller.pointer("/spec/template").unwrap_or(&Value::Null);
        let Some(selector) = controller
            .object("/spec/selector")
            .filter(|selector| !selector.is_empty())
        else {
            errors.push(FieldError::required("spec.selector", ""));
            return;
        };
        let labels = template.object("/metadata/labels");
        let selected = selector
            .iter()
            .all(|(name, value)| labels.and_then(|labels| labels.get(name)) == Some(value));
        if !selected {
            let given = template
                .pointer("/metadata/labels")
                .cloned()
                .unwrap_or(json!({}));
            let why = "`selector` does not match template `labels`";
            errors.push(FieldError::invalid(
                "spec.template.metadata.labels",
                given,
                why,
            ));
        }
        pod_spec::validate_template(template, "spec.template", errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }

    fn selectable(&self) -> &'static [&'static str] {
        &["status.replicas"]
    }
}

pub struct DaemonSet;

impl Strategy for DaemonSet {
    fn default(&self, set: &mut Value) {
        set.default("/spec/updateStrategy/type", "RollingUpdate");
        if set.text("/spec/updateStrategy/type") == "RollingUpdate" {
            set.default("/spec/updateStrategy/rollingUpdate/maxUnavailable", 1);
            set.default("/spec/updateStrategy/rollingUpdate/maxSurge", 0);
        }
        set.default("/spec/revisionHistoryLimit", 10);
        default_template(set);
    }

    fn validate(&self, set: &Value, errors: &mut Errors) {
        not_negative(set, "/spec/minReadySeconds", errors);
        not_negative(set, "/spec/revisionHistoryLimit", errors);
        validate_selector_and_template(set, errors);
        one_of(
            set,
            "/spec/updateStrategy/type",
            "",
            &["OnDelete", "RollingUpdate"],
            errors,
        );
        validate_share(set, "/spec/updateStrategy/rollingUpdate/maxSurge", errors);
        validate_share(
            set,
            "/spec/updateStrategy/rollingUpdate/maxUnavailable",
            errors,
        );
    }

    fn validate_update(&self, set: &Value, old: &Value, errors: &mut Errors) {
        immutable(set, old, "/spec/selector", errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

pub struct StatefulSet;

impl Strategy for StatefulSet {
    fn default(&self, set: &mut Value) {
        set.default("/spec/replicas", 1);
        set.default("/spec/podManagementPolicy", "OrderedReady");
        set.default("/spec/updateStrategy/type", "RollingUpdate");
        if set.text("/spec/updateStrategy/type") == "RollingUpdate" {
            set.default("/spec/updateStrategy/rollingUpdate/partition", 0);
        }
        set.default("/spec/revisionHistoryLimit", 10);
        set.default(
            "/spec/persistentVolumeClaimRetentionPolicy/whenDeleted",
            "Retain",
        );
        set.default(
            "/spec/persistentVolumeClaimRetentionPolicy/whenScaled",
            "Retain",
        );
        default_template(set);
    }

    fn validate(&self, set: &Value, errors: &mut Errors) {
        not_negative(set, "/spec/replicas", errors);
        validate_selector_and_template(set, errors);
        one_of(
            set,
            "/spec/podManagementPolicy",
            "",
            &["OrderedReady", "Parallel"],
            errors,
        );
    }

    fn validate_update(&self, set: &Value, old: &Value, errors: &mut Errors) {
        immutable(set, old, "/spec/selector", errors);
        immutable(set, old, "/spec/serviceName", errors);
        immutable(set, old, "/spec/podManagementPolicy", errors);
    }

    fn counts_generations(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let mut errors = Vec::new();
        Deployment.validate(&object, &mut errors);
        assert_eq!(errors, []);
    }

    #[test]
    fn a_selector_that_misses_its_template_is_refused() {
        let mut errors = Vec::new();
        Deployment.validate(&deployment(json!({"app": "other"})), &mut errors);
        assert_eq!(errors.len(), 1);
        assert_eq!(errors[0].field, "spec.template.metadata.labels");
        assert!(
            errors[0]
                .message
                .ends_with("`selector` does not match template `labels`")
        );
    }
}
