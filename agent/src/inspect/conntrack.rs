//! Flows, with names, and choosing among them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use cluster_model::ObjectKey;
use dataplane_abi::{FlowKey, SEEN_FIN, SEEN_RST, proto};
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use super::View;
use super::names::{Names, Owner};
use crate::dataplane::{FlowView, ServiceId};

/// Which flows are meant. Of several conditions all must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FlowFilter {
    /// `<namespace>/<name>` of the Service that the client asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// `<namespace>/<name>` of the client or the backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// An address or range that the client, the frontend or the backend has or is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpNetwork>,
    /// `TCP`, `UDP` or `SCTP`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
}

impl FlowFilter {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// One flow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowItem {
    pub protocol: String,
    pub client: SocketAddr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_name: Option<Owner>,
    /// What the client asked for.
    pub frontend: SocketAddr,
    /// `<namespace>/<name>:<port>`; absent when the Service is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    pub service_id: u32,
    pub backend: SocketAddr,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend_name: Option<Owner>,
    /// What the backend takes for the client, when it is not the client's own address and port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub translated_client: Option<SocketAddr>,
    pub state: FlowState,
    pub idle_seconds: u32,
    /// Until it is collected, if nothing comes.
    pub expires_seconds: u32,
}

/// How far a flow is, in the words that operators know from the kernel's own conntrack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum FlowState {
    /// No answer so far.
    Unreplied,
    /// A datagram flow with an answer.
    Replied,
    Established,
    /// One side has ended.
    FinWait,
    /// Both have.
    TimeWait,
    /// Reset.
    Close,
}

impl FlowState {
    pub fn name(self) -> &'static str {
        match self {
            FlowState::Unreplied => "UNREPLIED",
            FlowState::Replied => "REPLIED",
            FlowState::Established => "ESTABLISHED",
            FlowState::FinWait => "FIN_WAIT",
            FlowState::TimeWait => "TIME_WAIT",
            FlowState::Close => "CLOSE",
        }
    }

    fn of(flow: &FlowView) -> Self {
        let (both, any) = (
            flow.client_seen & flow.backend_seen,
            flow.client_seen | flow.backend_seen,
        );
        match flow.client.proto {
            proto::TCP | proto::SCTP if any & SEEN_RST != 0 => FlowState::Close,
            proto::TCP | proto::SCTP if both & SEEN_FIN != 0 => FlowState::TimeWait,
            proto::TCP | proto::SCTP if any & SEEN_FIN != 0 => FlowState::FinWait,
            _ if !flow.replied => FlowState::Unreplied,
            proto::TCP | proto::SCTP => FlowState::Established,
            _ => FlowState::Replied,
        }
    }
}

/// What is asked for cannot be found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    #[error("there is no Service {0}")]
    NoService(String),
    #[error("pod {0} is not of this node and no endpoint of a Service: filter by its address")]
    NoPod(String),
    #[error("{0:?} is not <namespace>/<name>")]
    Name(String),
    #[error("{0:?} is not TCP, UDP or SCTP")]
    Protocol(String),
}

/// A filter with its names resolved.
pub struct Chosen {
    ids: Option<BTreeSet<u32>>,
    pods: Option<Vec<IpAddr>>,
    range: Option<IpNetwork>,
    protocol: Option<u8>,
}

impl Chosen {
    pub fn new(filter: &FlowFilter, view: &View, names: &Names) -> Result<Self, FilterError> {
        let ids = filter
            .service
            .as_deref()
            .map(|name| service_ids(name, view))
            .transpose()?;
        let pods = filter
            .pod
            .as_deref()
            .map(|name| {
                let found = names.pod(&key(name)?);
                if found.is_empty() {
                    return Err(FilterError::NoPod(name.into()));
                }
                Ok(found)
            })
            .transpose()?;
        let protocol = filter.protocol.as_deref().map(number).transpose()?;
        Ok(Self {
            ids,
            pods,
            range: filter.address,
            protocol,
        })
    }

    pub fn has(&self, flow: &FlowView) -> bool {
        let ends = [flow.client.src, flow.backend.src].map(IpAddr::from);
        let all = [flow.client.src, flow.client.dst, flow.backend.src].map(IpAddr::from);
        self.ids
            .as_ref()
            .is_none_or(|ids| ids.contains(&flow.service))
            && self
                .pods
                .as_ref()
                .is_none_or(|pods| ends.iter().any(|end| pods.contains(end)))
            && self
                .range
                .is_none_or(|range| all.iter().any(|one| range.contains(*one)))
            && self.protocol.is_none_or(|proto| proto == flow.client.proto)
    }
}

fn service_ids(name: &str, view: &View) -> Result<BTreeSet<u32>, FilterError> {
    let key = key(name)?;
    let ids: BTreeSet<u32> = view
        .owners
        .iter()
        .filter(|(_, port)| port.service == key)
        .map(|(id, _)| id.0)
        .collect();
    if ids.is_empty() && view.snapshot.service(&key).is_none() {
        return Err(FilterError::NoService(name.into()));
    }
    Ok(ids)
}

/// `<namespace>/<name>`.
pub fn key(text: &str) -> Result<ObjectKey, FilterError> {
    match text.split_once('/') {
        Some((namespace, name))
            if !namespace.is_empty() && !name.is_empty() && !name.contains('/') =>
        {
            Ok(ObjectKey::new(namespace, name))
        }
        _ => Err(FilterError::Name(text.into())),
    }
}

const PROTOCOLS: [(&str, u8); 3] = [
    ("TCP", proto::TCP),
    ("UDP", proto::UDP),
    ("SCTP", proto::SCTP),
];

fn number(name: &str) -> Result<u8, FilterError> {
    PROTOCOLS
        .iter()
        .find(|(known, _)| known.eq_ignore_ascii_case(name))
        .map(|(_, number)| *number)
        .ok_or_else(|| FilterError::Protocol(name.into()))
}

/// The name of a protocol in an IP header.
pub fn protocol_name(number: u8) -> String {
    PROTOCOLS
        .iter()
        .find(|(_, known)| *known == number)
        .map_or_else(|| number.to_string(), |(name, _)| (*name).into())
}

fn source(key: &FlowKey) -> SocketAddr {
    SocketAddr::new(key.src.into(), u16::from_be(key.sport))
}

fn destination(key: &FlowKey) -> SocketAddr {
    SocketAddr::new(key.dst.into(), u16::from_be(key.dport))
}

/// A flow as it is shown.
pub fn item(flow: &FlowView, view: &View, names: &Names, now_s: u32) -> FlowItem {
    let (client, backend) = (source(&flow.client), source(&flow.backend));
    let seen_as = destination(&flow.backend);
    let idle = now_s.saturating_sub(flow.last_seen_s);
    FlowItem {
        protocol: protocol_name(flow.client.proto),
        client,
        client_name: names.get(client.ip()).cloned(),
        frontend: destination(&flow.client),
        service: view
            .owners
            .get(&ServiceId(flow.service))
            .map(|port| port.to_string()),
        service_id: flow.service,
        backend,
        backend_name: names.get(backend.ip()).cloned(),
        translated_client: (seen_as != client).then_some(seen_as),
        state: FlowState::of(flow),
        idle_seconds: idle,
        expires_seconds: flow.timeout_s().saturating_sub(idle),
    }
}
