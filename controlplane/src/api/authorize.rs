//! May the caller do this? Asked once per request, before anything is read, and again for what a request implies.

use http::Method;
use serde_json::Value;

use super::fields::Fields;
use super::request::{self, Query, Target};
use super::status::{Status, Subject};
use super::{Api, Authorization, Call};
use crate::auth::node::{Condition, condition, node_of};
use crate::auth::{Asked, Attributes, Identity, Resource};
use crate::registry;
use crate::selector::FieldSelector;

/// What authorizers say; a refusal may have a reason that the caller is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Allowed,
    Refused(String),
}

impl Verdict {
    pub fn is_allowed(&self) -> bool {
        *self == Self::Allowed
    }
}

/// What the field selector of a list holds it to.
#[derive(Debug, Default)]
pub struct Held {
    name: String,
    node: String,
}

impl Held {
    pub fn by(selector: &str) -> Self {
        // One that cannot be read is refused later, and holds the list to nothing here.
        let Ok(fields) = FieldSelector::parse(selector) else {
            return Self::default();
        };
        let exact = |path: &str| fields.exact(path).unwrap_or_default().to_owned();
        Self {
            name: Some(exact("metadata.name"))
                .filter(|name| request::is_path_segment(name))
                .unwrap_or_default(),
            node: exact("spec.nodeName"),
        }
    }
}

impl Target {
    /// The target as authorizers see it.
    pub fn asked<'a>(&'a self, verb: &'a str, held: &'a Held) -> Attributes<'a> {
        let name = self.name.as_deref().unwrap_or("");
        let listed = matches!(verb, "list" | "watch" | "deletecollection");
        let namespace = match self.namespace.as_deref() {
            // Who may read what is in a namespace may be allowed to read the namespace itself.
            None if self.resource.group.is_empty() && self.resource.plural == "namespaces" => name,
            namespace => namespace.unwrap_or(""),
        };
        Attributes::resource(
            verb,
            Resource {
                group: self.resource.group,
                resource: self.resource.plural,
                subresource: self.subresource.as_deref().unwrap_or(""),
                namespace,
                name: if listed && verb != "deletecollection" && name.is_empty() {
                    &held.name
                } else {
                    name
                },
                node: if listed { &held.node } else { "" },
            },
        )
    }
}

impl Api {
    /// Refuses with 403 what the caller may not do.
    pub(super) async fn check_access(
        &self,
        caller: &Identity,
        method: &Method,
        path: &str,
        target: Option<&Target>,
        query: &Query,
    ) -> Result<(), Status> {
        let Some(target) = target else {
            let verb = method.as_str().to_ascii_lowercase();
            return self.authorize(caller, &Attributes::path(&verb, path)).await;
        };
        let held = match query.get("fieldSelector") {
            "" => Held::default(),
            selector => Held::by(selector),
        };
        let verb = request::verb(method, target, query);
        self.authorize(caller, &target.asked(verb, &held)).await?;
        // A shell is more than reading, by whichever method it is asked for.
        let enters = matches!(
            target.subresource.as_deref(),
            Some("exec" | "attach" | "portforward")
        );
        if enters && verb != "create" {
            self.authorize(caller, &target.asked("create", &held))
                .await?;
        }
        Ok(())
    }

    /// Refuses a write that would make an object, when the caller may only change it.
    pub(super) async fn check_create(&self, call: &Call) -> Result<(), Status> {
        let held = Held::default();
        self.authorize(&call.identity, &call.target.asked("create", &held))
            .await
    }

    pub(super) async fn authorize(
        &self,
        caller: &Identity,
        asked: &Attributes<'_>,
    ) -> Result<(), Status> {
        match self.decide(caller, asked).await? {
            Verdict::Allowed => Ok(()),
            Verdict::Refused(reason) => {
                tracing::info!(user = %caller.user, %asked, %reason, "refused");
                Err(denied(caller, asked, &reason))
            }
        }
    }

    /// Whether rules decide at all.
    pub(super) fn decides(&self) -> bool {
        self.config.authorization == Authorization::Rules
    }

    /// What the authorizers say, Node first, then RBAC.
    pub(super) async fn decide(
        &self,
        caller: &Identity,
        asked: &Attributes<'_>,
    ) -> Result<Verdict, Status> {
        if caller.is_master() || !self.decides() {
            return Ok(Verdict::Allowed);
        }
        let mut reason = String::new();
        if let Some(node) = node_of(caller) {
            match self.decide_node(node, asked).await? {
                Verdict::Allowed => return Ok(Verdict::Allowed),
                Verdict::Refused(why) => reason = why,
            }
        }
        self.authority.rules.catch_up(&*self.store).await?;
        match self.authority.rules.view().allows(caller, asked) {
            true => Ok(Verdict::Allowed),
            false => Ok(Verdict::Refused(reason)),
        }
    }

