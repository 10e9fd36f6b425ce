//! Roles and bindings by whom they are for, so that a request looks only at what is bound to its caller.

use std::collections::HashMap;
use std::sync::Arc;

use serde::Deserialize;

use super::Rule;
use crate::auth::{Asked, Attributes, Identity};

/// RoleRef is the role that a binding gives.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct RoleRef {
    #[serde(default)]
    pub kind: String,
    #[serde(default)]
    pub name: String,
}

#[derive(Deserialize)]
struct Role {
    #[serde(default)]
    rules: Option<Vec<Rule>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Binding {
    role_ref: RoleRef,
    #[serde(default)]
    subjects: Option<Vec<Subject>>,
}

#[derive(Deserialize)]
struct Subject {
    #[serde(default)]
    kind: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    namespace: String,
}

/// Whom a right is given to. A ServiceAccount is the user that its tokens stand for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Holder {
    User(String),
    Group(String),
}

impl Subject {
    fn holder(self, binding_namespace: &str) -> Option<Holder> {
        let namespace = match self.namespace.as_str() {
            "" => binding_namespace,
            namespace => namespace,
        };
        match self.kind.as_str() {
            "User" => Some(Holder::User(self.name)),
            "Group" => Some(Holder::Group(self.name)),
            "ServiceAccount" if !namespace.is_empty() => Some(Holder::User(format!(
                "system:serviceaccount:{namespace}:{}",
                self.name
            ))),
            _ => None,
        }
    }
}

/// One binding of a holder.
struct Grant {
    binding: String,
    role: RoleRef,
}

/// By namespace; "" is the whole cluster.
type Grants = HashMap<String, Vec<Grant>>;

/// Index holds all roles and bindings. What cannot be read gives no right.
#[derive(Default)]
pub struct Index {
    /// By namespace ("" for ClusterRoles), then by name.
    roles: HashMap<String, HashMap<String, Arc<[Rule]>>>,
    /// Who holds something by a binding, to take it back: by namespace, then by name.
    bindings: HashMap<String, HashMap<String, Vec<Holder>>>,
    users: HashMap<String, Grants>,
    groups: HashMap<String, Grants>,
}

impl Index {
    /// Takes over a Role or, without a namespace, a ClusterRole as it is stored; None when it is gone.
    pub fn set_role(&mut self, namespace: &str, name: &str, role: Option<&[u8]>) {
        let rules = role.and_then(|bytes| serde_json::from_slice::<Role>(bytes).ok());
        let roles = self.roles.entry(namespace.to_owned()).or_default();
        match rules {
            Some(role) => {
                roles.insert(name.to_owned(), role.rules.unwrap_or_default().into());
            }
            None => {
                roles.remove(name);
                if roles.is_empty() {
                    self.roles.remove(namespace);
                }
            }
        }
    }

    /// Takes over a RoleBinding or, without a namespace, a ClusterRoleBinding as it is stored; None when it is gone.
    pub fn set_binding(&mut self, namespace: &str, name: &str, binding: Option<&[u8]>) {
        self.take_back(namespace, name);
        let Some(binding) = binding.and_then(|bytes| serde_json::from_slice::<Binding>(bytes).ok())
        else {
            return;
        };
        let mut holders: Vec<Holder> = Vec::new();
        for subject in binding.subjects.into_iter().flatten() {
            let Some(holder) = subject.holder(namespace) else {
                continue;
            };
            if holders.contains(&holder) {
                continue;
            }
            let grants = match &holder {
                Holder::User(name) => self.users.entry(name.clone()).or_default(),
                Holder::Group(name) => self.groups.entry(name.clone()).or_default(),
            };
            grants.entry(namespace.to_owned()).or_default().push(Grant {
                binding: name.to_owned(),
                role: binding.role_ref.clone(),
            });
            holders.push(holder);
        }
        let bindings = self.bindings.entry(namespace.to_owned()).or_default();
        bindings.insert(name.to_owned(), holders);
    }

    fn take_back(&mut self, namespace: &str, name: &str) {
        let Some(bindings) = self.bindings.get_mut(namespace) else {
            return;
        };
        let holders = bindings.remove(name).unwrap_or_default();
        if bindings.is_empty() {
            self.bindings.remove(namespace);
        }
        for holder in holders {
            let (of, holder) = match holder {
                Holder::User(name) => (&mut self.users, name),
                Holder::Group(name) => (&mut self.groups, name),
            };
            let Some(grants) = of.get_mut(&holder) else {
                continue;
            };
            if let Some(here) = grants.get_mut(namespace) {
                here.retain(|grant| grant.binding != name);
                if here.is_empty() {
                    grants.remove(namespace);
                }
            }
            if grants.is_empty() {
                of.remove(&holder);
            }
        }
    }

    /// Whether a rule of the caller's allows it. `system:masters` need no rule.
    pub fn allows(&self, caller: &Identity, asked: &Attributes<'_>) -> bool {
        let namespace = match asked.object {
            Asked::Resource(resource) => resource.namespace,
            Asked::Path(_) => "",
        };
        caller.is_master()
            || self
                .held(caller, namespace)
                .any(|rules| rules.iter().any(|rule| rule.allows(asked)))
    }

    /// All rules that the caller holds in a namespace, those of the whole cluster included; "" for the latter alone.
    pub fn rules(&self, caller: &Identity, namespace: &str) -> Vec<Rule> {
        self.held(caller, namespace)
            .flat_map(|rules| rules.iter())
            .cloned()
            .collect()
    }

    /// The rules of a role that a binding in a namespace names; None when there is no such role.
    pub fn role(&self, namespace: &str, role: &RoleRef) -> Option<&Arc<[Rule]>> {
        let place = match role.kind.as_str() {
            "ClusterRole" => "",
            "Role" if !namespace.is_empty() => namespace,
            _ => return None,
        };
        self.roles.get(place)?.get(&role.name)
    }

    fn held<'a>(
        &'a self,
        caller: &'a Identity,
        namespace: &'a str,
    ) -> impl Iterator<Item = &'a Arc<[Rule]>> {
        let groups = caller.groups.iter().filter_map(move |g| self.groups.get(g));
        let places = [Some(""), Some(namespace).filter(|n| !n.is_empty())];
        self.users
            .get(&caller.user)
            .into_iter()
            .chain(groups)
            .flat_map(move |grants| {
                places
                    .into_iter()
                    .flatten()
                    .filter_map(move |place| grants.get(place).map(|here| (place, here)))
            })
            .flat_map(|(place, here)| here.iter().map(move |grant| (place, &grant.role)))
            .filter_map(move |(place, role)| self.role(place, role))
    }
}
