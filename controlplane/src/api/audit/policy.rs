//! The policy: rules of which the first that fits decides, as in Kubernetes.

use std::path::Path;

use serde::Deserialize;

use super::super::request::Target;
use crate::auth::Identity;

/// A PolicyError says what of the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    #[error("cannot read the audit policy {path}: {reason}")]
    Read { path: String, reason: String },
    #[error("the audit policy {path} {reason}")]
    Content { path: String, reason: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
enum Level {
    None,
    Metadata,
    Request,
    RequestResponse,
}

/// Policy says which requests are recorded.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Policy {
    api_version: String,
    kind: String,
    #[serde(default, rename = "metadata")]
    _metadata: serde_json::Value,
    #[serde(default)]
    omit_stages: Vec<String>,
    // Bodies, of which these are a part, are not recorded.
    #[serde(default, rename = "omitManagedFields")]
    _omit_managed_fields: bool,
    rules: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    level: Level,
    #[serde(default)]
    users: Vec<String>,
    #[serde(default)]
    user_groups: Vec<String>,
    #[serde(default)]
    verbs: Vec<String>,
    #[serde(default)]
    resources: Vec<Resources>,
    #[serde(default)]
    namespaces: Vec<String>,
    #[serde(default, rename = "nonResourceURLs")]
    non_resource_urls: Vec<String>,
    #[serde(default)]
    omit_stages: Vec<String>,
    #[serde(default, rename = "omitManagedFields")]
    _omit_managed_fields: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Resources {
    #[serde(default)]
    group: String,
    #[serde(default)]
    resources: Vec<String>,
    #[serde(default)]
    resource_names: Vec<String>,
}

/// What a rule is held against.
pub struct Subject<'a> {
    pub caller: &'a Identity,
    pub verb: &'a str,
    pub target: Option<&'a Target>,
    pub path: &'a str,
    pub stage: &'static str,
}

impl Policy {
    pub fn read(path: &Path) -> Result<Self, PolicyError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|error| PolicyError::Read {
            path: name.clone(),
            reason: error.to_string(),
        })?;
        Self::parse(&text).map_err(|reason| PolicyError::Content { path: name, reason })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let policy: Self =
            serde_saphyr::from_str(text).map_err(|error| format!("cannot be read: {error}"))?;
        if policy.kind != "Policy" || policy.api_version != "audit.k8s.io/v1" {
            let (kind, version) = (&policy.kind, &policy.api_version);
            return Err(format!(
                "is {kind} of {version}, not Policy of audit.k8s.io/v1"
            ));
        }
        if policy.rules.is_empty() {
            return Err("has no rules".to_owned());
        }
        for (at, rule) in policy.rules.iter().enumerate() {
            let of_resources = !rule.resources.is_empty() || !rule.namespaces.is_empty();
            if of_resources && !rule.non_resource_urls.is_empty() {
                return Err(format!(
                    "has rules[{at}] that is about both resources and nonResourceURLs"
                ));
            }
        }
        Ok(policy)
    }

    pub fn wants(&self, subject: &Subject<'_>) -> bool {
        let Some(rule) = self.rules.iter().find(|rule| rule.fits(subject)) else {
            return false;
        };
        let omitted = self.omit_stages.iter().chain(&rule.omit_stages);
        rule.level != Level::None && !omitted.into_iter().any(|stage| stage == subject.stage)
    }
}

impl Rule {
    fn fits(&self, subject: &Subject<'_>) -> bool {
        let named =
            |list: &[String], value: &str| list.is_empty() || list.iter().any(|item| item == value);
        let groups = &subject.caller.groups;
        if !named(&self.users, &subject.caller.user)
            || !named(&self.verbs, subject.verb)
            || !(self.user_groups.is_empty()
                || self.user_groups.iter().any(|group| groups.contains(group)))
        {
            return false;
        }
        match subject.target {
            None if !self.non_resource_urls.is_empty() => {
                self.non_resource_urls
                    .iter()
                    .any(|url| match url.strip_suffix('*') {
                        Some(start) => subject.path.starts_with(start),
                        None => url == subject.path,
                    })
            }
            None => self.resources.is_empty() && self.namespaces.is_empty(),
            Some(_) if !self.non_resource_urls.is_empty() => false,
            Some(target) => {
                named(&self.namespaces, target.namespace.as_deref().unwrap_or(""))
                    && (self.resources.is_empty()
                        || self.resources.iter().any(|of| of.fits(target)))
            }
        }
    }
}

impl Resources {
    fn fits(&self, target: &Target) -> bool {
        let part = target.subresource.as_deref().unwrap_or("");
        let plural = target.resource.plural;
        let fits = |wanted: &String| match wanted.split_once('/') {
            None => wanted == "*" || (part.is_empty() && wanted == plural),
            Some((resource, wanted)) => {
                (resource == "*" || resource == plural)
                    && (wanted == "*" || (!part.is_empty() && wanted == part))
            }
        };
        let name = target.name.as_deref().unwrap_or("");
        self.group == target.resource.group
            && (self.resources.is_empty() || self.resources.iter().any(fits))
            && (self.resource_names.is_empty()
                || self.resource_names.iter().any(|wanted| wanted == name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: &str = r#"
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: None
    users: ["system:kube-scheduler"]
    verbs: [watch]
  - level: None
    userGroups: ["system:nodes"]
    resources: [{group: coordination.k8s.io, resources: [leases]}]
  - level: Metadata
    resources: [{group: "", resources: [secrets, "pods/exec"]}]
  - level: Request
    namespaces: [shop]
    verbs: [delete]
    omitStages: [ResponseStarted]
  - level: None
    nonResourceURLs: ["/healthz*", "/version"]
  - level: Metadata
    nonResourceURLs: ["/*"]
"#;

    #[test]
    fn the_first_rule_that_fits_decides() {
        let policy = Policy::parse(POLICY).expect("a policy");
        for (user, group, verb, path, expected) in [
            ("system:kube-scheduler", "", "watch", "/api/v1/pods", false),
            (
                "n",
                "system:nodes",
                "update",
                "/apis/coordination.k8s.io/v1/namespaces/a/leases/x",
                false,
            ),
            ("n", "", "get", "/api/v1/namespaces/a/secrets/x", true),
            ("n", "", "list", "/api/v1/secrets", true),
            ("n", "", "create", "/api/v1/namespaces/a/pods/x/exec", true),
            ("n", "", "create", "/api/v1/namespaces/a/pods", false),
            ("n", "", "delete", "/api/v1/namespaces/shop/pods/x", true),
            ("n", "", "delete", "/api/v1/namespaces/a/pods/x", false),
            ("n", "", "get", "/healthz/etcd", false),
            ("n", "", "get", "/metrics", true),
        ] {
            let caller = Identity {
                user: user.to_owned(),
                groups: vec![group.to_owned()],
                ..Identity::default()
            };
            let target = Target::parse(path);
            let subject = Subject {
                caller: &caller,
                verb,
                target: target.as_ref(),
                path,
                stage: "ResponseComplete",
            };
            assert_eq!(policy.wants(&subject), expected, "{user} {verb} {path}");
        }
    }

    #[test]
    fn what_a_policy_gets_wrong_is_told() {
        for (from, to, expected) in [
            ("kind: Policy", "kind: Plan", "not Policy"),
            ("level: Request", "level: Some", "cannot be read"),
            ("users:", "user:", "cannot be read"),
            (
                "namespaces: [shop]",
                "namespaces: [shop]\n    nonResourceURLs: [/x]",
                "both resources and",
            ),
        ] {
            let error = Policy::parse(&POLICY.replace(from, to)).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
    }
}
