//! The per-node daemon: plans what the data plane shall hold, wires pods, keeps routes, and answers for all of it.
//!
//! [`supervisor`] keeps a worker running. The worker is one event loop ([`worker`]) that owns all state; everything else
//! either feeds it events ([`source`], [`socket`], [`metrics`], [`inspect`], [`share`]) or does what it decided ([`net`], [`dataplane`]).

pub mod addresses;
pub mod announce;
pub mod balancer;
mod clock;
pub mod config;
pub mod dataplane;
pub mod event;
pub mod health;
pub mod inspect;
pub mod install;
mod lease;
pub mod metrics;
pub mod monitor;
pub mod names;
pub mod net;
pub mod node;
pub mod node_ports;
pub mod node_ranges;
pub mod offers;
pub mod plan;
pub mod pods;
pub mod progress;
pub mod record;
pub mod report;
pub mod routing;
pub mod sandboxes;
pub mod service_ranges;
pub mod share;
pub mod socket;
pub mod source;
pub mod supervisor;
pub mod surroundings;
pub mod uninstall;
pub mod worker;