    async fn decide_node(&self, node: &str, asked: &Attributes<'_>) -> Result<Verdict, Status> {
        let Asked::Resource(resource) = asked.object else {
            return Ok(Verdict::Refused(String::new()));
        };
        if !self
            .authority
            .node_rules
            .iter()
            .any(|rule| rule.allows(asked))
        {
            return Ok(Verdict::Refused(String::new()));
        }
        let met = match condition(node, asked.verb, &resource) {
            Condition::Met => true,
            Condition::Refused(why) => return Ok(Verdict::Refused(why)),
            Condition::Used(kind) => {
                self.authority.pods.catch_up(&*self.store).await?;
                let pods = self.authority.pods.view();
                pods.uses(node, kind, resource.namespace, resource.name)
            }
            Condition::Bound => {
                self.authority.pods.catch_up(&*self.store).await?;
                let pods = self.authority.pods.view();
                let found = pods.node_of(resource.namespace, resource.name);
                // That a pod is gone is what its kubelet has to learn.
                found.is_none_or(|found| found == node)
            }
            Condition::VolumeUsed => {
                let volume = self
                    .lookup("", resource.resource, None, resource.name)
                    .await?;
                let claim = volume
                    .as_ref()
                    .and_then(|volume| volume.pointer("/spec/claimRef"));
                self.authority.pods.catch_up(&*self.store).await?;
                let pods = self.authority.pods.view();
                claim.is_some_and(|claim| {
                    let kind = crate::auth::node::Kind::Claim;
                    pods.uses(node, kind, claim.text("/namespace"), claim.text("/name"))
                })
            }
            Condition::Names(field) => {
                let known = registry::resource(resource.group, "v1", resource.resource).is_some();
                let found = match known {
                    true => {
                        self.lookup(resource.group, resource.resource, None, resource.name)
                            .await?
                    }
                    false => None,
                };
                found.is_some_and(|found| found.text(field) == node)
            }
        };
        Ok(match met {
            true => Verdict::Allowed,
            false => Verdict::Refused(format!(
                "no relationship found between node '{node}' and this object"
            )),
        })
    }
}

/// 403, in the words of Kubernetes.
pub fn denied(caller: &Identity, asked: &Attributes<'_>, reason: &str) -> Status {
    let mut why = format!("User {:?} {asked}", caller.user);
    if !reason.is_empty() {
        why.push_str(": ");
        why.push_str(reason);
    }
    match asked.object {
        Asked::Path(_) => Status::forbidden(
            Subject {
                group: "",
                resource: "",
                name: "",
            },
            why,
        ),
        Asked::Resource(resource) => Status::forbidden(
            Subject {
                group: resource.group,
                resource: resource.resource,
                name: resource.name,
            },
            why,
        ),
    }
}

/// The question of an access review.
pub struct Question {
    spec: Value,
    held: Held,
}

impl Question {
    pub fn of(review: &Value) -> Self {
        let spec = review["spec"].clone();
        let requirements = spec.items("/resourceAttributes/fieldSelector/requirements");
        let exact: Vec<String> = requirements
            .iter()
            .filter(|r| r.text("/operator") == "In" && r.items("/values").len() == 1)
            .map(|r| format!("{}={}", r.text("/key"), r.text("/values/0")))
            .collect();
        let raw = spec.text("/resourceAttributes/fieldSelector/rawSelector");
        let held = match raw {
            "" => Held::by(&exact.join(",")),
            raw => Held::by(raw),
        };
        Self { spec, held }
    }

