//! What the node's data plane shall hold, planned from the cluster: pure functions and their bookkeeping.
//!
//! [`plan`] turns one Service of a snapshot into a [`ServicePlan`]; [`check`] holds what must be true of it; a [`Ledger`] keeps
//! the plans of all Services, gives each service port an id, and diffs wishes against what the maps hold.

mod endpoints;
mod host_ports;
mod ledger;
mod lifeline;
pub mod names;
mod peers;
mod routes;
mod service;
mod unmasqueraded;
mod uplinks;

pub use host_ports::{collide, host_ports_key, plan_host_ports};
pub use ledger::{Batch, Ledger, Refusal};
pub use lifeline::{held_lifeline, is_lifeline, keep_backends, lifeline};
pub use peers::plan_peers;
pub use routes::{
    NodeRoute, PathKey, Probed, RouteChange, RoutePlan, Routing, diff_routes, plan_routes,
};
pub use service::{
    Balancing, Dsr, Here, Policy, PortKey, PortPlan, Route, ServicePlan, Violation, check, plan,
};
pub use unmasqueraded::plan_unmasqueraded;
pub use uplinks::{Surveyed, is_reachable, missing_uplinks, plan_uplinks};
