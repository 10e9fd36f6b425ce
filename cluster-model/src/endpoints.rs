//! EndpointSlices, as the network path sees them.

use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;

use crate::reject::{self, BadField};
use crate::{Kind, ObjectKey, Protocol, Rejected, ServiceKey, SliceKey, wire};

/// A part of the endpoints of one Service, all of one address family.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointSlice {
    pub key: SliceKey,
    /// The Service that the slice belongs to (label `kubernetes.io/service-name`); a slice may stand alone.
    pub service: Option<ServiceKey>,
    /// Label [`HEADLESS_LABEL`], whatever it says: it is for names alone, and no proxy serves by it.
    pub headless: bool,
    pub ports: Vec<EndpointPort>,
    pub endpoints: Vec<Endpoint>,
    /// Endpoints that were left out because no packet can be sent to them, in words. The others serve.
    pub refused: Vec<String>,
    /// When what the slice's controller last acted on happened, by that controller's clock.
    pub last_change: Option<Timestamp>,
}

/// One port that every endpoint of a slice serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointPort {
    /// The name of the Service's port that it stands for; may be empty.
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: u16,
    pub app_protocol: Option<Arc<str>>,
}

/// One endpoint. The API lists several addresses as interchangeable and asks consumers to use the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    pub address: IpAddr,
    pub conditions: Conditions,
    pub node_name: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
    pub hostname: Option<Arc<str>>,
    pub target: Option<TargetRef>,
    /// Zones that should use this endpoint (`hints.forZones`); empty when there is no hint.
    pub for_zones: Vec<Arc<str>>,
    /// Nodes that should use this endpoint (`hints.forNodes`); empty when there is no hint.
    pub for_nodes: Vec<Arc<str>>,
}

/// Conditions of an endpoint, with the API's defaults filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conditions {
    /// Should get traffic. Already true for endpoints of a Service with `publishNotReadyAddresses`.
    pub ready: bool,
    /// Could answer, also while terminating.
    pub serving: bool,
    pub terminating: bool,
}

/// What an endpoint is the address of, as kind and key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetRef {
    pub kind: Arc<str>,
    pub key: ObjectKey,
}

pub(crate) const LAST_CHANGE_ANNOTATION: &str = "endpoints.kubernetes.io/last-change-trigger-time";
pub(crate) const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";
/// Label of slices that proxies leave alone; their Service's controller sets it where the Service has no address of its own.
pub const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

impl TryFrom<wire::EndpointSlice<'_>> for EndpointSlice {
    type Error = Rejected;

    fn try_from(slice: wire::EndpointSlice<'_>) -> Result<Self, Rejected> {
        convert(&slice).map_err(|bad| bad.of(Kind::EndpointSlice, &slice.metadata))
    }
}

fn convert(slice: &wire::EndpointSlice<'_>) -> Result<EndpointSlice, BadField> {
    let key = reject::namespaced(&slice.metadata)?;
    let ipv4 = match slice.address_type.as_deref().unwrap_or_default() {
        "IPv4" => true,
        "IPv6" => false,
        other => {
            return Err(BadField::new(
                "addressType",
                format!("{other:?} is not IPv4 or IPv6"),
            ));
        }
    };
    let service = slice
        .metadata
        .labels
        .get(SERVICE_NAME_LABEL)
        .filter(|name| !name.is_empty())
        .map(|name| ServiceKey {
            namespace: key.namespace.clone(),
            name: name.into(),
        });
    let headless = slice.metadata.labels.get(HEADLESS_LABEL).is_some();

    // As long as needed and no longer: there are very many of these, and what grows by itself takes twice the room.
    let given = slice.ports.as_deref().unwrap_or_default();
    let mut ports = Vec::with_capacity(given.len());
    for (i, port) in given.iter().enumerate() {
        // Without a number the port means "any", which is for consumers that agree on one among themselves.
        let Some(number) = port.port else { continue };
        ports.push(EndpointPort {
            name: port.name.as_deref().unwrap_or_default().into(),
            protocol: Protocol::parse(port.protocol.as_deref(), || format!("ports[{i}].protocol"))?,
            port: reject::port(number, || format!("ports[{i}].port"))?,
            app_protocol: port.app_protocol.as_deref().map(Into::into),
        });
    }
    let given = slice.endpoints.as_deref().unwrap_or_default();
    let (mut endpoints, mut refused) = (Vec::with_capacity(given.len()), Vec::new());
    for (i, one) in given.iter().enumerate() {
        match endpoint(i, one, ipv4, &key, endpoints.last()) {
            Ok(endpoint) => endpoints.push(endpoint),
            Err(bad) => refused.push(bad.to_string()),
        }
    }
    let last_change = slice.metadata.annotations.get(LAST_CHANGE_ANNOTATION);
    Ok(EndpointSlice {
        key,
        service,
        headless,
        ports,
        endpoints,
        refused,
        last_change: last_change.and_then(|time| time.parse().ok()),
    })
}

/// A text that is most often one which is known already, and then takes no memory of its own.
fn shared(text: &str, known: Option<&Arc<str>>) -> Arc<str> {
    match known {
        Some(known) if **known == *text => known.clone(),
        _ => text.into(),
    }
}

/// `before` is the one that precedes it in the slice `slice`.
fn endpoint(
    i: usize,
    endpoint: &wire::Endpoint<'_>,
    ipv4: bool,
    slice: &SliceKey,
    before: Option<&Endpoint>,
) -> Result<Endpoint, BadField> {
    let field = || format!("endpoints[{i}].addresses");
    let Some(text) = endpoint.addresses.iter().flatten().next() else {
        return Err(BadField::new(field(), "is empty"));
    };
    let address = reject::endpoint_address(text, || format!("{}[0]", field()))?;
    if address.is_ipv4() != ipv4 {
        return Err(BadField::new(
            field(),
            format!("{address} is not of the slice's addressType"),
        ));
    }
    let conditions = endpoint.conditions.as_ref();
    let ready = conditions.and_then(|c| c.ready).unwrap_or(true);
    let hints = endpoint.hints.as_ref();
    Ok(Endpoint {
        address,
        conditions: Conditions {
            ready,
            serving: conditions.and_then(|c| c.serving).unwrap_or(true),
            terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        },
        node_name: endpoint
            .node_name
            .as_deref()
            .map(|name| shared(name, before.and_then(|before| before.node_name.as_ref()))),
        zone: endpoint
            .zone
            .as_deref()
            .map(|zone| shared(zone, before.and_then(|before| before.zone.as_ref()))),
        hostname: endpoint
            .hostname
            .as_deref()
            .filter(|name| !name.is_empty())
            .map(Into::into),
        target: endpoint.target_ref.as_ref().map(|target| TargetRef {
            kind: shared(
                target.kind.as_deref().unwrap_or_default(),
                before
                    .and_then(|before| before.target.as_ref())
                    .map(|target| &target.kind),
            ),
            key: ObjectKey::new(
                shared(
                    target.namespace.as_deref().unwrap_or_default(),
                    Some(&slice.namespace),
                ),
                target.name.as_deref().unwrap_or_default(),
            ),
        }),
        for_zones: hints
            .and_then(|hints| hints.for_zones.as_deref())
            .unwrap_or_default()
            .iter()
            .filter_map(|zone| zone.name.as_deref())
            .map(Into::into)
            .collect(),
        for_nodes: hints
            .and_then(|hints| hints.for_nodes.as_deref())
            .unwrap_or_default()
            .iter()
            .filter_map(|node| node.name.as_deref())
            .map(Into::into)
            .collect(),
    })
}