    pub fn attributes(&self) -> Attributes<'_> {
        if self.spec.has("/nonResourceAttributes") {
            let text = |field: &str| self.spec["nonResourceAttributes"][field].as_str();
            return Attributes::path(
                text("verb").unwrap_or_default(),
                text("path").unwrap_or_default(),
            );
        }
        let text = |field: &str| {
            self.spec["resourceAttributes"][field]
                .as_str()
                .unwrap_or_default()
        };
        Attributes::resource(
            text("verb"),
            Resource {
                group: text("group"),
                resource: text("resource"),
                subresource: text("subresource"),
                namespace: text("namespace"),
                name: text("name"),
                node: &self.held.node,
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(method: &str, uri: &str) -> String {
        let (path, query) = uri.split_once('?').unwrap_or((uri, ""));
        let target = Target::parse(path).expect("a resource");
        let query = Query::parse(query);
        let held = Held::by(query.get("fieldSelector"));
        let method: Method = method.parse().expect("a method");
        let verb = request::verb(&method, &target, &query);
        let attributes = target.asked(verb, &held);
        let Asked::Resource(resource) = attributes.object else {
            panic!("a resource");
        };
        format!(
            "{} {}.{}/{} {:?} {:?} {:?}",
            verb,
            resource.resource,
            resource.group,
            resource.subresource,
            resource.namespace,
            resource.name,
            resource.node
        )
    }

    #[test]
    fn requests_are_named_as_kubernetes_names_them() {
        for (method, uri, expected) in [
            ("GET", "/api/v1/pods", r#"list pods./ "" "" """#),
            (
                "GET",
                "/api/v1/namespaces/a/pods?watch=true",
                r#"watch pods./ "a" "" """#,
            ),
            (
                "GET",
                "/api/v1/namespaces/a/pods/x",
                r#"get pods./ "a" "x" """#,
            ),
            (
                "GET",
                "/api/v1/namespaces/a/pods/x?watch=1",
                r#"watch pods./ "a" "x" """#,
            ),
            (
                "GET",
                "/api/v1/namespaces/a/secrets?fieldSelector=metadata.name%3Dx",
                r#"list secrets./ "a" "x" """#,
            ),
            (
                "GET",
                "/api/v1/namespaces/a/secrets?fieldSelector=metadata.name!%3Dx",
                r#"list secrets./ "a" "" """#,
            ),
            (
                "GET",
                "/api/v1/pods?fieldSelector=spec.nodeName%3Dn&watch=true",
                r#"watch pods./ "" "" "n""#,
            ),
            (
                "DELETE",
                "/api/v1/namespaces/a/secrets?fieldSelector=metadata.name%3Dx",
                r#"deletecollection secrets./ "a" "" """#,
            ),
            (
                "DELETE",
                "/api/v1/namespaces/a/secrets/x",
                r#"delete secrets./ "a" "x" """#,
            ),
            (
                "POST",
                "/apis/apps/v1/namespaces/a/deployments",
                r#"create deployments.apps/ "a" "" """#,
            ),
            (
                "PUT",
                "/apis/apps/v1/namespaces/a/deployments/x/scale",
                r#"update deployments.apps/scale "a" "x" """#,
            ),
            (
                "PATCH",
                "/api/v1/nodes/n/status",
                r#"patch nodes./status "" "n" """#,
            ),
            (
                "POST",
                "/api/v1/namespaces/a/pods/x/exec",
                r#"create pods./exec "a" "x" """#,
            ),
            (
                "GET",
                "/api/v1/nodes/n/proxy/metrics",
                r#"get nodes./proxy "" "n" """#,
            ),
            (
                "GET",
                "/api/v1/namespaces/a",
                r#"get namespaces./ "a" "a" """#,
            ),
            ("GET", "/api/v1/namespaces", r#"list namespaces./ "" "" """#),
            (
                "PUT",
                "/api/v1/namespaces/a/finalize",
                r#"update namespaces./finalize "a" "a" """#,
            ),
        ] {
            assert_eq!(asked(method, uri), expected, "{method} {uri}");
        }
    }

    #[test]
    fn refusals_read_as_kubernetes_words_them() {
        let caller = Identity {
            user: "jane".into(),
            ..Identity::default()
        };
        let held = Held::default();
        let list = Target::parse("/api/v1/namespaces/a/pods").expect("pods");
        let refused = denied(&caller, &list.asked("list", &held), "");
        assert_eq!(
            refused.message,
            r#"pods is forbidden: User "jane" cannot list resource "pods" in API group "" in the namespace "a""#
        );
        assert_eq!((refused.code.as_u16(), refused.reason), (403, "Forbidden"));
        let scale = Target::parse("/apis/apps/v1/namespaces/a/deployments/x/scale").expect("scale");
        assert_eq!(
            denied(&caller, &scale.asked("patch", &held), "for a reason").message,
            r#"deployments.apps "x" is forbidden: User "jane" cannot patch resource "deployments/scale" in API group "apps" in the namespace "a": for a reason"#
        );
        let nodes = Target::parse("/api/v1/nodes").expect("nodes");
        assert_eq!(
            denied(&caller, &nodes.asked("list", &held), "").message,
            r#"nodes is forbidden: User "jane" cannot list resource "nodes" in API group "" at the cluster scope"#
        );
        assert_eq!(
            denied(&caller, &Attributes::path("get", "/metrics"), "").message,
            r#"forbidden: User "jane" cannot get path "/metrics""#
        );
    }
}
