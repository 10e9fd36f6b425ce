//! Nobody hands out rights that they do not hold themselves, unless they hold `escalate` (on the role) or `bind` (to the role).

use serde_json::Value;

use crate::api::Api;
use crate::api::authorize::denied;
use crate::api::fields::{self, Fields};
use crate::api::request::Target;
use crate::api::status::{Status, Subject};
use crate::auth::rbac::{GROUP, RoleRef, Rule, covers};
use crate::auth::{Attributes, Identity, Resource};

/// Refuses a role or a binding that would give more than the caller holds.
pub async fn check(
    api: &Api,
    caller: &Identity,
    target: &Target,
    object: &Value,
    old: Option<&Value>,
) -> Result<(), Status> {
    if caller.is_master() || target.resource.group != GROUP {
        return Ok(());
    }
    // The garbage collector's writes go through. Nothing else does: a label may have another role take this one's rules over.
    if old.is_some_and(|old| is_collection_only(object, old)) {
        return Ok(());
    }
    if target.resource.plural.ends_with("bindings") {
        check_binding(api, caller, target, object).await
    } else {
        check_role(api, caller, target, object, old).await
    }
}

/// Whether nothing changes but who owns the object and what its removal waits for.
fn is_collection_only(object: &Value, old: &Value) -> bool {
    let rest = |of: &Value| {
        let mut rest = of.clone();
        for field in [
            "ownerReferences",
            "finalizers",
            "managedFields",
            "resourceVersion",
        ] {
            rest.remove(&format!("/metadata/{field}"));
        }
        rest
    };
    rest(object) == rest(old)
}

async fn check_role(
    api: &Api,
    caller: &Identity,
    target: &Target,
    role: &Value,
    old: Option<&Value>,
) -> Result<(), Status> {
    let namespace = target.namespace.as_deref().unwrap_or("");
    let asked = Resource {
        group: GROUP,
        resource: target.resource.plural,
        namespace,
        name: fields::name(role),
        ..Resource::default()
    };
    let escalates = Attributes::resource("escalate", asked);
    if api.decide(caller, &escalates).await?.is_allowed() {
        return Ok(());
    }
    let mut wanted: Vec<Rule> = rules_of(role)?;
    if [Some(role), old]
        .into_iter()
        .flatten()
        .any(|role| role.has("/aggregationRule"))
    {
        // It takes over whatever roles will be there, or has.
        wanted.extend(everything());
    }
    hold(api, caller, target, fields::name(role), namespace, &wanted).await
}

async fn check_binding(
    api: &Api,
    caller: &Identity,
    target: &Target,
    binding: &Value,
) -> Result<(), Status> {
    let namespace = target.namespace.as_deref().unwrap_or("");
    let role = RoleRef {
        kind: binding.text("/roleRef/kind").to_owned(),
        name: binding.text("/roleRef/name").to_owned(),
    };
    let plural = match role.kind.as_str() {
        "ClusterRole" => "clusterroles",
        "Role" => "roles",
        // Validation says what is wrong with it.
        _ => return Ok(()),
    };
    let asked = Resource {
        group: GROUP,
        resource: plural,
        namespace,
        name: &role.name,
        ..Resource::default()
    };
    let binds = Attributes::resource("bind", asked);
    if api.decide(caller, &binds).await?.is_allowed() {
        return Ok(());
    }
    api.authority.rules.catch_up(&*api.store).await?;
    let wanted = api.authority.rules.view().role(namespace, &role).cloned();
    let wanted = wanted.ok_or_else(|| {
        Status::not_found(Subject {
            group: GROUP,
            resource: plural,
            name: &role.name,
        })
    })?;
    hold(
        api,
        caller,
        target,
        fields::name(binding),
        namespace,
        &wanted,
    )
    .await
}

/// Refuses unless the caller holds all of the rules.
async fn hold(
    api: &Api,
    caller: &Identity,
    target: &Target,
    name: &str,
    namespace: &str,
    wanted: &[Rule],
) -> Result<(), Status> {
    api.authority.rules.catch_up(&*api.store).await?;
    let held = api.authority.rules.view().rules(caller, namespace);
    covers(&held, wanted).map_err(|missing| {
        tracing::info!(user = %caller.user, role = name, "refused to hand out rights that are not held");
        let why = format!(
            "user {:?} (groups={:?}) is attempting to grant RBAC permissions not currently held:\n{missing}",
            caller.user, caller.groups
        );
        Status::forbidden(target.subject_named(name), why)
    })
}

fn rules_of(role: &Value) -> Result<Vec<Rule>, Status> {
    match role.get("rules") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(rules) => serde_json::from_value(rules.clone())
            .map_err(|error| Status::bad_request(format!("the rules cannot be read: {error}"))),
    }
}

fn everything() -> [Rule; 2] {
    let all = || vec!["*".to_owned()];
    [
        Rule {
            verbs: all(),
            api_groups: all(),
            resources: all(),
            ..Rule::default()
        },
        Rule {
            verbs: all(),
            non_resource_urls: all(),
            ..Rule::default()
        },
    ]
}

impl Api {
    /// Refuses to approve or sign for a signer that the caller is not trusted with: `approve` or `sign` on `signers`, by its
    /// name or by that of its domain.
    pub(in crate::api) async fn check_signer(
        &self,
        caller: &Identity,
        verb: &str,
        request: &Value,
    ) -> Result<(), Status> {
        let signer = request.text("/spec/signerName");
        let domain = format!("{}/*", signer.split('/').next().unwrap_or(""));
        let asked = |name| {
            let signers = Resource {
                group: "certificates.k8s.io",
                resource: "signers",
                name,
                ..Resource::default()
            };
            Attributes::resource(verb, signers)
        };
        for name in [signer, &domain] {
            if self.decide(caller, &asked(name)).await?.is_allowed() {
                return Ok(());
            }
        }
        let why = format!("user not permitted to {verb} requests with signerName {signer:?}");
        Err(denied(caller, &asked(signer), &why))
    }
}
