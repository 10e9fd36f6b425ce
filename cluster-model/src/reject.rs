//! Why an object of the API was not taken.

use std::net::IpAddr;

use crate::wire::Meta;
use crate::{Kind, ObjectKey, ObjectRef};

/// An object that cannot be what the API says it is. It counts as absent until it is mended: a plan must not depend
/// on which versions of an object were seen before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{object}: {field}: {reason}")]
pub struct Rejected {
    pub object: ObjectRef,
    /// Path of the field, as `spec.clusterIPs[0]`.
    pub field: String,
    pub reason: String,
}

/// What a conversion says of a field, before the object's name is known to it.
#[derive(Debug, thiserror::Error)]
#[error("{field}: {reason}")]
pub(crate) struct BadField {
    field: String,
    reason: String,
}

impl BadField {
    pub(crate) fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            reason: reason.into(),
        }
    }

    pub(crate) fn of(self, kind: Kind, meta: &Meta<'_>) -> Rejected {
        let key = ObjectKey::new(
            meta.namespace.as_deref().unwrap_or_default(),
            meta.name.as_deref().unwrap_or_default(),
        );
        Rejected {
            object: ObjectRef { kind, key },
            field: self.field,
            reason: self.reason,
        }
    }
}

/// The key of a namespaced object.
pub(crate) fn namespaced(meta: &Meta<'_>) -> Result<ObjectKey, BadField> {
    let namespace = meta.namespace.as_deref().unwrap_or_default();
    if namespace.is_empty() {
        return Err(BadField::new("metadata.namespace", "is empty"));
    }
    Ok(ObjectKey::new(namespace, named(meta)?))
}

pub(crate) fn named<'a>(meta: &'a Meta<'_>) -> Result<&'a str, BadField> {
    match meta.name.as_deref() {
        None | Some("") => Err(BadField::new("metadata.name", "is empty")),
        Some(name) => Ok(name),
    }
}

/// A unicast address that a packet can be sent to. One of IPv4 in IPv6's form is the IPv4 one, as it is for the API.
pub(crate) fn address(text: &str, field: impl FnOnce() -> String) -> Result<IpAddr, BadField> {
    let reason = match text.parse::<IpAddr>().map(|address| address.to_canonical()) {
        Err(_) => "is not an IP address",
        Ok(address) if address.is_unspecified() => "is the unspecified address",
        Ok(address) if address.is_multicast() => "is a multicast address",
        Ok(address) => return Ok(address),
    };
    Err(BadField::new(field(), format!("{text:?} {reason}")))
}

/// An address that another machine or a pod can have: what the API allows for endpoints.
pub(crate) fn endpoint_address(text: &str, field: impl Fn() -> String) -> Result<IpAddr, BadField> {
    let address = address(text, &field)?;
    let reason = match address {
        address if address.is_loopback() => "is a loopback address",
        IpAddr::V4(v4) if v4.is_link_local() => "is a link-local address",
        IpAddr::V6(v6) if v6.is_unicast_link_local() => "is a link-local address",
        IpAddr::V4(v4) if v4.is_broadcast() => "is the broadcast address",
        _ => return Ok(address),
    };
    Err(BadField::new(field(), format!("{text:?} {reason}")))
}

/// A port number, 1 to 65535.
pub(crate) fn port(number: i32, field: impl FnOnce() -> String) -> Result<u16, BadField> {
    match u16::try_from(number) {
        Ok(port) if port != 0 => Ok(port),
        _ => Err(BadField::new(
            field(),
            format!("{number} is not a port (1 to 65535)"),
        )),
    }
}
