//! What a caller asks for, as authorizers see it.

use std::fmt;

/// Attributes are one thing that a caller wants to do: a verb, and what to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes<'a> {
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`, or a verb of its own (`bind`,
    /// `impersonate`); of a path: the method in lower case.
    pub verb: &'a str,
    pub object: Asked<'a>,
}

/// Asked is what a verb is applied to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked<'a> {
    Resource(Resource<'a>),
    /// A path that is not one of a resource.
    Path(&'a str),
}

/// A resource, or one object of it. What is not named is "".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resource<'a> {
    pub group: &'a str,
    pub resource: &'a str,
    pub subresource: &'a str,
    pub namespace: &'a str,
    pub name: &'a str,
    /// The node that a list of pods is held to by its field selector.
    pub node: &'a str,
}

impl<'a> Attributes<'a> {
    pub fn resource(verb: &'a str, resource: Resource<'a>) -> Self {
        Self {
            verb,
            object: Asked::Resource(resource),
        }
    }

    pub fn path(verb: &'a str, path: &'a str) -> Self {
        Self {
            verb,
            object: Asked::Path(path),
        }
    }
}

/// In the words of Kubernetes: `cannot list resource "pods" in API group "" in the namespace "a"`.
impl fmt::Display for Attributes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let resource = match self.object {
            Asked::Path(path) => return write!(f, "cannot {} path {path:?}", self.verb),
            Asked::Resource(resource) => resource,
        };
        write!(f, "cannot {} resource \"{}", self.verb, resource.resource)?;
        if !resource.subresource.is_empty() {
            write!(f, "/{}", resource.subresource)?;
        }
        write!(f, "\" in API group {:?}", resource.group)?;
        match resource.namespace {
            "" => f.write_str(" at the cluster scope"),
            namespace => write!(f, " in the namespace {namespace:?}"),
        }
    }
}
