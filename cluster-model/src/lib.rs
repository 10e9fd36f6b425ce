//! The view of a cluster that the network path needs: Services, EndpointSlices, Nodes and Pods.
//!
//! Objects of the Kubernetes API are converted once, at the edge, into the small validated types of this crate
//! ([`Service`], [`EndpointSlice`], [`Node`], [`Pod`]). A [`Snapshot`] holds them with shared structure, so that a
//! clone is cheap and a change costs the same in a small cluster and in a large one. [`Snapshot::apply`] says which
//! keys a [`Change`] made [`Dirty`]; plans are made again for those only.
//!
//! The crate is pure. The feature `watch` adds the one asynchronous module, which feeds changes from an API server.
#![forbid(unsafe_code)]

#[cfg(feature = "watch")]
mod arrived;
mod endpoints;
mod manifest;
mod node;
mod object;
mod reject;
mod service;
pub mod share;
mod snapshot;
#[cfg(feature = "watch")]
pub mod watch;
mod wire;

pub use endpoints::{Conditions, Endpoint, EndpointPort, EndpointSlice, HEADLESS_LABEL, TargetRef};
pub use manifest::{ManifestError, read_manifest};
pub use node::{Node, Pod};
pub use object::{Kind, Object, ObjectKey, ObjectRef, ServiceKey, SliceKey};
pub use reject::Rejected;
pub use service::{
    BALANCING_ANNOTATION, DSR_ANNOTATION, Protocol, Service, ServicePort, ServiceType,
    TrafficDistribution, TrafficPolicy,
};
pub use snapshot::{Change, Dirty, Snapshot};

/// The types of the Kubernetes API.
#[cfg(feature = "watch")]
pub use k8s_openapi as api;
