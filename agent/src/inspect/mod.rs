//! What the agent answers to operators: its Services and its flows, as they are in the maps, with names.
//!
//! A question ([`Query`]) comes by the agent's socket and is answered by a stream of lines ([`Line`]), so that a table of any size costs a
//! bounded amount of memory on both sides. [`serve`] answers on the thread of the connection; the event loop is asked only for a
//! [`View`], which shares structure with its own state, and for Services a page at a time. [`client`] and [`table`] are the
//! other side: the commands of `keelway-agent`.

pub mod client;
pub mod conntrack;
pub mod names;
pub mod serve;
pub mod service;
pub mod table;
pub mod text;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use cluster_model::{ServiceKey, Snapshot};
use keelway_cni::CniError;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::addresses::Allocation;
use crate::dataplane::ServiceId;
use crate::monitor::{Hub, MonitorFilter};
use crate::plan::PortKey;

pub use conntrack::{FlowFilter, FlowItem};
pub use names::Names;
pub use service::ServiceItem;

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "show", rename_all = "camelCase")]
pub enum Query {
    /// Every Service, of one namespace or of all; each is a [`ServiceItem`].
    Services { namespace: Option<String> },
    /// One Service.
    Service { namespace: String, name: String },
    /// Flows, each a [`FlowItem`].
    Flows { filter: FlowFilter },
    /// The same, removed as they are shown.
    FlushFlows { filter: FlowFilter },
    /// Events as they happen, each an [`crate::monitor::EventItem`]; without an end.
    Monitor { filter: MonitorFilter },
}

/// One line of an answer. The last one is `end` or `error`: without either, the answer was cut off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Line {
    Item(Value),
    /// Nothing happened for a while, and the agent is there.
    Alive,
    End,
    Error(CniError),
}

/// What the event loop knows at one moment, as far as questions go.
#[derive(Clone, Debug)]
pub struct View {
    pub node: Arc<str>,
    pub snapshot: Snapshot,
    pub allocations: Vec<Allocation>,
    /// The service port of each id that the maps may name.
    pub owners: HashMap<ServiceId, PortKey>,
    /// The names of all Services, sorted.
    pub services: Vec<ServiceKey>,
    pub pin_root: PathBuf,
    pub monitor: Hub,
}
